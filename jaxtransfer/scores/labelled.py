"""Labelled features and predictions, checked: what the scores share."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxtransfer.losses.reduction import check_mask, integers
from jaxtransfer.losses.sets import matrix
from jaxtransfer.ops.products import product


def rows_and_weights(name, rows, where):
    """Rows, widened and 0 where masked, and the weight 0 or 1 of each."""
    rows = matrix(name, rows)
    if not rows.size:
        raise ValueError(f"{name} is empty, of shape {rows.shape}; give some rows.")
    where = check_mask("where", True if where is None else where, rows.shape[:1])
    return jnp.where(where[:, None], rows, 0.0), where.astype(rows.dtype)


def labelled_rows(name, rows, labels, classes, where):
    """Rows, 0 where masked; membership [rows, classes] as 0 or 1; weights [rows]."""
    rows, weights = rows_and_weights(name, rows, where)
    member, _ = membership("labels", labels, len(rows), classes, where, rows.dtype)
    return rows, member, weights


def membership(name, labels, count, classes, where, dtype):
    """Membership [count, classes] as 0 or 1, all 0 where masked, and the weights.

    Not-a-number for labels that are out of range and can't be seen.
    """
    labels = integers(labels)
    if labels.shape != (count,) or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"{name} must be one integer a row, [{count}], got {labels.dtype} of "
            f"shape {labels.shape}; of one-hot or soft labels take the argmax."
        )
    where = check_mask("where", True if where is None else where, (count,))
    if classes is None:
        classes = _seen_classes(name, labels, where)
    wrong = where & ((labels < 0) | (labels >= classes))
    if not isinstance(wrong, Tracer) and wrong.is_fully_addressable and wrong.any():
        raise ValueError(
            f"{name} must be in [0, {classes}), got {labels[wrong].tolist()[:5]}; give "
            "the number of classes, or mask these examples with where."
        )
    member = jax.nn.one_hot(jnp.where(where, labels, -1), classes, dtype=dtype)
    return jnp.where(wrong[:, None], jnp.nan, member), where.astype(dtype)


def _seen_classes(name, labels, where):
    if isinstance(labels, Tracer) or isinstance(where, Tracer):
        raise ValueError(
            f"the number of classes can't be read from traced {name}; give it by "
            "keyword, as in classes=10."
        )
    seen = np.asarray(labels)[np.asarray(where)]
    return int(seen.max()) + 1 if seen.size else 1


def mean_of_present(values, member):
    """Mean over the classes that have a row; 0 if none has."""
    present = ~(jnp.sum(member, axis=0) == 0)  # not-a-number stays seen
    total = jnp.sum(jnp.where(present, values, 0.0))
    return total / jnp.maximum(jnp.sum(present, dtype=total.dtype), 1.0)


def centred(rows, weights):
    """The rows less the mean of those that count, 0 where masked."""
    count = jnp.maximum(jnp.sum(weights), 1.0)
    return (rows - (product(weights, rows) / count)[None]) * weights[:, None]


def decomposed(rows):
    """Left singular vectors and singular values, 0 beyond the numerical rank."""
    left, values, _ = jnp.linalg.svd(rows, full_matrices=False)
    least = max(rows.shape) * jnp.finfo(rows.dtype).eps * values[0]
    kept = ~(values <= least)  # not-a-number stays seen
    return jnp.where(kept, left, 0.0), jnp.where(kept, values, 0.0)
