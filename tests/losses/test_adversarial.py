import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxtransfer import losses, ops

SOURCE = np.array([0.3, -1.2, 2.0])
TARGET = np.array([-0.7, 0.4])


def _twin(source, target):
    def sigmoid(z):
        return 1 / (1 + np.exp(-z))

    return -0.5 * (np.log(sigmoid(source)).mean() + np.log(1 - sigmoid(target)).mean())


def test_equals_its_definition_and_gradient(float64):
    source, target = jnp.asarray(SOURCE), jnp.asarray(TARGET)
    result = losses.domain_adversarial(source, target)
    np.testing.assert_allclose(result, _twin(SOURCE, TARGET), rtol=1e-13)
    with_axis = losses.domain_adversarial(source[:, None], target[:, None])
    np.testing.assert_allclose(with_axis, result, rtol=1e-15)

    @jax.jit
    def loss(s, t):
        return losses.domain_adversarial(jnp.asarray(s), jnp.asarray(t))

    check_grads(loss, (source, target), order=2)


def test_swapping_the_domains_flips_the_logits():
    source, target = jnp.asarray(SOURCE), jnp.asarray(TARGET)
    swapped = losses.domain_adversarial(-target, -source)
    expected = losses.domain_adversarial(source, target)
    np.testing.assert_allclose(swapped, expected, rtol=1e-6)


def test_masks_and_transformations(transform):
    source, target = jnp.asarray(SOURCE), jnp.asarray(TARGET).at[1].set(jnp.nan)
    where = jnp.array([True, False])

    def both(s, t, w):
        return jax.value_and_grad(
            lambda s, t: losses.domain_adversarial(s, t, target_where=w),
            argnums=(0, 1),
        )(s, t)

    value, gradients = transform(both)(source, target, where)
    np.testing.assert_allclose(value, _twin(SOURCE, TARGET[:1]), rtol=1e-5)
    assert all(jnp.isfinite(g).all() for g in gradients)
    assert gradients[1][1] == 0.0
    nobody = jnp.zeros(2, bool)
    value, gradients = transform(both)(source, target, nobody)
    np.testing.assert_allclose(value, _twin(SOURCE, np.full(1, -99.0)), rtol=1e-5)
    np.testing.assert_array_equal(gradients[1], 0.0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_finite_at_extreme_logits(dtype):
    logits = jnp.array([1e4, -1e4], dtype)
    value, gradient = jax.value_and_grad(losses.domain_adversarial)(logits, logits)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, 5e3, rtol=1e-2)
    assert jnp.isfinite(gradient.astype(jnp.float32)).all()


def test_reversed_features_climb_what_the_critic_descends():
    features = jnp.array([[0.5, 1.0], [-1.0, 2.0]])
    weights = jnp.array([1.0, -2.0])

    def loss(f, w, strength):
        logits = ops.gradient_reversal(f, strength) @ w
        return losses.domain_adversarial(logits, -logits)

    gradients = jax.grad(loss, argnums=(0, 1))
    reversed_features, critic = gradients(features, weights, 0.25)
    plain_features, plain_critic = gradients(features, weights, -1.0)
    np.testing.assert_allclose(reversed_features, -0.25 * plain_features, rtol=1e-6)
    np.testing.assert_allclose(critic, plain_critic, rtol=1e-6)


def test_domain_accuracy(transform):
    source, target = jnp.asarray(SOURCE), jnp.asarray(TARGET)
    result = transform(losses.domain_accuracy)(source, target)
    np.testing.assert_allclose(result, (2 / 3 + 1 / 2) / 2, rtol=1e-6)
    constant = losses.domain_accuracy(jnp.zeros(5), jnp.zeros(3))
    assert constant == 0.5
    masked = losses.domain_accuracy(source, target, source_where=source > 0)
    np.testing.assert_allclose(masked, 0.75)


def test_says_what_is_wrong():
    for loss in (losses.domain_adversarial, losses.domain_accuracy):
        with pytest.raises(ValueError, match=r"source_logits must be .* \(3, 2\)"):
            inspect.unwrap(loss)(jnp.ones((3, 2)), jnp.ones(3))
