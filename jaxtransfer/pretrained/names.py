"""Where the leaves of a network lie in a file: names and layouts of the formats.

A *naming* maps a leaf of the network (its collection, path and shape) to an
:class:`Entry`: the name or names in the file, and how their arrays become the leaf and
back. Those here know no architecture but by the paths of its modules; a naming of
one's own is a function from :class:`Leaf` to :class:`Entry`.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Renames = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]
"""Pairs (regular expression, replacement) as of ``re.sub``, applied in turn."""


class Leaf(NamedTuple):
    """A leaf of a network.

    Attributes:
        collection: ``"params"``, ``"batch_stats"``, …
        path: its path in the collection, ``"layer1_0/conv1/kernel"``.
        shape: its shape.
    """

    collection: str
    path: str
    shape: tuple[int, ...]


class Entry(NamedTuple):
    """Where a leaf lies in a file.

    Attributes:
        names: of the arrays in the file that make up the leaf.
        read: these arrays → the leaf.
        write: the leaf → a tuple of these arrays; undoes ``read`` exactly.
    """

    names: tuple[str, ...]
    read: Callable[..., np.ndarray]
    write: Callable[[np.ndarray], tuple[np.ndarray, ...]]


Naming = Callable[[Leaf], Entry]


def _alone(array: np.ndarray) -> tuple[np.ndarray, ...]:
    return (array,)


def flax(*, collections: bool = True) -> Naming:
    """Paths and layout of the network itself, as Flax and this library write them.

    Args:
        collections: whether names begin with the collection, ``"params/…"``; a file
            that holds bare parameters has none.

    Returns:
        The naming.

    Example:
        >>> flax()(Leaf("params", "head/kernel", (4, 2))).names
        ('params/head/kernel',)
    """

    def naming(leaf: Leaf) -> Entry:
        name = f"{leaf.collection}/{leaf.path}" if collections else leaf.path
        return Entry((name,), lambda array: array, _alone)

    return naming


_TORCH_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "mean": "running_mean",
    "var": "running_var",
}


def torch(*, rename: Renames = ()) -> Naming:
    """Names and layout of a PyTorch ``state_dict``.

    Modules are joined by ``.`` instead of ``/``, the numbers of list items too:
    ``layer1_0/conv1/kernel`` is ``layer1.0.conv1.weight``. Kernels have their output
    and input axes first, ``[out, in, height, width]`` and ``[out, in]``, where they are
    last here; depthwise kernels alike. ``kernel``, ``scale`` and ``embedding`` are
    ``weight``, ``mean`` and ``var`` of batch normalisation ``running_mean`` and
    ``running_var``. All other leaves keep name and layout.

    Not covered: kernels of transposed convolutions, attention whose query, key and
    value are kernels of three axes of their own, and a dense layer on a flattened map.
    PyTorch flattens (channels, height, width); :class:`~jaxtransfer.nets.LeNet` and
    :class:`~jaxtransfer.nets.Conv4` without pooling flatten (height, width, channels).
    The shapes agree, so that ``load`` can't tell: give it an adapter,
    :func:`~jaxtransfer.pretrained.flattened`.

    Args:
        rename: how names that this makes become those of the file, e.g.
            ``[("^", "module.")]`` or ``[("^fc", "linear")]``.

    Returns:
        The naming.

    Example:
        >>> entry = torch()(Leaf("batch_stats", "layer1_0/bn1/mean", (16,)))
        >>> entry.names
        ('layer1.0.bn1.running_mean',)
        >>> naming = torch(rename=[("^fc", "linear")])
        >>> entry = naming(Leaf("params", "fc/kernel", (4, 2)))
        >>> entry.names, entry.read(np.ones((2, 4))).shape
        (('linear.weight',), (4, 2))
    """

    def naming(leaf: Leaf) -> Entry:
        *modules, last = leaf.path.split("/")
        modules = [_numbered(module) for module in modules]
        name = ".".join([*modules, _TORCH_LEAVES.get(last, last)])
        name = _renamed(name, rename)
        if last == "kernel":
            return Entry((name,), _channels_last, lambda leaf: (_channels_first(leaf),))
        return Entry((name,), lambda array: array, _alone)

    return naming


def _numbered(module: str) -> str:
    """``blocks_0_1`` → ``blocks.0.1``."""
    return re.sub(r"(?:_\d+)+$", lambda found: found[0].replace("_", "."), module)


def _renamed(name: str, rename: Renames) -> str:
    for pattern, replacement in rename:
        name = re.sub(pattern, replacement, name)
    return name


def _channels_last(array: np.ndarray) -> np.ndarray:
    """``[out, in, *spatial]`` → ``[*spatial, in, out]``."""
    return array.transpose(*range(2, array.ndim), 1, 0) if array.ndim > 1 else array


def _channels_first(array: np.ndarray) -> np.ndarray:
    """``[*spatial, in, out]`` → ``[out, in, *spatial]``."""
    if array.ndim < 2:
        return array
    return array.transpose(-1, -2, *range(array.ndim - 2))


__all__ = ["Entry", "Leaf", "Naming", "Renames", "flax", "torch"]
