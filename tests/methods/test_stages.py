"""Objectives that follow one another, of distillation and of meta-learning."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtransfer import losses
from jaxtransfer.methods import distill, meta
from jaxtransfer.train import init_state, train_step
from jaxtransfer.train.metrics import finalize
from jaxtransfer.typing import Variables
from tests import tasks
from tests.twins import network

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (6, 6))
BATCH = {"inputs": X, "labels": jnp.array([0, 2, 1, 1, 0, 2])}


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
    with pytest.raises(ValueError, match=r"stages follow .*counted\(variables\)"):
        both({"w": jnp.zeros(())}, {}, {}, {}, KEY)


def test_the_order_of_the_meta_gradient_changes_during_a_run():
    """Derivative-order annealing of MAML++, in float64 as in float32."""
    model, start = tasks.made("linen")
    batch = tasks.episodes()
    task = meta.task(model)

    def of_order(first_order):
        return meta.objective(
            meta.maml(task, optax.sgd(0.2), steps=2, first_order=first_order)
        )

    both = meta.stages((2, of_order(True)), (None, of_order(False)))

    @jax.jit
    def gradients(updates):
        """Of either order, and of the stage of a number of updates."""

        def of(objective, state):
            def loss(params):
                return objective(params, {}, state, batch, KEY)[0]

            return jax.grad(loss)(start.params)

        alone = of(of_order(True), {}), of(of_order(False), {})
        return *alone, of(both, {"updates": updates})

    for updates, order in ((0, 0), (1, 0), (2, 1), (9, 1)):
        found = gradients(jnp.array(updates))
        tasks.close(found[2], found[order])
        gap = optax.tree.norm(optax.tree.sub(found[0], found[1]))
        assert gap > 0.01 * optax.tree.norm(found[1])


def test_a_loss_keeps_its_precision():
    with jax.enable_x64(True):
        both = meta.stages((1, toward(0.0, "a")), (None, toward(1.0, "b")))
        params = {"w": jnp.array(1 / 3, jnp.float64)}
        loss, _ = both(params, {}, {"updates": jnp.array(1)}, {}, KEY)
    assert loss.dtype == jnp.float64
    np.testing.assert_allclose(loss, 2 / 9, rtol=1e-15)
