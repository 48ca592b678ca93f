import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from jaxtransfer import ops
from tests.losses.case import det

BANDWIDTHS, KERNEL_WEIGHTS = (1.0, 2.5, 7.0), (0.5, 1.0, 2.0)
COMBINATION = (0.3, -0.7, 1.1)
kernel_sum = functools.partial(
    ops.gaussian_kernel_sum,
    bandwidths=BANDWIDTHS,
    kernel_weights=jnp.array(KERNEL_WEIGHTS),
)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def _sets(n, m, features=3):
    x, y = det((n, features), 61), det((m, features), 62) + 0.5
    return x, y, 0.5 + det((n,), 63) / 2, 0.5 + det((m,), 64) / 2


def _twin(x, y, u, v):
    """The three sums from all distances, as a NumPy or JAX array."""

    def kernel(a, b):
        distances = ((a[:, None] - b) ** 2).sum(-1)
        pairs = zip(KERNEL_WEIGHTS, BANDWIDTHS, strict=True)
        return sum(w * jnp.exp(-distances / b) for w, b in pairs)

    def distinct(a):
        return jnp.where(jnp.eye(len(a), dtype=bool), 0.0, kernel(a, a))

    return u @ distinct(x) @ u, v @ distinct(y) @ v, u @ kernel(x, y) @ v


def _combined_twin(*arrays):
    return jnp.array(COMBINATION) @ jnp.stack(_twin(*arrays))


def _tiled(tile, coefficients=COMBINATION, **options):
    return lambda x, y, u, v: kernel_sum(
        x, y, coefficients=coefficients, x_weights=u, y_weights=v, tile=tile, **options
    )


def _each(tile, *arrays, **options):
    """The three sums alone."""
    return [_tiled(tile, tuple(row), **options)(*arrays) for row in np.eye(3).tolist()]


@pytest.mark.parametrize(
    ("n", "m", "tile"),
    [(7, 5, 3), (10, 4, 4), (3, 9, 4), (6, 6, 6), (3, 9, 512), (1, 1, 2)],
)
def test_value_and_gradient_are_those_of_all_pairs(float64, n, m, tile):
    arrays = [jnp.asarray(array) for array in _sets(n, m)]
    got = jax.jit(jax.value_and_grad(_tiled(tile), (0, 1)))(*arrays)
    expected = jax.value_and_grad(_combined_twin, (0, 1))(*arrays)
    jax.tree.map(
        lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-12, atol=1e-13),
        got,
        expected,
    )


def test_value_alone_is_the_same(float64):
    arrays = [jnp.asarray(array) for array in _sets(7, 5)]
    for got, expected in zip(_each(2, *arrays), _twin(*arrays), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-13)


def test_derivatives_of_both_orders_and_modes(float64):
    x, y, u, v = (jnp.asarray(array) for array in _sets(4, 3, 2))
    for tile in 2, 4:
        value = jax.jit(lambda x, y, tile=tile: _tiled(tile)(x, y, u, v))
        check_grads(value, (x, y), order=2, modes=["fwd", "rev"])


def test_offset_counts_once_a_pair(float64):
    x, y, u, v = (jnp.asarray(array) for array in _sets(7, 5))
    plain, less = _each(3, x, y, u, v), _each(3, x, y, u, v, offset=0.25)
    pairs = (u.sum() ** 2 - u @ u, v.sum() ** 2 - v @ v, u.sum() * v.sum())
    for one, other, count in zip(plain, less, pairs, strict=True):
        np.testing.assert_allclose(one - other, 0.25 * count, rtol=1e-12)


def test_weights_and_bandwidths_get_no_gradient():
    x, y, u, v = (jnp.asarray(array, jnp.float32) for array in _sets(4, 3))

    def value(u, v, bandwidths, kernel_weights):
        return ops.gaussian_kernel_sum(
            x,
            y,
            x_weights=u,
            y_weights=v,
            bandwidths=bandwidths,
            kernel_weights=kernel_weights,
        )

    given = (u, v, jnp.array(BANDWIDTHS), jnp.array(KERNEL_WEIGHTS))
    for gradient in jax.grad(value, (0, 1, 2, 3))(*given):
        np.testing.assert_array_equal(gradient, 0.0)


