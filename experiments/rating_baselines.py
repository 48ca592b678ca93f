"""Linear baselines of rating prediction: item mean, biases, matrix factorisation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.ratings import Choice, Chosen, Split, choose, training_mean
from experiments.ratings import validation_errors as errors_of


def matrix(split: Split, items: int) -> tuple[jax.Array, jax.Array]:
    """Support ratings ``[users, items]`` and which there are."""
    rows = jnp.arange(len(split.items))[:, None]
    at = jnp.where(split.where, split.items, items)  # Padding falls off the end.
    there = (
        jnp.zeros((len(split.items), items), bool).at[rows, at].set(True, mode="drop")
    )
    values = jnp.zeros(there.shape).at[rows, at].set(split.ratings, mode="drop")
    return values, there


@functools.partial(jax.jit, static_argnames="items")
def item_mean(split: Split, items: int) -> jax.Array:
    """Predictions ``[users, items]``: the mean of the training users' ratings."""
    values, there = (part[split.train] for part in matrix(split, items))
    counts = there.sum(0)
    means = values.sum(0) / jnp.maximum(counts, 1)
    means = jnp.where(counts > 0, means, training_mean(split))
    return jnp.broadcast_to(means, (len(split.items), items))


def factorisation(
    split: Split,
    items: int,
    penalties: jax.Array,
    key: jax.Array,
    *,
    rank: int,
    sweeps: int,
) -> jax.Array:
    r"""Predictions ``[users, items]`` of biases and factors, by alternating ridge.

    .. math:: \hat y_{ui} = \mu + b_u + c_i + p_u \cdot q_i

    Items and training users are fitted in turns; then every user, new ones included,
    to its support with the items held. An item that nobody rated has
    :math:`c_i = 0, q_i = 0`. Rank 0 is the model of user and item biases.

    Args:
        split: the ratings.
        items: number of items.
        penalties: of :math:`b_u^2, c_i^2` and of the squared factors ``[3]``.
        key: of the first factors.
        rank: number of factors.
        sweeps: turns.
    """
    values, there = matrix(split, items)
    mean = training_mean(split)
    values, there = jnp.where(there, values - mean, 0), there.astype(jnp.float32)
    user_penalty, item_penalty, factor_penalty = penalties

    def ridge(values, there, others, penalty):
        """Bias and factors of rows, given those of the columns."""
        columns = others.at[:, 0].set(1)
        values = values - there * others[:, 0]
        squares = columns[:, :, None] * columns[:, None]
        curvature = jnp.tensordot(there, squares, 1)
        ridge = jnp.diag(jnp.full(rank + 1, factor_penalty).at[0].set(penalty))
        slopes = values @ columns
        solve = jax.vmap(functools.partial(jax.scipy.linalg.solve, assume_a="pos"))
        return solve(curvature + ridge, slopes)

    def sweep(by_item, _):
        by_user = ridge(values[split.train], there[split.train], by_item, user_penalty)
        by_item = ridge(
            values[split.train].T, there[split.train].T, by_user, item_penalty
        )
        return by_item, None

    start = 0.1 * jax.random.normal(key, (items, rank + 1))
    by_item, _ = jax.lax.scan(sweep, start.at[:, 0].set(0), length=sweeps)
    by_user = ridge(values, there, by_item, user_penalty)
    factors = by_user[:, 1:] @ by_item[:, 1:].T
    return mean + by_user[:, :1] + by_item[:, 0] + factors


@functools.partial(jax.jit, static_argnames=("items", "rank", "sweeps"))
def _asked(split, items, grid, key, rank, sweeps):
    """Predictions ``[settings, 2, users, queries]`` for every row of penalties."""
    users = jnp.arange(len(split.users))[:, None]

    def one(penalties: jax.Array) -> jax.Array:
        whole = factorisation(split, items, penalties, key, rank=rank, sweeps=sweeps)
        return whole[users, split.asked]

    return jax.lax.map(one, grid)


def linear_baselines(
    split: Split,
    items: int,
    key: jax.Array,
    *,
    bias_penalties: tuple[float, ...],
    factor_penalties: tuple[float, ...],
    ranks: tuple[int, ...],
    sweeps: int,
) -> dict[str, Chosen]:
    """The three baselines, with the settings of least validation error.

    Args:
        split: the ratings.
        items: number of items.
        key: of the first factors.
        bias_penalties: for users and for items, every pair is tried.
        factor_penalties: tried with the penalties that are best for biases alone.
        ranks: numbers of factors to try.
        sweeps: turns of the alternating regressions.
    """

    def choices(grid: list[tuple[float, ...]], rank: int) -> list[Choice]:
        several = _asked(split, items, jnp.array(grid), key, rank, sweeps)
        held = several[:, 0, split.validation].swapaxes(0, 1)
        return [
            Choice(float(error), {"penalties": row, "rank": rank}, lambda p=made: p)
            for error, row, made in zip(
                errors_of(split, held), grid, several, strict=True
            )
        ]

    means = item_mean(split, items)[jnp.arange(len(split.users))[:, None], split.asked]
    pairs = [(user, item) for user in bias_penalties for item in bias_penalties]
    biases = choose(choices([(*pair, 1.0) for pair in pairs], 0))
    pair = biases.settings["penalties"][:2]
    grid = [(*pair, penalty) for penalty in factor_penalties]
    factors = choose([choice for rank in ranks for choice in choices(grid, rank)])
    return {
        "item mean": Chosen(np.asarray(means), {}),
        "user and item bias": biases,
        "matrix factorisation": factors,
    }
