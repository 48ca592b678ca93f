"""Whose batch statistics normalise, which a network carries, and those collected."""

import functools

import flax.linen as nn
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtransfer import nets
from jaxtransfer.methods import meta
from jaxtransfer.methods.meta.learner import batch_statistics
from jaxtransfer.model import from_linen, from_nnx
from jaxtransfer.typing import Variables
from tests.tasks import KEY, close, episodes, first, gradient
from tests.twins import same


class Net(nn.Module):
    momentum: float = 0.0

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Dense(4, name="dense")(x)
        x = nn.BatchNorm(not train, momentum=self.momentum, name="norm")(x)
        return nn.Dense(3, name="head")(nn.relu(x))


class NNXNet(nnx.Module):
    """The same network, its middle behind a transform of NNX."""

    def __init__(self, rngs):
        self.dense = nnx.Linear(6, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.0, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.remat(lambda norm, x: norm(x))(self.norm, self.dense(x))
        return self.head(nnx.relu(x))


BATCH = episodes()
START = from_linen(Net()).init(KEY, jnp.ones((2, 6)))
RUNNING = {
    "batch_stats": {
        "norm": {"mean": jnp.array([0.5, -1.0, 0.0, 2.0]), "var": jnp.arange(1.0, 5.0)}
    }
}


def built(statistics, momentum=0.0, steps=1):
    task = meta.task(from_linen(Net(momentum)), statistics=statistics)
    return meta.maml(task, optax.sgd(0.3), steps=steps)


@functools.cache
def loss_of(statistics):
    run = jax.jit(meta.objective(built(statistics)))
    return lambda batch, state=RUNNING: float(
        run(START.params, {}, state, batch, KEY)[0]
    )


@pytest.mark.parametrize("statistics", ["transductive", "support", "running"])
def test_whom_a_query_depends_on(statistics):
    """Three rows count; of those that don't, one moves; and then the running ones."""
    batch = first(BATCH)
    only = {**batch["query"], "where": jnp.arange(6)[None] < 3}
    moved = {**only, "inputs": only["inputs"].at[:, 4].add(5.0)}
    loss = loss_of(statistics)
    before = loss({**batch, "query": only})
    others = abs(loss({**batch, "query": moved}) - before)
    assert (others > 1e-4) == (statistics == "transductive")
    fresh = abs(loss({**batch, "query": only}, START.model_state) - before)
    assert (fresh > 1e-4) == (statistics == "running")


def by_hand(params, inputs):
    """Statistics of rows after the first layer."""
    hidden = inputs @ params["dense"]["kernel"] + params["dense"]["bias"]
    return {"batch_stats": {"norm": {"mean": hidden.mean(0), "var": hidden.var(0)}}}


@pytest.mark.parametrize("steps", [0, 2])
def test_the_support_statistics_are_those_of_the_adapted_parameters(steps):
    support = jax.tree.map(lambda leaf: leaf[0], BATCH["support"])
    adapt = jax.jit(built("support", 0.9, steps).adapt)
    adapted = adapt(START.params, {}, RUNNING, support, KEY)
    close(adapted.model_state, by_hand(adapted.params, support["inputs"]))
    if steps:
        before = by_hand(START.params, support["inputs"])
        with pytest.raises(AssertionError):
            close(adapted.model_state, before, 1e-3)


def test_those_of_an_nnx_network_have_the_gradient_of_linen():
    """Flax stops it where NNX's batch normalisation writes its statistics."""

    def slope(net):
        learner = meta.maml(meta.task(net), optax.sgd(0.3), steps=1)
        return jax.jit(jax.value_and_grad(meta.objective(learner), has_aux=True))(
            START.params, {}, START.model_state, BATCH, KEY
        )

    (loss, _), expected = slope(from_linen(Net()))
    (value, _), found = slope(from_nnx(NNXNet))
    np.testing.assert_allclose(value, loss, rtol=1e-6)
    close(found, expected)


def test_running_statistics_stay_and_are_used():
    learner = built("running", 0.9)
    support = jax.tree.map(lambda leaf: leaf[0], BATCH["support"])
    adapted = jax.jit(learner.adapt)(START.params, {}, RUNNING, support, KEY)
    assert same(adapted.model_state, RUNNING)
    inputs = BATCH["query"]["inputs"][0]
    outputs = learner.predict(adapted.params, {}, adapted.model_state, inputs)
    hidden = (
        inputs @ adapted.params["dense"]["kernel"] + adapted.params["dense"]["bias"]
    )
    running, norm = RUNNING["batch_stats"]["norm"], adapted.params["norm"]
    hidden = (hidden - running["mean"]) / jnp.sqrt(running["var"] + 1e-5)
    hidden = jax.nn.relu(hidden * norm["scale"] + norm["bias"])
    head = adapted.params["head"]
    close(outputs, hidden @ head["kernel"] + head["bias"])


def test_the_momentum_of_the_layers_does_not_matter():
    """Neither to the loss nor to its gradient, with whatever came before."""
    found = [
        gradient(
            meta.objective(built("support", momentum)),
            Variables(START.params, state),
            BATCH,
        )
        for momentum, state in ((0.0, START.model_state), (0.9, RUNNING))
    ]
    close(*found, 1e-5)


def test_query_by_statistics_of_the_same_examples_equals_its_own():
    """Query = support: both kinds of normalisation see the same statistics."""
    batch = {"support": BATCH["support"], "query": BATCH["support"]}
    own, supports = loss_of("transductive")(batch), loss_of("support")(batch)
    np.testing.assert_allclose(own, supports, rtol=1e-4)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_held_layers_do_not_change_whose_statistics(momentum):
    """Of a layer that is held the running ones, of the others the support's."""
    net, support = from_linen(Net(momentum)), first(BATCH)["support"]
    support = jax.tree.map(lambda leaf: leaf[0], support)
    whole = START.params
    for held, expected in (
        (("dense", "head"), by_hand(whole, support["inputs"])),
        (("norm", "dense"), RUNNING),
    ):
        frozen = {"params": {name: whole[name] for name in held}}
        params = {name: part for name, part in whole.items() if name not in held}
        learner = meta.maml(meta.task(net), optax.sgd(0.3), steps=0)
        adapted = learner.adapt(params, frozen, RUNNING, support, KEY)
        close(adapted.model_state, expected)


def test_state_that_is_no_statistic_of_a_batch_stays():
    class Spectral(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            layer = nn.SpectralNorm(nn.Dense(4), name="norm")
            return nn.Dense(3, name="head")(layer(x, update_stats=train))

    net = from_linen(Spectral())
    start = net.init(KEY, jnp.ones((2, 6)))
    support = jax.tree.map(lambda leaf: leaf[0], first(BATCH)["support"])
    learner = meta.maml(meta.task(net), optax.sgd(0.3), steps=0)
    adapted = learner.adapt(start.params, {}, start.model_state, support, KEY)
    assert same(adapted.model_state, start.model_state)


def test_statistics_keep_their_type_in_float64():
    """Flax gives statistics of float64 inputs back as float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda x: (
                x.astype(jnp.promote_types(x.dtype, jnp.float64))
                if jnp.issubdtype(x.dtype, jnp.floating)
                else x
            ),
            (START.params, BATCH),
        )
        state = jax.tree.map(lambda x: x.astype(jnp.float32), RUNNING)
        learner = meta.objective(built("support", 0.9, steps=2))
        loss, _ = jax.jit(learner)(wide[0], {}, state, first(wide[1]), KEY)
        assert jnp.isfinite(loss)


def test_a_query_is_blended_as_the_support_is():
    """By the support's size too, which task normalisation reads."""

    class Task(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nets.TaskNorm(not train, name="norm")(x[:, None, :, None])
            return nn.Dense(3, name="head")(x.reshape(len(x), -1))

    net, sgd = from_linen(Task()), optax.sgd(0.0)
    support = jax.tree.map(lambda leaf: leaf[0], BATCH["support"])
    start = net.init(KEY, support["inputs"])
    start.params["norm"]["blend_slope"] = jnp.full((), 0.3)
    learner = meta.maml(meta.task(net), sgd, steps=1)

    @jax.jit
    def found(params, state):
        begun = params, {}, state
        states = [
            one.adapt(*begun, support, KEY).model_state
            for one in (meta.prototypical(net, ways=3), learner)
        ]
        collect = meta.objective(learner, collect=0.0)
        states.append(collect(*begun, first(BATCH), KEY)[1][0])
        loss = meta.trajectory(learner)(*begun, first(BATCH), KEY)["loss"]
        return states, loss, net.apply(start, support["inputs"], train=True)[2]

    states, loss, expected = found(*start)
    assert float(expected["batch_stats"]["norm"]["size"]) == 3
    for state in states:
        close(state, expected)
    np.testing.assert_allclose(loss[:, 0], loss[:, 1], rtol=1e-5)  # steps of 0


class Stochastic(nn.Module):
    probability: float = 0.5

    @nn.compact
    def __call__(self, x, train=False):
        for number in range(2):
            x = nets.StochNorm(
                not train, probability=self.probability, name=f"norm_{number}"
            )(x)
        return nn.Dense(3, name="head")(x)


class NNXStochastic(nnx.Module):
    def __init__(self, rngs):
        self.norm_0 = nets.NNXStochNorm(6, rngs=rngs)
        self.norm_1 = nets.NNXStochNorm(6, rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm_1(self.norm_0(x)))


def traced(net, statistics="support", collect=None, held=()):
    """The objectives of steps and of none, of a network of which layers are held."""
    params, state = jax.eval_shape(net.init, KEY, jnp.ones((2, 6)))
    frozen = {"params": {name: params[name] for name in held}}
    params = {name: part for name, part in params.items() if name not in held}
    for learner in (
        meta.maml(meta.task(net, statistics=statistics), optax.sgd(0.1), steps=1),
        meta.prototypical(net, ways=3, statistics=statistics),
    ):
        run = meta.objective(learner, collect=collect)
        yield lambda run=run: jax.eval_shape(
            run, params, frozen, state, first(BATCH), KEY
        )


def test_layers_that_read_the_running_statistics_have_none_of_the_support():
    stochastic = from_linen(Stochastic())
    for options in (
        {"net": stochastic},
        {"net": from_nnx(NNXStochastic)},
        {"net": stochastic, "statistics": "running", "collect": 0.5},
    ):
        for run in traced(**options):
            with pytest.raises(ValueError, match="StochNorm.*choose statistics="):
                run()
    for options in (
        {"net": from_linen(Stochastic(1.0))},
        {"net": stochastic, "statistics": "transductive"},
        {"net": stochastic, "statistics": "running"},
        {"net": stochastic, "held": ("norm_0", "norm_1")},
    ):
        for run in traced(**options):
            run()


class Fixed(nn.Module):
    """A layer that always normalises by running statistics, before one that learns."""

    momentum: float = 0.9

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=True, name="fixed")(x)
        x = nn.BatchNorm(not train, momentum=self.momentum, name="norm")(x)
        return nn.Dense(3, name="head")(x)


class NNXFixed(nnx.Module):
    def __init__(self, rngs):
        options = {"use_running_average": True, "rngs": rngs}
        self.fixed = nnx.BatchNorm(6, **options)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x, train=False):
        x = self.fixed(x, use_running_average=True)
        return self.head(self.norm(x, use_running_average=not train))


def test_a_layer_that_is_fixed_reads_the_running_statistics_as_they_are():
    x = first(BATCH)["support"]["inputs"][0]
    plain = from_linen(Fixed())
    params, state = plain.init(KEY, x)
    fixed = {"mean": jnp.arange(6.0), "var": jnp.arange(1.0, 7.0)}
    state = {"batch_stats": {**state["batch_stats"], "fixed": fixed}}
    now = from_linen(Fixed(momentum=0.0))
    _, _, exact = now.apply(Variables(params, state), x, train=True)
    for net in (plain, from_nnx(NNXFixed)):
        learner = meta.prototypical(net, ways=3)
        support = jax.tree.map(lambda leaf: leaf[0], first(BATCH)["support"])
        found = jax.jit(learner.adapt)(params, {}, state, support, KEY).model_state
        for layer in ("fixed", "norm"):
            for name in ("mean", "var"):
                np.testing.assert_allclose(
                    found["batch_stats"][layer][name],
                    exact["batch_stats"][layer][name],
                    rtol=1e-4,
                    atol=1e-5,
                )


def test_transductive_steps_hand_their_running_statistics_on():
    """A query reads them where a layer in training mode does."""
    support = jax.tree.map(lambda leaf: leaf[0], BATCH["support"])
    adapted = jax.jit(built("transductive", 0.9).adapt)(
        START.params, {}, RUNNING, support, KEY
    )
    expected = jax.tree.map(
        lambda old, new: 0.9 * old + 0.1 * new,
        RUNNING,
        by_hand(START.params, support["inputs"]),
    )
    close(adapted.model_state, expected)


# --- statistics of a batch, whatever came before --------------------------------------


def left(momentum):
    """A task whose pass moves one leaf to the batch's mean, and leaves two."""

    def task(params, frozen, state, batch, key):
        mean = momentum * state["mean"] + (1 - momentum) * batch["inputs"].mean(0)
        return params["w"], ({**state, "mean": mean}, {})

    return task


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99])
def test_statistics_of_a_batch_at_every_scale(momentum, scale):
    inputs = scale * jnp.array([[1.0, -2.0, 0.0], [3.0, -2.0, 0.0]])
    state = {
        "mean": jnp.array([4.0, 5.0, 6.0]),
        "fixed": jnp.array([7.0, 0.0]),
        "count": jnp.array(3),
    }
    found = batch_statistics(
        left(momentum), {"w": jnp.zeros(())}, {}, state, {"inputs": inputs}, KEY
    )
    np.testing.assert_allclose(found["mean"], inputs.mean(0), rtol=1e-4)
    assert same({**found, "mean": 0}, {**state, "mean": 0})


