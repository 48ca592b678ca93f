"""Gradient steps from a learned start: what adapts, and the gradient through it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtransfer import data, tree
from jaxtransfer.methods import finetune, meta
from jaxtransfer.typing import Variables
from tests import digits
from tests.tasks import (
    KEY,
    QUADRATIC,
    SIZE,
    WEIGHTS,
    bowl,
    bowl_by_hand,
    check_differences,
    close,
    episodes,
    gradient,
    made,
)
from tests.twins import jitted, network, same

BACKWARDS = ("forward-over-reverse", "remat", "stored")
BOWL = meta.Task(bowl, bowl)
RATE, STEPS = 0.1, 5


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


# --- the gradient ---------------------------------------------------------------------


@pytest.mark.parametrize("form", [*BACKWARDS, "first order"])
@pytest.mark.parametrize("chunk", [None, 1])
def test_the_gradient_of_a_quadratic_is_the_closed_form(form, chunk, float64):
    first_order = form == "first order"
    options = {"first_order": True} if first_order else {"backward": form}
    learner = meta.maml(BOWL, optax.sgd(RATE), steps=STEPS, **options)
    batch = jax.tree.map(jnp.asarray, QUADRATIC)
    start = Variables({"w": jnp.asarray(WEIGHTS)})
    loss, found = gradient(meta.objective(learner, chunk=chunk), start, batch)
    rates = np.full((STEPS, SIZE), RATE)
    expected_loss, expected, _ = bowl_by_hand(rates, first_order)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-10)
    np.testing.assert_allclose(found["w"], expected, rtol=1e-10)
    assert np.abs(expected - bowl_by_hand(rates, not first_order)[1]).max() > 1e-2


INNER = {
    "sgd": optax.sgd(0.3),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(0.05, eps_root=1e-6),
    "clipped": optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.5)),
}


@pytest.mark.parametrize(
    ("kind", "inner", "backward"),
    [
        ("nnx", "sgd", "forward-over-reverse"),
        ("linen", "momentum", "remat"),
        ("nnx", "adam", "forward-over-reverse"),
        ("linen", "clipped", "forward-over-reverse"),
    ],
)
def test_the_gradient_through_any_optimizer_is_the_difference(
    kind, inner, backward, float64
):
    model, start = made(kind)
    start = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), start)
    batch = episodes(tasks=2, dtype=jnp.float64)
    learner = meta.maml(meta.task(model), INNER[inner], steps=3, backward=backward)
    check_differences(meta.objective(learner), start, batch)


@pytest.mark.parametrize(("eps_root", "finite"), [(0.0, False), (1e-8, True)])
def test_adam_needs_its_root_away_from_zero(eps_root, finite):
    """With slopes of 0, such as those of the weights of a pixel that is always 0."""

    def pixel(params, *rest):
        return bowl({"w": params["w"] + 0.0 * params["idle"]}, *rest)

    learner = meta.maml(
        meta.Task(pixel, pixel), optax.adam(0.05, eps_root=eps_root), steps=2
    )
    start = Variables({"w": jnp.asarray(WEIGHTS), "idle": jnp.zeros(SIZE)})
    batch = jax.tree.map(jnp.asarray, QUADRATIC)
    loss, found = gradient(meta.objective(learner), start, batch)
    assert jnp.isfinite(loss)
    assert all(jnp.isfinite(leaf).all() for leaf in found.values()) == finite


@pytest.mark.parametrize("steps", [1, 2])
def test_an_optimizer_that_needs_the_loss_is_refused(steps):
    learner = meta.maml(BOWL, optax.lbfgs(), steps=steps)
    support = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), QUADRATIC["support"])
    with pytest.raises(ValueError, match="it needs more .*'value'.*without a line"):
        learner.adapt({"w": jnp.asarray(WEIGHTS)}, {}, {}, support, KEY)


def test_first_order_is_the_gradient_at_the_adapted_parameters():
    model, start = made("linen")
    task, batch = meta.task(model), episodes()
    learner = meta.maml(task, optax.sgd(0.3), steps=3, first_order=True)
    _, found = gradient(meta.objective(learner), start, batch)

    @jax.jit
    @jax.vmap
    def at_adapted(episode):
        adapted = learner.adapt(start.params, {}, {}, episode["support"], KEY).params
        return jax.grad(lambda p: task.query(p, {}, {}, episode["query"], KEY)[0])(
            adapted
        )

    expected = jax.tree.map(lambda leaf: leaf.mean(axis=0), at_adapted(batch))
    close(found, expected)


@pytest.mark.parametrize(("kind", "first_order"), [("linen", False), ("nnx", True)])
def test_every_form_is_the_same(kind, first_order):
    """Side by side or in chunks, kept or recomputed, scanned or written out."""
    model, start = made(kind)
    task, batch = meta.task(model), episodes(tasks=2)
    optimizer = optax.adam(0.1, eps_root=1e-6)

    def written_out(params, frozen, model_state, batch, key):
        total = 0.0
        for number in range(2):
            parts = jax.tree.map(lambda leaf, n=number: leaf[n], batch)
            fast, slots = params, optimizer.init(params)
            for _ in range(2):
                inner = jax.grad(
                    lambda p, s=parts["support"]: task.support(p, {}, {}, s, KEY)[0]
                )
                slope = inner(fast)
                if first_order:
                    slope = jax.lax.stop_gradient(slope)
                updates, slots = optimizer.update(slope, slots, fast)
                fast = optax.apply_updates(fast, updates)
            total += task.query(fast, {}, {}, parts["query"], KEY)[0]
        return total / 2, ({}, {})

    expected = gradient(written_out, start, batch)
    forms = {"stored": 1} if first_order else {"forward-over-reverse": 1, "remat": 2}
    for form, chunk in forms.items():
        learner = meta.maml(
            task, optimizer, steps=2, first_order=first_order, backward=form
        )
        close(gradient(meta.objective(learner, chunk=chunk), start, batch), expected)


def test_no_steps_is_the_query_loss_alone():
    model, start = made("nnx")
    task, batch = meta.task(model), episodes()
    learner = meta.maml(task, optax.sgd(0.1), steps=0)
    loss, _ = gradient(meta.objective(learner), start, batch)
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch["query"])
    expected, _ = task.query(start.params, {}, {}, flat, KEY)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_dropout_differs_between_tasks_and_keys_and_repeats():
    model, start = made("nnx", rate=0.5)
    one = episodes(tasks=1)
    batch = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), one)
    task = meta.task(model, statistics="transductive")
    follow = jax.jit(meta.trajectory(meta.maml(task, optax.sgd(0.1), steps=2)))
    first, again, other = (
        follow(start.params, {}, {}, batch, jax.random.key(seed))["loss"]
        for seed in (0, 0, 1)
    )
    assert same(first, again)
    assert not same(first, other)
    assert not same(first[0], first[1])


# --- what adapts ----------------------------------------------------------------------


def test_the_head_adapts_and_all_of_it_learns():
    model, start = made("linen")
    batch = episodes()
    learner = meta.anil(meta.task(model), optax.adam(0.1, eps_root=1e-6), steps=2)
    support = jax.tree.map(lambda leaf: leaf[0], batch["support"])
    adapted = jax.jit(learner.adapt)(start.params, {}, {}, support, KEY).params
    assert same(adapted["blocks_0"], start.params["blocks_0"])
    assert not same(adapted["head"], start.params["head"])
    _, found = gradient(meta.objective(learner), start, batch)
    assert tree.flatten(found).keys() == tree.flatten(start.params).keys()
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(found))


def distances(params, frozen, model_state, batch, key):
    """Pulls every parameter to 1, whatever its name."""
    parts = jax.tree.leaves(dict(params))
    return sum((part - 1) ** 2 / 2 for part in parts), (model_state, {})


NAMES = {
    "head": {"kernel": 0.0, "bias": 0.0},
    "head2": {"kernel": 0.0},
    "body": {"head": 0.0, "conv": 0.0},
}
HEAD, HEAD2 = {"head/kernel", "head/bias"}, {"head2/kernel"}
BODY = {"body/head", "body/conv"}


@pytest.mark.parametrize(
    ("build", "options", "moved"),
    [
        (meta.anil, {}, HEAD),
        (meta.boil, {}, HEAD2 | BODY),
        (meta.anil, {"head": "head2"}, HEAD2),
        (meta.boil, {"head": "head2"}, HEAD | BODY),
        (meta.boil, {"head": "body/head"}, HEAD | HEAD2 | {"body/conv"}),
        (meta.boil, {"head": "head|body"}, HEAD2),
    ],
)
def test_the_head_is_found_by_its_whole_name(build, options, moved):
    task = meta.Task(distances, distances)
    learner = build(task, optax.sgd(0.5), steps=1, **options)
    params = jax.tree.map(jnp.array, NAMES)
    adapted = learner.adapt(params, {}, {}, {"none": jnp.ones(1)}, KEY).params
    found = {path for path, leaf in tree.flatten(adapted).items() if leaf != 0}
    assert found == moved


def scaled_bowl(params, frozen, model_state, batch, key):
    loss, rest = bowl({"w": params["w"]}, frozen, model_state, batch, key)
    return params["gain"] * loss, rest


def scaled_by_hand(gains, steps):
    """The gain of step j is a factor of its rate; the last one is the query's."""
    rows = np.minimum(np.arange(steps + 1), len(gains) - 1)
    rates = RATE * np.repeat(gains[rows[:-1], None], SIZE, axis=1)
    loss, by_start, by_rates = bowl_by_hand(rates)
    last = gains[rows[-1]]
    by_gains = np.zeros(len(gains))
    np.add.at(by_gains, rows[:-1], last * RATE * by_rates.sum(axis=1))
    by_gains[rows[-1]] += loss
    return last * loss, {"w": last * by_start, "gain": by_gains}


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("steps", [2, 4])
def test_every_step_has_its_own_row_and_the_last_serves_beyond(
    backward, steps, float64
):
    """Trained for 2 steps: three rows, of which the third is the query's."""
    task = meta.Task(scaled_bowl, scaled_bowl)
    build = functools.partial(
        meta.maml, task, optax.sgd(RATE), per_step="gain", backward=backward
    )
    variables = Variables({"w": jnp.asarray(WEIGHTS), "gain": jnp.ones(())})
    rows = build(steps=2).init(variables).params["gain"]
    assert rows.tolist() == [1.0, 1.0, 1.0]
    gains = np.array([0.5, 2.0, 1.5])
    start = Variables({**variables.params, "gain": jnp.asarray(gains)})
    batch = jax.tree.map(jnp.asarray, QUADRATIC)
    loss, found = gradient(meta.objective(build(steps=steps)), start, batch)
    expected, slopes = scaled_by_hand(gains, steps)
    np.testing.assert_allclose(loss, expected, rtol=1e-10)
    close(found, slopes, 1e-10)
    assert (np.abs(slopes["gain"]) > 1e-3).all()


