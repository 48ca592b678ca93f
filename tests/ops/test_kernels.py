import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxtransfer import ops


def _rows(count, seed):
    return np.random.default_rng(seed).normal(size=(count, 3))


def _twin(x, y):
    return np.array([[((a - b) ** 2).sum() for b in y] for a in x])


def test_squared_distances_equal_their_definition():
    x, y = _rows(5, 0), _rows(4, 1)
    with jax.enable_x64(True):
        np.testing.assert_allclose(
            ops.squared_distances(jnp.asarray(x), jnp.asarray(y)), _twin(x, y), 1e-12
        )
        np.testing.assert_allclose(
            ops.self_squared_distances(jnp.asarray(x)), _twin(x, x), 1e-12
        )
        check_grads(
            jax.jit(ops.squared_distances),
            (jnp.asarray(x), jnp.asarray(y)),
            order=2,
        )


def test_diagonal_is_zero_and_has_no_gradient():
    x = jnp.asarray(_rows(5, 0) * 1e3 + 1e4, jnp.float32)
    distances = ops.self_squared_distances(x)
    np.testing.assert_array_equal(jnp.diagonal(distances), 0.0)
    gradient = jax.grad(lambda x: jnp.trace(ops.self_squared_distances(x)))(x)
    np.testing.assert_array_equal(gradient, 0.0)


def test_equal_rows_are_never_negative_and_have_finite_gradient():
    x = jnp.full((6, 3), 0.1)
    value, gradient = jax.value_and_grad(lambda x: ops.squared_distances(x, x).sum())(x)
    assert value >= 0 and (ops.squared_distances(x, x) >= 0).all()
    assert jnp.isfinite(gradient).all()


def test_float32_survives_a_common_offset():
    x, y = _rows(5, 0), _rows(4, 1)
    offset = ops.squared_distances(
        jnp.asarray(x + 100, jnp.float32), jnp.asarray(y + 100, jnp.float32)
    )
    np.testing.assert_allclose(offset, _twin(x, y), rtol=1e-3)


def test_half_precision_is_accumulated_in_float32():
    x = jnp.asarray(_rows(5, 0), jnp.bfloat16)
    distances = ops.self_squared_distances(x)
    assert distances.dtype == jnp.float32
    wide = np.asarray(x.astype(jnp.float32))
    np.testing.assert_allclose(distances, _twin(wide, wide), rtol=1e-5, atol=1e-6)


def test_mean_squared_distance_needs_no_pairs():
    x = _rows(7, 2)
    expected = _twin(x, x).sum() / (49 - 7)
    result = ops.mean_squared_distance(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(result, expected, rtol=1e-5)
    padded = jnp.asarray(np.concatenate([x, np.full((2, 3), np.nan)]), jnp.float32)
    masked = jax.jit(ops.mean_squared_distance)(padded, where=jnp.arange(9) < 7)
    np.testing.assert_allclose(masked, expected, rtol=1e-5)
    jaxpr = str(jax.make_jaxpr(ops.mean_squared_distance)(jnp.ones((50, 3))))
    assert "[50,50]" not in jaxpr


def test_mean_squared_distance_of_several_sets_is_that_of_all_rows():
    x, y = (jnp.asarray(_rows(n, n), jnp.float32) for n in (4, 7))
    where = jnp.arange(11) % 3 > 0
    for options in ({}, {"where": where}, {"where": where * 0.5}):
        got = ops.mean_squared_distance(x, y, **options)
        whole = ops.mean_squared_distance(jnp.concatenate([x, y]), **options)
        np.testing.assert_allclose(got, whole, rtol=1e-6)


@pytest.mark.parametrize("count", [0, 1])
def test_mean_squared_distance_of_too_few_rows_is_zero(count):
    where = jnp.arange(4) < count
    value, gradient = jax.value_and_grad(
        lambda x: ops.mean_squared_distance(x, where=where)
    )(jnp.asarray(_rows(4, 0), jnp.float32))
    assert value == 0.0
    np.testing.assert_array_equal(gradient, 0.0)


def test_says_what_is_wrong():
    distances = inspect.unwrap(ops.squared_distances)
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 4\)"):
        distances(jnp.ones((2, 3)), jnp.ones((2, 4)))
    for fn in (ops.self_squared_distances, ops.mean_squared_distance):
        with pytest.raises(ValueError, match=r"x must be .* got shape \(2, 3, 4\)"):
            inspect.unwrap(fn)(jnp.ones((2, 3, 4)))
    mean = inspect.unwrap(ops.mean_squared_distance)
    with pytest.raises(ValueError, match=r"features, got shapes \[\(2, 3\), \(2, 4\)"):
        mean(jnp.ones((2, 3)), jnp.ones((2, 4)))
    with pytest.raises(ValueError, match=r"one a row, 5, got shape \(2,\)"):
        mean(jnp.ones((2, 3)), jnp.ones((3, 3)), where=jnp.ones(2))
