import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer.losses import labelled_distillation
from jaxtransfer.losses.classification import cross_entropy
from jaxtransfer.losses.distillation import knowledge_distillation
from jaxtransfer.losses.labelled_distillation import (
    decoupled_knowledge_distillation,
    nontarget_class_distillation,
    normalized_knowledge_distillation,
    target_class_distillation,
    virtual_teacher_distillation,
    weighted_soft_label_distillation,
)

LABELS = (3 * np.arange(8) + 1) % 10

GOLDEN = {
    "DKD": (decoupled_knowledge_distillation, 29.8194517593, 2.53812442),
    "TCKD": (target_class_distillation, 0.268370768552, None),
    "8 NCKD": (
        lambda s, t, y: 8 * nontarget_class_distillation(s, t, y),
        29.5510809908,
        None,
    ),
    "NKD": (normalized_knowledge_distillation, 6.02874061205, 0.3915847562),
    "WSLD": (weighted_soft_label_distillation, 5.53013739333, 0.1721002529),
}

golden = pytest.mark.parametrize(
    ("loss", "value", "norm"), GOLDEN.values(), ids=GOLDEN.keys()
)


@golden
def test_golden(float64, student_logits, teacher_logits, loss, value, norm):
    student, teacher = jnp.asarray(student_logits), jnp.asarray(teacher_logits)
    got, gradient = jax.value_and_grad(lambda z: loss(z, teacher, LABELS).mean())(
        student
    )
    np.testing.assert_allclose(got, value, rtol=1e-11)
    if norm is not None:
        np.testing.assert_allclose(jnp.linalg.norm(gradient), norm, rtol=1e-9)


@golden
def test_golden_in_float32(student_logits, teacher_logits, loss, value, norm):
    student = jnp.asarray(student_logits, jnp.float32)
    teacher = jnp.asarray(teacher_logits, jnp.float32)
    got, gradient = jax.value_and_grad(lambda z: loss(z, teacher, LABELS).mean())(
        student
    )
    np.testing.assert_allclose(got, value, rtol=1e-5)
    if norm is not None:
        np.testing.assert_allclose(jnp.linalg.norm(gradient), norm, rtol=1e-5)


def _softmax(z):
    return np.exp(z) / np.exp(z).sum()


def test_target_and_other_classes_against_numpy(
    float64, student_logits, teacher_logits
):
    targets, others = [], []
    for s, t, y in zip(student_logits / 4, teacher_logits / 4, LABELS, strict=True):
        p, q = _softmax(t), _softmax(s)
        rest = np.arange(10) != y
        binary = p[y] * np.log(p[y] / q[y])
        targets.append(16 * (binary + (1 - p[y]) * np.log((1 - p[y]) / (1 - q[y]))))
        p_rest, q_rest = p[rest] / p[rest].sum(), q[rest] / q[rest].sum()
        others.append(16 * (p_rest * np.log(p_rest / q_rest)).sum())
    arguments = student_logits, teacher_logits, LABELS
    np.testing.assert_allclose(target_class_distillation(*arguments), targets, 1e-12)
    np.testing.assert_allclose(nontarget_class_distillation(*arguments), others, 1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0, np.linspace(0.5, 6.0, 8)])
def test_target_and_other_classes_make_up_knowledge_distillation(
    float64, student_logits, teacher_logits, temperature
):
    """KD = TCKD + (1 - p_y) NCKD, example by example."""
    arguments, given = (student_logits, teacher_logits), {"temperature": temperature}
    softened = jax.nn.softmax(teacher_logits / np.reshape(temperature, (-1, 1)))
    p_y = softened[np.arange(8), LABELS]
    parts = target_class_distillation(*arguments, LABELS, **given) + (
        1 - p_y
    ) * nontarget_class_distillation(*arguments, LABELS, **given)
    whole = knowledge_distillation(*arguments, **given)
    np.testing.assert_allclose(parts, whole, rtol=1e-12)


def test_weight_zero_is_the_part_left_out(student_logits, teacher_logits):
    arguments = student_logits, teacher_logits, LABELS
    np.testing.assert_array_equal(
        decoupled_knowledge_distillation(*arguments, beta=0.0),
        target_class_distillation(*arguments),
    )
    np.testing.assert_array_equal(
        decoupled_knowledge_distillation(*arguments, alpha=0.0, beta=1.0),
        nontarget_class_distillation(*arguments),
    )


def test_two_classes_have_no_others(student_logits, teacher_logits):
    student, teacher = student_logits[:, :2], teacher_logits[:, :2]
    value, gradient = jax.value_and_grad(
        lambda z: nontarget_class_distillation(z, teacher, LABELS % 2).sum()
    )(jnp.asarray(student, jnp.float32))
    assert value == 0.0
    np.testing.assert_array_equal(gradient, 0.0)


