import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import losses

PARAMS = {
    "body": {"kernel": np.arange(6.0).reshape(2, 3), "bias": np.array([1.0, -2.0])},
    "head": {"kernel": np.ones((3, 2))},
}
ANCHOR = {"body": {"kernel": np.ones((2, 3)), "bias": np.zeros(2)}}


def _arrays(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def test_l2_value_and_gradient(transform):
    value, gradient = transform(jax.value_and_grad(losses.l2))(_arrays(PARAMS))
    np.testing.assert_allclose(value, (55 + 5 + 6) / 2)
    jax.tree.map(np.testing.assert_allclose, gradient, PARAMS)


def test_l2_sp_value_and_gradient(transform):
    value, (gradient, to_anchor) = transform(
        jax.value_and_grad(losses.l2_sp, argnums=(0, 1))
    )(_arrays(PARAMS), _arrays(ANCHOR))
    np.testing.assert_allclose(value, (1 + 0 + 1 + 4 + 9 + 16 + 5) / 2)
    expected = {
        "body": jax.tree.map(np.subtract, PARAMS["body"], ANCHOR["body"]),
        "head": {"kernel": np.zeros((3, 2))},
    }
    jax.tree.map(np.testing.assert_allclose, gradient, expected)
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0.0), to_anchor)


def test_zero_and_without_gradient_at_the_anchor():
    anchor = _arrays(ANCHOR)
    value, gradient = jax.value_and_grad(losses.l2_sp)(anchor, anchor)
    assert value == 0.0
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0.0), gradient)


def test_half_precision_is_summed_in_float32():
    params = {"w": jnp.full(4096, 1.0, jnp.bfloat16)}
    result = losses.l2_sp(params, {"w": jnp.zeros(4096, jnp.bfloat16)})
    assert result.dtype == losses.l2(params).dtype == jnp.float32
    assert result == losses.l2(params) == 2048.0


def test_l2_of_nothing_is_zero():
    assert losses.l2({}) == 0.0


def test_says_what_is_wrong():
    params = _arrays(PARAMS)
    with pytest.raises(ValueError, match="anchor has no arrays"):
        losses.l2_sp(params, {})
    with pytest.raises(ValueError, match="anchor has 'boby/bias', which params lack"):
        losses.l2_sp(params, {"boby": {"bias": jnp.zeros(2)}})
    with pytest.raises(ValueError, match=r"'head/kernel': \(3, 5\) and \(3, 2\)"):
        losses.l2_sp(params, {"head": {"kernel": jnp.zeros((3, 5))}})
