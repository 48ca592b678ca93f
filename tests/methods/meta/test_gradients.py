"""The meta-gradient against PyTorch and a NumPy twin; its precision and its memory."""

import functools
import pathlib
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from jaxtransfer import nets, ops
from jaxtransfer.methods import meta
from jaxtransfer.model import from_linen
from jaxtransfer.ops import patches

KEY = jax.random.key(0)
BACKWARDS: tuple[meta.Backward, ...] = ("forward-over-reverse", "remat", "stored")


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


class Net(nn.Module):
    """In the manner of Conv4; ``outputs`` of tests/golden/make_maml.py is the same."""

    filters: tuple[int, ...] = (2, 3)
    strided: bool = True
    conv: Callable[..., nn.Module] = nets.PatchConv

    @nn.compact
    def __call__(self, inputs, train: bool = False):
        x = inputs
        for number, filters in enumerate(self.filters):
            strides = 2 if self.strided else 1
            x = self.conv(filters, (3, 3), strides, name=f"conv_{number}")(x)
            if number == 0:
                x = nn.BatchNorm(not train, momentum=0.0, name="norm_0")(x)
            x = nn.relu(x)
            if not self.strided:
                x = ops.max_pool(x)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def weights_of(model, inputs, vector):
    """The parameters of a network, from the leaves in the order of their names."""
    shapes = jax.eval_shape(model.init, KEY, inputs).params
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, vector.dtype), shapes)
    return ravel_pytree(zeros)[1](vector)


def loss_and_gradient(objective, params, model_state, batch):
    """Of the outer loss by the parameters, as one vector."""

    def loss(params):
        return objective(params, {}, model_state, batch, KEY)[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    return np.concatenate([value[None], ravel_pytree(gradient)[0]])


def close(found, expected, tolerance):
    """Relative to each number or, for slopes that are 0, to the largest slope."""
    atol = tolerance * np.abs(expected[1:]).max()
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=atol)


# --- PyTorch --------------------------------------------------------------------------


@functools.cache
def golden():
    folder = pathlib.Path(__file__).resolve().parents[2] / "golden"
    with np.load(folder / "maml.npz") as file:
        return dict(file)


def by_library(case, optimizer=None, *, conv=nets.PatchConv, chunk=None, **options):
    """Loss and gradient of a case of the golden file."""
    net, steps, order = case.split("/")
    model = from_linen(Net(strided=net == "strided", conv=conv))
    batch = {
        part: {
            "inputs": jnp.asarray(golden()[f"{part}/inputs"], jnp.float64)[..., None],
            "labels": jnp.asarray(golden()[f"{part}/labels"], jnp.int32),
        }
        for part in ("support", "query")
    }
    learner = meta.maml(
        meta.task(model, statistics="transductive"),
        optax.sgd(0.4) if optimizer is None else optimizer,
        steps=int(steps),
        first_order=order == "first",
        **options,
    )
    shapes = jax.eval_shape(
        lambda images: learner.init(model.init(KEY, images)),
        batch["support"]["inputs"][0],
    )
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
    names = ("weights",) if optimizer is None else ("weights", "rates")
    vector = np.concatenate([golden()[name] for name in names])
    params = ravel_pytree(zeros.params)[1](vector)
    objective = meta.objective(learner, chunk=chunk)
    return loss_and_gradient(objective, params, zeros.model_state, batch)


# The other forms are held to the twin in NumPy below, whose network compiles quickly.
FORMS = [
    ("strided/1/first", {"chunk": 1}),
    ("strided/5/first", {"chunk": None}),
    ("strided/1/second", {"chunk": None}),
    ("strided/5/second", {"chunk": 1}),
    ("strided/3/second", {"backward": "remat", "chunk": 1}),
    ("strided/3/second", {"backward": "stored", "chunk": None}),
    ("strided/3/second", {"conv": nn.Conv, "chunk": None}),
    ("pooled/3/second", {"chunk": None}),
]


@pytest.mark.parametrize(("case", "options"), FORMS)
def test_loss_and_gradient_are_those_of_pytorch(case, options, float64):
    close(by_library(case, **options), golden()[case], 1e-9)


def test_so_is_the_gradient_by_learned_rates(float64):
    found = by_library("strided/3/second", meta.meta_sgd(0.1), chunk=1)
    close(found, golden()["meta_sgd/3/second"], 1e-9)


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_the_orders_are_told_apart(steps):
    first, second = (
        golden()[f"strided/{steps}/{order}"][1:] for order in ("first", "second")
    )
    assert np.linalg.norm(first - second) > 0.3 * np.linalg.norm(second)


