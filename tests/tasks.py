"""Few-shot tasks that the tests of meta-learning share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests.twins import jitted, network

KEY = jax.random.key(0)


def episodes(tasks=4, ways=3, key=KEY, dtype=jnp.float32):
    """Random tasks for the networks of ``tests.twins``."""

    def part(key, rows):
        return {
            "inputs": jax.random.normal(key, (tasks, rows, 6), dtype),
            "labels": jnp.tile(jnp.arange(rows) % ways, (tasks, 1)),
        }

    first, second = jax.random.split(key)
    return {"support": part(first, 3), "query": part(second, 6)}


def first(batch):
    """The first task alone, still with an axis of tasks."""
    return jax.tree.map(lambda leaf: leaf[:1], batch)


@functools.cache
def made(kind, **options):
    """A small network and its variables."""
    model = network(kind, **{"widths": (5,), **options})
    return model, jitted(model).init(KEY, jnp.ones((2, 6)))


def gradient(objective, start, batch, key=KEY):
    """Loss and gradient with respect to the parameters."""

    def loss(params):
        return objective(params, {}, start.model_state, batch, key)[0]

    return jax.jit(jax.value_and_grad(loss))(start.params)


def close(found, expected, tolerance=1e-5):
    """Two trees of one structure hold the same numbers."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, two in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(one, two, rtol=tolerance, atol=tolerance)


def check_differences(objective, start, batch, *, ways=3, tolerance=1e-5):
    """The gradient along random directions is the difference; in float64.

    Returns:
        The gradient.
    """
    loss = jax.jit(lambda p: objective(p, {}, start.model_state, batch, KEY)[0])
    _, found = gradient(objective, start, batch)
    leaves, structure = jax.tree.flatten(start.params)
    for seed in range(ways):
        random = np.random.default_rng(seed)
        way = structure.unflatten([random.normal(size=leaf.shape) for leaf in leaves])
        along = sum(
            jnp.vdot(a, b)
            for a, b in zip(*map(jax.tree.leaves, (found, way)), strict=True)
        )
        size = 1e-6
        ahead, behind = (
            loss(jax.tree.map(lambda p, w, s=s: p + s * w, start.params, way))
            for s in (size, -size)
        )
        np.testing.assert_allclose(
            along, (ahead - behind) / (2 * size), rtol=tolerance, atol=1e-8
        )
    return found


# --- a quadratic, of which everything is known ----------------------------------------

TASKS, SIZE = 3, 4
_RANDOM = np.random.default_rng(0)


def _positive():
    root = _RANDOM.normal(size=(TASKS, SIZE, SIZE))
    return root @ root.swapaxes(1, 2) / SIZE + 0.2 * np.eye(SIZE)


QUADRATIC = {
    part: {"matrix": _positive(), "centre": _RANDOM.normal(size=(TASKS, SIZE))}
    for part in ("support", "query")
}
WEIGHTS = _RANDOM.normal(size=SIZE)


def bowl(params, frozen, model_state, batch, key):
    """``(w - c)^T A (w - c) / 2``."""
    offset = params["w"] - batch["centre"]
    return offset @ batch["matrix"] @ offset / 2, (model_state, {})


def bowl_by_hand(steps, first_order=False):
    """Loss, and gradients by the start and by the rate of each step.

    ``w_K - c = prod_j (I - diag(r_j) A) (w - c)`` with rates ``r_j [size]``.

    Args:
        steps: rates ``[steps, size]``.
        first_order: take the slopes as constants.
    """
    losses, by_start, by_rates = [], [], []
    for task in range(TASKS):
        (matrix, centre), (other, goal) = (
            (QUADRATIC[p]["matrix"][task], QUADRATIC[p]["centre"][task])
            for p in ("support", "query")
        )
        weights, slopes = WEIGHTS, []
        for rate in steps:
            slopes.append(matrix @ (weights - centre))
            weights = weights - rate * slopes[-1]
        pull = other @ (weights - goal)
        losses.append((weights - goal) @ pull / 2)
        rates = []
        for rate, slope in zip(steps[::-1], slopes[::-1], strict=True):
            rates.append(-pull * slope)
            if not first_order:
                pull = pull - matrix @ (rate * pull)
        by_start.append(pull)
        by_rates.append(rates[::-1])
    return np.mean(losses), np.mean(by_start, axis=0), np.mean(by_rates, axis=0)
