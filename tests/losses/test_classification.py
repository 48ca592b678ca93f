import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxtransfer import losses

LABELS = (3 * np.arange(8) + 1) % 10


def _twin(logits, labels, smoothing):
    result = []
    for row, label in zip(logits, labels, strict=True):
        log_probabilities = row - row.max() - np.log(np.exp(row - row.max()).sum())
        target = np.full(len(row), smoothing / len(row))
        target[label] += 1.0 - smoothing
        result.append(-(target * log_probabilities).sum())
    return np.array(result)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy_equals_its_definition(float64, student_logits, smoothing):
    result = losses.cross_entropy(
        jnp.asarray(student_logits), jnp.asarray(LABELS), label_smoothing=smoothing
    )
    expected = _twin(student_logits, LABELS, smoothing)
    np.testing.assert_allclose(result, expected, rtol=1e-13)


def test_cross_entropy_gradient_is_probabilities_minus_targets(float64, student_logits):
    logits = jnp.asarray(student_logits)
    labels = jnp.asarray(LABELS)
    gradient = jax.grad(lambda z: losses.cross_entropy(z, labels).sum())(logits)
    expected = np.array(jax.nn.softmax(logits))
    expected[np.arange(8), LABELS] -= 1.0
    np.testing.assert_allclose(gradient, expected, atol=1e-13)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_derivatives_up_to_second_order(float64, smoothing):
    logits, labels = jax.random.normal(jax.random.key(0), (3, 4)), jnp.array([0, 3, 1])

    @jax.jit
    def total(z):
        z = jnp.asarray(z)
        return losses.cross_entropy(z, labels, label_smoothing=smoothing).sum()

    check_grads(total, (logits,), order=2)


def test_cross_entropy_agrees_under_transformations(transform, student_logits):
    logits = jnp.asarray(student_logits, jnp.float32)
    labels = jnp.asarray(LABELS)
    where = jnp.arange(8) < 5

    def both(z, y, w):
        def total(z):
            value = losses.cross_entropy(z, y, label_smoothing=0.1, where=w)
            return losses.mean(value, where=w), value

        return jax.grad(total, has_aux=True)(z)

    for got, expected in zip(
        transform(both)(logits, labels, where), both(logits, labels, where), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)


def test_cross_entropy_ignores_a_shift_of_the_logits_and_their_order(student_logits):
    logits = jnp.asarray(student_logits, jnp.float32)
    labels = jnp.asarray(LABELS)
    expected = losses.cross_entropy(logits, labels)
    shifted = losses.cross_entropy(logits + 50.0, labels)
    np.testing.assert_allclose(shifted, expected, rtol=1e-4)
    order = np.random.default_rng(0).permutation(10)
    permuted = losses.cross_entropy(logits[:, order], jnp.argsort(order)[labels])
    np.testing.assert_allclose(permuted, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_cross_entropy_is_finite_at_extreme_logits(dtype):
    logits = jnp.array([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], dtype)
    labels = jnp.array([0, 0])
    result = losses.cross_entropy(logits, labels)
    gradient = jax.grad(lambda z: losses.cross_entropy(z, labels).sum())(logits)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, [0.0, 2e4], rtol=1e-2)
    assert jnp.isfinite(gradient.astype(jnp.float32)).all()


def test_masked_examples_may_hold_anything():
    logits = jnp.array([[1.0, 2.0], [jnp.nan, jnp.inf]])
    labels = jnp.array([1, -1])
    where = jnp.array([True, False])

    def total(z):
        return losses.cross_entropy(z, labels, label_smoothing=0.1, where=where).sum()

    value, gradient = jax.jit(jax.value_and_grad(total))(logits)
    expected = losses.cross_entropy(logits[:1], labels[:1], label_smoothing=0.1)
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    np.testing.assert_array_equal(gradient[1], 0.0)
    assert jnp.isfinite(gradient).all()
    scores = losses.accuracy(logits, labels, where=where)
    np.testing.assert_array_equal(scores, [1.0, 0.0])


@pytest.mark.parametrize("bad", [-1, 2, 255])
def test_label_out_of_range_is_an_error_when_seen_and_nan_when_traced(bad):
    logits, labels = jnp.zeros((2, 2)), jnp.array([0, bad])
    for loss in (losses.cross_entropy, losses.accuracy):
        with pytest.raises(ValueError, match=rf"labels must be in \[0, 2\).*\[{bad}\]"):
            loss(logits, labels)

    @jax.jit
    def both(z, y):
        return jax.value_and_grad(lambda z: losses.cross_entropy(z, y).mean())(z)

    value, gradient = both(logits, labels)
    assert jnp.isnan(value)
    assert jnp.isnan(gradient[1]).all() and jnp.isfinite(gradient[0]).all()


def test_cross_entropy_says_what_is_wrong():
    cross_entropy = inspect.unwrap(losses.cross_entropy)
    with pytest.raises(ValueError, match=r"got logits \(2, 3\) and labels \(3,\)"):
        cross_entropy(jnp.zeros((2, 3)), jnp.zeros(3, int))
    with pytest.raises(ValueError, match="labels must be integers, got float32"):
        cross_entropy(jnp.zeros((2, 3)), jnp.zeros(2))
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\], got 2"):
        cross_entropy(jnp.zeros((2, 3)), jnp.zeros(2, int), label_smoothing=2.0)


def test_mean_squared_error(transform):
    predictions, targets = jnp.array([[1.0, 3.0], [0.0, jnp.nan]]), jnp.zeros((2, 2))
    where = jnp.array([True, False])

    def both(p, t, w):
        def total(p):
            value = losses.mean_squared_error(p, t, where=w)
            return value.sum(), value

        return jax.grad(total, has_aux=True)(p)

    gradient, value = transform(both)(predictions, targets, where)
    np.testing.assert_allclose(value, [5.0, 0.0])
    np.testing.assert_allclose(gradient, [[1.0, 3.0], [0.0, 0.0]])


def test_mean_squared_error_axes_and_shapes():
    predictions = jnp.arange(24.0).reshape(2, 3, 4)
    targets = jnp.ones_like(predictions)
    squares = np.asarray(predictions - 1.0) ** 2
    for axis in (-1, (1, 2), ()):
        result = losses.mean_squared_error(predictions, targets, axis=axis)
        np.testing.assert_allclose(result, squares.mean(axis=axis), rtol=1e-6)
    masked = losses.mean_squared_error(
        predictions, targets, axis=(1, 2), where=jnp.array([False, True])
    )
    np.testing.assert_allclose(masked, [0.0, squares[1].mean()], rtol=1e-6)
    with pytest.raises(ValueError, match=r"same shape, got \(3, 1\) and \(3,\)"):
        inspect.unwrap(losses.mean_squared_error)(jnp.ones((3, 1)), jnp.ones(3))


def test_accuracy(transform):
    logits = jnp.array([[0.0, 1.0], [2.0, 1.0], [1.0, 1.0]])
    result = transform(losses.accuracy)(logits, jnp.array([1, 1, 0]))
    np.testing.assert_array_equal(result, [1.0, 0.0, 1.0])
    assert result.dtype == jnp.float32
