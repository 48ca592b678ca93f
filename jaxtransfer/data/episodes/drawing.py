"""Which examples make up classification tasks, drawn from a key."""

import operator
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from jaxtransfer import prng
from jaxtransfer.data.episodes.index import ClassIndex, GroupIndex

Drawn = dict[str, dict[str, Array]]
"""`{"support": {"rows" [tasks, rows], "labels" [tasks, rows]}, "query": ...}`, where
`"rows"` are those of the pool, with `"turns"`, `"where"` and `"classes"` as needed."""

Count = int | tuple[int, int]
"""A number, or the least and the most of a number that is drawn for each task."""

Rotations = bool | Literal["classes", "tasks"]
"""What is turned by a multiple of 90 degrees.

- `True`: each class of a task, by an angle of its own; no two classes of a task are
  rotations of one another.
- `"classes"`: a class turned is one more class (four times as many classes), so that
  two rotations of a class may meet in a task.
- `"tasks"`: all classes of a task by one angle.
"""


class _Choice(NamedTuple):
    """Classes of tasks: `classes`, `turns` `[tasks, ways]`, how many can differ."""

    classes: Array
    turns: Array | None
    limit: Array | int


def draw(
    key: Key[Array, ""],
    class_index: ClassIndex,
    *,
    tasks: int,
    ways: Count,
    shots: Count,
    queries: int,
    groups: GroupIndex | None = None,
    rotations: Rotations = False,
    equal_shots: bool = True,
) -> Drawn:
    """Draw which examples make up N-way K-shot classification tasks.

    Each task draws its classes uniformly without replacement, all of the pool or, with
    `groups`, of one group, which is drawn first, uniformly among those that have
    enough; then from each class its support and query examples without replacement, so
    that they never share one. Pure and jit-able; everything but `key`, `class_index`
    and `groups` is static.

    With `(least, most)` the number of ways or shots is drawn uniformly for each task,
    up to what its group and classes have. All tasks then have the rows of the largest;
    those beyond a task's own repeat its examples in turn, with their labels, and are
    False in `where`.

    Args:
        key: typed key; the same key draws the same tasks, compiled or not.
        class_index: from `class_index(labels)`.
        tasks: number of tasks.
        ways: classes of a task.
        shots: support examples of a class.
        queries: query examples of a class.
        groups: from `group_index(labels, groups)`: all classes of a task from one.
        rotations: what is turned; see `Rotations`.
        equal_shots: with a range of shots, one number for all classes of a task, or one
            for each class.

    Returns:
        `{"support", "query"}`, each with `rows` of the pool and `labels` `[tasks, ways
        * shots]` (of the query: ways * queries), 0..ways-1, int32, ordered by class;
        with rotations also `turns`, quarter turns counter-clockwise; with a range that
        matters to it also `where`, bool; with a range of ways also `classes` `[tasks,
        ways]`, bool: the classes that the task has.

    Raises:
        ValueError: more ways than classes or than any group has, more shots and
            queries than the smallest class has, a count below 1, a range upside down,
            a range of queries, unknown `rotations`, or `groups` of other classes.

    Example:
        >>> from jaxtransfer.data import class_index, group_index
        >>> labels = np.arange(40) // 4  # ten classes of four, in two groups
        >>> drawn = draw(jax.random.key(0), class_index(labels), tasks=3, ways=(2, 5),
        ...              shots=1, queries=2, groups=group_index(labels, labels // 5))
        >>> drawn["query"]["rows"].shape, drawn["support"]["classes"].shape
        ((3, 10), (3, 5))

    References:
        Vinyals et al., "Matching Networks for One Shot Learning", 2016, section 3.1
        (the episode). Lake et al., "Human-level concept learning through probabilistic
        program induction", 2015 (tasks within an alphabet). Triantafillou et al.,
        "Meta-Dataset", 2020, section 3 and appendix (alphabet first, then the ways).
        Rotations: `"classes"` is Santoro et al., "Meta-Learning with Memory-Augmented
        Neural Networks", 2016, section 4.1.
    """
    if isinstance(queries, tuple | list):
        raise ValueError(
            f"queries={queries} must be one number; draw the most, and set `where` of "
            "the query to leave some out"
        )
    fewest, ways = _range("ways", ways)
    low, shots = _range("shots", shots)
    check_counts(tasks=tasks, queries=queries)
    if low + queries > class_index.smallest:
        raise ValueError(
            f"shots + queries = {low} + {queries} is more than the "
            f"{class_index.smallest} examples of the smallest class; lower them or drop"
            " that class"
        )
    if isinstance(rotations, np.bool_):
        rotations = bool(rotations)
    if not isinstance(rotations, bool) and rotations not in ("classes", "tasks"):
        raise ValueError(
            f"rotations={rotations!r} must be False, True, 'classes' or 'tasks'"
        )
    if groups is not None and sum(groups.sizes) != len(class_index.counts):
        raise ValueError(
            f"groups has {sum(groups.sizes)} classes, but class_index "
            f"{len(class_index.counts)}; make both of the same labels"
        )
    copies = 4 if rotations == "classes" else 1
    if groups is None:
        choice = _of_pool(key, class_index, tasks, ways, copies)
    else:
        choice = _of_group(key, groups, tasks, fewest, ways, copies)
    classes, turns, limit = choice
    if rotations is True or rotations == "tasks":
        shape = (tasks, ways if rotations is True else 1)
        turns = jax.random.randint(prng.stream(key, "rotations"), shape, 0, 4)
        turns = jnp.broadcast_to(turns, (tasks, ways))

    most = class_index.members.shape[1]
    wanted = min(shots + queries, most)
    score = jax.random.uniform(prng.stream(key, "members"), (tasks, ways, most))
    present = jnp.arange(most)[None, None] < class_index.counts[classes][..., None]
    _, position = jax.lax.top_k(jnp.where(present, score, -1.0), wanted)
    rows = jnp.take_along_axis(class_index.members[classes], position, axis=-1)

    way = jnp.broadcast_to(jnp.arange(ways, dtype=jnp.int32), (tasks, ways))
    there = None
    if fewest < ways:  # ways beyond a task's own repeat its first ones
        number = jax.random.randint(
            prng.stream(key, "ways"), (tasks,), fewest, jnp.minimum(ways, limit) + 1
        )[:, None]
        there, way = way < number, way % number
        rows = jnp.take_along_axis(rows, way[..., None], axis=1)
        classes = jnp.take_along_axis(classes, way, axis=1)
        if turns is not None:
            turns = jnp.take_along_axis(turns, way, axis=1)

    own = None
    if low < shots:
        room = class_index.counts[classes] - queries
        if equal_shots:
            room = jnp.broadcast_to(room.min(axis=1, keepdims=True), room.shape)
        shape = (tasks, 1 if equal_shots else ways)
        limits = jnp.minimum(shots, room) + 1
        own = jax.random.randint(
            prng.stream(key, "shots"), shape, low, limits[:, : shape[1]]
        )
        own = jnp.take_along_axis(jnp.broadcast_to(own, (tasks, ways)), way, axis=1)

    def part(rows: Array, where: Array | None) -> dict[str, Array]:
        count = rows.shape[2]

        def flat(values: Array) -> Array:
            spread = jnp.broadcast_to(values, (tasks, ways, count))
            return spread.reshape(tasks, ways * count)

        found = {"rows": flat(rows), "labels": flat(way[..., None])}
        if turns is not None:
            found["turns"] = flat(turns[..., None])
        if there is not None:
            found["classes"] = there
            where = there[..., None] if where is None else where & there[..., None]
        if where is not None:
            found["where"] = flat(where)
        return found

    if own is None:
        support, asked, given = rows[..., :shots], rows[..., shots:], None
    else:
        place = jnp.arange(shots)
        support = jnp.take_along_axis(rows, place % own[..., None], axis=-1)
        place_asked = own[..., None] + jnp.arange(queries)
        asked = jnp.take_along_axis(rows, place_asked, axis=-1)
        given = place < own[..., None]
    return {"support": part(support, given), "query": part(asked, None)}


