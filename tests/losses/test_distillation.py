import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxtransfer.losses import distillation
from jaxtransfer.losses.distillation import (
    cached_knowledge_distillation,
    dist,
    dynamic_temperature,
    knowledge_distillation,
    logit_matching,
    standardize_logits,
    top_k_knowledge_distillation,
)


def _standardized(student, teacher):
    student, teacher = standardize_logits(student), standardize_logits(teacher)
    return knowledge_distillation(student, teacher, temperature=2.0)


def _with(function, **options):
    return lambda student, teacher: function(student, teacher, **options)


# Values and norms of the student's gradient of the reference implementations; where
# there is none, values of the definition in NumPy.
GOLDEN = {
    "KD": (_with(knowledge_distillation), 3.69312893904, 0.3042396218),
    "KD T=1": (
        _with(knowledge_distillation, temperature=1.0),
        2.84233999805,
        0.2626521332,
    ),
    "logit standardisation": (_standardized, 1.01078382639, 4 * 0.01530282613),
    "DIST": (dist, 2.11250468605, 0.132446635),
    "DIST inter": (_with(dist, gamma=0.0), 1.04141878923, None),
    "DIST intra": (_with(dist, beta=0.0), 1.07108589682, None),
    "DIST T=4": (_with(dist, temperature=4.0), 35.2652620317, 1.799753682),
    "DIST T=4 inter": (_with(dist, temperature=4.0, gamma=0.0), 17.1470900121, None),
    "DIST T=4 intra": (_with(dist, temperature=4.0, beta=0.0), 18.1181720195, None),
    "DIST plain": (_with(dist, eps=0.0), 2.11250472759, 0.1324466452),
}
for _beta, _value in {
    0.0: 2.84233999805,
    0.1: 0.178011699464,
    0.5: 0.397499531213,
    0.9: 0.165422386904,
    1.0: 2.27244947035,
}.items():
    GOLDEN[f"GKD {_beta}"] = (
        _with(
            knowledge_distillation,
            temperature=1.0,
            divergence="jensen_shannon",
            beta=_beta,
        ),
        _value,
        None,
    )
for _tail, _k, _value in (
    ("renormalize", 3, 1.3828172309086608),
    ("renormalize", 5, 2.328188393805307),
    ("bucket", 3, 2.676276846555612),
    ("bucket", 5, 2.793088011710466),
    ("renormalize", 10, 2.842339998049658),
    ("bucket", 10, 2.842339998049658),
):
    GOLDEN[f"top {_k} {_tail}"] = (
        _with(top_k_knowledge_distillation, k=_k, tail=_tail),
        _value,
        None,
    )

golden = pytest.mark.parametrize(
    ("loss", "value", "norm"), GOLDEN.values(), ids=GOLDEN.keys()
)


@golden
def test_golden(float64, student_logits, teacher_logits, loss, value, norm):
    student, teacher = jnp.asarray(student_logits), jnp.asarray(teacher_logits)
    got, gradient = jax.value_and_grad(lambda z: loss(z, teacher).mean())(student)
    np.testing.assert_allclose(got, value, rtol=1e-11)
    if norm is not None:
        np.testing.assert_allclose(jnp.linalg.norm(gradient), norm, rtol=1e-9)


@golden
def test_golden_in_float32(student_logits, teacher_logits, loss, value, norm):
    student = jnp.asarray(student_logits, jnp.float32)
    teacher = jnp.asarray(teacher_logits, jnp.float32)
    got, gradient = jax.value_and_grad(lambda z: loss(z, teacher).mean())(student)
    np.testing.assert_allclose(got, value, rtol=1e-5)
    if norm is not None:
        np.testing.assert_allclose(jnp.linalg.norm(gradient), norm, rtol=1e-5)


def test_derivatives(float64, student_logits, teacher_logits):
    teacher = jnp.asarray(teacher_logits[:3, :4])
    student = jnp.asarray(student_logits[:3, :4])

    def total(z):
        return knowledge_distillation(z, teacher).sum()

    check_grads(jax.jit(total), (student,), order=2)


