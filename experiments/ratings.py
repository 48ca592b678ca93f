"""Ratings as tasks, one a user: fields, cold-start splits, what is measured."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer import data
from jaxtransfer.train.ranking import ndcg

AGES = (18, 25, 35, 45, 50, 56)
YEARS = (1950, 1960, 1970, 1980, 1985, 1990, 1992, 1993, 1994, 1995, 1996)
AREAS = 11
GENRES = 19
OCCUPATIONS = 21


class Ratings(NamedTuple):
    """A data set of ratings.

    Attributes:
        users: fields of every user ``[users, 4]``: age bucket, gender, occupation and
            area (first digit of the zip code; 10 for codes that are not American).
        items: fields of every item ``[items, 1 + 19]``: bucket of the year of release,
            genres as 0 and 1.
        years: of release ``[items]``; 0 if unknown.
        pairs: who rated what, and how ``[ratings, 3]``: user, item, 1 ... 5.
    """

    users: np.ndarray
    items: np.ndarray
    years: np.ndarray
    pairs: np.ndarray


FIELDS = (len(AGES) + 1, 2, OCCUPATIONS, AREAS, len(YEARS) + 1)
"""Number of values of every field: those of the user, then those of the item."""


def movielens_100k(data_dir: str | None) -> Ratings:
    """Read the prepared data set ``movielens_100k``."""
    source = data.load("movielens_100k", data_dir=data_dir)
    examples = source.__getitems__(range(len(source)))
    examples.sort(key=lambda example: int(example["user"]))

    def column(name: str) -> np.ndarray:
        return np.concatenate([example[name] for example in examples])

    areas = [bytes(example["zip_code"]).decode()[:1] for example in examples]
    users = np.stack(
        [
            np.searchsorted(AGES, [e["age"] for e in examples], side="right"),
            [int(example["gender"]) for example in examples],
            [int(example["occupation"]) for example in examples],
            [int(area) if area.isdecimal() else AREAS - 1 for area in areas],
        ],
        axis=1,
    )
    rated = np.repeat(np.arange(len(examples)), [len(e["items"]) for e in examples])
    item = column("items")
    years = np.zeros(item.max() + 1, np.int64)
    genres = np.zeros((len(years), GENRES), np.int64)
    years[item], genres[item] = column("years"), column("genres")
    return Ratings(
        users,
        _item_fields(years, genres),
        years,
        np.stack([rated, item, column("ratings")], axis=1),
    )


def synthetic(seed: int, *, users: int = 60, items: int = 100) -> Ratings:
    """Made-up users with tastes of their own for genres, to try the study out."""
    random = np.random.default_rng(seed)
    years = random.integers(1988, 1999, items)
    genres = (random.random((items, GENRES)) < 0.1).astype(np.int64)
    genres[np.arange(items), random.integers(0, GENRES, items)] = 1
    taste = random.normal(size=(users, GENRES))
    liking = 3.5 + taste @ genres.T / np.sqrt(genres.sum(1))
    liking += random.normal(size=(users, 1)) / 2 + random.normal(size=items) / 2
    rated = random.random((users, items)) < 0.5
    user, item = np.nonzero(rated)
    rating = np.clip(np.round(liking[rated]), 1, 5).astype(np.int64)
    fields = [random.integers(0, size, users) for size in FIELDS[:4]]
    return Ratings(
        np.stack(fields, axis=1),
        _item_fields(years, genres),
        years,
        np.stack([user, item, rating], axis=1),
    )


def _item_fields(years: np.ndarray, genres: np.ndarray) -> np.ndarray:
    buckets = np.searchsorted(YEARS, years, side="right")
    return np.concatenate([buckets[:, None], genres], axis=1)


class Split(NamedTuple):
    """One cold-start split of the users who count.

    Attributes:
        users: number of the user in the data set ``[users]``.
        items, ratings, where: support, ratings of existing items ``[users, rows]``,
            padded at the end.
        asked, answers: query items and their ratings, ``[2, users, queries]``: existing
            items, new items.
        complete: users with enough query ratings ``[2, users]``.
        train, validation, new: rows of the users of each part.
    """

    users: Any
    items: Any
    ratings: Any
    where: Any
    asked: Any
    answers: Any
    complete: Any
    train: Any
    validation: Any
    new: Any


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What is new, and who counts."""

    new_from: int = 1997
    """Items released in this year or later are new."""
    fewest: int = 13
    """Ratings of existing items that a user has at least."""
    most: int = 100
    """Ratings of existing items that a user has at most."""
    queries: int = 10
    """Query items of a user."""
    validation: float = 0.2
    """Part of the users that settings are chosen on; the same for all seeds."""
    new: float = 0.2
    """Part of the other users that is new."""