class Wide(nn.Module):
    """A layer of 16 channels, with parameters before and after it."""

    conv: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, inputs, train: bool = False):
        x = nn.Dense(16, name="first")(inputs)
        x = ops.max_pool(nn.relu(self.conv(16, (3, 3), name="conv")(x)))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def test_of_wide_layers_it_is_that_of_convolutions(float64, monkeypatch):
    """They take Winograd's form on a CPU."""
    random = np.random.default_rng(0)
    batch = {
        part: {
            "inputs": jnp.asarray(random.normal(size=(2, 3, 8, 8, 2))),
            "labels": jnp.tile(jnp.arange(3), (2, 1)),
        }
        for part in ("support", "query")
    }
    vector = random.normal(scale=0.3, size=2419)
    winograd, shapes = patches.winograd_conv, set()

    def seen(inputs, kernel, **options):
        shapes.add(inputs.shape)
        return winograd(inputs, kernel, **options)

    monkeypatch.setattr(patches, "winograd_conv", seen)

    def found(conv, **options):
        model = from_linen(Wide(conv))
        learner = meta.maml(meta.task(model), optax.sgd(0.4), steps=2, **options)
        params = weights_of(model, batch["support"]["inputs"][0], vector)
        objective = meta.objective(learner, chunk=None)
        return loss_and_gradient(objective, params, {}, batch)

    expected = found(nn.Conv)
    assert not shapes
    close(found(nets.PatchConv), expected, 1e-9)
    assert shapes == {(3, 10, 10, 16)}  # with the padding
    first = found(nn.Conv, first_order=True)
    assert np.linalg.norm(first - expected) > 0.1 * np.linalg.norm(expected[1:])


# --- a twin in NumPy ------------------------------------------------------------------

LAYERS = (3, 4, 2)
RATE, STEPS = 0.5, 3


def twin_outputs(weights, inputs):
    bias_0, kernel_0, bias_1, kernel_1 = weights
    hidden = np.tanh(inputs @ kernel_0 + bias_0)
    return hidden, hidden @ kernel_1 + bias_1


def twin_loss(weights, inputs, labels):
    _, logits = twin_outputs(weights, inputs)
    chosen = logits[np.arange(len(labels)), labels]
    return np.mean(np.log(np.exp(logits).sum(1)) - chosen)


def twin_slopes(weights, inputs, labels):
    """The gradient of the loss, by hand."""
    hidden, logits = twin_outputs(weights, inputs)
    odds = np.exp(logits)
    by_logits = odds / odds.sum(1, keepdims=True) - np.eye(LAYERS[-1])[labels]
    by_logits = by_logits / len(labels)
    by_hidden = by_logits @ weights[3].T * (1 - hidden**2)
    return (
        by_hidden.sum(0),
        inputs.T @ by_hidden,
        by_logits.sum(0),
        hidden.T @ by_logits,
    )


def twin_adapted(weights, task):
    for _ in range(STEPS):
        slopes = twin_slopes(weights, *task["support"].values())
        weights = [w - RATE * s for w, s in zip(weights, slopes, strict=True)]
    return weights


def twin(vector, batch, first_order):
    """Loss and gradient; the latter by a difference along every single weight.

    The difference is imaginary, f'(x) = Im f(x + ih) / h, which is exact to rounding.
    """
    sizes = [(LAYERS[1],), LAYERS[:2], (LAYERS[2],), LAYERS[1:]]
    ends = np.cumsum([np.prod(size) for size in sizes])[:-1]

    def unflat(vector):
        parts = zip(np.split(vector, ends), sizes, strict=True)
        return [part.reshape(size) for part, size in parts]

    def flat(weights):
        return np.concatenate([w.ravel() for w in weights])

    total = 0.0
    for number in range(2):
        task = jax.tree.map(lambda leaf, n=number: leaf[n], batch)

        def loss(vector, adapt, query=task["query"], task=task):
            weights = unflat(vector)
            weights = twin_adapted(weights, task) if adapt else weights
            return twin_loss(weights, *query.values())

        at = flat(twin_adapted(unflat(vector), task)) if first_order else vector
        ways = 1e-30j * np.eye(len(vector))
        slopes = [loss(at + way, not first_order).imag / 1e-30 for way in ways]
        total = total + np.concatenate([[loss(vector, True)], slopes]) / 2
    return total


@functools.cache
def episodes():
    random = np.random.default_rng(0)
    return {
        part: {
            "inputs": random.normal(size=(2, rows, LAYERS[0])),
            "labels": np.tile(np.arange(rows) % 2, (2, 1)),
        }
        for part, rows in (("support", 4), ("query", 6))
    }


MLP = from_linen(nets.MLP(LAYERS[2], widths=LAYERS[1:2], activation=jnp.tanh))
WEIGHTS = np.random.default_rng(1).normal(size=26)


@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize(
    "form", [{"backward": backward} for backward in BACKWARDS] + [{"first_order": True}]
)
def test_every_form_gives_the_difference_of_a_twin(form, chunk, float64):
    learner = meta.maml(meta.task(MLP), optax.sgd(RATE), steps=STEPS, **form)
    objective = meta.objective(learner, chunk=chunk)
    params = weights_of(MLP, episodes()["support"]["inputs"][0], WEIGHTS)
    found = loss_and_gradient(objective, params, {}, episodes())
    first_order = "first_order" in form
    close(found, twin(WEIGHTS, episodes(), first_order), 1e-9)
    other = twin(WEIGHTS, episodes(), not first_order)
    assert np.linalg.norm(found - other) > 0.1 * np.linalg.norm(found[1:])