def test_temperature_may_be_learnt_and_one_an_example(
    float64, student_logits, teacher_logits
):
    student, teacher = jnp.asarray(student_logits), jnp.asarray(teacher_logits)
    temperatures = jnp.linspace(0.5, 8.0, 8)
    check_grads(
        lambda t: knowledge_distillation(student, teacher, temperature=t),
        (temperatures,),
        order=1,
        modes=["rev"],
    )
    single = [
        knowledge_distillation(s, t, temperature=float(one))
        for s, t, one in zip(student, teacher, temperatures, strict=True)
    ]
    got = knowledge_distillation(student, teacher, temperature=temperatures)
    np.testing.assert_allclose(got, single, rtol=1e-12)


def test_temperature_of_masked_examples_may_be_anything(student_logits):
    student = jnp.asarray(student_logits, jnp.float32)
    where = jnp.arange(8) < 6
    got = knowledge_distillation(
        student, student + 1.0, temperature=jnp.where(where, 2.0, 0.0), where=where
    )
    np.testing.assert_allclose(got, 0.0, atol=1e-5)


def test_zero_at_equality_whatever_the_shift(teacher_logits):
    teacher = jnp.asarray(teacher_logits, jnp.float32)
    for loss in (
        _with(knowledge_distillation),
        _with(knowledge_distillation, divergence="reverse"),
        _with(knowledge_distillation, divergence="jensen_shannon"),
        _with(logit_matching, centred=True),
        _with(top_k_knowledge_distillation, k=3, tail="bucket", temperature=4.0),
    ):
        np.testing.assert_allclose(loss(teacher + 3.0, teacher), 0.0, atol=2e-5)


def test_reverse_is_forward_with_sides_changed(student_logits, teacher_logits):
    got = knowledge_distillation(student_logits, teacher_logits, divergence="reverse")
    expected = knowledge_distillation(teacher_logits, student_logits)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("near", [1e-7, 1 - 1e-7])
def test_jensen_shannon_tends_to_both_divergences(
    float64, student_logits, teacher_logits, near
):
    def of(beta):
        return knowledge_distillation(
            student_logits, teacher_logits, divergence="jensen_shannon", beta=beta
        )

    limit, scale = round(near), min(near, 1 - near)
    np.testing.assert_allclose(of(near) / scale, of(float(limit)), rtol=1e-4)
    for beta in (0.0, 0.3, 1.0):
        np.testing.assert_allclose(jax.jit(of)(beta), of(beta), rtol=1e-12)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jensen_shannon"])
