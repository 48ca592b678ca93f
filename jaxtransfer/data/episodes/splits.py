"""Parts of a pool that share no class."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Array, Key

from jaxtransfer.data.arrays import check_arrays


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
            parts; or inputs and labels are not equally many.

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
    check_arrays({"inputs": inputs, "labels": labels})
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