def penalized(params, frozen, model_state, batch, key):
    """Weight decay of a learned strength: its gradient is the same for all tasks."""
    error = jnp.mean((params["w"] - batch["y"]) ** 2)
    return error + jnp.exp(params["decay"]) * params["w"] ** 2, (model_state, {})


@pytest.mark.parametrize("form", BACKWARDS)
@pytest.mark.parametrize("chunk", [None, 1])
def test_what_does_not_depend_on_the_task_counts_once_a_task(form, chunk, float64):
    random = np.random.default_rng(0)
    tasks = {part: {"y": random.normal(size=(3, 4))} for part in ("support", "query")}
    params = {"w": jnp.asarray(1.5), "decay": jnp.asarray(0.3)}

    def value(params, learner, chunk):
        objective = meta.objective(learner, chunk=chunk)
        return objective(params, {}, {}, tasks, jax.random.key(0))[0]

    task, rate = meta.Task(penalized, penalized), optax.sgd(0.1)
    found = jax.grad(value)(
        params, meta.maml(task, rate, steps=1, backward=form), chunk
    )
    stored = meta.maml(task, rate, steps=1, backward="stored")
    expected = jax.grad(value)(params, stored, 1)
    for name, slope in expected.items():
        np.testing.assert_allclose(found[name], slope, rtol=1e-9, err_msg=name)


# --- precision and memory -------------------------------------------------------------


def test_patches_are_as_precise_as_convolutions(float64):
    """In float32, by the median error over 16 tasks, each with its own gradient."""
    random = np.random.default_rng(0)
    episodes = {
        part: {
            "inputs": random.normal(size=(16, 1, rows, 7, 7, 8)).astype(np.float32),
            "labels": np.tile(np.arange(rows, dtype=np.int32) % 3, (16, 1, 1)),
        }
        for part, rows in (("support", 6), ("query", 12))
    }
    vector = random.normal(scale=0.25, size=1251).astype(np.float32)

    def gradients(conv, dtype):
        model = from_linen(Net((16,), conv=conv))
        task = meta.task(model, statistics="transductive")
        objective = meta.objective(meta.maml(task, optax.sgd(0.4), steps=1))
        params = weights_of(model, episodes["support"]["inputs"][0, 0], vector)
        params, tasks = jax.tree.map(
            lambda leaf: jnp.asarray(leaf, None if leaf.dtype == np.int32 else dtype),
            (params, episodes),
        )
        norm = {"mean": jnp.zeros(16, dtype), "var": jnp.ones(16, dtype)}
        state = {"batch_stats": {"norm_0": norm}}

        def of_task(task):
            gradient = jax.grad(lambda p: objective(p, {}, state, task, KEY)[0])
            return ravel_pytree(gradient(params))[0]

        return np.asarray(jax.jit(lambda t: jax.lax.map(of_task, t))(tasks))

    exact = gradients(nets.PatchConv, jnp.float64)
    patches, convolutions = (
        np.median(
            np.linalg.norm(gradients(conv, jnp.float32) - exact, axis=1)
            / np.linalg.norm(exact, axis=1)
        )
        for conv in (nets.PatchConv, nn.Conv)
    )
    assert 0 < patches < 2 * convolutions < 1e-5


WIDE = from_linen(nets.MLP(3, widths=(16, 16)))


def wide_episodes(tasks):
    part = {
        "inputs": jax.ShapeDtypeStruct((tasks, 1024, 16), jnp.float32),
        "labels": jax.ShapeDtypeStruct((tasks, 1024), jnp.int32),
    }
    return {"support": part, "query": part}


@functools.cache
def temporary(
    *, tasks=4, steps=1, chunk: int | None = 1, backward: meta.Backward = BACKWARDS[0]
):
    """Bytes that the compiled loss and gradient hold beside inputs and results."""
    learner = meta.maml(meta.task(WIDE), optax.sgd(0.1), steps=steps, backward=backward)
    objective = meta.objective(learner, chunk=chunk)

    def loss(params, batch):
        return objective(params, {}, {}, batch, KEY)[0]

    params = jax.eval_shape(WIDE.init, KEY, jnp.ones((1, 16))).params
    lowered = jax.jit(jax.value_and_grad(loss)).lower(params, wide_episodes(tasks))
    return lowered.compile().memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_the_tasks_but_by_their_examples():
    few, many = (
        sum(4 * leaf.size for leaf in jax.tree.leaves(wide_episodes(tasks)))
        for tasks in (4, 16)
    )
    growth = temporary(tasks=16) - temporary(tasks=4)
    assert growth <= many - few + 4096
    growth = temporary(tasks=16, chunk=None) - temporary(tasks=4, chunk=None)
    assert growth > 3 * (many - few)


def test_memory_hardly_grows_with_the_steps():
    one = temporary()
    for backward in ("forward-over-reverse", "remat"):
        assert temporary(steps=50, backward=backward) <= 2 * one
    assert temporary(steps=50, backward="stored") > 5 * one
