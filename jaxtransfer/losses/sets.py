"""Sets of features, checked, with their masks as weights."""

import jax.numpy as jnp
from jax.core import Tracer

from jaxtransfer.losses.reduction import check_mask, integers, widen


def weighted_rows(name, rows, where, least, mask=None):
    """The rows, widened and 0 where masked, and the weight 0 or 1 of each.

    ``mask`` is what the mask is called, if not ``NAME_where``.
    """
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
    where = check_mask(mask or f"{name}_where", where, rows.shape[:1])
    return jnp.where(where[:, None], rows, 0.0), where.astype(rows.dtype)


def check_widths(source, target):
    """A ValueError if two sets of rows differ in their number of features."""
    if source.shape[1] != target.shape[1]:
        raise ValueError(
            "source and target must have the same number of features, got shapes "
            f"{source.shape} and {target.shape}; take both from the same layer."
        )


def matrix(name, rows):
    """The rows, widened; a ValueError if they are no matrix."""
    rows = widen(rows)
    if rows.ndim != 2:
        raise ValueError(f"{name} must be a matrix, got shape {rows.shape}.")
    return rows


def checked_labels(labels, count, classes, where):
    """Labels in range, whether they were, and which examples count."""
    labels = integers(labels)
    if labels.shape != (count,):
        raise ValueError(
            f"labels must be one a row, [{count}], got shape {labels.shape}."
        )
    where = check_mask("where", True if where is None else where, (count,))
    valid = (labels >= 0) & (labels < classes)
    wrong = where & ~valid
    if not isinstance(wrong, Tracer) and wrong.is_fully_addressable and wrong.any():
        raise ValueError(
            f"labels must be in [0, {classes}), got {labels[wrong].tolist()[:5]}."
        )
    return jnp.where(valid, labels, 0), valid | ~where, where


def critic_outputs(name, logits, where):
    """The logits of a critic as [n], 0 where masked, and the mask."""
    logits = widen(logits)
    if logits.ndim == 2 and logits.shape[1] == 1:
        logits = logits[:, 0]
    if logits.ndim != 1:
        raise ValueError(
            f"{name}_logits must be [examples] or [examples, 1], got shape "
            f"{logits.shape}; the critic has one output."
        )
    if where is not None:
        where = check_mask(f"{name}_where", where, logits.shape)
        logits = jnp.where(where, logits, 0.0)
    return logits, where