def test_many_tiles_lose_nothing_in_float32():
    """400 tiles of float32 against all pairs in float64."""
    x, y, _, _ = _sets(300, 500, 4)
    ones = np.ones(300), np.ones(500)
    with jax.enable_x64(True):
        exact = _twin(*(jnp.asarray(array) for array in (x, y, *ones)))
    arrays = (jnp.asarray(array, jnp.float32) for array in (x, y, *ones))
    got = _each(29, *arrays)
    for value, expected in zip(got, exact, strict=True):
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, expected, rtol=2e-7)


def test_memory_does_not_grow_with_the_pairs():
    def temporary(n):
        x = jax.ShapeDtypeStruct((n, 8), jnp.float32)
        run = jax.jit(jax.grad(lambda x, y: kernel_sum(x, y, tile=64), (0, 1)))
        return run.lower(x, x).compile().memory_analysis().temp_size_in_bytes

    small, large = temporary(4096), temporary(32768)
    rows = 2 * (32768 - 4096)
    # A weight a row, and the slopes: its features and their sum. No copy of the rows.
    assert large - small < 1.1 * rows * (1 + 8 + 1) * 4


def _sharded(transformation):
    x, y, u, v = (jnp.asarray(a, jnp.float32) for a in _sets(64, 48, 5))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = PartitionSpec("data")

    def run(axis_name):
        def value(x, y, u, v):
            return _tiled(8, offset=1.0, axis_name=axis_name)(x, y, u, v)

        return jax.value_and_grad(value, (0, 1))

    expected = run(None)(x, y, u, v)
    if transformation == "jit":
        arrays = (jax.device_put(a, NamedSharding(mesh, split)) for a in (x, y, u, v))
        return jax.jit(run(None))(*arrays), expected
    if transformation == "shard_map":
        fn = jax.shard_map(
            run("data"),
            mesh=mesh,
            in_specs=(split,) * 4,
            out_specs=(PartitionSpec(), (split, split)),
        )
        return jax.jit(fn)(x, y, u, v), expected
    divided = [a.reshape(8, -1, *a.shape[1:]) for a in (x, y, u, v)]
    value, gradients = jax.pmap(run("data"), axis_name="data")(*divided)
    assert jnp.ptp(value) == 0.0
    # As of any sum over the devices: the gradient of what all of them return.
    whole = [g.reshape(-1, 5) / 8 for g in gradients]
    return (value[0], tuple(whole)), expected


def _largest_square(n, m, wrapped=lambda run: run, **options):
    """Side of it in the gradient, and whether that has a loop."""
    sets = [jax.ShapeDtypeStruct((rows, 8), jnp.float32) for rows in (n, m)]
    run = jax.grad(functools.partial(kernel_sum, **options), (0, 1))
    traced = str(jax.make_jaxpr(wrapped(run))(*sets))
    shapes = re.findall(r"f32\[(\d+),(\d+)\]", traced)
    return max(int(a) for a, b in shapes if a == b), "scan" in traced


def test_tiles_are_even_unless_their_size_is_given(float64):
    arrays = [jnp.asarray(array) for array in _sets(600, 90)]
    np.testing.assert_allclose(
        _tiled(None)(*arrays), _combined_twin(*arrays), rtol=1e-12
    )
    assert _largest_square(512, 300) == (512, False)
    assert _largest_square(600, 90) == (304, True)
    assert _largest_square(300, 1025) == (352, True)


def test_tiles_are_larger_where_small_steps_take_as_long(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert _largest_square(2048, 1000) == (2048, False)
    assert _largest_square(8192, 5000) == (4096, True)
    assert _largest_square(4500, 4097) == (2256, True)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("data")
    shared = functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(rows, rows), out_specs=(rows, rows)
    )
    # 16 tiles a side in all, so that each of 8 devices has several.
    assert _largest_square(4800, 4800, shared, axis_name="data") == (608, True)


@pytest.mark.parametrize("transformation", ["jit", "shard_map", "pmap"])
def test_divided_over_devices_is_one_device(transformation):
    got, expected = _sharded(transformation)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        atol = 1e-6 * float(jnp.abs(other).max())
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=atol)


def test_says_what_is_wrong(types_unchecked):
    with pytest.raises(ValueError, match=r"equal width, got shapes \(2, 3\) and \(2,"):
        ops.gaussian_kernel_sum(jnp.zeros((2, 3)), jnp.zeros((2, 4)))
    with pytest.raises(ValueError, match="tile must be positive, got 0"):
        ops.gaussian_kernel_sum(jnp.zeros((2, 3)), jnp.zeros((2, 3)), tile=0)
