"""Tasks, padding and NumPy twins of the few-shot learners."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtransfer.methods import meta
from jaxtransfer.model import from_linen
from jaxtransfer.train.metrics import ABSENT
from jaxtransfer.typing import Model

KEY = jax.random.key(0)
WAYS, FEATURES, INPUTS = 3, 4, 5
LABELS = {"support": [0, 0, 1, 2, 2, 1, 2], "query": [2, 1, 0, 1]}


class Net(nn.Module):
    """``features`` (a tanh layer) and a linear ``head``."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(WAYS, name="head")(Features(name="features")(x))


class Features(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.tanh(nn.Dense(FEATURES, name="dense")(x))


@functools.cache
def made() -> tuple[Model, dict]:
    """The network and its parameters, as NumPy arrays of float64."""
    net = from_linen(Net())
    shapes = jax.eval_shape(net.init, KEY, jnp.ones((1, INPUTS))).params
    random = np.random.default_rng(1)
    return net, jax.tree.map(lambda leaf: random.normal(size=leaf.shape) / 2, shapes)


def episodes(tasks=2, seed=0):
    """Tasks of three unequal classes, NumPy arrays of float64."""
    random = np.random.default_rng(seed)

    def part(labels):
        shape = (tasks, len(labels), INPUTS)
        return {
            "inputs": random.normal(size=shape),
            "labels": np.tile(np.array(labels, np.int32), (tasks, 1)),
        }

    return {name: part(labels) for name, labels in LABELS.items()}


def padded(batch, rows=2):
    """The same tasks with rows that don't count, at the front, full of other things."""

    def more(name, leaf):
        widths = ((0, 0), (rows, 0)) + ((0, 0),) * (leaf.ndim - 2)
        return np.pad(leaf, widths, constant_values=1 if name == "labels" else 50.0)

    def part(old):
        counts = np.ones(old["labels"].shape, bool)
        where = np.pad(counts, ((0, 0), (rows, 0)))
        classes = np.ones((len(counts), WAYS), bool)
        new = {name: more(name, leaf) for name, leaf in old.items()}
        return {**new, "where": where, "classes": classes}

    return {name: part(old) for name, old in batch.items()}


def task_of(batch, number):
    """One task of several."""
    return jax.tree.map(lambda leaf: leaf[number], batch)


def compiled(learner, prepare=lambda batch: batch):
    """``(start, frozen, batch) -> loss, its gradient, what is predicted in each task``.

    One program for tasks with and without padding, of all or of some classes.
    """

    @jax.jit
    def run(start, frozen, batch):
        batch = prepare(batch)
        keys = jax.random.split(KEY, len(batch["query"]["labels"]))

        def of_task(params, task, key):
            support, query = task["support"], task["query"]
            found = learner.adapt(params, frozen, start.model_state, support, key)
            given = found.params, frozen, found.model_state
            value, _ = learner.query(*given, query, key)
            return value, learner.predict(*given, query["inputs"])

        def loss(params):
            values, outputs = jax.vmap(of_task, (None, 0, 0))(params, batch, keys)
            return values.mean(), outputs

        (value, outputs), slopes = jax.value_and_grad(loss, has_aux=True)(start.params)
        return value, slopes, outputs

    return run


def check_twin(run, start, twin, frozen=None, tolerance=1e-9):
    """Of padded tasks, value and gradient are those of a twin without padding.

    ``twin(params, episode) -> loss``, analytic, in NumPy. Returns the gradient.
    """
    batch = episodes()
    value, slopes, _ = run(start, frozen or {}, padded(batch))

    def total(params):
        return (twin(params, task_of(batch, 0)) + twin(params, task_of(batch, 1))) / 2

    params = jax.tree.map(np.asarray, start.params)
    np.testing.assert_allclose(value, total(params), rtol=tolerance)
    close(slopes, complex_step(total, params), tolerance)
    return slopes


def close(found, expected, tolerance=1e-9):
    def compare(a, b):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)

    jax.tree.map(compare, found, expected)


