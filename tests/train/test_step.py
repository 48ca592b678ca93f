"""The one update rule, several players in one step, and measuring a batch."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtransfer import parallel, prng
from jaxtransfer.train import (
    alternate,
    eval_step,
    init_state,
    metrics,
    train_step,
)
from jaxtransfer.typing import Mean, Variables
from tests.twins import same

BATCH = jax.random.normal(jax.random.key(3), (8, 3))
START = Variables(
    {"w": jnp.array([1.0, -2.0, 0.5]), "b": jnp.array(0.25)},
    {"batch_stats": {"mean": jnp.zeros(3)}},
)


def objective(params, frozen, model_state, batch, key):
    """Squares of a line, with frozen offset, running mean and noise as a metric."""
    offset = frozen.get("offset", 0.0)
    error = batch @ params["w"] + params["b"] + offset
    state = {"batch_stats": {"mean": batch.mean(axis=0)}}
    return jnp.mean(error**2), (
        state,
        {"error": metrics.mean(error), "noise": jax.random.normal(key)},
    )


def by_hand(params, offset=0.0):
    x = np.asarray(BATCH, np.float64)
    error = x @ np.asarray(params["w"], np.float64) + float(params["b"]) + offset
    gradient = {"w": 2 * x.T @ error / len(x), "b": 2 * error.mean()}
    return np.mean(error**2), gradient


def test_a_step_is_gradient_descent():
    optimizer = optax.sgd(0.1)
    step = jax.jit(train_step(objective, optimizer))
    state = init_state(
        jax.random.key(0), START, optimizer, frozen={"offset": jnp.array(3.0)}
    )
    after, measured = step(state, BATCH)
    loss, gradient = by_hand(START.params, 3.0)
    for name, value in START.params.items():
        np.testing.assert_allclose(
            after.params[name], value - 0.1 * gradient[name], rtol=1e-5
        )
    assert int(after.step) == 1
    assert same(after.frozen, state.frozen) and same(after.key, state.key)
    np.testing.assert_allclose(
        after.model_state["batch_stats"]["mean"], BATCH.mean(axis=0), rtol=1e-5
    )
    final = metrics.finalize(measured)
    assert set(final) == {"loss", "error", "noise", "gradient_norm"}
    norm = np.sqrt(sum(np.sum(g**2) for g in gradient.values()))
    np.testing.assert_allclose(final["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(final["gradient_norm"], norm, rtol=1e-5)
    assert float(measured["error"].count) == 8


def test_the_key_of_a_step_is_root_and_number():
    optimizer = optax.sgd(0.0)
    step = jax.jit(train_step(objective, optimizer))
    state = init_state(jax.random.key(4), START, optimizer)
    for number in range(3):
        expected = jax.random.normal(prng.step_key(jax.random.key(4), number))
        state, measured = step(state, BATCH)
        assert float(measured["noise"].total) == float(expected)


def test_the_optimizer_sees_the_parameters():
    """Weight decay, momentum and schedules need what optax gives them."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(0.5), optax.adamw(0.1, weight_decay=0.3)
    )
    state = init_state(jax.random.key(0), START, optimizer)
    step = jax.jit(train_step(objective, optimizer))
    params, slots = START.params, optimizer.init(START.params)
    for _ in range(3):
        gradient = jax.tree.map(jnp.float32, by_hand(params)[1])
        updates, slots = optimizer.update(gradient, slots, params)
        params = optax.apply_updates(params, updates)
        state, _ = step(state, BATCH)
    for name in params:
        np.testing.assert_allclose(state.params[name], params[name], rtol=1e-4)


def test_after_update_sees_and_makes_the_new_state():
    def follow(state):
        average = jax.tree.map(
            lambda old, new: 0.9 * old + 0.1 * new,
            state.model_state["average"],
            state.params,
        )
        return state.replace(model_state={**state.model_state, "average": average})

    def keeps(params, frozen, model_state, batch, key):
        loss, (new, measured) = objective(params, frozen, {}, batch, key)
        return loss, ({**model_state, **new}, measured)

    optimizer = optax.sgd(0.1)
    step = jax.jit(train_step(keeps, optimizer, after_update=follow))
    start = Variables(START.params, {**START.model_state, "average": START.params})
    after, _ = step(init_state(jax.random.key(0), start, optimizer), BATCH)
    np.testing.assert_allclose(
        after.model_state["average"]["w"],
        0.9 * START.params["w"] + 0.1 * after.params["w"],
        rtol=1e-6,
    )


def test_after_update_may_not_change_what_is_frozen():
    def follow(state):
        return state.replace(frozen={"average": state.params})

    optimizer = optax.sgd(0.1)
    state = init_state(
        jax.random.key(0), START, optimizer, frozen={"average": START.params}
    )
    with pytest.raises(ValueError, match="changed state.frozen.*in model_state"):
        train_step(objective, optimizer, after_update=follow)(state, BATCH)


def test_not_a_number_is_reported_and_not_hidden():
    optimizer = optax.sgd(0.1)
    step = jax.jit(train_step(objective, optimizer))
    state = init_state(jax.random.key(0), START, optimizer)
    _, measured = step(state, BATCH.at[0, 0].set(jnp.nan))
    final = metrics.finalize(measured)
    assert np.isnan(final["loss"]) and np.isnan(final["gradient_norm"])


