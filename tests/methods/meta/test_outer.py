"""The outer level: what is averaged over tasks, what is weighed, and what is seen."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtransfer.methods import meta
from jaxtransfer.methods.meta import chunks
from jaxtransfer.model import from_linen
from jaxtransfer.train import init_state, metrics, scan_fit, train_step
from tests.tasks import KEY, close, episodes, first, gradient, made

MODEL, START = made("linen")
BATCH = episodes()
LEARNER = meta.maml(meta.task(MODEL), optax.sgd(0.2), steps=3)
FIRST_ORDER = meta.maml(meta.task(MODEL), optax.adam(0.1), steps=3, first_order=True)


@pytest.fixture(scope="module")
def curves():
    """The trajectory of the four tasks."""
    return jax.jit(meta.trajectory(LEARNER))(START.params, {}, {}, BATCH, KEY)


# --- tasks side by side, and one after the other --------------------------------------


@pytest.mark.parametrize("chunk", [None, 2])
def test_metrics_are_those_of_the_query_over_all_tasks(chunk, curves):
    run = jax.jit(meta.objective(LEARNER, chunk=chunk))
    loss, (state, measured) = run(START.params, {}, {}, BATCH, KEY)
    assert state == {}
    assert float(measured["accuracy"].count) == 4 * 6
    final = metrics.finalize(measured)
    np.testing.assert_allclose(final["task_loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(final["accuracy"], curves["accuracy"][:, -1].mean())


def test_the_trajectory_begins_at_the_start_and_ends_at_the_objective(curves):
    assert curves["loss"].shape == curves["accuracy"].shape == (4, 4)
    norms = curves["parameter_norm"]
    np.testing.assert_allclose(norms[:, 0], optax.tree.norm(START.params), rtol=1e-5)
    support = jax.tree.map(lambda leaf: leaf[0], BATCH["support"])
    end = jax.jit(LEARNER.adapt)(START.params, {}, {}, support, KEY).params
    np.testing.assert_allclose(norms[0, -1], optax.tree.norm(end), rtol=1e-5)
    assert not np.allclose(norms[0, -1], norms[0, 0], rtol=1e-3)
    for steps in (0, 2, 3):
        learner = meta.maml(meta.task(MODEL), optax.sgd(0.2), steps=steps)
        run = jax.jit(meta.objective(learner))
        loss, _ = run(START.params, {}, {}, BATCH, KEY)
        np.testing.assert_allclose(curves["loss"][:, steps].mean(), loss, rtol=1e-5)


def test_the_trajectory_keeps_the_order_of_tasks_in_chunks(curves):
    for chunk in (1, 2):
        follow = jax.jit(meta.trajectory(LEARNER, chunk=chunk))
        close(follow(START.params, {}, {}, BATCH, KEY), curves)


@pytest.mark.parametrize(
    ("room", "chunk"), [(1.0, 1), (2500.0, 2), (4500.0, 3), (1e9, 6)]
)
def test_as_many_tasks_as_fit_and_divide_run_side_by_side(room, chunk, monkeypatch):
    """Of six tasks that write 1000 bytes each."""
    monkeypatch.setitem(chunks._ROOM, "cpu", room)
    assert chunks._chunk("auto", 6, lambda x: x + 1, jnp.zeros(250)) == chunk


def test_the_room_changes_nothing_but_the_order(monkeypatch):
    whole = gradient(meta.objective(LEARNER), START, BATCH)
    monkeypatch.setitem(chunks._ROOM, "cpu", 1.0)
    close(gradient(meta.objective(LEARNER), START, BATCH), whole)
    program = jax.make_jaxpr(meta.objective(LEARNER))(START.params, {}, {}, BATCH, KEY)
    assert "length=4" in str(program)


def test_a_chunk_that_is_no_number_is_refused(types_unchecked):
    with pytest.raises(ValueError, match="chunk: got 'all'; choose a number"):
        meta.objective(LEARNER, chunk="all")(START.params, {}, {}, BATCH, KEY)


# --- losses of every step -------------------------------------------------------------


def reference_weights(steps, epoch, epochs):
    """The released formula, by epochs; after the last of them, the last loss alone."""
    if epoch >= epochs:
        return [0.0] * steps + [1.0]
    speed = 1 / (steps * epochs)
    early = max(1 / steps - epoch * speed, 0.03 / steps)
    last = min(1 / steps + epoch * (steps - 1) * speed, 1 - (steps - 1) * 0.03 / steps)
    return [0.0, *[early] * (steps - 1), last]


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_weights_move_to_the_last_step_as_in_the_reference(steps):
    """Ten epochs of a hundred updates."""
    weights = meta.multi_step_weights(steps, 1000)
    for epoch in range(13):
        found = weights(jnp.array(100 * epoch))
        np.testing.assert_allclose(
            found, reference_weights(steps, epoch, 10), atol=1e-6
        )
    # The floor is reached before the end.
    assert float(weights(999)[1]) == pytest.approx(1.0 if steps == 1 else 0.03 / steps)


def test_the_loss_of_every_step_is_weighed_and_its_gradient_with_it(curves):
    weights = (0.0, 0.2, 0.3, 0.5)
    weighed = meta.objective(LEARNER, step_weights=lambda count: jnp.array(weights))
    start = meta.counted(START)
    loss, found = gradient(weighed, start, BATCH)
    np.testing.assert_allclose(loss, curves["loss"].mean(0) @ np.array(weights), 1e-5)

    def summed(params, frozen, model_state, batch, key):
        total = 0.0
        for steps in (1, 2, 3):
            learner = meta.maml(meta.task(MODEL), optax.sgd(0.2), steps=steps)
            value, _ = meta.objective(learner)(params, {}, {}, batch, key)
            total = total + weights[steps] * value
        return total, ({}, {})

    close(found, gradient(summed, START, BATCH)[1])


def test_the_losses_of_many_steps_keep_no_activations():
    part = {"inputs": jnp.ones((1, 500, 6)), "labels": jnp.zeros((1, 500), int)}
    batch = {"support": first(BATCH)["support"], "query": part}

    def memory(steps):
        learner = meta.maml(meta.task(MODEL), optax.sgd(0.2), steps=steps)
        weights = meta.multi_step_weights(steps, 9)
        weighed = meta.objective(learner, step_weights=weights, chunk=1)
        state = meta.counted(START).model_state
        run = jax.jit(jax.grad(lambda p: weighed(p, {}, state, batch, KEY)[0]))
        analysis = run.lower(START.params).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    assert memory(20) < 1.5 * memory(4)


def test_the_weights_follow_the_number_of_updates(curves):
    """All of the weight is on the last loss from the third update on."""
    objective = meta.objective(
        LEARNER, step_weights=meta.multi_step_weights(3, 2), chunk=2
    )
    optimizer = optax.sgd(0.0)
    state = init_state(KEY, meta.counted(START), optimizer)
    state, history = jax.jit(
        lambda state: scan_fit(
            train_step(objective, optimizer), state, lambda *_: BATCH, steps=3
        )
    )(state)
    assert int(state.model_state["updates"]) == 3
    steps = np.array(curves["loss"].mean(0))
    expected = [steps[1:].mean(), (steps[1:] @ [1 / 6, 1 / 6, 2 / 3]), steps[-1]]
    np.testing.assert_allclose(history.train["loss"], expected, rtol=1e-5)


def test_weights_that_cannot_be_used_are_refused():
    weighed = meta.objective(LEARNER, step_weights=meta.multi_step_weights(3, 2))
    with pytest.raises(ValueError, match=r"step_weights follow .*counted\(variables\)"):
        weighed(START.params, {}, {}, BATCH, KEY)
    two = meta.objective(LEARNER, step_weights=meta.multi_step_weights(2, 2))
    counted = meta.counted(START).model_state
    with pytest.raises(ValueError, match=r"weights \(3,\) for \(4,\) losses"):
        two(START.params, {}, counted, BATCH, KEY)
    for steps, updates, name in ((0, 1, "steps"), (1, 0, "updates")):
        with pytest.raises(ValueError, match=f"{name}: got 0; it must be 1 or more"):
            meta.multi_step_weights(steps, updates)


def test_a_count_is_no_part_of_the_network(curves):
    counted = meta.counted(START)
    run = jax.jit(meta.trajectory(LEARNER))
    found = run(counted.params, {}, counted.model_state, BATCH, KEY)
    close(found, curves)
    _, (state, _) = jax.jit(meta.reptile(FIRST_ORDER))(
        counted.params, {}, counted.model_state, BATCH, KEY
    )
    assert {name: int(value) for name, value in state.items()} == {"updates": 1}


# --- Reptile --------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", [1, 4])
def test_reptile_moves_to_the_mean_of_where_the_tasks_end(tasks):
    batch = BATCH if tasks == 4 else first(BATCH)
    optimizer = optax.sgd(1.0)
    step = train_step(meta.reptile(FIRST_ORDER, chunk=1), optimizer)
    state = init_state(KEY, START, optimizer)
    after, measured = jax.jit(step)(state, {"support": batch["support"]})

    @jax.jit
    @jax.vmap
    def ends(support):
        return FIRST_ORDER.adapt(START.params, {}, {}, support, KEY).params

    apart = ends(batch["support"])
    close(after.params, jax.tree.map(lambda leaf: leaf.mean(0), apart))
    gaps = jax.tree.map(
        lambda end, start: ((end - start) ** 2).sum() / 2 / tasks, apart, START.params
    )
    final = metrics.finalize(measured)
    np.testing.assert_allclose(final["loss"], sum(jax.tree.leaves(gaps)), rtol=1e-5)
    assert float(measured["accuracy"].count) == 3 * tasks


@pytest.mark.parametrize(
    "learner",
    [
        meta.maml(meta.task(MODEL), meta.meta_sgd(0.1), steps=1),
        meta.maml(meta.task(MODEL), optax.sgd(0.1), steps=1, per_step="head/bias"),
    ],
    ids=["learned optimizer", "per step"],
)
def test_reptile_of_other_meta_parameters_is_refused(learner):
    start = learner.init(START)
    with pytest.raises(ValueError, match="reptile: the adapted parameters are not of"):
        meta.reptile(learner)(start.params, {}, {}, BATCH, KEY)


# --- what is seen ---------------------------------------------------------------------


def test_a_diverged_task_is_named():
    losses = np.array([[1.0, 0.5], [2.0, 0.25], [4.0, np.nan]])
    meta.check_finite({"loss": losses[:2]})
    with pytest.raises(
        FloatingPointError,
        match=r"^task 12: the loss is nan after step 1 \(4.0 the step before\); take a",
    ):
        meta.check_finite({"loss": jnp.asarray(losses)}, first_task=10)
    norms = np.array([[1.0, 2.0], [1.0, 2.0], [1.5, 3e20]])
    with pytest.raises(
        FloatingPointError,
        match=r"before\), the norm of the parameters 3e\+20 \(1.5 the step before\);",
    ):
        meta.check_finite({"loss": losses, "parameter_norm": norms})
    losses[1, 0] = np.inf
    with pytest.raises(
        FloatingPointError, match="task 1: the loss is inf after step 0;"
    ):
        meta.check_finite({"loss": losses})


# --- tasks of different size ----------------------------------------------------------


def test_rows_that_do_not_count_change_nothing(curves):
    def padded(part):
        rows = part["labels"].shape[1]
        where = jnp.arange(rows + 3) < rows
        return {
            "inputs": jnp.pad(part["inputs"], ((0, 0), (0, 3), (0, 0)))
            + 9.0 * ~where[None, :, None],
            "labels": jnp.pad(part["labels"], ((0, 0), (0, 3)), constant_values=2),
            "where": jnp.tile(where, (4, 1)),
        }

    more = {name: padded(part) for name, part in BATCH.items()}
    follow = jax.jit(meta.trajectory(LEARNER))
    close(follow(START.params, {}, {}, more, KEY), curves)


def test_classes_that_a_task_lacks_change_nothing():
    """Two of three classes: the network with two outputs."""
    batch = episodes(ways=2)
    model, two = from_linen(nn.Dense(3)), from_linen(nn.Dense(2))
    params = model.init(KEY, jnp.ones((1, 6))).params
    classes = jnp.tile(jnp.array([True, True, False]), (4, 1))
    fewer = {name: {**part, "classes": classes} for name, part in batch.items()}

    def run(model, params, batch):
        task = meta.task(model)
        learner = meta.maml(task, optax.adam(0.1), steps=2)

        @jax.jit
        @jax.vmap
        def each(episode):
            adapted, state, _ = learner.adapt(params, {}, {}, episode["support"], KEY)
            loss, (_, measured) = task.query(adapted, {}, state, episode["query"], KEY)
            return adapted, (loss, measured)

        return each(batch)

    adapted, judged = run(model, params, fewer)

    def first_two(tree):
        return jax.tree.map(lambda leaf: leaf[..., :2], tree)

    close((first_two(adapted), judged), run(two, first_two(params), batch))
    for name, leaf in params.items():
        np.testing.assert_array_equal(
            adapted[name][..., 2], jnp.stack([leaf[..., 2]] * 4)
        )


def test_a_metric_of_the_query_of_a_name_that_is_taken_is_refused():
    def query(*given):
        loss, (state, _) = LEARNER.query(*given)
        return loss, (state, {"loss": loss})

    learner = LEARNER._replace(query=query)
    with pytest.raises(ValueError, match="query: its metric 'loss' has the name of"):
        jax.eval_shape(meta.trajectory(learner), START.params, {}, {}, BATCH, KEY)


def test_support_and_query_draw_numbers_of_their_own():
    def drawn(params, frozen, model_state, batch, key):
        return params["w"] * jax.random.uniform(key), (
            model_state,
            {"drawn": jax.random.uniform(key)},
        )

    learner = meta.maml(meta.Task(drawn, drawn), optax.sgd(1.0), steps=1)
    task = {"rows": jnp.zeros((1, 2))}
    batch, start = {"support": task, "query": task}, {"w": jnp.zeros(())}
    loss, (_, measured) = meta.objective(learner)(start, {}, {}, batch, KEY)
    of_query = float(metrics.finalize(measured)["drawn"])
    of_support = -float(loss) / of_query
    assert 0 < of_support < 1 and abs(of_support - of_query) > 1e-3
    seen = meta.trajectory(learner)(start, {}, {}, batch, KEY)["drawn"]
    np.testing.assert_allclose(seen, np.full((1, 2), of_query), rtol=1e-6)


def test_a_task_may_be_a_number():
    def loss(params, frozen, model_state, batch, key):
        return (params["w"] - batch["target"]) ** 2, (model_state, {})

    learner = meta.maml(meta.Task(loss, loss), optax.sgd(0.5), steps=1)
    task = {"target": jnp.array([1.0, 2.0])}
    batch = {"support": task, "query": task}
    value = meta.objective(learner)({"w": jnp.zeros(())}, {}, {}, batch, KEY)[0]
    assert float(value) == 0.0
