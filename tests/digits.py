"""Embedded digits for tests that must beat a baseline on real data, in seconds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

from jaxtransfer.train import init_state, train_step


@functools.cache
def digits():
    """1,000 images for training and 797 for testing, ``[n, 64]`` in 0 … 1."""
    pool = load_digits()
    order = np.random.default_rng(0).permutation(len(pool.target))
    inputs = (pool.data[order] / 16).astype(np.float32)
    labels = pool.target[order].astype(np.int32)
    parts = (slice(0, 1000), slice(1000, None))
    return [{"inputs": inputs[part], "labels": labels[part]} for part in parts]


def shifted(batch):
    """Another domain: paper and ink swapped, fainter, a pixel to the right."""
    images = batch["inputs"].reshape(-1, 8, 8)
    moved = 1 - 0.7 * np.roll(images, 1, axis=2)
    return {**batch, "inputs": moved.reshape(-1, 64).astype(np.float32)}


def few(batch, each):
    """The first examples of every class."""
    chosen = [np.flatnonzero(batch["labels"] == c)[:each] for c in range(10)]
    rows = np.sort(np.concatenate(chosen))
    return jax.tree.map(lambda leaf: leaf[rows], batch)


def learn(objective, optimizer, variables, draw, *, steps, frozen=None):
    """A whole run as one compiled function; ``draw(key)`` makes a batch."""
    step = train_step(objective, optimizer)

    @jax.jit
    def run(variables, frozen):
        state = init_state(jax.random.key(0), variables, optimizer, frozen=frozen)

        def body(state, number):
            batch_key = jax.random.fold_in(jax.random.key(1), number)
            return step(state, draw(batch_key))[0], None

        return jax.lax.scan(body, state, jnp.arange(steps))[0]

    return run(variables, frozen or {})


def batches(pool, size):
    """``draw`` for :func:`learn`: random rows of a pool."""
    pool = jax.tree.map(jnp.asarray, pool)
    count = len(jax.tree.leaves(pool)[0])

    def draw(key):
        rows = jax.random.randint(key, (size,), 0, count)
        return jax.tree.map(lambda leaf: leaf[rows], pool)

    return draw


def accuracy(predict, state, batch):
    outputs = jax.jit(predict)(
        state.params, state.frozen, state.model_state, batch["inputs"]
    )
    return float((outputs.argmax(-1) == batch["labels"]).mean())