@pytest.mark.parametrize("size", [6e4, 1e-5])
def test_the_norm_of_a_gradient_of_half_precision(size):
    def linear(params, frozen, model_state, batch, key):
        return jnp.sum(params["w"] * batch), (model_state, {})

    optimizer = optax.sgd(0.0)
    start = Variables({"w": jnp.zeros(4, jnp.float16)})
    state = init_state(jax.random.key(0), start, optimizer)
    batch = jnp.full(4, size, jnp.float16)
    _, measured = train_step(linear, optimizer)(state, batch)
    norm = metrics.finalize(measured)["gradient_norm"]
    np.testing.assert_allclose(norm, 2 * float(batch[0]), rtol=1e-5)


@pytest.mark.parametrize("name", ["loss", "gradient_norm"])
def test_a_metric_of_the_steps_own_name_is_refused(name):
    def named(params, *rest):
        loss, (state, _) = objective(params, *rest)
        return loss, (state, {name: loss})

    optimizer = optax.sgd(0.1)
    state = init_state(jax.random.key(0), START, optimizer)
    with pytest.raises(ValueError, match=f"its metric '{name}' has the name of one"):
        jax.eval_shape(train_step(named, optimizer), state, BATCH)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()),
        optax.polyak_sgd(),
        optax.lbfgs(),
        optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1)),
    ],
    ids=["plateau", "polyak", "lbfgs", "sam"],
)
def test_optimizers_of_extra_arguments(optimizer):
    """The last takes one of its own alone."""
    state = init_state(jax.random.key(0), START, optimizer)
    after, _ = jax.eval_shape(train_step(objective, optimizer), state, BATCH)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (state, after))
    assert shapes[0] == shapes[1]


def test_what_an_optimizer_of_extra_arguments_is_given():
    def update(updates, state, params=None, *, value, grad, value_fn, **_):
        here = {"value": value, "value_fn": value_fn(params)}
        return updates, {**here, "grad": grad["b"]}

    optimizer = optax.GradientTransformationExtraArgs(lambda params: {}, update)
    state = init_state(jax.random.key(0), START, optimizer)
    after, _ = train_step(objective, optimizer)(state, BATCH)
    loss, gradient = by_hand(START.params)
    for name, expected in (
        ("value", loss),
        ("value_fn", loss),
        ("grad", gradient["b"]),
    ):
        np.testing.assert_allclose(after.opt_state[name], expected, rtol=1e-5)

    step = train_step(objective, optimizer, axis_name="data")
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    with pytest.raises(ValueError, match="line search .* axis_name='data'.*jit_step"):
        parallel.shard_map_step(step, mesh)(state, BATCH)


def test_steps_may_be_scanned_and_vmapped():
    optimizer = optax.adam(0.1)
    step = train_step(objective, optimizer)

    def run(key):
        state = init_state(key, START, optimizer)
        state, _ = jax.lax.scan(lambda s, _: step(s, BATCH), state, length=4)
        return state.params

    seeds = jax.random.split(jax.random.key(0), 2)
    many = jax.jit(jax.vmap(run))(seeds)
    state = init_state(seeds[0], START, optimizer)
    single = jax.jit(step)
    for _ in range(4):
        state, _ = single(state, BATCH)
    np.testing.assert_allclose(many["w"][1], state.params["w"], rtol=1e-5)


# --- the state ------------------------------------------------------------------------


def test_the_state_is_a_copy_of_the_variables():
    state = init_state(jax.random.key(0), START, optax.sgd(0.1))
    jax.tree.map(lambda leaf: leaf.delete(), (state.params, state.model_state))
    assert float(START.params["b"]) == 0.25


def test_numpy_variables_become_arrays():
    start = Variables({"w": np.ones(3, np.float32)})
    state = init_state(
        jax.random.key(0), start, optax.adam(0.1), frozen={"f": np.ones(2)}
    )
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize(
    "key",
    [jax.random.PRNGKey(0), 0, np.zeros(2, np.uint32)],
    ids=["raw", "int", "numpy"],
)
def test_a_raw_key_is_refused(key, types_unchecked):
    with pytest.raises(TypeError, match=r"key: .*jax\.random\.key\(seed\)"):
        init_state(key, START, optax.sgd(0.1))


def test_nothing_to_learn_is_refused():
    with pytest.raises(ValueError, match="nothing to learn"):
        init_state(jax.random.key(0), Variables({}), optax.sgd(0.1))


def test_roles_of_optimizers_and_parameters_must_agree():
    with pytest.raises(ValueError, match=r"roles \['a'\] must be those of params"):
        init_state(jax.random.key(0), START, {"a": optax.sgd(0.1)})


# --- several players ------------------------------------------------------------------


def pull(other, rate):
    """Toward the other player; counts calls in the model state."""

    def objective(params, frozen, model_state, batch, key):
        loss = jnp.sum((params["w"] - frozen[other]["w"]) ** 2) / 2
        state = {**model_state, "calls": model_state["calls"] + 1}
        return loss, (state, {"noise": jax.random.normal(key)})

    return train_step(objective, optax.sgd(rate))


