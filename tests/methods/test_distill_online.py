"""Students that learn together, and stages of an objective."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtransfer import losses
from jaxtransfer.methods import distill
from jaxtransfer.train import init_state, train_step
from jaxtransfer.train.metrics import finalize, promote
from jaxtransfer.typing import Variables
from tests.twins import jitted, network, same

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (6, 6))
BATCH = {"inputs": X, "labels": jnp.array([0, 2, 1, 1, 0, 2])}
MODEL = jitted(network("linen", widths=(4,), normalized=True))
COHORT = distill.init_cohort(KEY, MODEL, X, students=3)


def members(params, state):
    return [distill.of_cohort(params, state, n) for n in range(3)]


def outputs(variables):
    return MODEL.apply(variables, X, train=True)[0]


def loss_of(objective, batch=BATCH):
    return jax.jit(objective)(COHORT.params, {}, COHORT.model_state, batch, KEY)


@pytest.mark.parametrize("where", [None, [True, True, False, True, False, True]])
def test_every_student_has_the_gradient_of_its_own_loss(where):
    batch = BATCH if where is None else {**BATCH, "where": jnp.array(where)}
    rows = jnp.flatnonzero(jnp.ones(6, bool) if where is None else batch["where"])
    objective = distill.mutual_objective(MODEL, weight=0.7, temperature=2.0)
    found = jax.jit(
        jax.grad(lambda p: objective(p, {}, COHORT.model_state, batch, KEY)[0])
    )(COHORT.params)["cohort"]
    everyone = members(*COHORT)
    for n, own in enumerate(everyone):
        peers = [outputs(v)[rows] for m, v in enumerate(everyone) if m != n]

        def alone(params, own=own, peers=peers):
            logits = outputs(Variables(params, own.model_state))[rows]
            task = losses.cross_entropy(logits, BATCH["labels"][rows]).mean()
            taught = [
                losses.knowledge_distillation(logits, peer, temperature=2.0).mean()
                for peer in peers
            ]
            return task + 0.7 * sum(taught) / 2

        expected = jax.grad(alone)(own.params)
        jax.tree.map(
            lambda got, want, n=n: np.testing.assert_allclose(got[n], want, 1e-4, 1e-6),
            found,
            expected,
        )


def test_a_cohort_begins_apart_and_is_measured_in_the_mean():
    assert not same(*(distill.of_cohort(*COHORT, n).params for n in (0, 1)))
    _, (state, measured) = loss_of(distill.mutual_objective(MODEL))
    each = [
        losses.cross_entropy(outputs(v), BATCH["labels"]).mean()
        for v in members(*COHORT)
    ]
    measured = finalize(promote(measured))
    np.testing.assert_allclose(measured["task_loss"], np.mean(each), rtol=1e-5)
    assert 0 <= measured["accuracy"] <= 1 and measured["distillation"] > 0
    own = MODEL.apply(members(*COHORT)[1], X, train=True)[2]
    after = distill.of_cohort(COHORT.params, state, 1).model_state
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5), after, own)


def test_without_labels_the_peers_are_all():
    total, (_, measured) = loss_of(distill.mutual_objective(MODEL), {"inputs": X})
    assert set(measured) == {"distillation"}
    mean = finalize(promote(measured))["distillation"]
    np.testing.assert_allclose(total, 3 * mean, rtol=1e-5)


def test_one_student_is_no_cohort():
    with pytest.raises(ValueError, match="students: got 1; a cohort has 2 or more"):
        distill.init_cohort(KEY, MODEL, X, students=1)


# --- stages ---------------------------------------------------------------------------


def toward(target, name):
    def objective(params, frozen, model_state, batch, key):
        distance = jnp.sum((params["w"] - target) ** 2) / 2
        return distance, (model_state, {name: distance})

    return objective


def test_stages_follow_one_another():
    both = distill.stages((4, toward(0.0, "first")), (None, toward(1.0, "second")))
    sgd = optax.sgd(1.0)
    begun = distill.counted(Variables({"w": jnp.array(5.0)}))
    step = jax.jit(train_step(both, sgd))
    state, seen = init_state(KEY, begun, sgd), []
    for _ in range(6):
        state, measured = step(state, {})
        seen.append((float(state.params["w"]), finalize(measured)))
    assert [w for w, _ in seen] == [0.0] * 4 + [1.0] * 2
    assert np.isnan(seen[0][1]["second"]) and seen[0][1]["first"] == 12.5
    assert np.isnan(seen[4][1]["first"]) and seen[4][1]["second"] == 0.5
    assert int(state.model_state["updates"]) == 6


def test_a_stage_that_counts_itself_is_counted_once():
    student = network("linen", widths=(4,))
    terms = {
        "own": distill.Term(
            loss=losses.hint, of="student", weight=optax.constant_schedule(1.0)
        )
    }
    begun = distill.start(
        KEY, student, None, terms, student_variables=student.init(KEY, X), inputs=X
    )
    objective = distill.objective(student, terms=terms)
    both = distill.stages((1, objective), (None, objective))
    _, (state, _) = jax.jit(both)(begun.params, {}, begun.model_state, BATCH, KEY)
    assert int(state["updates"]) == 1


@pytest.mark.parametrize("lengths", [(), (None, None), (0, None), (-1,)])
def test_stages_that_can_not_follow_are_refused(lengths):
    parts = [(length, toward(0.0, "w")) for length in lengths]
    with pytest.raises(ValueError, match="stages: got lengths"):
        distill.stages(*parts)


def test_stages_without_a_count_are_refused():
    both = distill.stages((1, toward(0.0, "a")), (None, toward(1.0, "b")))
    with pytest.raises(ValueError, match=r"start from distill.counted\(variables\)"):
        both({"w": jnp.zeros(())}, {}, {}, {}, KEY)
