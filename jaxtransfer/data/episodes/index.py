"""Which examples belong to which class, and which classes to which group."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from jaxtransfer.typing import AnyArray


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["members", "counts"],
    meta_fields=["smallest", "examples"],
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
        examples: number of examples of the pool, static too, so that `sample` can
            refuse another pool.
    """

    # Any: transformations rebuild a pytree with avals or specs in the arrays' place.
    members: Any
    counts: Any
    smallest: int
    examples: int


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
        examples=int(labels.size),
    )


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["members", "counts"],
    meta_fields=["sizes"],
)
@dataclasses.dataclass(frozen=True)
class GroupIndex:
    """Which classes belong to which group (characters to an alphabet), as arrays.

    Attributes:
        members: classes of each group `[groups, most]`, as rows of the `ClassIndex` of
            the same labels, padded with the group's first class.
        counts: number of classes of each group `[groups]`.
        sizes: `counts` as numbers; static, so that a compiled function can leave out
            the groups that are too small for a task.
    """

    members: Any
    counts: Any
    sizes: tuple[int, ...]


def group_index(
    labels: Shaped[AnyArray, "..."], groups: Shaped[AnyArray, "..."]
) -> GroupIndex:
    """Index the classes of a pool by the group that they belong to.

    Args:
        labels: integer labels `[n]`, as given to `class_index`; concrete.
        groups: group of each example `[n]`, integers, e.g. the `alphabet` of Omniglot.

    Returns:
        A `GroupIndex`, a pytree of arrays for `draw` and `sample`.

    Raises:
        ValueError: not two vectors of integers of one length, an empty pool, or a class
            in two groups.

    Example:
        >>> index = group_index(np.array([7, 3, 7, 5]), np.array([0, 1, 0, 1]))
        >>> index.members.tolist(), index.sizes
        ([[2, 2], [0, 1]], (1, 2))
    """
    labels, groups = np.asarray(labels), np.asarray(groups)
    if labels.shape != groups.shape:
        raise ValueError(
            f"groups {list(groups.shape)} must have a value for each of the labels "
            f"{list(labels.shape)}"
        )
    if not np.issubdtype(groups.dtype, np.integer):
        raise ValueError(f"groups must be integers [n], got {groups.dtype}")
    classes = class_index(labels)
    of_class = groups[np.asarray(classes.members)]
    mixed = np.flatnonzero((of_class != of_class[:, :1]).any(axis=1))
    if len(mixed):
        found = np.unique(of_class[mixed[0]]).tolist()
        raise ValueError(
            f"label {np.unique(labels)[mixed[0]]} occurs in the groups {found}; number "
            "the classes of different groups differently"
        )
    index = class_index(of_class[:, 0])
    return GroupIndex(
        index.members, index.counts, tuple(np.asarray(index.counts).tolist())
    )
