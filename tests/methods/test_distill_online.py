"""Students that learn together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import losses
from jaxtransfer.methods import distill
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


@pytest.mark.parametrize("number", [-1, 3])
def test_a_student_that_is_not_in_the_cohort(number):
    with pytest.raises(ValueError, match=f"number: 0 to 2, got {number}"):
        distill.of_cohort(*COHORT, number)