def test_the_trajectory_sees_the_row_of_each_step(float64):
    task = meta.Task(scaled_bowl, scaled_bowl)
    learner = meta.maml(task, optax.sgd(RATE), steps=4, per_step="gain")
    gains = np.array([0.5, 2.0, 1.5])
    params = {"w": jnp.asarray(WEIGHTS), "gain": jnp.asarray(gains)}
    batch = jax.tree.map(jnp.asarray, QUADRATIC)
    follow = jax.jit(meta.trajectory(learner))
    curves = follow(params, {}, {}, batch, KEY)["loss"]
    for steps, column in enumerate(curves.T):
        rows = np.minimum(np.arange(steps + 1), 2)
        loss, *_ = bowl_by_hand(RATE * np.repeat(gains[rows[:-1], None], SIZE, axis=1))
        np.testing.assert_allclose(column.mean(), gains[rows[-1]] * loss, rtol=1e-10)


def test_what_is_per_step_does_not_adapt():
    """Whether all else adapts or a rule chooses, and beside a learned optimizer."""
    task = meta.Task(distances, distances)
    variables = Variables(jax.tree.map(jnp.array, NAMES))
    for rules, moved in ((None, HEAD | BODY), ("body", BODY)):
        for inner in (optax.sgd(0.5), meta.meta_sgd(0.5)):
            learner = meta.maml(task, inner, steps=2, rules=rules, per_step="head2")
            start = learner.init(variables)
            adapted = learner.adapt(start.params, {}, {}, {"none": jnp.ones(1)}, KEY)
            assert jax.tree.structure(adapted.params) == jax.tree.structure(NAMES)
            leaves = tree.flatten(adapted.params)
            assert {path for path, leaf in leaves.items() if leaf != 0} == moved
            if isinstance(inner, meta.Learned):
                assert set(tree.flatten(start.params["optimizer"])) == moved


