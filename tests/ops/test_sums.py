import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import ops
from jaxtransfer.ops.order import argmax


@pytest.mark.parametrize("shape", [(1, 3), (5,), (4, 2, 3)])
def test_sum_first_is_the_sum(shape):
    values = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    np.testing.assert_allclose(ops.sum_first(values), values.sum(0), rtol=1e-6)
    gradient = jax.grad(lambda v: jnp.sum(ops.sum_first(v) ** 2))(values)
    expected = jnp.broadcast_to(2 * values.sum(0), shape)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_argmax_is_that_of_jax(dtype):
    random = np.random.default_rng(0)
    values = jnp.asarray(random.integers(-3, 4, (50, 6)), dtype)
    np.testing.assert_array_equal(argmax(values), jnp.argmax(values, axis=-1))


def test_argmax_of_infinities_and_not_a_number():
    nan, inf = jnp.nan, jnp.inf
    values = jnp.array([[-inf, -inf], [1.0, inf], [inf, nan], [nan, inf], [nan, nan]])
    np.testing.assert_array_equal(argmax(values), jnp.argmax(values, axis=-1))
