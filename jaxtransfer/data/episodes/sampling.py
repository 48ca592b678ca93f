"""Classification tasks with their examples, from arrays on the device."""

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int, Key, Shaped

from jaxtransfer.data.episodes.drawing import Count, Drawn, Rotations, draw
from jaxtransfer.data.episodes.index import ClassIndex, GroupIndex
from jaxtransfer.typing import AnyArray

Episodes = dict[str, dict[str, Array]]
"""`{"support": {"inputs" [tasks, rows, ...], "labels" [tasks, rows]}, "query": ...}`,
with `"where"` and `"classes"` where tasks differ in size."""


def gather(inputs: Shaped[AnyArray, "n ..."], drawn: Drawn) -> Episodes:
    """Look up the examples of tasks that were drawn or loaded.

    Args:
        inputs: the pool `[n, ...]`; with `turns` square images `[n, side, side,
            channels]`.
        drawn: from `draw` or `load_episodes`.

    Returns:
        The tasks, with `inputs` `[tasks, rows, ...]` in the place of `rows` and
        `turns`.

    Raises:
        ValueError: turns of images that are not square, or rows outside the pool
            (where they are known: not while `drawn` is traced).

    Example:
        >>> part = {"rows": jnp.array([[2, 0]]), "labels": jnp.array([[0, 1]])}
        >>> tasks = gather(jnp.array([5.0, 6.0, 7.0]), {"support": part, "query": part})
        >>> tasks["query"]["inputs"].tolist()
        [[7.0, 5.0]]
    """
    check_rows(drawn, len(inputs))
    inputs = jnp.asarray(inputs)

    def look_up(part: dict[str, Array]) -> dict[str, Array]:
        images = inputs[part["rows"]]
        if "turns" in part:
            images = _turn(images, part["turns"])
        rest = {k: v for k, v in part.items() if k not in ("rows", "turns")}
        return {"inputs": images, **rest}

    return {name: look_up(part) for name, part in drawn.items()}


def sample(
    key: Key[Array, ""],
    inputs: Shaped[AnyArray, "n ..."],
    class_index: ClassIndex,
    *,
    tasks: int,
    ways: Count,
    shots: Count,
    queries: int,
    groups: GroupIndex | None = None,
    rotations: Rotations = False,
    equal_shots: bool = True,
) -> Episodes:
    """Draw N-way K-shot classification tasks: `gather` of `draw`.

    Args:
        key: typed key; the same key draws the same tasks, compiled or not.
        inputs: the pool `[n, ...]` that `class_index` indexes; with rotations square
            images `[n, side, side, channels]`.
        class_index: from `class_index(labels)`.
        tasks: number of tasks.
        ways: classes of a task, or `(least, most)`.
        shots: support examples of a class, or `(least, most)`.
        queries: query examples of a class.
        groups: from `group_index(labels, groups)`: all classes of a task from one.
        rotations: what is turned; see `Rotations`.
        equal_shots: with a range of shots, one number for all classes of a task.

    Returns:
        `{"support": {"inputs" [tasks, ways * shots, ...], "labels" [tasks, ways *
        shots]}, "query": the same with queries}`; labels are 0..ways-1, int32, ordered
        by class. With ranges also `where` and `classes`, as from `draw`.

    Raises:
        ValueError: as `draw` and `gather`, or `class_index` is of another number of
            examples.

    Example:
        >>> import jax
        >>> from jaxtransfer.data import class_index
        >>> pool = class_index(jnp.arange(12) % 4)
        >>> episodes = sample(jax.random.key(0), jnp.arange(12.0)[:, None], pool,
        ...                   tasks=2, ways=3, shots=1, queries=2)
        >>> episodes["support"]["inputs"].shape, episodes["query"]["labels"][0].tolist()
        ((2, 3, 1), [0, 0, 1, 1, 2, 2])

    References:
        Those of `draw`.
    """
    drawn = draw(
        key,
        class_index,
        tasks=tasks,
        ways=ways,
        shots=shots,
        queries=queries,
        groups=groups,
        rotations=rotations,
        equal_shots=equal_shots,
    )
    if class_index.examples != len(inputs):
        raise ValueError(
            f"class_index is of {class_index.examples} examples, but inputs has "
            f"{len(inputs)} rows; give the pool and the index of its own labels"
        )
    return gather(inputs, drawn)


def check_rows(drawn: Drawn, count: int) -> None:
    """Refuse tasks that point outside a pool; traced ones pass.

    Args:
        drawn: from `draw` or `load_episodes`.
        count: number of examples of the pool.

    Raises:
        ValueError: a row is not one of 0 .. count - 1.
    """
    for part in drawn.values():
        rows = part["rows"]
        if isinstance(rows, Tracer) or not getattr(rows, "is_fully_addressable", True):
            continue
        rows = np.asarray(rows)
        wrong = rows[(rows < 0) | (rows >= count)]
        if wrong.size:
            raise ValueError(
                f"drawn holds row {wrong[0]}, but inputs has {count} rows; give the "
                "pool that the tasks were drawn of"
            )


def _turn(
    images: Shaped[Array, "..."], turns: Int[Array, "tasks rows"]
) -> Shaped[Array, "tasks rows side side c"]:
    """Quarter turns, counter-clockwise as `jnp.rot90`."""
    if images.ndim != 5 or images.shape[2] != images.shape[3]:
        raise ValueError(
            "rotations take square images [n, side, side, channels], got inputs"
            f" [n, {', '.join(map(str, images.shape[2:]))}]"
        )
    turns = turns[..., None, None, None]
    images = jnp.where(turns % 2 == 1, jnp.swapaxes(images, 2, 3), images)
    down = jnp.where((turns == 1) | (turns == 2), jnp.flip(images, 2), images)
    return jnp.where((turns == 2) | (turns == 3), jnp.flip(down, 3), down)
