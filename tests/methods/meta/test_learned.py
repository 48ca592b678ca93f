"""Learned inner optimizers: what they do, and the gradient by what is learned."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtransfer.methods import meta
from jaxtransfer.typing import Variables
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

BOWL = meta.Task(bowl, bowl)
BACKWARDS = ("forward-over-reverse", "remat", "stored")


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def of_quadratic(learner, own):
    """Loss and gradients on the quadratic with parameters ``own`` of the optimizer."""
    params = {
        "network": {"w": jnp.asarray(WEIGHTS)},
        "optimizer": {"w": jnp.asarray(own)},
    }
    batch = jax.tree.map(jnp.asarray, QUADRATIC)
    return gradient(meta.objective(learner, chunk=1), Variables(params), batch)


@pytest.mark.parametrize("form", [*BACKWARDS, "first order"])
@pytest.mark.parametrize("steps", [1, 3])
def test_meta_sgd_is_the_closed_form(steps, form, float64):
    first_order = form == "first order"
    options = {"first_order": True} if first_order else {"backward": form}
    learner = meta.maml(BOWL, meta.meta_sgd(0.1), steps=steps, **options)
    rates = np.array([0.05, 0.1, -0.2, 0.3])
    loss, found = of_quadratic(learner, rates)
    expected, by_start, by_rates = bowl_by_hand(np.tile(rates, (steps, 1)), first_order)
    np.testing.assert_allclose(loss, expected, rtol=1e-10)
    np.testing.assert_allclose(found["network"]["w"], by_start, rtol=1e-10)
    np.testing.assert_allclose(found["optimizer"]["w"], by_rates.sum(0), rtol=1e-10)


@pytest.mark.parametrize("steps", [3, 5])
def test_each_step_has_its_own_rate_and_the_last_serves_beyond(steps, float64):
    learner = meta.maml(BOWL, meta.per_layer_per_step(0.1), steps=steps)
    rates = np.array([0.05, 0.3, -0.1])
    loss, found = of_quadratic(learner, rates)
    rows = np.minimum(np.arange(steps), 2)
    expected, by_start, each = bowl_by_hand(np.repeat(rates[rows, None], SIZE, axis=1))
    by_rates = np.zeros(3)
    np.add.at(by_rates, rows, each.sum(axis=1))
    np.testing.assert_allclose(loss, expected, rtol=1e-10)
    np.testing.assert_allclose(found["network"]["w"], by_start, rtol=1e-10)
    np.testing.assert_allclose(found["optimizer"]["w"], by_rates, rtol=1e-10)
    assert np.abs(by_rates).min() > 1e-3


LEARNED = {
    "meta-sgd": meta.meta_sgd(0.3),
    "per layer, per step": meta.per_layer_per_step(0.3),
    "meta-curvature": meta.meta_curvature(0.3),
    "optax": meta.Learned(
        lambda params, steps: {"rate": jnp.array(0.3)},
        lambda own: optax.sgd(own["rate"]),
    ),
}


@pytest.mark.parametrize("name", LEARNED)
def test_each_begins_as_gradient_descent(name):
    model, start = made("linen")
    support = jax.tree.map(lambda leaf: leaf[0], episodes()["support"])
    adapted = []
    for optimizer in (LEARNED[name], optax.sgd(0.3)):
        learner = meta.maml(meta.task(model), optimizer, steps=2)
        params = learner.init(start).params
        adapted.append(jax.jit(learner.adapt)(params, {}, {}, support, KEY).params)
    close(*adapted)


def test_meta_curvature_turns_every_axis(float64):
    """A kernel's gradient by the window, inputs and outputs; a number is scaled."""
    random = np.random.default_rng(0)
    shapes = {"conv": (3, 3, 2, 4), "dense": (2, 3), "bias": (3,), "number": ()}
    slopes = {name: jnp.asarray(random.normal(size=s)) for name, s in shapes.items()}
    learned = meta.meta_curvature(0.5)
    own = jax.tree.map(
        lambda leaf: jnp.asarray(random.normal(size=leaf.shape)),
        learned.init(slopes, 1),
    )
    updates, _ = learned.build(own).update(slopes, optax.EmptyState())
    window, inputs, outputs = own["conv"].values()
    flat = slopes["conv"].reshape(9, 2, 4)
    expected = {
        "conv": np.einsum("pqr,ap,bq,cr->abc", flat, window, inputs, outputs),
        "dense": np.einsum("qr,bq,cr->bc", slopes["dense"], *own["dense"].values()),
        "bias": own["bias"]["axis_0"] @ slopes["bias"],
        "number": own["number"]["axis_0"][0, 0] * slopes["number"],
    }
    expected["conv"] = expected["conv"].reshape(3, 3, 2, 4)
    close(updates, jax.tree.map(lambda leaf: -0.5 * leaf, expected), 1e-12)


@pytest.mark.parametrize(
    "optimizer",
    [
        meta.meta_curvature(0.3),
        meta.Learned(
            lambda params, steps: {
                "rate": jnp.array(0.05, jnp.float64),
                "decay": jnp.array(0.8, jnp.float64),
            },
            lambda own: optax.adam(own["rate"], b1=own["decay"], eps_root=1e-6),
        ),
    ],
    ids=["meta-curvature", "learned Adam"],
)
def test_the_gradient_by_what_is_learned_is_the_difference(optimizer, float64):
    model, start = made("linen")
    start = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), start)
    learner = meta.maml(meta.task(model), optimizer, steps=2)
    batch = episodes(tasks=2, dtype=jnp.float64)
    found = check_differences(meta.objective(learner), learner.init(start), batch)
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(found["optimizer"]))


def test_only_what_adapts_has_rates():
    """And a network's own parameters in the place of the learner's are refused."""
    model, start = made("linen")
    learner = meta.anil(meta.task(model), meta.meta_sgd(0.3), steps=1)
    params = learner.init(start).params
    assert set(params["network"]) == {"blocks_0", "head"}
    assert set(params["optimizer"]) == {"head"}
    support = jax.tree.map(lambda leaf: leaf[0], episodes()["support"])
    with pytest.raises(ValueError, match=r"learner.init\(variables\)"):
        learner.adapt(start.params, {}, {}, support, KEY)
