"""Few-shot tasks drawn in JAX from a key: N-way K-shot episodes and sinusoids."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key, Shaped

from jaxtransfer import prng
from jaxtransfer.typing import AnyArray

Episodes = dict[str, dict[str, Array]]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["members", "counts"],
    meta_fields=["smallest"],
)
@dataclasses.dataclass(frozen=True)
class ClassIndex:
    """Which examples belong to which class, as arrays.

    Attributes:
        members: indices of the examples of each class `[classes, most]`, padded with
            the class's first index.
        counts: number of examples of each class `[classes]`.
        smallest: the least of `counts`; static, so that a compiled function can refuse
            tasks that a class can't fill.
    """

    # Any: transformations rebuild a pytree with avals or specs in the arrays' place.
    members: Any
    counts: Any
    smallest: int


def class_index(labels: Shaped[AnyArray, "..."]) -> ClassIndex:
    """Index a pool of labelled examples by class.

    Classes are the distinct values of `labels`; they need not be consecutive.

    Args:
        labels: integer labels `[n]`, concrete (not traced).

    Returns:
        A `ClassIndex`, a pytree of arrays for `sample`.

    Raises:
        ValueError: the pool is empty, or labels are not a vector of integers.

    Example:
        >>> index = class_index(np.array([7, 3, 7, 3, 7]))
        >>> index.members.shape, index.counts.tolist(), index.smallest
        ((2, 3), [2, 3], 2)
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels must be integers [n], got {labels.dtype}{list(labels.shape)}"
        )
    if labels.size == 0:
        raise ValueError("labels is empty: the episode pool holds no example")
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    order = np.argsort(inverse, kind="stable")
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    offsets = np.arange(counts.max())
    offsets = np.where(offsets[None] < counts[:, None], offsets[None], 0)
    members = order[starts[:, None] + offsets]
    return ClassIndex(
        members=jnp.asarray(members, jnp.int32),
        counts=jnp.asarray(counts, jnp.int32),
        smallest=int(counts.min()),
    )


def sample(
    key: Key[Array, ""],
    inputs: Shaped[AnyArray, "n ..."],
    class_index: ClassIndex,
    *,
    tasks: int,
    ways: int,
    shots: int,
    queries: int,
    rotations: bool = False,
) -> Episodes:
    """Draw N-way K-shot classification tasks.

    Each task draws `ways` different classes uniformly, and from each class `shots`
    support and `queries` query examples without replacement, so that support and
    query never share an example. Pure and jit-able; everything but `key`, `inputs`
    and `class_index` is static.

    Args:
        key: typed key; the same key draws the same tasks.
        inputs: the pool `[n, ...]` that `class_index` indexes.
        class_index: from `class_index(labels)`.
        tasks: number of tasks.
        ways: classes a task.
        shots: support examples a class.
        queries: query examples a class.
        rotations: turn all images of a class in a task by one of 0, 90, 180, 270
            degrees, drawn for each task and class. Images `[n, side, side, channels]`.

    Returns:
        `{"support": {"inputs" [tasks, ways * shots, ...], "labels" [tasks, ways *
        shots]}, "query": the same with queries}`; labels are 0..ways-1, int32, ordered
        by class.

    Raises:
        ValueError: more ways than classes, more shots and queries than the smallest
            class has, a count below 1, or rotations of images that are not square.

    Example:
        >>> pool = class_index(np.arange(12) % 4)
        >>> episodes = sample(jax.random.key(0), jnp.arange(12.0)[:, None], pool,
        ...                   tasks=2, ways=3, shots=1, queries=2)
        >>> episodes["support"]["inputs"].shape, episodes["query"]["labels"][0].tolist()
        ((2, 3, 1), [0, 0, 1, 1, 2, 2])

    Reference:
        Vinyals et al., "Matching Networks for One Shot Learning", 2016, section 3.1
        (the episode); rotations of Omniglot classes: Santoro et al., "Meta-Learning
        with Memory-Augmented Neural Networks", 2016, section 4.1.

    Deviation: there a rotated character is one more class, so two rotations of one
    character may meet in a task; here the classes of a task are always different
    characters.
    """
    _check_counts(tasks=tasks, ways=ways, shots=shots, queries=queries)
    classes, most = class_index.members.shape
    if ways > classes:
        raise ValueError(f"ways={ways} is more than the {classes} classes of the pool")
    wanted = shots + queries
    if wanted > class_index.smallest:
        raise ValueError(
            f"shots + queries = {shots} + {queries} is more than the "
            f"{class_index.smallest} examples of the smallest class; lower them or drop"
            " that class"
        )
    class_key, member_key, turn_key = prng.streams(
        key, "classes", "members", "rotations"
    )
    _, chosen = jax.lax.top_k(jax.random.uniform(class_key, (tasks, classes)), ways)
    score = jax.random.uniform(member_key, (tasks, ways, most))
    present = jnp.arange(most) < class_index.counts[chosen][..., None]
    _, position = jax.lax.top_k(jnp.where(present, score, -1.0), wanted)
    rows = jnp.take_along_axis(class_index.members[chosen], position, axis=-1)
    images = jnp.asarray(inputs)[rows]
    if rotations:
        turns = jax.random.randint(turn_key, (tasks, ways), 0, 4)
        images = _turn(images, turns)

    def part(images: Array, count: int) -> dict[str, Array]:
        shape = (tasks, ways * count, *images.shape[3:])
        labels = jnp.repeat(jnp.arange(ways, dtype=jnp.int32), count)
        return {
            "inputs": images.reshape(shape),
            "labels": jnp.broadcast_to(labels, (tasks, ways * count)),
        }

    return {
        "support": part(images[:, :, :shots], shots),
        "query": part(images[:, :, shots:], queries),
    }


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")