def split(
    ratings: Ratings, protocol: Protocol, *, fixed: jax.Array, key: jax.Array
) -> Split:
    """Draw a split: who is new, and which ratings are support and query.

    Args:
        ratings: the data set.
        protocol: what is new, and who counts.
        fixed: key of the validation users.
        key: key of everything else.

    Raises:
        ValueError: too few users or items are left, or a scenario has no user.
    """
    user, item, rating = ratings.pairs.T
    old = ratings.years[item] < protocol.new_from
    counts = np.bincount(user[old], minlength=len(ratings.users))
    eligible = np.flatnonzero((counts >= protocol.fewest) & (counts <= protocol.most))
    if protocol.fewest <= protocol.queries or len(eligible) < 10 or old.all():
        raise ValueError(
            f"{protocol}: {len(eligible)} users and {np.sum(~old)} ratings of new items"
            " are left; at least 10 and 1 are needed, and fewest > queries"
        )
    shuffled = np.asarray(jax.random.permutation(key, len(user)))
    user, item, rating, old = (part[shuffled] for part in (user, item, rating, old))
    rows = protocol.most - protocol.queries
    shape = (len(eligible), rows)
    items, values, where = np.zeros(shape, int), np.zeros(shape), np.zeros(shape, bool)
    asked = np.zeros((2, len(eligible), protocol.queries), int)
    answers, complete = np.ones(asked.shape), np.zeros(asked.shape[:2], bool)
    for row, number in enumerate(eligible):
        for kind in (0, 1):
            own = np.flatnonzero((user == number) & (old if kind == 0 else ~old))
            if len(own) >= protocol.queries:
                last = own[-protocol.queries :]
                asked[kind, row], answers[kind, row] = item[last], rating[last]
                complete[kind, row] = True
            if kind == 0:
                rest = own[: -protocol.queries]
                items[row, : len(rest)] = item[rest]
                values[row, : len(rest)] = rating[rest]
                where[row, : len(rest)] = True
    order = np.asarray(jax.random.permutation(fixed, len(eligible)))
    held = round(protocol.validation * len(eligible))
    rest = np.asarray(jax.random.permutation(key, order[held:]))
    fresh = round(protocol.new * len(rest))
    parts = {"validation": held, "new": fresh, "other": len(rest) - fresh}
    if min(parts.values()) < 1:
        raise ValueError(f"{protocol}: users by part are {parts}; each needs one")
    for name, part in (("existing", rest[fresh:]), ("new", rest[:fresh])):
        if not complete[1, part].any():  # all have a query of existing items
            raise ValueError(
                f"{protocol}: none of the {len(part)} {name} users has "
                f"{protocol.queries} ratings of new items; lower queries or new_from"
            )
    return Split(
        jnp.asarray(eligible),
        jnp.asarray(items),
        jnp.asarray(values, jnp.float32),
        jnp.asarray(where),
        jnp.asarray(asked),
        jnp.asarray(answers, jnp.float32),
        jnp.asarray(complete),
        train=jnp.asarray(np.sort(rest[fresh:])),
        validation=jnp.asarray(np.sort(order[:held])),
        new=jnp.asarray(np.sort(rest[:fresh])),
    )


@jax.jit
def training_mean(split: Split) -> jax.Array:
    """Mean rating of the training users' support."""
    where = split.where[split.train]
    return jnp.sum(jnp.where(where, split.ratings[split.train], 0)) / jnp.sum(where)


MEASURES = ("MAE", "nDCG@1", "nDCG@3")


@jax.jit
def measure(predictions: jax.Array, answers: jax.Array) -> jax.Array:
    """MAE, nDCG@1 and nDCG@3 ``[..., 3]`` of users' queries ``[..., queries]``.

    The error is that of predictions cut to 1 ... 5; gains are 2^rating - 1.
    """
    answers = jnp.broadcast_to(answers, predictions.shape)
    error = jnp.abs(jnp.clip(predictions, 1, 5) - answers).mean(-1)
    gains = 2.0**answers - 1
    ranked = [ndcg(predictions, gains, top=top) for top in (1, 3)]
    return jnp.stack([error, *ranked], axis=-1)


@jax.jit
def validation_errors(split: Split, predictions: jax.Array) -> jax.Array:
    """MAE of the validation users' existing items, the mean over users ``[...]``.

    Args:
        split: whose answers.
        predictions: of the validation users ``[users, ..., queries]``.
    """
    shape = len(predictions), *(1,) * (predictions.ndim - 2), -1
    answers = split.answers[0, split.validation].reshape(shape)
    return jnp.abs(jnp.clip(predictions, 1, 5) - answers).mean((0, -1))


class Choice(NamedTuple):
    """Settings to choose from.

    Attributes:
        error: on the validation users.
        settings: for the record.
        predict: makes the predictions for all users ``[2, users, queries]``.
    """

    error: float
    settings: dict[str, Any]
    predict: Callable[[], Any]


class Chosen(NamedTuple):
    """Predictions for all users ``[2, users, queries]``, and the settings."""

    predictions: np.ndarray
    settings: dict[str, Any]


def choose(choices: list[Choice]) -> Chosen:
    """The least validation error; what is not finite is never chosen."""
    best = min(choices, key=lambda choice: np.nan_to_num(choice.error, nan=np.inf))
    settings = {**best.settings, "validation": round(float(best.error), 4)}
    return Chosen(np.asarray(best.predict()), settings)
