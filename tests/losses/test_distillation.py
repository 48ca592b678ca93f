import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxtransfer import losses


def _kd(student, teacher, temperature=4.0):
    return losses.knowledge_distillation(student, teacher, temperature=temperature)


@pytest.mark.parametrize(
    ("temperature", "golden", "golden_gradient"),
    [(4.0, 3.69312893904, 0.3042396218), (1.0, 2.84233999805, 0.2626521332)],
)
def test_golden(
    float64, student_logits, teacher_logits, temperature, golden, golden_gradient
):
    student, teacher = jnp.asarray(student_logits), jnp.asarray(teacher_logits)
    value, gradient = jax.value_and_grad(lambda z: _kd(z, teacher, temperature).mean())(
        student
    )
    np.testing.assert_allclose(value, golden, rtol=1e-11)
    np.testing.assert_allclose(jnp.linalg.norm(gradient), golden_gradient, rtol=1e-9)


def test_golden_in_float32(student_logits, teacher_logits):
    student = jnp.asarray(student_logits, jnp.float32)
    teacher = jnp.asarray(teacher_logits, jnp.float32)
    np.testing.assert_allclose(_kd(student, teacher).mean(), 3.69312893904, rtol=1e-5)


def test_target_and_other_classes_decompose(float64, student_logits, teacher_logits):
    """KD = TCKD + (1 - p_t(y)) NCKD, example by example, from plain NumPy."""
    labels = (3 * np.arange(8) + 1) % 10
    expected = []
    for s, t, y in zip(student_logits / 4, teacher_logits / 4, labels, strict=True):
        p, q = np.exp(t) / np.exp(t).sum(), np.exp(s) / np.exp(s).sum()
        rest = np.arange(10) != y
        binary = p[y] * np.log(p[y] / q[y])
        binary += (1 - p[y]) * np.log((1 - p[y]) / (1 - q[y]))
        p_rest, q_rest = p[rest] / p[rest].sum(), q[rest] / q[rest].sum()
        other = (p_rest * np.log(p_rest / q_rest)).sum()
        expected.append(16 * (binary + (1 - p[y]) * other))
    result = _kd(jnp.asarray(student_logits), jnp.asarray(teacher_logits))
    np.testing.assert_allclose(result, expected, rtol=1e-12)


def test_derivatives(float64, student_logits, teacher_logits):
    teacher = jnp.asarray(teacher_logits[:3, :4])
    student = jnp.asarray(student_logits[:3, :4])
    check_grads(jax.jit(lambda z: _kd(z, teacher).sum()), (student,), order=2)


def test_teacher_gets_no_gradient(student_logits, teacher_logits):
    student = jnp.asarray(student_logits, jnp.float32)
    teacher = jnp.asarray(teacher_logits, jnp.float32)
    gradient = jax.grad(lambda t: _kd(student, t).sum())(teacher)
    np.testing.assert_array_equal(gradient, 0.0)


def test_zero_at_equality_whatever_the_shift(teacher_logits):
    teacher = jnp.asarray(teacher_logits, jnp.float32)
    np.testing.assert_allclose(_kd(teacher + 3.0, teacher), 0.0, atol=2e-5)


def test_high_temperature_is_matching_of_centred_logits(
    float64, student_logits, teacher_logits
):
    difference = student_logits - teacher_logits
    difference -= difference.mean(axis=1, keepdims=True)
    result = _kd(jnp.asarray(student_logits), jnp.asarray(teacher_logits), 1e4)
    np.testing.assert_allclose(result, (difference**2).sum(axis=1) / 20, rtol=1e-3)


def test_agrees_under_transformations(transform, student_logits, teacher_logits):
    student = jnp.asarray(student_logits, jnp.float32)
    teacher = jnp.asarray(teacher_logits, jnp.float32)

    def both(s, t, temperature):
        return jax.value_and_grad(lambda s: _kd(s, t, temperature).mean())(s)

    temperature = jnp.asarray(3.0)
    for got, expected in zip(
        transform(both)(student, teacher, temperature),
        both(student, teacher, temperature),
        strict=True,
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_finite_at_extreme_logits(temperature):
    student = jnp.array([[1e4, -1e4, 0.0], [1e4, -1e4, 0.0]])
    teacher = jnp.array([[-1e4, 1e4, 0.0], [1e4, -1e4, 0.0]])
    value = _kd(student, teacher, temperature)
    gradient = jax.grad(lambda s: _kd(s, teacher, temperature).sum())(student)
    np.testing.assert_allclose(value, [temperature * 2e4, 0.0], rtol=1e-5)
    assert jnp.isfinite(gradient).all()


def test_half_precision_is_accumulated_in_float32(student_logits, teacher_logits):
    student = jnp.asarray(student_logits, jnp.bfloat16)
    teacher = jnp.asarray(teacher_logits, jnp.bfloat16)
    result = _kd(student, teacher)
    expected = _kd(student.astype(jnp.float32), teacher.astype(jnp.float32))
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_masked_examples_may_hold_anything(student_logits, teacher_logits):
    student = jnp.asarray(student_logits, jnp.float32).at[3].set(jnp.nan)
    teacher = jnp.asarray(teacher_logits, jnp.float32).at[3].set(jnp.inf)
    where = jnp.arange(8) != 3

    def total(s):
        return losses.knowledge_distillation(s, teacher, where=where).sum()

    value, gradient = jax.value_and_grad(total)(student)
    expected = _kd(student[where], teacher[where]).sum()
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_array_equal(gradient[3], 0.0)


def test_says_what_is_wrong():
    kd = inspect.unwrap(losses.knowledge_distillation)
    with pytest.raises(ValueError, match=r"got \(2, 3\) and \(2, 4\)"):
        kd(jnp.zeros((2, 3)), jnp.zeros((2, 4)))
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        kd(jnp.zeros((2, 3)), jnp.zeros((2, 3)), temperature=0.0)
