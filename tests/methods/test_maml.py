import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtransfer import data, tree
from jaxtransfer.methods import finetune, maml
from jaxtransfer.train import metrics
from jaxtransfer.typing import Variables
from tests import digits
from tests.twins import KINDS, jitted, network, same

KEY = jax.random.key(0)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def episodes(tasks=4, ways=3, key=KEY, dtype=jnp.float32):
    def part(key, rows):
        return {
            "inputs": jax.random.normal(key, (tasks, rows, 6), dtype),
            "labels": jnp.tile(jnp.arange(rows) % ways, (tasks, 1)),
        }

    first, second = jax.random.split(key)
    return {"support": part(first, 3), "query": part(second, 6)}


@functools.cache
def made(kind, **options):
    model = network(kind, widths=(5,), **options)
    return model, jitted(model).init(KEY, jnp.ones((2, 6)))


def gradient(objective, start, batch=None, key=KEY):
    def loss(params):
        return objective(params, {}, start.model_state, batch, key)[0]

    return jax.jit(jax.value_and_grad(loss))(start.params)


def close(first, second, tolerance=1e-5):
    for one, two in zip(*map(jax.tree.leaves, (first, second)), strict=True):
        np.testing.assert_allclose(one, two, rtol=tolerance, atol=tolerance)


# --- a quadratic, of which everything is known ----------------------------------------

RANDOM = np.random.default_rng(0)
TASKS, SIZE, RATE, STEPS = 3, 4, 0.1, 5


def positive():
    root = RANDOM.normal(size=(TASKS, SIZE, SIZE))
    return root @ root.swapaxes(1, 2) / SIZE + 0.2 * np.eye(SIZE)


QUADRATIC = {
    part: {"matrix": positive(), "centre": RANDOM.normal(size=(TASKS, SIZE))}
    for part in ("support", "query")
}
WEIGHTS = RANDOM.normal(size=SIZE)


def bowl(params, frozen, model_state, batch, key):
    offset = params["w"] - batch["centre"]
    return offset @ batch["matrix"] @ offset / 2, (model_state, {})


def bowl_by_hand(first_order):
    """w_K - a = (I - r A)^K (w - a); dL/dw = (dw_K/dw)^T B (w_K - b)."""
    losses, gradients = [], []
    for task in range(TASKS):
        (matrix, centre), (other, goal) = (
            (QUADRATIC[p]["matrix"][task], QUADRATIC[p]["centre"][task])
            for p in ("support", "query")
        )
        jacobian = np.linalg.matrix_power(np.eye(SIZE) - RATE * matrix, STEPS)
        adapted = centre + jacobian @ (WEIGHTS - centre)
        pull = other @ (adapted - goal)
        losses.append((adapted - goal) @ pull / 2)
        gradients.append(pull if first_order else jacobian.T @ pull)
    return np.mean(losses), np.mean(gradients, axis=0)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("chunk", [None, 1])
def test_the_gradient_of_a_quadratic_is_the_closed_form(
    first_order, remat, chunk, float64
):
    task = maml.objective(
        bowl,
        optax.sgd(RATE),
        steps=STEPS,
        first_order=first_order,
        remat=remat,
        chunk=chunk,
    )
    batch = jax.tree.map(jnp.asarray, QUADRATIC)
    loss, found = gradient(task, Variables({"w": jnp.asarray(WEIGHTS)}), batch)
    expected_loss, expected = bowl_by_hand(first_order)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-10)
    np.testing.assert_allclose(found["w"], expected, rtol=1e-10)
    assert np.abs(expected - bowl_by_hand(not first_order)[1]).max() > 1e-2


# --- networks against finite differences ----------------------------------------------

INNER = {
    "sgd": optax.sgd(0.3),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(0.05, eps_root=1e-6),
    "clipped": optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.5)),
}


@pytest.mark.parametrize(
    ("kind", "inner"),
    [("linen", "sgd"), ("nnx", "sgd"), ("linen", "momentum"), ("nnx", "adam")]
    + [("linen", "clipped")],
)
def test_the_gradient_through_any_optimizer_is_the_difference(kind, inner, float64):
    model, start = made(kind)
    start = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), start)
    batch = episodes(tasks=2, dtype=jnp.float64)
    task = maml.objective(finetune.objective(model), INNER[inner], steps=3)

    @jax.jit
    def loss(params):
        return task(params, {}, {}, batch, KEY)[0]

    found = jax.jit(jax.grad(loss))(start.params)
    first = maml.objective(
        finetune.objective(model), INNER[inner], steps=3, first_order=True
    )
    _, other = gradient(first, start, batch)
    difference = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), found, other)
    assert max(jax.tree.leaves(difference)) > 1e-4
    leaves, structure = jax.tree.flatten(start.params)
    for seed in range(3):
        random = np.random.default_rng(seed)
        ways = structure.unflatten([random.normal(size=leaf.shape) for leaf in leaves])
        along = sum(
            jnp.vdot(a, b)
            for a, b in zip(*map(jax.tree.leaves, (found, ways)), strict=True)
        )
        size = 1e-6
        ahead, behind = (
            loss(jax.tree.map(lambda p, w, s=s: p + s * w, start.params, ways))
            for s in (size, -size)
        )
        np.testing.assert_allclose(
            along, (ahead - behind) / (2 * size), rtol=1e-5, atol=1e-8
        )


