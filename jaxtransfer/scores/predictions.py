"""Transferability from a source classifier's predictions on the target's examples."""

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Integer

from jaxtransfer.ops.products import product
from jaxtransfer.scores.labelled import labelled_rows, membership
from jaxtransfer.typing import AnyArray


def log_expected_empirical_prediction(
    probabilities: Float[AnyArray, "batch source_classes"],
    labels: Integer[AnyArray, " batch"],
    *,
    classes: int | None = None,
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, ""]:
    """Log expected empirical prediction (LEEP); larger: the source transfers better.

    ``mean_i log sum_z P(y_i | z) p_i(z)`` with the source classifier's probabilities
    ``p_i(z)`` of target example i and the empirical conditional ``P(y | z) = sum_{i:
    y_i = y} p_i(z) / sum_i p_i(z)``. An upper bound of it is the log-likelihood of a
    head trained on the same predictions.

    Args:
        probabilities: p [batch, source classes] of the source model, rows of sum 1.
        labels: Target labels y [batch] in [0, classes).
        classes: Target classes; default one more than the largest label. Needed under
            ``jit``.
        where: Which examples count [batch]; default all.

    Returns:
        Scalar in (-inf, 0] nats, float32 or wider; 0 if no example counts.

    Raises:
        ValueError: If shapes do not match, labels are out of range, or traced without
            ``classes``; if probabilities that can be seen are negative, or those of an
            example that counts do not sum to 1 (to 2 %, as low precision may have it).

    Example:
        >>> import jax.numpy as jnp
        >>> source = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> score = log_expected_empirical_prediction(source, jnp.array([0, 0, 1]))
        >>> abs(float(score))
        0.0

    Reference:
        Nguyen et al., "LEEP: A New Measure to Evaluate Transferability of Learned
        Representations", ICML 2020, eqs. 1 and 2.
    """
    rows, member, weights = labelled_rows(
        "probabilities", probabilities, labels, classes, where
    )
    if not isinstance(rows, Tracer) and rows.is_fully_addressable:
        _check_probabilities(rows, weights)
    joint = product(member.T, rows)  # [classes, source classes]
    conditional = joint / _nonzero(jnp.sum(joint, axis=0, keepdims=True))
    expected = jnp.sum(member * product(rows, conditional.T), axis=1)
    logs = jnp.log(jnp.where(weights > 0, _nonzero(expected), 1.0))
    return jnp.sum(weights * logs) / jnp.maximum(jnp.sum(weights), 1.0)


leep = log_expected_empirical_prediction


def _check_probabilities(rows: Array, weights: Array) -> None:
    if (rows < 0).any():
        raise ValueError(
            f"probabilities must not be negative, got {float(rows.min())}; give "
            "jax.nn.softmax(logits)."
        )
    sums = rows.sum(axis=1)
    if (
        not isinstance(weights, Tracer)
        and (wrong := (weights > 0) & (abs(sums - 1) > 0.02)).any()
    ):
        raise ValueError(
            "probabilities of an example must sum to 1, got a sum of "
            f"{float(sums[wrong.argmax()])}; give jax.nn.softmax(logits)."
        )


def negative_conditional_entropy(
    predictions: Integer[AnyArray, " batch"],
    labels: Integer[AnyArray, " batch"],
    *,
    source_classes: int | None = None,
    classes: int | None = None,
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, ""]:
    """Negative conditional entropy (NCE) of target labels given source labels.

    ``-H(Y | Z) = sum_{y, z} P(y, z) log P(y | z)`` with the empirical distribution of
    pairs; larger: knowing the source's label tells more about the target's.

    Args:
        predictions: Source classes z [batch], given or predicted by the source model.
        labels: Target labels y [batch] in [0, classes).
        source_classes: Source classes; default one more than the largest. Needed under
            ``jit``, as ``classes``.
        classes: Target classes; default one more than the largest label.
        where: Which examples count [batch]; default all.

    Returns:
        Scalar in [-log(classes), 0] nats, float32 or wider; 0 if no example
        counts.

    Raises:
        ValueError: If shapes do not match, labels are out of range, or traced without
            the numbers of classes.

    Example:
        >>> import jax.numpy as jnp
        >>> z, y = jnp.array([0, 0, 1, 1]), jnp.array([0, 1, 2, 2])
        >>> print(f"{float(negative_conditional_entropy(z, y)):.4f}")
        -0.3466

    Reference:
        Tran, Nguyen and Hassner, "Transferability and Hardness of Supervised
        Classification Tasks", ICCV 2019, eq. 4.
    """
    count, dtype = jnp.size(predictions), jnp.zeros(()).dtype
    given, _ = membership(
        "predictions", predictions, count, source_classes, where, dtype
    )
    member, weights = membership("labels", labels, count, classes, where, dtype)
    total = jnp.maximum(jnp.sum(weights), 1.0)
    joint = product(member.T, given) / total
    conditional = joint / _nonzero(jnp.sum(joint, axis=0, keepdims=True))
    return jnp.sum(jax.scipy.special.xlogy(joint, conditional))


nce = negative_conditional_entropy


def _nonzero(values):
    """The values, with 1 for 0: what is divided by it or logged is 0 anyhow."""
    return jnp.where(values == 0, 1.0, values)