def players(key=0, frozen=None):
    start = Variables(
        {"a": {"w": jnp.array([0.0])}, "b": {"w": jnp.array([4.0])}},
        {"calls": jnp.zeros((), jnp.int32)},
    )
    optimizers = {"a": optax.sgd(1.0), "b": optax.sgd(0.25)}
    return init_state(jax.random.key(key), start, optimizers, frozen=frozen)


def test_players_move_in_the_order_given():
    step = jax.jit(alternate(a=pull("b", 1.0), b=pull("a", 0.25)))
    state, measured = step(players(), None)
    assert float(state.params["a"]["w"][0]) == 4.0  # all the way to b
    assert float(state.params["b"]["w"][0]) == 4.0  # a is there already
    assert int(state.step) == 1 and int(state.model_state["calls"]) == 2
    assert set(measured) == {
        f"{role}/{name}" for role in "ab" for name in ("loss", "noise", "gradient_norm")
    }
    step = jax.jit(alternate(b=pull("a", 0.25), a=pull("b", 1.0)))
    state, _ = step(players(), None)
    assert float(state.params["b"]["w"][0]) == 3.0
    assert float(state.params["a"]["w"][0]) == 3.0


def test_players_draw_from_streams_of_their_own():
    step = jax.jit(alternate(a=pull("b", 1.0), b=pull("a", 0.25)))
    state, measured = step(players(), None)
    noise = {float(measured[f"{role}/noise"].total) for role in "ab"}
    _, later = step(state, None)
    noise |= {float(later[f"{role}/noise"].total) for role in "ab"}
    assert len(noise) == 4
    assert same(state.key, players().key)


def test_a_player_may_wait():
    """A role without a step keeps its parameters and is frozen for the others."""
    state, _ = jax.jit(alternate(a=pull("b", 0.5)))(players(), None)
    assert float(state.params["a"]["w"][0]) == 2.0
    assert float(state.params["b"]["w"][0]) == 4.0


def test_what_is_frozen_reaches_every_player_and_stays():
    state = players(frozen={"teacher": {"w": jnp.array([7.0])}})
    after, _ = jax.jit(alternate(a=pull("teacher", 1.0), b=pull("a", 1.0)))(state, None)
    assert float(after.params["b"]["w"][0]) == 7.0
    assert same(after.frozen, state.frozen)


def test_a_role_without_parameters_is_refused():
    with pytest.raises(ValueError, match=r"role 'c' has no parameters; roles are"):
        alternate(c=pull("a", 1.0))(players(), None)


def test_a_role_in_params_and_in_frozen_is_refused():
    state = players(frozen={"b": {"w": jnp.array([0.0])}})
    with pytest.raises(ValueError, match="'b' is both learned and frozen"):
        alternate(a=pull("b", 1.0))(state, None)


# --- measuring ------------------------------------------------------------------------


def test_measuring_batches_of_different_sizes_is_exact():
    def measure(params, frozen, model_state, batch):
        return {"error": metrics.mean(batch["x"], where=batch["where"])}

    step = jax.jit(eval_step(measure))
    state = init_state(jax.random.key(0), START, optax.sgd(0.1))
    x = jnp.arange(10.0)
    total: dict[str, Mean] = {}
    for rows in (x[:4], x[4:8], x[8:]):
        padded = jnp.pad(rows, (0, 4 - len(rows)), constant_values=1e6)
        batch = {"x": padded, "where": jnp.arange(4) < len(rows)}
        total = metrics.merge(total, step(state, batch))
    assert metrics.finalize(total) == {"error": 4.5}


def test_measuring_over_devices_adds_up():
    def measure(params, frozen, model_state, batch):
        return {"error": metrics.mean(batch)}

    state = init_state(jax.random.key(0), START, optax.sgd(0.1))
    step = jax.pmap(
        eval_step(measure, axis_name="data"),
        axis_name="data",
        in_axes=(None, 0),
        out_axes=None,
    )
    measured = step(state, jnp.arange(8.0).reshape(8, 1))
    assert (float(measured["error"].total), float(measured["error"].count)) == (28, 8)


def test_optimizers_that_keep_where_they_began_can_be_donated():
    """As `meta.proximal` does: the same buffer must not be given away twice."""

    class Kept(NamedTuple):
        start: Any

    optimizer = optax.chain(
        optax.sgd(0.1),
        optax.GradientTransformation(
            Kept, lambda updates, state, params=None: (updates, state)
        ),
    )

    def objective(params, frozen, state, batch, key):
        return jnp.sum((params["w"] - batch) ** 2), (state, {})

    step = parallel.jit_step(train_step(objective, optimizer))
    begun = Variables({"w": jnp.zeros(3)})
    state = init_state(jax.random.key(0), begun, optimizer)
    state, _ = step(state, jnp.ones(3))
    assert state.opt_state[1].start["w"].tolist() == [0.0] * 3
    assert state.params["w"].tolist() != [0.0] * 3
