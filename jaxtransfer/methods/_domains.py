"""What methods over two domains share."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.typing import Batch


def domains(batch: Batch, *, places: bool = False) -> tuple[Batch, Batch]:
    """The two domains of a batch.

    Args:
        batch: of both.
        places: whether the source may have a mask of the places of its examples
            (pixels), ``[batch, ...]``, which is the task loss's alone.

    Raises:
        ValueError: one of them is missing, or has a mask of examples, which a distance
            of sets would not see.
    """
    for name in ("source", "target"):
        if name not in batch:
            raise ValueError(
                f"batch: got {sorted(batch)}, but no {name!r}; give 'source' and "
                "'target' (data.pairs makes such batches)"
            )
        masked = "where" in batch[name]
        if masked and not (
            places and name == "source" and jnp.ndim(batch[name]["where"]) > 1
        ):
            raise ValueError(
                f"{name}: got 'where', but every row of a domain counts here; leave "
                "out the rows that should not"
            )
    return batch["source"], batch["target"]


def join(source: jax.Array, target: jax.Array) -> jax.Array:
    """Stack the inputs of two domains, ``[n + m, ...]``, source first.

    Raises:
        ValueError: an input has another shape in the target than in the source, or a
            domain has no examples.
    """
    for name, inputs in (("source", source), ("target", target)):
        if not len(inputs):
            raise ValueError(f"{name}: got no examples, and its rows are compared")
    if source.shape[1:] != target.shape[1:]:
        raise ValueError(
            f"source inputs are {source.shape[1:]}, target inputs {target.shape[1:]}: "
            "one network sees both; bring them to one size and number of channels "
            "(data.pair does)"
        )
    return jnp.concatenate([source, target])


def check_gathered_once(
    distance: Callable[..., Any], axis_name: str | None, name: str
) -> None:
    """Refuse a distance that gathers over devices where its rows are gathered already.

    Args:
        distance: of two sets of rows; seen if it is a ``functools.partial``.
        axis_name: device axis that the objective gathers over.
        name: of the term, for the error.

    Raises:
        ValueError: both have ``axis_name``.
    """
    fixed = distance.keywords if isinstance(distance, functools.partial) else {}
    own = fixed.get("axis_name")
    if own is not None and axis_name is not None:
        raise ValueError(
            f"term {name!r}: its distance has axis_name={own!r} and the objective "
            f"{axis_name!r}, so rows would be gathered twice; leave it out of the "
            "distance"
        )


def gather(parts: tuple, axis_name: str | None) -> tuple:
    """Rows of all devices, for losses that must see the whole batch."""
    if axis_name is None:
        return parts
    return jax.lax.all_gather(parts, axis_name, tiled=True)