# --- collected over tasks -------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 2])
def test_collected_are_the_mean_of_the_supports_under_the_start(chunk):
    objective = meta.objective(built("running", 0.5), collect=0.8, chunk=chunk)
    start = meta.counted(Variables(START.params, RUNNING))
    run = jax.jit(jax.value_and_grad(objective, has_aux=True))
    (loss, (state, _)), _ = run(start.params, {}, start.model_state, BATCH, KEY)
    each = [by_hand(START.params, inputs) for inputs in BATCH["support"]["inputs"]]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *each)
    expected = jax.tree.map(lambda old, new: 0.8 * old + 0.2 * new, RUNNING, mean)
    close(state, {**expected, "updates": jnp.array(1, jnp.int32)})
    np.testing.assert_allclose(loss, loss_of("running")(BATCH), rtol=1e-5)


@pytest.mark.parametrize("statistics", ["transductive", "support", "running"])
def test_only_what_is_asked_for_is_collected(statistics):
    learner = built(statistics)
    whole = jax.eval_shape(
        meta.objective(learner, collect=0.9), START.params, {}, RUNNING, BATCH, KEY
    )
    assert jax.tree.structure(whole[1][0]) == jax.tree.structure(RUNNING)
    jaxpr = jax.make_jaxpr(
        lambda state: meta.objective(learner)(START.params, {}, state, BATCH, KEY)[1][0]
    )(RUNNING)
    assert set(jaxpr.jaxpr.outvars) == set(jaxpr.jaxpr.invars)