def _turn(
    images: Shaped[Array, "..."], turns: Int[Array, "tasks ways"]
) -> Shaped[Array, "tasks ways k side side c"]:
    """Quarter turns, counter-clockwise as `jnp.rot90`."""
    if images.ndim != 6 or images.shape[3] != images.shape[4]:
        raise ValueError(
            "rotations=True takes square images [n, side, side, channels], got inputs"
            f" [n, {', '.join(map(str, images.shape[3:]))}]"
        )
    turns = turns[..., None, None, None, None]
    images = jnp.where(turns % 2 == 1, jnp.swapaxes(images, 3, 4), images)
    down = jnp.where((turns == 1) | (turns == 2), jnp.flip(images, 3), images)
    return jnp.where((turns == 2) | (turns == 3), jnp.flip(down, 4), down)


def sinusoid(key: Key[Array, ""], *, tasks: int, shots: int, queries: int) -> Episodes:
    """Draw sine regression tasks.

    `y = A sin(x - p)` with A ~ U[0.1, 5], p ~ U[0, pi] for each task and
    x ~ U[-5, 5] for each point. Pure and jit-able.

    Args:
        key: typed key; the same key draws the same tasks.
        tasks: number of tasks.
        shots: support points a task.
        queries: query points a task.

    Returns:
        `{"support": {"inputs" [tasks, shots, 1], "labels" [tasks, shots, 1]}, "query":
        the same with queries}`, float32.

    Raises:
        ValueError: a count below 1.

    Example:
        >>> tasks = sinusoid(jax.random.key(0), tasks=4, shots=5, queries=10)
        >>> tasks["query"]["labels"].shape
        (4, 10, 1)

    Reference:
        Finn et al., "Model-Agnostic Meta-Learning for Fast Adaptation of Deep
        Networks", 2017, section 5.1.
    """
    _check_counts(tasks=tasks, shots=shots, queries=queries)
    amplitude_key, phase_key, point_key = prng.streams(
        key, "amplitude", "phase", "points"
    )
    amplitude = jax.random.uniform(amplitude_key, (tasks, 1, 1), minval=0.1, maxval=5.0)
    phase = jax.random.uniform(phase_key, (tasks, 1, 1), maxval=jnp.pi)
    inputs = jax.random.uniform(
        point_key, (tasks, shots + queries, 1), minval=-5.0, maxval=5.0
    )
    labels = amplitude * jnp.sin(inputs - phase)
    return {
        "support": {"inputs": inputs[:, :shots], "labels": labels[:, :shots]},
        "query": {"inputs": inputs[:, shots:], "labels": labels[:, shots:]},
    }


def omniglot_split(
    arrays: Mapping[str, np.ndarray],
    key: Key[Array, ""],
    *,
    sizes: Sequence[int] = (1100, 100, 423),
) -> dict[str, dict[str, np.ndarray]]:
    """Split a pool by class, so that test classes are never seen in training.

    Args:
        arrays: `inputs` `[n, ...]` and `labels` `[n]` of all 1,623 characters:
            `as_arrays(load("omniglot", "train+test"), size=28, channels=1,
            invert=True)`.
        key: decides which characters go where.
        sizes: number of classes for training, validation and test.

    Returns:
        `{"train", "validation", "test"}`, each `inputs` and `labels`, the labels
        numbered anew from 0.

    Raises:
        ValueError: `sizes` asks for more classes than there are, or not for three
            parts.

    Example:
        >>> pool = {"inputs": np.zeros((8, 2)), "labels": np.arange(8) // 2}
        >>> parts = omniglot_split(pool, jax.random.key(0), sizes=(2, 1, 1))
        >>> parts["train"]["labels"].tolist(), parts["test"]["labels"].tolist()
        ([0, 0, 1, 1], [0, 0])

    Reference:
        Vinyals et al., "Matching Networks for One Shot Learning", 2016, section 4.1.1
        (random split of the characters); 1,100/100/423 as in Finn et al., 2017.
    """
    inputs, labels = np.asarray(arrays["inputs"]), np.asarray(arrays["labels"])
    classes = np.unique(labels)
    if len(sizes) != 3 or min(sizes) < 1 or sum(sizes) > len(classes):
        raise ValueError(
            f"sizes={tuple(sizes)} must be three numbers >= 1 with a sum of at most "
            f"{len(classes)}, the number of classes in labels"
        )
    order = classes[np.asarray(jax.random.permutation(key, len(classes)))]
    parts, start = {}, 0
    for name, size in zip(("train", "validation", "test"), sizes, strict=True):
        members = np.sort(order[start : start + size])
        rows = np.flatnonzero(np.isin(labels, members))
        parts[name] = {
            "inputs": inputs[rows],
            "labels": np.searchsorted(members, labels[rows]).astype(np.int32),
        }
        start += size
    return parts
