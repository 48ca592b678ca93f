"""A whole run as one function: same as the loop, and vmapped as run one by one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtransfer import prng, train
from jaxtransfer.typing import Variables
from tests.train.checkpointed_run import objective

ROWS = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
DATA = {"inputs": jnp.asarray(ROWS), "labels": jnp.asarray(ROWS.sum(axis=1))}


def start(key, optimizer, frozen=None):
    first, second = jax.random.split(prng.stream(key, "init"))
    params = {
        "hidden": jax.random.normal(first, (8, 16)) / 3,
        "output": jax.random.normal(second, (16, 1)) / 4,
    }
    return train.init_state(key, Variables(params), optimizer, frozen=frozen)


def evaluate(data, state):
    hidden = jax.nn.relu(data["inputs"] @ state.params["hidden"])
    error = (hidden @ state.params["output"])[:, 0] - data["labels"]
    return {"error": train.metrics.mean(error**2)}


def run(key, learning_rate, data, *, steps=12, eval_every=None, replacement=False):
    optimizer = optax.adam(learning_rate)
    return train.scan_fit(
        train.train_step(objective, optimizer),
        start(key, optimizer),
        train.resident(data, 8, replacement=replacement),
        steps=steps,
        evaluate=functools.partial(evaluate, data),
        eval_every=eval_every,
    )


SINGLE = jax.jit(run)
KEYS = jax.vmap(jax.random.key)(jnp.arange(4))


def assert_close(tree, others, *, index):
    for one, many in zip(jax.tree.leaves(tree), jax.tree.leaves(others), strict=True):
        if not jax.dtypes.issubdtype(one.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(one, many[index], rtol=1e-5, atol=1e-5)


def test_vmap_over_seeds_equals_single_runs():
    many = jax.jit(jax.vmap(run, in_axes=(0, None, None)))(KEYS, 1e-2, DATA)
    for index, key in enumerate(KEYS):
        assert_close(SINGLE(key, 1e-2, DATA), many, index=index)
    losses = many[1].train["loss"]
    assert losses.shape == (4, 12)
    assert len(np.unique(losses[:, 0])) == 4, "the seeds saw the same run"


def test_vmap_over_learning_rates_equals_single_runs():
    rates = jnp.array([1e-3, 1e-2, 3e-2])
    many = jax.jit(jax.vmap(run, in_axes=(None, 0, None)))(KEYS[0], rates, DATA)
    for index, rate in enumerate(rates):
        assert_close(SINGLE(KEYS[0], rate, DATA), many, index=index)
    errors = many[1].evaluation["error"][:, -1]
    assert len(np.unique(errors)) == 3 and errors[0] > errors[1]


def test_vmap_over_data_equals_single_runs():
    several = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), DATA)
    many = jax.jit(jax.vmap(run, in_axes=(None, None, 0)))(KEYS[0], 1e-2, several)
    for index in range(2):
        data = jax.tree.map(lambda x, index=index: x[index], several)
        assert_close(SINGLE(KEYS[0], 1e-2, data), many, index=index)


def test_vmap_with_injected_hyperparameters():
    optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=1e-2)
    step = train.train_step(objective, optimizer)

    def tuned(rate):
        state = start(KEYS[0], optimizer)
        state.opt_state.hyperparams["learning_rate"] = rate
        return train.scan_fit(step, state, train.resident(DATA, 8), steps=12)[0]

    many = jax.jit(jax.vmap(tuned))(jnp.array([1e-3, 1e-2]))
    expected, _ = SINGLE(KEYS[0], 1e-2, DATA)
    assert_close(expected.params, many.params, index=1)


def test_equals_the_host_loop_on_the_same_batches():
    optimizer = optax.adam(1e-2)
    sample = jax.jit(train.resident(DATA, 8))
    state = start(KEYS[1], optimizer)
    data_key = prng.stream(state.key, "data")
    looped, history = train.fit(
        jax.jit(train.train_step(objective, optimizer)),
        state,
        (sample(data_key, step) for step in range(12)),
        steps=12,
        log_every=1,
        progress=False,
    )
    scanned, records = SINGLE(KEYS[1], 1e-2, DATA)
    for name in looped.params:
        np.testing.assert_allclose(
            looped.params[name], scanned.params[name], rtol=1e-5, atol=1e-6
        )
    np.testing.assert_allclose(
        history.series("loss")[1], records.train["loss"], rtol=1e-4, atol=1e-6
    )
    assert history.series("loss")[0] == records.step.tolist()


def test_blocks_average_the_steps_and_evaluate_at_their_ends():
    state, each = SINGLE(KEYS[0], 1e-2, DATA)
    nested = functools.partial(run, eval_every=4)
    blocked_state, blocked = jax.jit(nested)(KEYS[0], 1e-2, DATA)
    assert_close(
        state.params, jax.tree.map(lambda x: x[None], blocked_state.params), index=0
    )
    assert blocked.step.tolist() == [4, 8, 12]
    np.testing.assert_allclose(
        blocked.train["loss"], each.train["loss"].reshape(3, 4).mean(axis=1), rtol=1e-5
    )
    short, _ = jax.jit(functools.partial(run, steps=8))(KEYS[0], 1e-2, DATA)
    expected = train.metrics.finalize(evaluate(DATA, short))["error"]
    np.testing.assert_allclose(blocked.evaluation["error"][1], expected, rtol=1e-5)
    np.testing.assert_allclose(
        blocked.evaluation["error"][-1:], each.evaluation["error"], rtol=1e-5
    )


def test_goes_on_where_it_stopped():
    optimizer = optax.adam(1e-2)
    step, sample = train.train_step(objective, optimizer), train.resident(DATA, 8)
    go = jax.jit(lambda state: train.scan_fit(step, state, sample, steps=6))
    state, _ = go(start(KEYS[0], optimizer))
    state, history = go(state)
    whole, _ = SINGLE(KEYS[0], 1e-2, DATA)
    assert int(state.step) == 12 and history.step.tolist() == list(range(7, 13))
    for name in whole.params:
        np.testing.assert_allclose(
            state.params[name], whole.params[name], rtol=1e-5, atol=1e-6
        )


def test_frozen_is_an_argument_and_not_carried():
    optimizer = optax.sgd(1e-2)

    def held(params, frozen, model_state, batch, key):
        error = batch["inputs"] @ frozen["teacher"]["w"] @ params["w"]
        return jnp.mean(error**2), (model_state, {})

    def go(params, teacher):
        state = train.init_state(
            jax.random.key(0), Variables(params), optimizer, frozen={"teacher": teacher}
        )
        step = train.train_step(held, optimizer)
        return train.scan_fit(step, state, train.resident(DATA, 8), steps=3)

    def lowered(width):
        teacher = {"w": jnp.ones((8, width))}
        return jax.jit(go).lower({"w": jnp.ones((width, 1))}, teacher).as_text()

    assert len(lowered(4096)) - len(lowered(16)) < 1000
    state, _ = jax.jit(go)({"w": jnp.ones((4, 1))}, {"w": jnp.ones((8, 4))})
    np.testing.assert_array_equal(state.frozen["teacher"]["w"], jnp.ones((8, 4)))
    scan = next(
        e
        for e in jax.make_jaxpr(go)(
            {"w": jnp.ones((4, 1))}, {"w": jnp.ones((8, 4))}
        ).eqns
        if e.primitive.name == "scan"
    )
    assert (8, 4) not in [v.aval.shape for v in scan.outvars], "carried"


def test_epochs_are_permutations_that_differ():
    sample = train.resident({"row": jnp.arange(10)}, 3)
    epochs = [
        np.concatenate([sample(jax.random.key(0), 3 * e + s)["row"] for s in range(3)])
        for e in range(2)
    ]
    for rows in epochs:
        assert len(set(rows.tolist())) == 9
    assert epochs[0].tolist() != epochs[1].tolist()
    other = sample(jax.random.key(1), 0)["row"].tolist()
    assert other != epochs[0][:3].tolist()


def test_with_replacement_draws_all_rows_evenly():
    sample = train.resident({"row": jnp.arange(5)}, 5, replacement=True)
    rows = jax.vmap(lambda s: sample(jax.random.key(0), s)["row"])(jnp.arange(2000))
    shares = np.bincount(np.asarray(rows).ravel(), minlength=5) / rows.size
    np.testing.assert_allclose(shares, 0.2, atol=0.02)
    assert any(len(set(batch.tolist())) < 5 for batch in rows[:20])


def test_paired_streams_are_separate():
    one = train.resident(DATA, 8)
    batch = train.paired(one, one)(KEYS[0], 0)
    assert set(batch) == {"source", "target"}
    assert not np.array_equal(batch["source"]["labels"], batch["target"]["labels"])
    other = train.paired(one, train.resident(DATA, 4))(KEYS[0], 0)
    np.testing.assert_array_equal(batch["source"]["labels"], other["source"]["labels"])


@pytest.mark.parametrize(
    ("steps", "every"), [(10, 4), (0, None), (4, 0), (3, 6), (-2, None)]
)
def test_steps_must_be_a_multiple(steps, every):
    with pytest.raises(ValueError, match=f"steps: {steps} must be a positive multiple"):
        run(KEYS[0], 1e-2, DATA, steps=steps, eval_every=every)


def test_resident_refuses_what_it_cannot_sample():
    with pytest.raises(ValueError, match="same number of examples"):
        train.resident({"inputs": jnp.ones((4, 2)), "labels": jnp.ones(3)}, 2)
    with pytest.raises(ValueError, match="same number of examples"):
        train.resident({"inputs": jnp.ones(())}, 2)
    for size in (0, 41):
        with pytest.raises(ValueError, match=r"batch_size: must be 1 … 40"):
            train.resident(DATA, size)