def test_statistics_of_every_step():
    """Collected after each; step j is normalised by row j, the query by the last."""
    learner = built("per_step", steps=2)
    start = learner.init(START)
    run = jax.jit(meta.objective(learner, collect=0.0))
    _, (state, _) = run(start.params, {}, start.model_state, BATCH, KEY)
    assert state["batch_stats"]["norm"]["mean"].shape == (3, 4)

    def after(steps, support):
        """Plain steps on running statistics, those of the start here."""
        params = built("running", steps=steps).adapt(
            START.params, {}, START.model_state, support, KEY
        )
        return by_hand(params.params, support["inputs"])

    supports = [
        jax.tree.map(lambda leaf, n=n: leaf[n], BATCH["support"])
        for n in range(len(BATCH["support"]["labels"]))
    ]
    for row in range(3):
        each = [after(row, support) for support in supports]
        mean = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *each)
        close(jax.tree.map(lambda leaf, row=row: leaf[row], state), mean, 1e-4)

    def loss(row, by=1.0):
        moved = jax.tree.map(lambda leaf: leaf.at[row].add(by), state)
        return float(run(start.params, {}, moved, BATCH, KEY)[0])

    kept = run(start.params, {}, state, BATCH, KEY)[0]
    assert all(abs(loss(row) - kept) > 1e-4 for row in range(3))
    found = learner.adapt(start.params, {}, state, supports[0], KEY).model_state
    assert same(found, jax.tree.map(lambda leaf: leaf[2], state))


def test_statistics_of_every_step_need_steps():
    task = meta.task(from_linen(Net()), statistics="per_step")
    with pytest.raises(ValueError, match='statistics="per_step" belong to steps'):
        meta.implicit_maml(task, optax.sgd(0.1), steps=1)


def test_nothing_to_collect_is_refused():
    task = meta.task(from_linen(Net()))
    bare = meta.maml(meta.Task(task.support, task.query), optax.sgd(0.1), steps=1)
    with pytest.raises(ValueError, match="collect: got 0.9, but the learner has no"):
        meta.objective(bare, collect=0.9)
    with pytest.raises(
        ValueError, match=r"collect: got 1.5; it must lie in 0 \.\.\. 1"
    ):
        meta.objective(built("running"), collect=1.5)


def test_an_unknown_name_is_refused(types_unchecked):
    with pytest.raises(ValueError, match="statistics: got 'batch'; choose"):
        meta.task(from_linen(Net()), statistics="batch")
