"""The logarithm of one softmax, expected under another, and its derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxtransfer.losses import softened
from tests.losses.case import det

TAUGHT, LOGITS = det((3, 5), 1), det((3, 5), 2)
WHERE = np.arange(15).reshape(3, 5) % 4 > 0
FUNCTIONS = {
    "divergence": softened.softmax_divergence,
    "divergence over the first axis": lambda t, z: softened.softmax_divergence(t, z, 0),
    "cross-entropy": softened.soft_cross_entropy,
    "cross-entropy of some classes": lambda t, z: softened.soft_cross_entropy(
        t, z, where=WHERE
    ),
}
each = pytest.mark.parametrize("name", FUNCTIONS)


def plain(name, taught, logits):
    """Without the shared sums."""
    axis = 0 if "first" in name else 1
    p, q = (np.exp(z) / np.exp(z).sum(axis, keepdims=True) for z in (taught, logits))
    terms = p * (np.log(p / q) if "divergence" in name else -np.log(q))
    return np.where(WHERE if "some" in name else True, terms, 0).sum(axis)


@each
def test_value(float64, name):
    found = FUNCTIONS[name](jnp.asarray(TAUGHT), jnp.asarray(LOGITS))
    np.testing.assert_allclose(found, plain(name, TAUGHT, LOGITS), rtol=1e-12)


@each
def test_derivatives_by_both_forwards_backwards_and_again(float64, name):
    both = jnp.asarray(TAUGHT), jnp.asarray(LOGITS)
    check_grads(FUNCTIONS[name], both, order=2, atol=1e-6, rtol=1e-6)


def test_classes_that_both_lack_are_no_classes(float64):
    lacking = [np.insert(z, 2, -np.inf, axis=1) for z in (TAUGHT, LOGITS)]
    run = jax.value_and_grad(lambda *z: softened.softmax_divergence(*z).sum(), (0, 1))
    value, slopes = run(*map(jnp.asarray, lacking))
    expected, kept = run(jnp.asarray(TAUGHT), jnp.asarray(LOGITS))
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    for slope, without in zip(slopes, kept, strict=True):
        np.testing.assert_array_equal(slope[:, 2], 0.0)
        np.testing.assert_allclose(np.delete(slope, 2, axis=1), without, atol=1e-12)


def test_a_class_that_only_the_teacher_has_is_infinitely_far():
    taught, logits = jnp.zeros(2), jnp.array([0.0, -jnp.inf])
    assert softened.softmax_divergence(taught, logits) == jnp.inf
    assert softened.softmax_divergence(logits, taught) == pytest.approx(np.log(2))