@pytest.mark.parametrize("kind", KINDS)
def test_first_order_is_the_gradient_at_the_adapted_parameters(kind):
    model, start = made(kind)
    task, batch = finetune.objective(model), episodes()
    meta = maml.objective(task, optax.sgd(0.3), steps=3, first_order=True)
    _, found = gradient(meta, start, batch)
    to_task = maml.adapt(task, optax.sgd(0.3), steps=3)

    @jax.jit
    @jax.vmap
    def at_adapted(episode):
        adapted, _ = to_task(start.params, {}, {}, episode["support"], KEY)
        return jax.grad(lambda p: task(p, {}, {}, episode["query"], KEY)[0])(adapted)

    expected = jax.tree.map(lambda leaf: leaf.mean(axis=0), at_adapted(batch))
    close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first_order", [False, True])
def test_every_form_is_the_same(kind, first_order):
    """Side by side or in chunks, kept or recomputed, scanned or written out."""
    model, start = made(kind)
    task, batch = finetune.objective(model), episodes()
    build = functools.partial(
        maml.objective, task, optax.adam(0.1, eps_root=1e-6), first_order=first_order
    )
    expected = gradient(build(steps=2), start, batch)
    for options in ({"remat": False}, {"chunk": 1}, {"chunk": 2, "remat": False}):
        close(gradient(build(steps=2, **options), start, batch), expected)

    def written_out(params, frozen, model_state, batch, key):
        optimizer = optax.adam(0.1, eps_root=1e-6)
        total = 0.0
        for number in range(4):
            parts = jax.tree.map(lambda leaf, n=number: leaf[n], batch)
            fast, slots = params, optimizer.init(params)
            for _ in range(2):
                inner = jax.grad(
                    lambda p, s=parts["support"]: task(p, {}, {}, s, KEY)[0]
                )
                slope = inner(fast)
                if first_order:
                    slope = jax.lax.stop_gradient(slope)
                updates, slots = optimizer.update(slope, slots, fast)
                fast = optax.apply_updates(fast, updates)
            total += task(fast, {}, {}, parts["query"], KEY)[0]
        return total / 4, ({}, {})

    close(gradient(written_out, start, batch), expected)


def test_metrics_are_those_of_the_query_over_all_tasks():
    model, start = made("linen")
    batch = episodes()
    for chunk in (None, 2):
        task = maml.objective(
            finetune.objective(model), optax.sgd(0.1), steps=1, chunk=chunk
        )
        loss, (_, measured) = jax.jit(task)(start.params, {}, {}, batch, KEY)
        assert float(measured["accuracy"].count) == 4 * 6
        np.testing.assert_allclose(
            metrics.finalize(measured)["task_loss"], loss, rtol=1e-5
        )


def test_no_steps_is_the_query_loss_alone():
    model, start = made("nnx")
    batch = episodes()
    loss, _ = gradient(
        maml.objective(finetune.objective(model), optax.sgd(0.1), steps=0), start, batch
    )
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch["query"])
    expected, _ = finetune.objective(model)(start.params, {}, {}, flat, KEY)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_rules_choose_what_adapts(kind):
    """ANIL: the head adapts, all of it learns."""
    model, start = made(kind)
    task = finetune.objective(model)
    batch = episodes()
    support = jax.tree.map(lambda leaf: leaf[0], batch["support"])
    adapted, _ = maml.adapt(task, optax.adam(0.1), steps=2, rules="head")(
        start.params, {}, {}, support, KEY
    )
    assert same(adapted["blocks_0"], start.params["blocks_0"])
    assert not same(adapted["head"], start.params["head"])
    _, found = gradient(
        maml.objective(task, optax.sgd(0.1), steps=2, rules="head"), start, batch
    )
    assert tree.flatten(found).keys() == tree.flatten(start.params).keys()
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_differs_between_tasks_and_keys_and_repeats(kind):
    model, start = made(kind, rate=0.5)
    one = episodes(tasks=1)
    batch = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), one)
    follow = jax.jit(
        maml.trajectory(finetune.objective(model), optax.sgd(0.1), steps=2)
    )
    first, again, other = (
        follow(start.params, {}, {}, batch, jax.random.key(seed))["loss"]
        for seed in (0, 0, 1)
    )
    assert same(first, again)
    assert not same(first, other)
    assert not same(first[0], first[1])


