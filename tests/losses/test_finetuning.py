import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import losses
from jaxtransfer.losses import finetuning
from tests.losses.case import det

MAPS, ANCHOR = det((5, 3, 2, 4), 61), det((5, 3, 2, 4), 62)
ATTENTION = np.array([0.1, 0.2, 0.3, 0.4])
LOGITS, LABELS = det((6, 4), 63, 3.0), np.array([0, 2, 1, 2, 0, 0])


def softmax(logits):
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


PROBABILITIES = softmax(LOGITS)


@pytest.mark.parametrize("form", ["code", "paper"])
def test_delta_is_a_sum_over_channels(float64, form):
    expected = np.zeros(5)
    for example in range(5):
        for channel in range(4):
            difference = MAPS[example, ..., channel] - ANCHOR[example, ..., channel]
            norm = np.linalg.norm(difference.ravel())
            factor = 4 / (2 * 3 * 2) if form == "code" else 1.0
            expected[example] += factor * ATTENTION[channel] * norm**2
    got = finetuning.delta(MAPS, ANCHOR, ATTENTION, form=form)
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_even_attention_is_no_attention(float64):
    plain = finetuning.behavioral_regularization(MAPS, ANCHOR)
    even = np.full(4, 0.25)
    np.testing.assert_allclose(
        finetuning.delta(MAPS, ANCHOR, even), plain / 6, rtol=1e-12
    )
    paper = finetuning.delta(MAPS, ANCHOR, even, form="paper")
    np.testing.assert_allclose(paper, plain / 2, rtol=1e-12)
    np.testing.assert_allclose(
        plain, 0.5 * ((MAPS - ANCHOR) ** 2).reshape(5, -1).sum(axis=1), rtol=1e-12
    )


def test_features_without_places_are_maps_of_one_place(float64):
    flat = finetuning.delta(MAPS[:, 0, 0], ANCHOR[:, 0, 0], ATTENTION)
    one = finetuning.delta(MAPS[:, :1, :1], ANCHOR[:, :1, :1], ATTENTION)
    np.testing.assert_array_equal(flat, one)


def test_places_and_channels_may_be_permuted(float64):
    expected = finetuning.delta(MAPS, ANCHOR, ATTENTION)
    order = [2, 0, 3, 1]
    permuted = finetuning.delta(
        MAPS[:, ::-1, :, order], ANCHOR[:, ::-1, :, order], ATTENTION[order]
    )
    np.testing.assert_allclose(permuted, expected, rtol=1e-12)


def test_attention_of_channels(float64):
    values = np.array([0.9, 2.0, 1.1, 0.4])
    scores = (values - values.mean()) / values.std()
    expected = softmax(scores / 5)
    got = finetuning.channel_attention(values, np.array(0.3))
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    moved = finetuning.channel_attention(10 * values + 3, np.array(0.0))
    np.testing.assert_allclose(moved, expected, rtol=1e-12)
    even = finetuning.channel_attention(np.full(4, 0.1), np.array(0.3))
    np.testing.assert_allclose(even, 0.25, rtol=1e-12)


@pytest.mark.parametrize(("precision", "rtol"), [("float64", 1e-11), ("float32", 1e-5)])
def test_learning_without_forgetting_golden(precision, rtol):
    i, c = np.meshgrid(np.arange(1, 7), np.arange(1, 4), indexing="ij")
    student = 2 * np.sin(1.1 * i + 0.6 * c + 0.31 * i * c)
    teacher = 2 * np.cos(0.8 * i - 0.7 * c + 0.19 * i * c)
    with jax.enable_x64(precision == "float64"):
        got = finetuning.learning_without_forgetting(
            jnp.asarray(student, precision),
            jnp.asarray(teacher, precision),
            temperature=4.0,
        )
        assert got.dtype == precision
        np.testing.assert_allclose(jnp.mean(got), 0.05556987681263764, rtol=rtol)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_learning_without_forgetting_is_distillation_over_t_squared(temperature):
    student, teacher = jnp.asarray(LOGITS), jnp.asarray(det((6, 4), 65, 3.0))
    got = finetuning.learning_without_forgetting(
        student, teacher, temperature=temperature
    )
    full = losses.knowledge_distillation(student, teacher, temperature=temperature)
    np.testing.assert_allclose(got * temperature**2, full, rtol=1e-6)


def test_gradient_is_that_of_the_paper_s_cross_entropy(float64):
    """Of predictions raised to 1/T and normalised again, T = 2."""
    teacher = det((6, 4), 65, 3.0)
    recorded = softmax(teacher) ** 0.5
    recorded /= recorded.sum(axis=1, keepdims=True)

    def paper(logits):
        present = jax.nn.softmax(logits) ** 0.5
        present /= present.sum(axis=1, keepdims=True)
        return -jnp.sum(recorded * jnp.log(present))

    got = jax.grad(lambda z: finetuning.learning_without_forgetting(z, teacher).sum())(
        LOGITS
    )
    np.testing.assert_allclose(got, jax.grad(paper)(LOGITS), rtol=1e-9, atol=1e-12)


def test_relationship_is_the_mean_prediction_of_a_class(float64):
    got = finetuning.category_relationship(PROBABILITIES, LABELS, 4)
    for label in range(3):
        rows = PROBABILITIES[LABELS == label]
        np.testing.assert_allclose(got[label], rows.mean(axis=0), rtol=1e-12)
    np.testing.assert_array_equal(got[3], 0.0)


def test_calibrated_relationship_is_bayes_rule(float64):
    logits = det((4, 3), 66, 3.0)
    joint = softmax(logits) * PROBABILITIES.mean(axis=0)[:, None]
    expected = (joint / joint.sum(axis=0)).T
    got = finetuning.calibrated_category_relationship(logits, PROBABILITIES)
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    np.testing.assert_allclose(got.sum(axis=1), 1.0, rtol=1e-12)