def _of_pool(
    key: Key[Array, ""], index: ClassIndex, tasks: int, ways: int, copies: int
) -> _Choice:
    """Classes of tasks from the whole pool; a class and its copies are as many."""
    classes = len(index.counts)
    if ways > copies * classes:
        raise ValueError(
            f"ways={ways} is more than the {copies * classes} classes of the pool; "
            "lower it or take a pool with more classes"
        )
    score = jax.random.uniform(prng.stream(key, "classes"), (tasks, copies * classes))
    _, place = jax.lax.top_k(score, ways)
    turns = place // classes if copies > 1 else None
    return _Choice(place % classes, turns, copies * classes)


def _of_group(
    key: Key[Array, ""],
    groups: GroupIndex,
    tasks: int,
    fewest: int,
    ways: int,
    copies: int,
) -> _Choice:
    """Classes of tasks from one group each."""
    sizes = copies * np.array(groups.sizes)
    if ways > sizes.max():
        raise ValueError(
            f"ways={ways} is more than the {sizes.max()} classes of the largest group; "
            "lower it, or draw across groups (groups=None)"
        )
    enough = jnp.asarray(np.flatnonzero(sizes >= fewest))
    which = jax.random.randint(prng.stream(key, "groups"), (tasks,), 0, len(enough))
    members, counts = groups.members[enough[which]], groups.counts[enough[which]]
    most = members.shape[1]
    score = jax.random.uniform(prng.stream(key, "classes"), (tasks, copies, most))
    present = jnp.arange(most) < counts[:, None, None]
    score = jnp.where(present, score, -1.0).reshape(tasks, copies * most)
    _, place = jax.lax.top_k(score, ways)
    turns = place // most if copies > 1 else None
    classes = jnp.take_along_axis(members, place % most, axis=1)
    return _Choice(classes, turns, copies * counts)


def _range(name: str, value: Count) -> tuple[int, int]:
    """Least and most of a count."""
    both = value if isinstance(value, tuple | list) else (value, value)
    try:
        least, most = map(operator.index, both)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name}={value!r} must be a whole number, or (least, most)"
        ) from error
    if least < 1:
        raise ValueError(f"{name}={value} must be at least 1")
    if least > most:
        raise ValueError(f"{name}={value} must be (least, most); turn it round")
    return least, most


def check_counts(**counts: int) -> None:
    """Refuse counts below 1, or that are no whole numbers.

    Args:
        **counts: values by the name of the argument.

    Raises:
        ValueError: one is.
    """
    for name, value in counts.items():
        if not hasattr(value, "__index__"):
            raise ValueError(f"{name}={value!r} must be a whole number")
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