def test_class_that_both_lack_changes_nothing(
    student_logits, teacher_logits, divergence
):
    loss = _with(knowledge_distillation, divergence=divergence)
    student = jnp.asarray(student_logits, jnp.float32)
    teacher = jnp.asarray(teacher_logits, jnp.float32)
    lacking = jnp.arange(10) == 4
    has = np.flatnonzero(~lacking)

    def total(s, t):
        return loss(s, t).sum()

    got, gradient = jax.value_and_grad(total)(
        jnp.where(lacking, -jnp.inf, student), jnp.where(lacking, -jnp.inf, teacher)
    )
    value, expected = jax.value_and_grad(total)(student[:, has], teacher[:, has])
    np.testing.assert_allclose(got, value, rtol=1e-6)
    np.testing.assert_allclose(gradient[:, has], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(gradient[:, 4], 0.0)


def test_high_temperature_is_matching_of_centred_logits(
    float64, student_logits, teacher_logits
):
    difference = student_logits - teacher_logits
    difference -= difference.mean(axis=1, keepdims=True)
    matched = logit_matching(student_logits, teacher_logits, centred=True)
    np.testing.assert_allclose(matched, (difference**2).mean(axis=1), rtol=1e-12)
    hot = knowledge_distillation(student_logits, teacher_logits, temperature=1e4)
    np.testing.assert_allclose(hot, matched / 2, rtol=1e-3)
    plain = logit_matching(student_logits, teacher_logits)
    expected = ((student_logits - teacher_logits) ** 2).mean(axis=1)
    np.testing.assert_allclose(plain, expected, rtol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_value_at_extreme_logits(temperature):
    student = jnp.array([[1e4, -1e4, 0.0], [1e4, -1e4, 0.0]])
    teacher = jnp.array([[-1e4, 1e4, 0.0], [1e4, -1e4, 0.0]])
    value = knowledge_distillation(student, teacher, temperature=temperature)
    np.testing.assert_allclose(value, [temperature * 2e4, 0.0], rtol=1e-5)


def test_standardized_logits_lose_size_and_shift(float64, teacher_logits):
    scores = standardize_logits(teacher_logits)
    np.testing.assert_allclose(scores.mean(axis=1), 0.0, atol=1e-12)
    np.testing.assert_allclose(scores.std(axis=1, ddof=1), 1.0, rtol=1e-6)
    again = standardize_logits(1e3 * teacher_logits - 7.0)
    np.testing.assert_allclose(again, scores, rtol=1e-6)


def test_masked_rows_are_standardized_to_zero(student_logits):
    student = jnp.asarray(student_logits, jnp.float32)
    where = jnp.arange(8) != 3

    def total(z):
        return (standardize_logits(z, where=where)[:, 0] ** 2).sum()

    got = standardize_logits(student.at[3].set(jnp.nan), where=where)
    np.testing.assert_array_equal(got[3], 0.0)
    np.testing.assert_allclose(got[where], standardize_logits(student[where]), 1e-6)
    gradient = jax.grad(total)(student.at[3].set(jnp.nan))
    np.testing.assert_array_equal(gradient[3], 0.0)
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("weighting", ["flsw", "cwsm"])
def test_dynamic_temperature_against_numpy(
    float64, student_logits, teacher_logits, weighting
):
    s, t = student_logits[:6], teacher_logits[:6]
    if weighting == "flsw":
        cosine = (s * t).sum(1) / np.linalg.norm(s, axis=1) / np.linalg.norm(t, axis=1)
        weights = (1 - cosine) ** 2.0
    else:
        probabilities = np.exp(s) / np.exp(s).sum(1, keepdims=True)
        weights = 1 / (probabilities.max(1) + 1e-3)
    expected = np.maximum(5.0 + 2.0 * (weights.mean() - weights), 4.2)
    got = dynamic_temperature(
        student_logits,
        teacher_logits,
        weighting=weighting,
        temperature=5.0,
        beta=2.0,
        gamma=2.0,
        minimum=4.2,
        where=jnp.arange(8) < 6,
    )
    np.testing.assert_allclose(got[:6], expected, rtol=1e-12)
    assert (expected > 4.2).any() and (expected == 4.2).any()


def _dist_in_numpy(student, teacher, temperature, beta, gamma):
    def softmax(z):
        e = np.exp(z / temperature)
        return e / e.sum(1, keepdims=True)

    p, q = softmax(teacher), softmax(student)
    rows = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)])
    columns = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(p.T, q.T, strict=True)])
    return temperature**2 * (beta * (1 - rows) + gamma * (1 - columns))


def test_dist_is_of_correlations(float64, student_logits, teacher_logits):
    options = {"temperature": 2.0, "beta": 0.7, "gamma": 3.0}
    got = dist(student_logits, teacher_logits, eps=0.0, **options)
    expected = _dist_in_numpy(student_logits, teacher_logits, **options)
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_dist_is_zero_at_equality_and_does_not_mind_the_order(
    float64, student_logits, teacher_logits
):
    np.testing.assert_allclose(dist(teacher_logits, teacher_logits), 0.0, atol=1e-5)
    value = dist(student_logits, teacher_logits)
    turned = dist(student_logits[::-1, ::-1], teacher_logits[::-1, ::-1])
    np.testing.assert_allclose(turned, value, rtol=1e-12)


def test_dist_of_one_example_has_no_relation_within_classes(student_logits):
    one = jnp.asarray(student_logits[:1], jnp.float32)
    np.testing.assert_allclose(dist(one, one, gamma=3.0), 3.0, atol=1e-4)
    np.testing.assert_array_equal(
        jax.grad(lambda z: dist(z, one, beta=0.0))(0.5 * one), 0.0
    )


