import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer.losses import ensembles
from jaxtransfer.losses.distillation import knowledge_distillation
from jaxtransfer.losses.ensembles import multi_teacher_distillation, mutual_learning
from tests.losses.case import det

TEACHERS = det((3, 8, 10), 2, 4.0)
ROUTING = np.abs(det((3, 8), 4)) * (det((3, 8), 5) > -0.5)
ROUTING[:, 5] = [0.0, 2.0, 0.0]
COHORT = det((3, 8, 10), 3, 3.0)

combined = pytest.mark.parametrize(
    "combine", ["probabilities", "logits", "divergences"]
)


def _kl(p, q):
    return (p * np.log(p / q)).sum(axis=-1)


def _softmax(z):
    return np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True)


@combined
@pytest.mark.parametrize("weights", [None, np.array([1.0, 3.0, 0.0]), ROUTING])
def test_against_numpy(float64, student_logits, combine, weights):
    given = np.ones((3, 8)) if weights is None else np.reshape(weights, (3, -1))
    w = np.broadcast_to(given / given.sum(axis=0), (3, 8))[..., None]
    q = _softmax(student_logits / 4)
    if combine == "probabilities":
        expected = _kl((w * _softmax(TEACHERS / 4)).sum(axis=0), q)
    elif combine == "logits":
        expected = _kl(_softmax((w * TEACHERS).sum(axis=0) / 4), q)
    else:
        expected = (w[..., 0] * _kl(_softmax(TEACHERS / 4), q)).sum(axis=0)
    got = multi_teacher_distillation(
        student_logits, TEACHERS, combine=combine, weights=weights
    )
    np.testing.assert_allclose(got, 16 * expected, rtol=1e-11)


@combined
def test_one_teacher_twice_is_one_teacher(float64, student_logits, combine):
    one = knowledge_distillation(student_logits, TEACHERS[0])
    for teachers, weights in (
        (TEACHERS[:1], None),
        (TEACHERS[[0, 0]], None),
        (TEACHERS[[0, 0]], np.array([1.0, 3.0])),
    ):
        got = multi_teacher_distillation(
            student_logits, teachers, combine=combine, weights=weights
        )
        np.testing.assert_allclose(got, one, rtol=1e-12)


@combined
def test_order_and_size_of_the_weights_do_not_matter(float64, student_logits, combine):
    def of(order, scale):
        return multi_teacher_distillation(
            student_logits,
            TEACHERS[order],
            combine=combine,
            weights=scale * ROUTING[order],
        )

    np.testing.assert_allclose(of([2, 0, 1], 7.0), of([0, 1, 2], 1.0), rtol=1e-12)


@combined
def test_teacher_of_weight_zero_is_absent(student_logits, combine):
    student = jnp.asarray(student_logits, jnp.float32)
    teachers = jnp.asarray(TEACHERS, jnp.float32).at[1].set(jnp.nan)
    weights = jnp.array([0.25, 0.0, 0.75])

    def total(z, teachers, weights):
        losses = multi_teacher_distillation(
            z, teachers, combine=combine, weights=weights
        )
        return losses.sum(), losses

    of = jax.value_and_grad(total, has_aux=True)
    (_, got), gradient = of(student, teachers, weights)
    chosen = jnp.array([0, 2])
    (_, expected), wanted = of(student, teachers[chosen], weights[chosen])
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(gradient, wanted)


@combined
def test_example_without_a_teacher_gives_nothing(student_logits, combine):
    weights = jnp.asarray(ROUTING, jnp.float32).at[:, 2].set(0.0)

    def losses(z):
        return multi_teacher_distillation(z, TEACHERS, combine=combine, weights=weights)

    student = jnp.asarray(student_logits, jnp.float32).at[2].set(jnp.nan)
    gradient = jax.grad(lambda z: losses(z).sum())(student)
    np.testing.assert_array_equal(losses(student)[2], 0.0)
    np.testing.assert_array_equal(gradient[2], 0.0)
    assert jnp.isfinite(gradient).all() and (losses(student)[3:] > 0).all()


def test_probabilities_and_divergences_have_one_gradient(float64, student_logits):
    def gradient(combine):
        return jax.grad(
            lambda z: multi_teacher_distillation(
                z, TEACHERS, combine=combine, weights=ROUTING
            ).sum()
        )(jnp.asarray(student_logits))

    np.testing.assert_allclose(
        gradient("probabilities"), gradient("divergences"), rtol=1e-10, atol=1e-13
    )


def test_peers_teach_each_other(float64):
    cohort = jnp.asarray(COHORT)
    got = mutual_learning(cohort, temperature=2.0)
    gradient = jax.grad(lambda z: mutual_learning(z, temperature=2.0).sum())(cohort)
    for student in range(3):
        peers = [cohort[peer] for peer in range(3) if peer != student]

        def expected(z, peers=peers):
            losses = [knowledge_distillation(z, p, temperature=2.0) for p in peers]
            return sum(losses) / 2

        value = expected(cohort[student])
        np.testing.assert_allclose(got[student], value, rtol=1e-12)
        wanted = jax.grad(lambda z: expected(z).sum())(cohort[student])
        np.testing.assert_allclose(gradient[student], wanted, rtol=1e-10, atol=1e-13)


def test_student_without_peers_learns_nothing():
    alone = jnp.asarray(COHORT[:1], jnp.float32)
    value, gradient = jax.value_and_grad(lambda z: mutual_learning(z).sum())(alone)
    assert value == 0.0
    np.testing.assert_array_equal(gradient, 0.0)


ROWS = jnp.zeros((2, 3))


@pytest.mark.parametrize(
    ("name", "arguments", "options", "message"),
    [
        (
            "multi_teacher_distillation",
            (ROWS, ROWS),
            {},
            r"got \(2, 3\) and \(2, 3\); stack",
        ),
        (
            "multi_teacher_distillation",
            (ROWS, ROWS[None]),
            {"combine": "votes"},
            "combine must be .* got 'votes'",
        ),
        (
            "multi_teacher_distillation",
            (ROWS, ROWS[None]),
            {"weights": jnp.array([-1.0])},
            "weights must not be negative",
        ),
        (
            "multi_teacher_distillation",
            (ROWS, jnp.zeros((3, 2, 3))),
            {"weights": jnp.ones(2)},
            r"\[teachers, ...\], \(3, 2\), got \(2,\)",
        ),
        (
            "multi_teacher_distillation",
            (ROWS, jnp.zeros((3, 2, 3))),
            {"weights": jnp.ones((3, 4))},
            r"got \(3, 4\)",
        ),
        ("mutual_learning", (jnp.zeros((0, 2, 3)),), {}, r"got \(0, 2, 3\)"),
    ],
)
def test_says_what_is_wrong(name, arguments, options, message):
    function = inspect.unwrap(getattr(ensembles, name))
    with pytest.raises(ValueError, match=message):
        function(*arguments, **options)


def test_a_teacher_of_little_weight_leaves_divergences_finite():
    """Its class has a probability, but the mean's is too small for a float."""
    teachers = jnp.array([[[0.0, -1e4]], [[0.0, -46.0]]])

    def loss(student):
        return multi_teacher_distillation(
            student,
            teachers,
            combine="divergences",
            weights=jnp.array([1.0, 1e-30]),
            temperature=1.0,
        )[0]

    value, gradient = jax.value_and_grad(loss)(jnp.array([[1.0, 0.0]]))
    np.testing.assert_allclose(value, np.log1p(np.exp(-1.0)), rtol=1e-6)
    assert jnp.all(jnp.isfinite(gradient))
