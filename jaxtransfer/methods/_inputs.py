"""Inputs of a whole data set, given to a network without passing through batches."""

from typing import Any

import jax
import numpy as np


def check_scaled(name: str, inputs: Any) -> None:
    """Refuse images as they are stored.

    Batches of :mod:`jaxtransfer.data` have them in [0, 1]; the network would see
    something else here than there.

    Args:
        name: of the argument.
        inputs: tree of arrays ``[examples, ...]``.

    Raises:
        ValueError: one of them is uint8 or uint16 and has three axes or more.
    """
    for leaf in jax.tree.leaves(inputs):
        kind = getattr(leaf, "dtype", None)
        if kind in (np.uint8, np.uint16) and leaf.ndim > 2:
            raise ValueError(
                f"{name}: got {kind} of shape {leaf.shape}; networks see images in "
                f"[0, 1], so divide by {np.iinfo(kind).max} (what is no image, cast)"
            )