@pytest.mark.parametrize("kind", KINDS)
def test_the_trajectory_begins_at_the_start_and_ends_at_the_objective(kind):
    model, start = made(kind)
    task, batch = finetune.objective(model), episodes()
    follow = maml.trajectory(task, optax.sgd(0.2), steps=3)
    curve = jax.jit(follow)(start.params, {}, {}, batch, KEY)
    assert curve["loss"].shape == curve["accuracy"].shape == (4, 4)
    for column, steps in ((0, 0), (2, 2), (3, 3)):
        loss, _ = gradient(
            maml.objective(task, optax.sgd(0.2), steps=steps), start, batch
        )
        np.testing.assert_allclose(curve["loss"][:, column].mean(), loss, rtol=1e-5)


@pytest.mark.parametrize("transductive", [True, False])
def test_whose_statistics_the_query_is_normalised_by(transductive):
    """Its own, or the support's: then no query row depends on another."""
    import flax.linen as nn

    from jaxtransfer.model import from_linen

    class Normalized(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool = False):
            x = nn.Dense(4)(x)
            x = nn.BatchNorm(not train, momentum=0.0)(x)
            return nn.Dense(3)(nn.relu(x))

    model = from_linen(Normalized())
    start = jitted(model).init(KEY, jnp.ones((2, 6)))
    task = finetune.objective(model)
    query = None if transductive else finetune.objective(model, train=False)
    meta = maml.objective(task, optax.sgd(0.1), steps=1, query=query)
    batch = episodes(tasks=1)
    only = {**batch["query"], "where": jnp.arange(6)[None] < 3}
    moved = {**only, "inputs": only["inputs"].at[:, 4].add(5.0)}
    run = jax.jit(meta)
    (first, (state, _)), (second, _) = (
        run(start.params, {}, start.model_state, {**batch, "query": q}, KEY)
        for q in (only, moved)
    )
    assert (abs(float(first) - float(second)) > 1e-4) == transductive
    assert same(state, start.model_state)
    # One row of it: a shift of all would be normalised away.
    inputs = batch["support"]["inputs"].at[:, 0].add(3.0)
    shifted = {**batch["support"], "inputs": inputs}
    third, _ = run(
        start.params, {}, start.model_state, {"support": shifted, "query": only}, KEY
    )
    assert abs(float(first) - float(third)) > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_it_beats_tuning_a_jointly_trained_network(kind):
    """Three new digits, one example each; both have seen the other seven."""
    train, test = digits.digits()
    known = train["labels"] < 7
    pool = jax.tree.map(lambda leaf: leaf[known], train)
    new = test["labels"] >= 7
    unseen = jax.tree.map(lambda leaf: leaf[new], test)
    index, test_index = (data.class_index(p["labels"]) for p in (pool, unseen))
    inputs = jnp.asarray(pool["inputs"])
    model = network(kind, inputs=64, outputs=3, widths=(64, 32))
    task = finetune.objective(model)
    fresh = jitted(model).init(KEY, jnp.ones((1, 64)))

    def draw(key):
        return data.sample(key, inputs, index, tasks=8, ways=3, shots=1, queries=5)

    meta = digits.learn(
        maml.objective(task, optax.sgd(0.3), steps=3),
        optax.adam(3e-3),
        fresh,
        draw,
        steps=200,
    )
    joint_model = network(kind, inputs=64, outputs=7, widths=(64, 32))
    joint = digits.learn(
        finetune.objective(joint_model),
        optax.adam(3e-3),
        jitted(joint_model).init(KEY, jnp.ones((1, 64))),
        digits.batches(pool, 64),
        steps=200,
    )
    head = jax.tree.map(jnp.zeros_like, fresh.params["head"])
    tuned = {**joint.params, "head": head}
    tests = data.sample(
        KEY,
        jnp.asarray(unseen["inputs"]),
        test_index,
        tasks=100,
        ways=3,
        shots=1,
        queries=10,
    )
    follow = jax.jit(maml.trajectory(task, optax.sgd(0.3), steps=5))
    scores = [
        follow(params, {}, {}, tests, KEY)["accuracy"].mean(axis=0)
        for params in (meta.params, tuned)
    ]
    # The baseline takes the best of its steps.
    assert scores[0][5] > scores[1].max() + 0.02, [s.tolist() for s in scores]