def check_absent_classes(run, start, frozen=None):
    """Left out by ``classes``, or without an example that counts: the same.

    Such a class is never predicted; with one class alone, that one is.
    """
    frozen = frozen or {}
    named = padded(episodes())
    for part in named.values():
        part["where"] &= part["labels"] != 1
    uncounted = jax.tree.map(np.copy, named)
    for part in named.values():
        part["classes"][:, 1] = False
    first, second = (run(start, frozen, batch) for batch in (named, uncounted))
    close(first, second)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(first))
    outputs = np.asarray(first[2])
    assert (outputs[..., 1] <= ABSENT / 2).all()
    assert (np.abs(outputs[..., [0, 2]]) < 1e5).all()
    for part in named.values():
        part["where"] &= part["labels"] == 2
    value, slopes, outputs = run(start, frozen, named)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))
    assert (np.argmax(outputs, axis=-1) == 2).all()


def complex_step(function, params):
    """Gradient of an analytic function of a tree, to the last digits.

    Im f(x + ih) / h has no cancellation.
    """
    leaves, structure = jax.tree.flatten(params)
    slopes = []
    for number, leaf in enumerate(leaves):
        slope = np.zeros(np.shape(leaf))
        for place in np.ndindex(slope.shape):
            moved = [np.array(other, complex) for other in leaves]
            moved[number][place] += 1e-30j
            slope[place] = function(structure.unflatten(moved)).imag / 1e-30
        slopes.append(slope)
    return structure.unflatten(slopes)


# --- NumPy, in functions that are analytic --------------------------------------------


def embedded(params, inputs):
    """The network's ``features``."""
    dense = params["features"]["dense"]
    return np.tanh(inputs @ dense["kernel"] + dense["bias"])


def network(params, inputs):
    """The network's outputs."""
    head = params["head"]
    return embedded(params, inputs) @ head["kernel"] + head["bias"]


def softmax(logits):
    powers = np.exp(logits - logits.real.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def cross_entropy(logits, labels):
    return -np.log(softmax(logits)[np.arange(len(labels)), labels]).mean()


def unit(rows):
    return rows / np.sqrt((rows**2).sum(axis=1, keepdims=True))


def means(rows, labels):
    return np.stack([rows[labels == k].mean(axis=0) for k in range(WAYS)])


def squared(rows, others):
    return ((rows[:, None] - others) ** 2).sum(axis=-1)


# --- tasks that an embedding can be learned for ---------------------------------------

SIGNAL, NUISANCE = 3, 9


def sample(key, tasks=16, shots=2, queries=5):
    """Classes differ in three of twelve numbers; the others vary more."""
    centre_key, *keys = jax.random.split(key, 3)
    centres = 2 * jax.random.normal(centre_key, (tasks, WAYS, 1, SIGNAL))

    def part(key, each):
        near, far = jax.random.split(key)
        signal = jax.random.normal(near, (tasks, WAYS, each, SIGNAL)) / 2 + centres
        other = 3 * jax.random.normal(far, (tasks, WAYS, each, NUISANCE))
        inputs = jnp.concatenate([signal, other], axis=-1)
        labels = jnp.repeat(jnp.arange(WAYS, dtype=jnp.int32), each)
        return {
            "inputs": inputs.reshape(tasks, -1, SIGNAL + NUISANCE),
            "labels": jnp.tile(labels, (tasks, 1)),
        }

    return {"support": part(keys[0], shots), "query": part(keys[1], queries)}


def learn(learner, start, *, steps=150, rate=0.02):
    """Accuracy on new tasks of the meta-parameters, as they begin and learned."""
    objective, optimizer = meta.objective(learner, chunk=None), optax.adam(rate)

    def loss(params, batch):
        value, (_, measured) = objective(params, {}, start.model_state, batch, KEY)
        return value, measured["accuracy"]

    @jax.jit
    def run(params):
        def step(carry, key):
            params, slots = carry
            slopes, _ = jax.grad(loss, has_aux=True)(params, sample(key))
            updates, slots = optimizer.update(slopes, slots)
            return (optax.apply_updates(params, updates), slots), None

        keys = jax.random.split(jax.random.key(1), steps)
        (learned, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), keys)
        tests = sample(jax.random.key(2), tasks=100)
        both = jax.tree.map(lambda *leaves: jnp.stack(leaves), params, learned)
        count = jax.vmap(lambda params: loss(params, tests)[1])(both)
        return count.total / count.count

    return run(start.params).tolist()