def with_context(params, frozen, model_state, batch, key):
    whole = {"w": params["w"] + params["context"]}
    return bowl(whole, frozen, model_state, batch, key)


def test_a_context_begins_at_zero_and_is_not_learned(float64):
    """Whatever is stored; the rest is learned through it by the closed form."""
    task = meta.Task(with_context, with_context)
    learner = meta.cavia(task, optax.sgd(RATE), steps=STEPS, context="context")
    batch = jax.tree.map(jnp.asarray, QUADRATIC)
    expected, slope, _ = bowl_by_hand(np.full((STEPS, SIZE), RATE))
    for stored in (0.0, 3.0):
        params = {"w": jnp.asarray(WEIGHTS), "context": jnp.full(SIZE, stored)}
        loss, found = gradient(meta.objective(learner), Variables(params), batch)
        np.testing.assert_allclose(loss, expected, rtol=1e-10)
        np.testing.assert_allclose(found["w"], slope, rtol=1e-10)
        assert found["context"].tolist() == [0.0] * SIZE
        support = jax.tree.map(lambda leaf: leaf[0], batch["support"])
        adapted = learner.adapt(params, {}, {}, support, KEY).params
        assert same(adapted["w"], params["w"])
        assert jnp.abs(adapted["context"]).min() > 1e-3


