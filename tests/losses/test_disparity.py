import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from jaxtransfer.losses import disparity, reduction

mdd = disparity.margin_disparity_discrepancy


@pytest.fixture(scope="module")
def logits():
    i, c = np.meshgrid(np.arange(1, 7), np.arange(1, 4), indexing="ij")
    source = 2 * np.sin(1.1 * i + 0.6 * c + 0.31 * i * c)
    target = 2 * np.cos(0.8 * i - 0.7 * c + 0.19 * i * c)
    assert abs(source.sum() + 0.2812481432002274) < 1e-12
    return source, target


@pytest.fixture(params=[(jnp.float64, 1e-9), (jnp.float32, 1e-5)])
def precision(request, float64):
    return request.param


def test_classifier_discrepancy_golden(precision, logits):
    dtype, tolerance = precision
    arrays = [jnp.asarray(z, dtype) for z in logits]
    value = reduction.mean(disparity.classifier_discrepancy(*arrays))
    np.testing.assert_allclose(value, 0.30029094524271643, rtol=tolerance)


def test_class_balance_golden(precision, logits):
    dtype, tolerance = precision
    value = disparity.class_balance(jnp.asarray(logits[1], dtype))
    np.testing.assert_allclose(value, 1.118500425501225, rtol=tolerance)


def test_margin_disparity_discrepancy_golden(precision, logits):
    dtype, tolerance = precision
    source, target = (jnp.asarray(z, dtype) for z in logits)
    shift = jnp.arange(1, 4, dtype=dtype)
    arrays = (source, 0.5 * source + 0.1 * shift, target, 0.7 * target - 0.2 * shift)
    value = mdd(*arrays, form="code")
    np.testing.assert_allclose(value, -2.623431823940375, rtol=tolerance)
    # Without the constant of the code, in its logarithm, the value is another.
    exact = mdd(*arrays)
    np.testing.assert_allclose(exact, value, rtol=2e-6)
    assert dtype == jnp.float32 or abs(exact - value) > 1e-8


@pytest.mark.parametrize("form", ["paper", "code"])
def test_margin_disparity_discrepancy_equals_its_definition(float64, logits, form):
    (source, target), margin = logits, 2.5
    target = target[:4]
    of_source, of_target = target[::-1].repeat(2, axis=0)[:6], source[:4] - 1
    log_p = log_softmax(of_source, axis=1)[range(6), source.argmax(axis=1)]
    p = softmax(of_target, axis=1)[range(4), target.argmax(axis=1)]
    apart = 1 - p if form == "paper" else np.minimum(1 - p + 1e-6, 1)
    value = mdd(source, of_source, target, of_target, margin=margin, form=form)
    expected = np.log(apart).mean() + margin * log_p.mean()
    np.testing.assert_allclose(value, expected, rtol=1e-12)


def test_margin_disparity_discrepancy_stays_exact_where_one_minus_p_rounds():
    sure = jnp.array([[40.0, 0.0, 0.0]])
    nobody = jnp.zeros(1, bool)
    value, gradient = jax.value_and_grad(
        lambda a: mdd(sure, sure, sure, a, source_where=nobody)
    )(sure)
    np.testing.assert_allclose(value, np.log(2) - 40.0, rtol=1e-6)
    np.testing.assert_allclose(gradient, [[-1.0, 0.5, 0.5]], rtol=1e-6)
    of_code = mdd(sure, sure, sure, sure, source_where=nobody, form="code")
    np.testing.assert_allclose(of_code, np.log(1e-6), rtol=1e-6)


def test_classifier_discrepancy_is_a_distance(logits):
    first, second = (jnp.asarray(z, jnp.float32) for z in logits)
    value = disparity.classifier_discrepancy(first, second)
    swapped = disparity.classifier_discrepancy(second, first)
    np.testing.assert_array_equal(swapped, value)
    shifted = disparity.classifier_discrepancy(first + 5.0, second)
    np.testing.assert_allclose(shifted, value, rtol=1e-4)
    value, gradient = jax.value_and_grad(
        lambda z: jnp.sum(disparity.classifier_discrepancy(z, z))
    )(first)
    assert value == 0.0
    np.testing.assert_array_equal(gradient, 0.0)


def test_class_balance_is_least_for_even_predictions():
    even = jnp.array([[9.0, 0.0], [0.0, 9.0]])
    value, gradient = jax.value_and_grad(disparity.class_balance)(even, epsilon=0.0)
    np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-7)
    one_class = jnp.array([[50.0, 0.0]])
    exact = disparity.class_balance(one_class, epsilon=0.0)
    np.testing.assert_allclose(exact, 25.0, rtol=1e-6)
    of_code = disparity.class_balance(one_class)
    np.testing.assert_allclose(of_code, -np.log(1e-6) / 2, rtol=1e-5)


@pytest.mark.usefixtures("types_unchecked")
def test_says_what_is_wrong():
    two, three = jnp.zeros((4, 2)), jnp.zeros((4, 3))
    with pytest.raises(ValueError, match=r"one shape .* \(4, 2\) and \(4, 3\)"):
        disparity.classifier_discrepancy(two, three)
    with pytest.raises(ValueError, match=r"logits must be \[examples, classes\]"):
        disparity.class_balance(two[0])
    with pytest.raises(ValueError, match="epsilon must not be negative, got -1"):
        disparity.class_balance(two, epsilon=-1.0)
    with pytest.raises(ValueError, match="target_logits and target_adversarial"):
        mdd(two, two, two, three)
    with pytest.raises(ValueError, match="at least two classes"):
        mdd(two[:, :1], two[:, :1], two, two)
    with pytest.raises(ValueError, match="margin must be positive, got 0"):
        mdd(two, two, two, two, margin=0.0)
    with pytest.raises(ValueError, match="form must be .* got 'clamped'"):
        mdd(two, two, two, two, form="clamped")
