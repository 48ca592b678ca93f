import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer.ops.order import argsort, kth_smallest


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 64), (2, 3, 33), (0, 4)])
def test_order_is_that_of_numpy(shape, dtype):
    with jax.enable_x64(True):
        # Many ties.
        values = np.random.default_rng(0).integers(-5, 6, shape).astype(dtype) / 4
        values += np.zeros((), dtype)  # no negative zero, which NumPy takes for 0
        places = argsort(jnp.asarray(values))
        np.testing.assert_array_equal(places, np.argsort(values, -1, kind="stable"))
        for k in range(shape[-1]):
            found = jax.jit(kth_smallest)(jnp.asarray(values), k)
            assert found.dtype == dtype
            np.testing.assert_array_equal(found, np.sort(values, -1)[..., k])


def test_extreme_numbers_are_in_order():
    tiny, huge = np.finfo(np.float32).tiny, np.finfo(np.float32).max
    expected = np.array([-np.inf, -huge, -tiny, 0.0, tiny, huge, np.inf], np.float32)
    shuffled = jnp.asarray(expected[[3, 6, 0, 5, 1, 4, 2]])
    for k, number in enumerate(expected):
        assert kth_smallest(shuffled, k) == number
    np.testing.assert_array_equal(shuffled[argsort(shuffled)], expected)


def test_smallest_integers():
    values = jnp.array([5, -7, 0, 2**31 - 1, -(2**31), 5], jnp.int32)
    found = [int(kth_smallest(values, k)) for k in range(6)]
    assert found == sorted(values.tolist())


def test_long_rows_are_sorted_too():
    values = jax.random.normal(jax.random.key(0), (50_000,))
    np.testing.assert_array_equal(
        argsort(values), np.argsort(np.asarray(values), kind="stable")
    )


def test_gradient_reaches_what_is_taken_and_not_what_is_sorted():
    values = jnp.array([2.0, 1.0, 2.0])

    def taken(values):
        ordered = jnp.take_along_axis(values, argsort(values), -1)
        return ordered @ jnp.array([1.0, 10.0, 100.0])

    assert jax.grad(taken)(values).tolist() == [10.0, 1.0, 100.0]
    assert jax.grad(kth_smallest)(values, 1).tolist() == [0.0] * 3


def test_order_is_found_under_jit_vmap_and_shard_map():
    values = jax.random.normal(jax.random.key(1), (4, 16))
    expected = np.argsort(values, -1, kind="stable")
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    mapped = jax.shard_map(argsort, mesh=mesh, in_specs=spec, out_specs=spec)
    for run in (jax.jit(argsort), jax.vmap(argsort), mapped):
        np.testing.assert_array_equal(run(values), expected)
