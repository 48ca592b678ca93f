"""Memories with a row for every example of a data set: their indices, their rows."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxtransfer.losses.reduction import integers
from jaxtransfer.losses.sets import matrix


def gathered(axis_name: str | None, *arrays: Any) -> Any:
    """The rows of all devices of an axis, in their order; as they are without one."""
    if axis_name is None:
        return arrays
    return jax.lax.all_gather(arrays, axis_name, tiled=True)


def checked_indices(name, indices, shape, examples, where):
    """Indices in range, and whether they were; those that don't count are 0."""
    indices = integers(indices)
    if indices.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}, got shape {indices.shape}.")
    valid = (indices >= 0) & (indices < examples)
    wrong = where & ~valid
    if not isinstance(wrong, Tracer) and wrong.is_fully_addressable and wrong.any():
        raise ValueError(
            f"{name} must be in [0, {examples}), the rows of the memory, got "
            f"{indices[wrong].tolist()[:5]}."
        )
    return jnp.where(valid & where, indices, 0), valid | ~where


def counted_rows(name, rows, where):
    """The rows of a matrix, widened, 0 where they do not count."""
    return jnp.where(where[:, None], matrix(name, rows), 0.0)


def write_rows(memory, indices, rows, where):
    """The memory with some rows replaced; of rows with one index the last one stays."""
    later = jnp.triu(jnp.ones((len(indices), len(indices)), bool), 1)
    again = (indices[:, None] == indices[None]) & where[None] & later
    stays = where & ~jnp.any(again, axis=1)
    places = jnp.where(stays, indices, len(memory))
    return memory.at[places].set(rows.astype(memory.dtype), mode="drop")