# --- real data ------------------------------------------------------------------------


def test_it_beats_tuning_a_jointly_trained_network():
    """Three new digits, one example each; both have seen the other seven."""
    train, test = digits.digits()
    known = train["labels"] < 7
    pool = jax.tree.map(lambda leaf: leaf[known], train)
    new = test["labels"] >= 7
    unseen = jax.tree.map(lambda leaf: leaf[new], test)
    index, test_index = (data.class_index(p["labels"]) for p in (pool, unseen))
    inputs = jnp.asarray(pool["inputs"])
    model = network("linen", inputs=64, outputs=3, widths=(64, 32))
    build = functools.partial(meta.maml, meta.task(model), optax.sgd(0.3))
    fresh = jitted(model).init(KEY, jnp.ones((1, 64)))

    def draw(key):
        return data.sample(key, inputs, index, tasks=8, ways=3, shots=1, queries=5)

    learned = digits.learn(
        meta.objective(build(steps=3)), optax.adam(3e-3), fresh, draw, steps=200
    )
    joint_model = network("linen", inputs=64, outputs=7, widths=(64, 32))
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
    follow = jax.jit(meta.trajectory(build(steps=5)))
    scores = [
        follow(params, {}, {}, tests, KEY)["accuracy"].mean(axis=0)
        for params in (learned.params, tuned)
    ]
    # The baseline takes the best of its steps.
    assert scores[0][5] > scores[1].max() + 0.02, [s.tolist() for s in scores]
