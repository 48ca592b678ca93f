"""The choice among runs, and the one score that sees target labels."""

import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Integer

from jaxtransfer import losses
from jaxtransfer.losses.reduction import check_mask, widen
from jaxtransfer.typing import AnyArray


def choose(
    values: Float[AnyArray, " runs"], *, where: Bool[AnyArray, " runs"] | None = None
) -> Int[Array, ""]:
    """Which run has the largest score; one that diverged is never chosen.

    ``argmax_r v_r`` over the runs whose score is a number; the first of equal ones.

    Args:
        values: Scores [runs] of one validator, of which larger is better.
        where: Which runs are up for choice [runs]; default all.

    Returns:
        Index of the run; -1 under ``jit`` if there is none to choose.

    Raises:
        ValueError: If the scores are not [runs], ``where`` does not fit or, outside of
            ``jit``, no run has a score that is a number.

    Example:
        >>> import jax.numpy as jnp
        >>> int(choose(jnp.array([0.1, jnp.nan, 0.3])))
        2
    """
    values = widen(values)
    if values.ndim != 1:
        raise ValueError(
            f"values must be [runs], one score a run, got shape {values.shape}."
        )
    where = check_mask("where", True if where is None else where, values.shape)
    legal = where & ~jnp.isnan(values)
    some = jnp.any(legal) if values.size else jnp.zeros((), bool)
    if not isinstance(some, Tracer) and not some:
        raise ValueError(
            f"values has no run to choose, got {values.tolist()[:5]}; not-a-number is "
            "the score of a run that diverged."
        )
    if not values.size:
        return jnp.asarray(-1)
    largest = jnp.max(values, where=legal, initial=-jnp.inf)
    return jnp.where(some, jnp.argmax(legal & (values == largest)), -1)


def oracle_target_accuracy(
    target_logits: Float[AnyArray, "batch classes"],
    target_labels: Integer[AnyArray, " batch"],
    *,
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, ""]:
    """Accuracy on labelled target examples: the oracle, which no one has in earnest.

    ``mean_i 1[argmax_c z_ic = y_i]``. For reporting how far a validator's choice stays
    behind the best one; a result chosen by it has seen the labels it is tested on.

    Args:
        target_logits: [batch, classes].
        target_labels: Classes [batch] in [0, classes).
        where: Which examples count [batch]; default all.

    Returns:
        Scalar in [0, 1], float32; larger is better. 0 if no example counts.

    Raises:
        ValueError: If shapes do not match, or labels are out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> float(oracle_target_accuracy(jnp.eye(2), jnp.array([0, 0])))
        0.5
    """
    return losses.mean(
        losses.accuracy(target_logits, target_labels, where=where), where=where
    )