def test_an_impossible_source_class_has_no_part(float64):
    probabilities = np.array([[0.4, 0.6, 0.0]])
    got = finetuning.calibrated_category_relationship(det((3, 2), 67), probabilities)
    np.testing.assert_array_equal(got[:, 2], 0.0)


def test_the_two_relationships_agree_where_source_classes_are_sure(float64):
    """Each source class belongs to one target class: both give p(s) within it."""
    kind = np.array([0, 1, 1, 2, 3, 3, 3, 0])
    labels, target_of = np.array([0, 1, 1, 1, 0, 0, 0, 0]), np.array([0, 1, 1, 0])
    probabilities = np.eye(4)[kind]
    direct = finetuning.category_relationship(probabilities, labels, 2)
    reverse = finetuning.calibrated_category_relationship(
        100.0 * np.eye(2)[target_of], probabilities
    )
    np.testing.assert_allclose(reverse, direct, atol=1e-12)


def test_co_tuning_is_cross_entropy_to_the_row_of_the_label(float64):
    relationship = finetuning.category_relationship(PROBABILITIES, LABELS, 3)
    logits = det((6, 4), 68, 2.0)
    expected = [
        -(np.asarray(relationship)[label] * np.log(softmax(row))).sum()
        for row, label in zip(logits, LABELS, strict=True)
    ]
    got = finetuning.co_tuning(logits, LABELS, relationship)
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_co_tuning_with_one_hot_rows_is_cross_entropy(float64):
    target = np.array([3, 0, 1])
    got = finetuning.co_tuning(LOGITS, LABELS, np.eye(4)[target])
    np.testing.assert_allclose(
        got, losses.cross_entropy(LOGITS, target[LABELS]), rtol=1e-12
    )


def test_co_tuning_leaves_a_class_without_a_row_alone(float64):
    value, gradient = jax.value_and_grad(
        lambda z: finetuning.co_tuning(z, LABELS, np.zeros((3, 4))).sum()
    )(LOGITS)
    assert value == 0.0
    np.testing.assert_array_equal(gradient, 0.0)


def test_a_traced_label_out_of_range_is_seen():
    result = jax.jit(finetuning.co_tuning)(LOGITS, LABELS - 1, np.eye(4)[:3])
    np.testing.assert_array_equal(np.isnan(result), LABELS == 0)
    relationship = jax.jit(finetuning.category_relationship, static_argnums=2)
    assert np.isnan(relationship(PROBABILITIES, LABELS - 1, 3)).all()
    got = relationship(PROBABILITIES, LABELS - 1, 3, where=LABELS > 0)
    expected = finetuning.category_relationship(PROBABILITIES, LABELS, 4)[1:]
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "term",
    [
        lambda z: finetuning.behavioral_regularization(z, LOGITS + 1.0),
        lambda z: finetuning.delta(z, LOGITS + 1.0, ATTENTION),
        lambda z: finetuning.learning_without_forgetting(z, LOGITS + 1.0),
        lambda z: finetuning.co_tuning(z, LABELS, PROBABILITIES),
    ],
    ids=["behavioral", "delta", "learning_without_forgetting", "co_tuning"],
)
def test_weight_zero_is_no_term_bit_for_bit(term):
    def task(z):
        return losses.cross_entropy(z, LABELS).mean()

    logits = jnp.asarray(LOGITS)
    got = jax.value_and_grad(lambda z: task(z) + 0.0 * term(z).mean())(logits)
    jax.tree.map(np.testing.assert_array_equal, got, jax.value_and_grad(task)(logits))


@pytest.mark.usefixtures("types_unchecked")
@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda: finetuning.behavioral_regularization(MAPS, ANCHOR[:2]),
            r"feature_maps and anchor_maps must have the same shape .* \(2, 3, 2, 4\)",
        ),
        (
            lambda: finetuning.delta(MAPS, ANCHOR, ATTENTION[:2]),
            r"attention must be \[channels\], here \[4\], got \(2,\)",
        ),
        (
            lambda: finetuning.delta(MAPS, ANCHOR, ATTENTION, form="both"),
            'form must be "code" or "paper"',
        ),
        (
            lambda: finetuning.channel_attention(ATTENTION, ATTENTION),
            "loss a scalar, got shapes",
        ),
        (
            lambda: finetuning.channel_attention(ATTENTION, 0.0, temperature=0.0),
            "temperature must be positive, got 0.0",
        ),
        (
            lambda: finetuning.learning_without_forgetting(LOGITS, LOGITS[:2]),
            "must have the same shape",
        ),
        (
            lambda: finetuning.category_relationship(PROBABILITIES, LABELS, 2),
            r"labels must be in \[0, 2\), got \[2, 2\]",
        ),
        (
            lambda: finetuning.category_relationship(PROBABILITIES, LABELS[:3], 3),
            r"labels must be one a row, \[6\], got shape \(3,\)",
        ),
        (
            lambda: finetuning.calibrated_category_relationship(LOGITS, PROBABILITIES),
            r"probabilities must be \[n, source classes\]",
        ),
        (
            lambda: finetuning.co_tuning(LOGITS, LABELS, np.ones((3, 5))),
            r"relationship must be \[classes, source classes\]",
        ),
        (
            lambda: finetuning.co_tuning(LOGITS[0], LABELS, np.ones((3, 4))),
            r"logits must be a matrix, got shape \(4,\)",
        ),
    ],
)
def test_says_what_is_wrong(call, match):
    with pytest.raises(ValueError, match=match):
        call()