@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
def test_stored_classes_serve_in_any_order(
    float64, student_logits, teacher_logits, tail
):
    log_p = jax.nn.log_softmax(jnp.asarray(teacher_logits) / 3.0)
    indices = jnp.argsort(-log_p, axis=-1)[:, :4][:, jnp.array([2, 0, 3, 1])]
    stored = jnp.take_along_axis(log_p, indices, axis=-1)
    got = cached_knowledge_distillation(
        student_logits, stored, indices, tail=tail, temperature=3.0
    )
    expected = top_k_knowledge_distillation(
        student_logits, teacher_logits, k=4, tail=tail, temperature=3.0
    )
    np.testing.assert_allclose(got, expected, rtol=1e-12)


@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
def test_all_classes_are_knowledge_distillation(
    float64, student_logits, teacher_logits, tail
):
    got = top_k_knowledge_distillation(
        student_logits, teacher_logits, k=99, tail=tail, temperature=4.0
    )
    expected = knowledge_distillation(student_logits, teacher_logits)
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_traced_index_out_of_range_gives_not_a_number(student_logits):
    student = jnp.asarray(student_logits[:2], jnp.float32)
    stored = jnp.log(jnp.full((2, 3), 0.2))
    indices = jnp.array([[0, 1, 2], [0, 10, 2]])
    got = jax.jit(cached_knowledge_distillation)(student, stored, indices)
    assert jnp.isfinite(got).tolist() == [True, False]


ROWS = jnp.zeros((2, 3))


@pytest.mark.parametrize(
    ("name", "arguments", "options", "message"),
    [
        (
            "knowledge_distillation",
            (ROWS, jnp.zeros((2, 4))),
            {},
            r"got \(2, 3\) and \(2, 4\)",
        ),
        (
            "knowledge_distillation",
            (ROWS, ROWS),
            {"temperature": 0.0},
            "temperature must be positive, got 0",
        ),
        (
            "knowledge_distillation",
            (ROWS, ROWS),
            {"temperature": jnp.ones(3)},
            r"temperature of shape \(3,\) does not fit \(2,\)",
        ),
        (
            "knowledge_distillation",
            (ROWS, ROWS),
            {"divergence": "sideways"},
            "divergence must be .* got 'sideways'",
        ),
        (
            "knowledge_distillation",
            (ROWS, ROWS),
            {"divergence": "jensen_shannon", "beta": 1.5},
            r"beta must be in \[0, 1\], got 1.5",
        ),
        ("standardize_logits", (ROWS[:, :1],), {}, r"two classes or more, got \(2, 1"),
        (
            "dynamic_temperature",
            (ROWS, ROWS),
            {"minimum": 0.0},
            "minimum must be positive",
        ),
        (
            "dynamic_temperature",
            (ROWS, ROWS),
            {"weighting": "x"},
            "weighting must be .* got 'x'",
        ),
        (
            "distillation_from_stronger_teacher",
            (ROWS[None], ROWS[None]),
            {},
            r"\[examples, classes\], got \(1, 2, 3\)",
        ),
        ("top_k_knowledge_distillation", (ROWS, ROWS), {"k": 0}, "k must be positive"),
        (
            "cached_knowledge_distillation",
            (ROWS, ROWS, jnp.zeros((2, 3), int)),
            {"tail": "cut"},
            "tail must be .* got 'cut'",
        ),
        (
            "cached_knowledge_distillation",
            (ROWS, ROWS, jnp.zeros((2, 2), int)),
            {},
            r"got \(2, 3\), \(2, 2\) and \(2, 3\)",
        ),
        (
            "cached_knowledge_distillation",
            (ROWS, ROWS, jnp.array([[0, 1, 3], [0, 1, 2]])),
            {},
            r"indices must be in \[0, 3\).* got 0 to 3",
        ),
    ],
)
def test_says_what_is_wrong(name, arguments, options, message):
    function = inspect.unwrap(getattr(distillation, name))
    with pytest.raises(ValueError, match=message):
        function(*arguments, **options)
