import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import log_softmax

from jaxtransfer import losses
from jaxtransfer.methods import distill, finetune
from jaxtransfer.train import metrics
from jaxtransfer.typing import Variables
from tests import digits
from tests.twins import KINDS, jitted, network

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (6, 6))
BATCH = {"inputs": X, "labels": jnp.array([0, 2, 1, 1, 0, 2])}
TEACHER = network("linen", widths=(9,), rate=0.5, normalized=True)
GIVEN = jitted(TEACHER).init(jax.random.key(3), X)


@pytest.fixture(scope="module", params=KINDS)
def student(request):
    model = network(request.param)
    return model, jitted(model).init(KEY, X)


def divergence(student_logits, teacher_logits, temperature):
    student_log = log_softmax(np.asarray(student_logits, np.float64) / temperature, -1)
    teacher_log = log_softmax(np.asarray(teacher_logits, np.float64) / temperature, -1)
    terms = np.exp(teacher_log) * (teacher_log - student_log)
    return temperature**2 * terms.sum(-1)


def task_loss(logits, labels):
    return -log_softmax(np.asarray(logits, np.float64), -1)[np.arange(6), labels]


def logits_of(student):
    model, start = student
    return model.apply(start, X)[0], TEACHER.apply(GIVEN, X)[0]


def value(task, start, batch, frozen):
    begun = distill.init(start)
    return jax.jit(task)(begun.params, frozen, begun.model_state, batch, KEY)


@pytest.mark.parametrize(("alpha", "temperature"), [(0.9, 4.0), (0.5, 1.0), (1.0, 2.0)])
def test_the_objective_is_hinton_s(student, alpha, temperature):
    model, start = student
    task = distill.objective(model, TEACHER, alpha=alpha, temperature=temperature)
    loss, (_, measured) = value(task, start, BATCH, {"teacher": GIVEN})
    own, taught = logits_of(student)
    soft = divergence(own, taught, temperature).mean()
    hard = task_loss(own, BATCH["labels"]).mean()
    np.testing.assert_allclose(loss, (1 - alpha) * hard + alpha * soft, rtol=1e-4)
    final = metrics.finalize(measured)
    np.testing.assert_allclose(final["distillation"], soft, rtol=1e-4)
    np.testing.assert_allclose(final["task_loss"], hard, rtol=1e-4)


def test_without_labels_the_teacher_is_all(student):
    model, start = student
    task = distill.objective(model, TEACHER, alpha=0.3)
    loss, (_, measured) = value(task, start, {"inputs": X}, {"teacher": GIVEN})
    np.testing.assert_allclose(
        loss, divergence(*logits_of(student), 4.0).mean(), rtol=1e-4
    )
    assert set(measured) == {"distillation"}


def test_at_weight_zero_the_teacher_is_not_needed(student):
    model, start = student
    task = distill.objective(model, TEACHER, alpha=0.0)
    loss, _ = value(task, start, BATCH, {})
    expected = task_loss(logits_of(student)[0], BATCH["labels"]).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_rows_that_do_not_count(student):
    model, start = student
    where = jnp.arange(6) < 4
    task = distill.objective(model, TEACHER)
    loss, _ = value(task, start, {**BATCH, "where": where}, {"teacher": GIVEN})
    own, taught = logits_of(student)
    soft = divergence(own, taught, 4.0)[:4].mean()
    hard = task_loss(own, BATCH["labels"])[:4].mean()
    np.testing.assert_allclose(loss, 0.1 * hard + 0.9 * soft, rtol=1e-4)


def test_nothing_flows_into_the_teacher(student):
    model, start = student
    begun = distill.init(start)
    task = distill.objective(model, TEACHER)

    def loss(params, given):
        return task(params, {"teacher": given}, begun.model_state, BATCH, KEY)[0]

    own, given = jax.jit(jax.grad(loss, argnums=(0, 1)))(begun.params, GIVEN)
    assert any(jnp.any(leaf != 0) for leaf in jax.tree.leaves(own))
    assert not any(jnp.any(leaf != 0) for leaf in jax.tree.leaves(given))


@pytest.mark.parametrize("labels", [False, True])
def test_across_domains(student, labels):
    model, start = student
    source = BATCH if labels else {"inputs": X}
    target = {"inputs": 2 * X[:4] + 1}
    task = distill.cross_domain_objective(
        model, TEACHER, tap="blocks_0", distillation=0.7, alignment=0.4, temperature=2.0
    )
    pair = {"source": source, "target": target}
    loss, (_, measured) = value(task, start, pair, {"teacher": GIVEN})
    parts, tapped = [], []
    for inputs in (X, target["inputs"]):
        own, features, _ = model.apply(start, inputs, taps=("blocks_0",))
        taught = TEACHER.apply(GIVEN, inputs)[0]
        parts.append(divergence(own, taught, 2.0).mean())
        tapped.append(features["blocks_0"])
    expected = 0.7 * np.mean(parts) + 0.4 * losses.mmd(*tapped)
    if labels:
        expected += task_loss(logits_of(student)[0], BATCH["labels"]).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    np.testing.assert_allclose(
        metrics.finalize(metrics.promote(measured))["distillation"],
        parts[1],
        rtol=1e-4,
    )


def test_across_domains_either_term_alone(student):
    model, start = student
    pair = {"source": {"inputs": X}, "target": {"inputs": X + 1}}
    alone = distill.cross_domain_objective(
        model, TEACHER, tap="blocks_0", distillation=0.0
    )
    _, (_, measured) = value(alone, start, pair, {})
    assert set(measured) == {"alignment"}
    alone = distill.cross_domain_objective(
        model, TEACHER, tap="blocks_0", alignment=0.0
    )
    _, (_, measured) = value(alone, start, pair, {"teacher": GIVEN})
    assert set(measured) == {"distillation"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_taught_student_beats_one_with_few_labels(kind):
    """Three labels a class alone, or the same network and unlabelled images."""
    train, test = digits.digits()
    teacher = network(kind, inputs=64, outputs=10, widths=(64, 32))
    state = digits.learn(
        finetune.objective(teacher),
        optax.adam(3e-3),
        jitted(teacher).init(KEY, jnp.ones((1, 64))),
        digits.batches(train, 64),
        steps=300,
    )
    given = Variables(state.params, state.model_state)
    model = network(kind, inputs=64, outputs=10, widths=(32,))
    fresh = jitted(model).init(KEY, jnp.ones((1, 64)))
    options = {"optimizer": optax.adam(3e-3), "steps": 200}
    alone = digits.learn(
        finetune.objective(model),
        variables=fresh,
        draw=digits.batches(digits.few(train, 3), 30),
        **options,
    )
    taught = digits.learn(
        distill.objective(model, teacher),
        variables=distill.init(fresh),
        draw=digits.batches({"inputs": train["inputs"]}, 64),
        frozen={"teacher": given},
        **options,
    )
    baseline = digits.accuracy(finetune.predict(model), alone, test)
    assert digits.accuracy(distill.predict(model), taught, test) > baseline + 0.05
