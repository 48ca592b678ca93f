"""The implicit meta-gradient is that of a long unrolled adaptation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtransfer.methods import meta

KEY = jax.random.key(0)
STRENGTH = 1.5
RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def loss(params, frozen, model_state, batch, key):
    """Logistic regression on features that a slow matrix makes: convex in "w"."""
    outputs = jnp.tanh(batch["inputs"] @ params["body"]) @ params["w"]
    return jnp.mean(optax.sigmoid_binary_cross_entropy(outputs, batch["labels"])), (
        model_state,
        {},
    )


TASK = meta.Task(loss, loss)


def start():
    random = np.random.default_rng(1)
    return {
        "body": jnp.asarray(random.normal(size=(3, 4))),
        "w": jnp.asarray(random.normal(size=4)),
    }


def episodes(tasks=2):
    random = np.random.default_rng(2)

    def part(rows):
        inputs = random.normal(size=(tasks, rows, 3))
        return {
            "inputs": jnp.asarray(inputs),
            "labels": jnp.asarray(random.random((tasks, rows)) < 0.5, jnp.float64),
        }

    return {"support": part(6), "query": part(5)}


def gradient(learner, chunk=None):
    objective = meta.objective(learner, chunk=chunk)

    def value(params):
        return objective(params, {}, {}, episodes(), KEY)[0]

    return jax.jit(jax.value_and_grad(value))(start())


@functools.cache
def unrolled(rules):
    inner = meta.proximal(optax.sgd(0.3), STRENGTH)
    learner = meta.maml(TASK, inner, steps=300, rules=rules)
    with jax.enable_x64(True):
        return gradient(learner)


@pytest.mark.parametrize("rules", [None, "w"])
@pytest.mark.parametrize("solver", ["conjugate gradient", "neumann"])
def test_it_is_that_of_long_unrolling(rules, solver):
    learner = meta.implicit_maml(
        TASK,
        optax.sgd(0.3),
        steps=300,
        strength=STRENGTH,
        solver=solver,
        iterations=60,
        rules=rules,
    )
    expected_value, expected = unrolled(rules)
    value, found = gradient(learner, chunk=1)
    np.testing.assert_allclose(value, expected_value, rtol=1e-10)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-7, atol=1e-10)


def test_the_check_discriminates():
    """A first-order gradient at the same solution is far off."""
    inner = meta.proximal(optax.sgd(0.3), STRENGTH)
    first = meta.maml(TASK, inner, steps=300, rules="w", first_order=True)
    _, found = gradient(first)
    _, expected = unrolled("w")
    assert np.abs(found["w"] - expected["w"]).max() > 1e-3


def test_few_iterations_come_close():
    learner = meta.implicit_maml(
        TASK, optax.sgd(0.3), steps=300, strength=STRENGTH, rules="w"
    )
    _, found = gradient(learner)
    _, expected = unrolled("w")
    np.testing.assert_allclose(found["w"], expected["w"], rtol=2e-2, atol=1e-4)


def test_weights_of_steps_are_refused():
    learner = meta.implicit_maml(TASK, optax.sgd(0.3), steps=2)
    with pytest.raises(ValueError, match="gradient at its end only; leave step_w"):
        meta.objective(learner, step_weights=meta.multi_step_weights(2, 9))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strength": 0.0}, "strength: got 0.0; it must be positive"),
        ({"strength": float("nan")}, "strength: got nan; it must be positive"),
        ({"iterations": 0}, "iterations: got 0"),
        ({"solver": "newton"}, "choose one of"),
    ],
)
def test_bad_options_are_named(options, words, types_unchecked):
    with pytest.raises(ValueError, match=words):
        meta.implicit_maml(TASK, optax.sgd(0.1), steps=1, **options)


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("chunk", [None, 2, "auto"])
def test_tasks_side_by_side_are_those_one_by_one(steps, chunk, float64):
    """Of what does not adapt, too: it is the same for all tasks, its gradient not."""
    learner = meta.implicit_maml(
        TASK, optax.sgd(0.3), steps=steps, strength=STRENGTH, rules="w"
    )
    (_, found), (_, expected) = gradient(learner, chunk), gradient(learner, 1)
    for name, slope in expected.items():
        np.testing.assert_allclose(found[name], slope, rtol=1e-9, err_msg=name)
        assert np.abs(slope).max() > 1e-3


@pytest.mark.parametrize("solver", ["conjugate gradient", "neumann"])
def test_not_a_number_stays(solver, float64):
    """An inner problem that diverged looks like none that is solved."""
    learner = meta.implicit_maml(TASK, optax.sgd(0.3), steps=2, solver=solver)
    lost = {**start(), "w": jnp.full(4, jnp.nan)}

    def value(params):
        return meta.objective(learner)(params, {}, {}, episodes(), KEY)[0]

    for slope in jax.grad(value)(lost).values():
        assert np.isnan(slope).all()


def test_a_learned_optimizer_is_refused(types_unchecked):
    with pytest.raises(TypeError, match="optimizer: got a learned one"):
        meta.implicit_maml(TASK, meta.meta_sgd(0.1), steps=1)


def test_no_gradient_is_too_small_and_dtypes_may_differ():
    """The system is linear: conjugate gradients must not square what is small."""

    def support(params, frozen, model_state, batch, key):
        wide = {name: leaf.astype(jnp.float32) for name, leaf in params.items()}
        together = jnp.sum(wide["v"]) * jnp.sum(wide["w"])
        total = sum(jnp.sum(leaf**2) for leaf in wide.values())
        return total / 2 + together / 10 + jnp.sum(batch["rows"]), (model_state, {})

    learner = meta.implicit_maml(
        meta.Task(support, support), optax.sgd(0.1), steps=5, strength=np.float64(2.0)
    )
    params = {"v": jnp.ones(2, jnp.float32), "w": jnp.ones(2, jnp.bfloat16)}
    rows = {"rows": np.zeros(1, np.float32)}

    @jax.jit
    def slope(scale):
        def value(params):
            found = learner.adapt(params, {}, {}, rows, KEY).params
            return scale * jnp.sum(found["v"] + found["w"].astype(jnp.float32))

        return jax.grad(value)(params)

    usual, tiny = slope(jnp.float32(1.0)), slope(jnp.float32(2.0**-80))
    # (I + H / 2) x = (1, 1, 1, 1) with H of ones on the diagonal and tenths between.
    np.testing.assert_allclose(usual["v"], 1 / 1.6, rtol=1e-2)
    assert usual["w"].dtype == jnp.bfloat16
    for name in params:
        np.testing.assert_allclose(
            np.float64(tiny[name]) * 2.0**80, np.float64(usual[name]), rtol=1e-6
        )
