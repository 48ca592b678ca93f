"""Sets of features, checked, with their masks as weights."""

import jax.numpy as jnp

from jaxtransfer.losses.reduction import check_mask, widen


def weighted_rows(name, rows, where, least):
    """The rows, widened and 0 where masked, and the weight 0 or 1 of each."""
    rows = widen(rows)
    if rows.ndim != 2:
        raise ValueError(
            f"{name} must be [rows, features], got shape {rows.shape}; flatten the "
            "trailing axes with reshape(len(x), -1)."
        )
    if len(rows) < least:
        raise ValueError(f"{name} needs at least {least} rows, got {len(rows)}.")
    if where is None:
        return rows, jnp.ones(len(rows), rows.dtype)
    where = check_mask(f"{name}_where", where, rows.shape[:1])
    return jnp.where(where[:, None], rows, 0.0), where.astype(rows.dtype)


def check_widths(source, target):
    """A ValueError if two sets of rows differ in their number of features."""
    if source.shape[1] != target.shape[1]:
        raise ValueError(
            "source and target must have the same number of features, got shapes "
            f"{source.shape} and {target.shape}; take both from the same layer."
        )