def test_target_distillation_does_not_see_how_the_others_share(
    float64, student_logits, teacher_logits
):
    others = jax.nn.one_hot(LABELS, 10) == 0
    swapped = np.array(student_logits)
    for row, other in zip(swapped, np.asarray(others), strict=True):
        row[other] = row[other][::-1]
    got = target_class_distillation(swapped, teacher_logits, LABELS)
    expected = target_class_distillation(student_logits, teacher_logits, LABELS)
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_normalized_distillation_against_numpy(float64, student_logits, teacher_logits):
    expected = []
    for s, t, y in zip(student_logits, teacher_logits, LABELS, strict=True):
        rest = np.arange(10) != y
        target = -_softmax(t)[y] * np.log(_softmax(s)[y])
        p_rest, q_rest = _softmax(t[rest] / 3), _softmax(s[rest] / 3)
        expected.append(target - 0.5 * 9 * (p_rest * np.log(q_rest)).sum())
    got = normalized_knowledge_distillation(
        student_logits, teacher_logits, LABELS, gamma=0.5, temperature=3.0
    )
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_soft_labels_weigh_nothing_where_the_student_is_right():
    student = jnp.array([[1e3, 0.0, 0.0], [0.0, 1e3, 0.0]])
    teacher = jnp.array([[2.0, 1.0, 0.0], [1e3, 0.0, 0.0]])
    labels = jnp.array([0, 0])
    got = weighted_soft_label_distillation(student, teacher, labels)
    # The second: weight 1, T^2 = 4, cross-entropy 1e3 / T.
    np.testing.assert_allclose(got, [0.0, 2e3], rtol=1e-6)


def test_virtual_teacher_is_label_smoothing_at_temperature_one(float64, student_logits):
    """The divergence from smoothed labels: their cross-entropy less their entropy."""
    smoothing = 0.2
    right = 1 - smoothing + smoothing / 10
    wrong = smoothing / 10
    entropy = -right * np.log(right) - 9 * wrong * np.log(wrong)
    got = virtual_teacher_distillation(
        student_logits, LABELS, correct_probability=right, temperature=1.0
    )
    smoothed = cross_entropy(student_logits, LABELS, label_smoothing=smoothing)
    np.testing.assert_allclose(got, smoothed - entropy, rtol=1e-12)


@pytest.mark.parametrize("form", ["paper", "code"])
def test_virtual_teacher_against_numpy(float64, student_logits, form):
    expected = []
    for z, y in zip(student_logits, LABELS, strict=True):
        u = np.where(np.arange(10) == y, 0.9, 0.1 / 9)
        if form == "paper":
            p, q, scale = _softmax(np.log(u) / 20), _softmax(z / 20), 400
        else:
            p, q, scale = _softmax(u / 20), _softmax(z), 1
        expected.append(scale * (p * np.log(p / q)).sum())
    got = virtual_teacher_distillation(
        student_logits, LABELS, correct_probability=0.9, form=form
    )
    np.testing.assert_allclose(got, expected, rtol=1e-9)


@pytest.mark.parametrize("form", ["paper", "code"])
def test_virtual_teacher_of_masked_examples_has_any_temperature(student_logits, form):
    where = np.arange(8) < 6

    def losses(temperature, **options):
        return virtual_teacher_distillation(
            student_logits, LABELS, temperature=temperature, form=form, **options
        )

    got = losses(np.where(where, 20.0, 0.0), where=where)
    np.testing.assert_allclose(got, np.where(where, losses(20.0), 0.0), rtol=1e-6)


@pytest.mark.parametrize("label", [-1, 10])
@pytest.mark.parametrize(
    "loss",
    [
        target_class_distillation,
        nontarget_class_distillation,
        decoupled_knowledge_distillation,
        normalized_knowledge_distillation,
        weighted_soft_label_distillation,
        lambda s, t, y: virtual_teacher_distillation(s, y),
    ],
)
def test_traced_label_out_of_range_gives_not_a_number(
    student_logits, teacher_logits, loss, label
):
    labels = jnp.array([label, 3])
    got = jax.jit(loss)(student_logits[:2], teacher_logits[:2], labels)
    assert jnp.isfinite(got).tolist() == [False, True]


ROWS = jnp.zeros((2, 3))


@pytest.mark.parametrize(
    ("name", "arguments", "options", "message"),
    [
        (
            "decoupled_knowledge_distillation",
            (ROWS, ROWS, jnp.array([0, 3])),
            {},
            r"labels must be in \[0, 3\)",
        ),
        (
            "target_class_distillation",
            (ROWS[:, :1], ROWS[:, :1], jnp.array([0, 0])),
            {},
            "student_logits must have two classes or more, got 1",
        ),
        (
            "nontarget_class_distillation",
            (ROWS, ROWS[:1], jnp.array([0, 0])),
            {},
            r"got \(2, 3\) and \(1, 3\)",
        ),
        (
            "virtual_teacher_distillation",
            (ROWS, jnp.array([0, 0])),
            {"correct_probability": 0.0},
            r"correct_probability must be in \(0, 1\], got 0.0",
        ),
        (
            "virtual_teacher_distillation",
            (ROWS, jnp.array([0, 0])),
            {"form": "book"},
            "form must be .* got 'book'",
        ),
    ],
)
def test_says_what_is_wrong(name, arguments, options, message):
    function = inspect.unwrap(getattr(labelled_distillation, name))
    with pytest.raises(ValueError, match=message):
        function(*arguments, **options)
