"""Losses and scores of predictions against labels, one value per example."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Integer

from jaxtransfer.losses.reduction import check_mask, integers, widen
from jaxtransfer.ops.order import argmax
from jaxtransfer.typing import AnyArray


def cross_entropy(
    logits: Float[AnyArray, "*batch classes"],
    labels: Integer[AnyArray, "*batch"],
    *,
    label_smoothing: float = 0.0,
    where: Bool[AnyArray, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Cross-entropy of softmax predictions against integer labels, per example.

    ``-sum_c q_c log softmax(z)_c`` with ``q = (1 - a) onehot(y) + a / classes``.

    Args:
        logits: Unnormalised log-probabilities [..., classes], finite.
        labels: Classes [...] in [0, classes).
        label_smoothing: Weight a of the uniform distribution, in [0, 1].
        where: Which examples count [...]; the others give 0 and no gradient.

    Returns:
        Losses [...], float32 or wider. A label out of range that can't be seen because
        it is traced gives not-a-number, in the value and the gradient.

    Raises:
        ValueError: If shapes do not match, labels are not integers or, outside of
            ``jit``, out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> losses = cross_entropy(jnp.zeros((2, 4)), jnp.array([0, 3]))
        >>> print([f"{loss:.4f}" for loss in losses.tolist()])
        ['1.3863', '1.3863']

    Reference:
        Smoothing: Szegedy et al., "Rethinking the Inception Architecture for Computer
        Vision", CVPR 2016, sec. 7.
    """
    if not isinstance(label_smoothing, Tracer):
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(
                f"label_smoothing must be in [0, 1], got {label_smoothing}."
            )
    logits, labels, where = classified(logits, labels, where)
    classes = logits.shape[-1]
    valid = (labels >= 0) & (labels < classes)
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(
        logits, jnp.where(valid, labels, 0)
    )
    if isinstance(label_smoothing, Tracer) or label_smoothing:
        uniform = -jnp.mean(jax.nn.log_softmax(logits), axis=-1)
        losses = (1.0 - label_smoothing) * losses + label_smoothing * uniform
    losses = losses * jnp.where(valid, 1.0, jnp.nan).astype(losses.dtype)
    return losses if where is None else jnp.where(where, losses, 0.0)


def mean_squared_error(
    predictions: Float[AnyArray, "..."],
    targets: Float[AnyArray, "..."],
    *,
    axis: int | tuple[int, ...] = -1,
    where: Bool[AnyArray, "..."] | None = None,
) -> Float[Array, "..."]:
    """Mean squared error (MSE) over the features of every example.

    ``mean_f (p_f - t_f)^2``, without a half.

    Args:
        predictions: Predicted values [..., features].
        targets: True values, of the same shape.
        axis: The axes of features, averaged over; ``()`` for one value per element.
        where: Which examples count [...], in the shape of the result; the others give
            0 and no gradient.

    Returns:
        Losses [...], float32 or wider.

    Raises:
        ValueError: If the shapes differ: nothing is broadcast.

    Example:
        >>> import jax.numpy as jnp
        >>> mean_squared_error(jnp.array([[1.0, 3.0]]), jnp.zeros((1, 2))).tolist()
        [5.0]
    """
    predictions, targets = widen(predictions), widen(targets)
    if predictions.shape != targets.shape:
        raise ValueError(
            f"predictions and targets must have the same shape, got "
            f"{predictions.shape} and {targets.shape}; add or drop an axis, "
            "nothing is broadcast."
        )
    differences = predictions - targets
    if where is not None:
        shape = jax.eval_shape(lambda d: jnp.mean(d, axis=axis), differences).shape
        where = check_mask("where", where, shape)
        differences = jnp.where(jnp.expand_dims(where, axis), differences, 0.0)
    return jnp.mean(differences**2, axis=axis)


def accuracy(
    logits: Float[AnyArray, "*batch classes"],
    labels: Integer[AnyArray, "*batch"],
    *,
    where: Bool[AnyArray, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Whether the largest logit is that of the label: 1 or 0 per example.

    ``1[argmax_c z_c = y]``; the first of equal logits wins.

    Args:
        logits: Scores [..., classes].
        labels: Classes [...] in [0, classes).
        where: Which examples count [...]; the others give 0. Pass it to `mean` too.

    Returns:
        1.0 where right and 0.0 where wrong, [...] in float32.

    Raises:
        ValueError: If shapes do not match, labels are not integers or, outside of
            ``jit``, out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> accuracy(jnp.array([[0.0, 1.0], [2.0, 1.0]]), jnp.array([1, 1])).tolist()
        [1.0, 0.0]
    """
    logits, labels, where = classified(logits, labels, where)
    correct = (argmax(logits).astype(labels.dtype) == labels).astype(jnp.float32)
    return correct if where is None else jnp.where(where, correct, 0.0)


def classified(logits, labels, where):
    """Checked, widened, and with harmless values where the mask is False."""
    logits, labels = widen(logits), integers(labels)
    if logits.ndim < 1 or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels must have the shape of logits without the classes, got logits "
            f"{logits.shape} and labels {labels.shape}."
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels must be integers, got {labels.dtype}; for one-hot labels take "
            "their argmax."
        )
    if where is not None:
        where = check_mask("where", where, labels.shape)
        labels = jnp.where(where, labels, 0)
        logits = jnp.where(where[..., None], logits, 0.0)
    _check_range(labels, logits.shape[-1])
    return logits, labels, where


def _check_range(labels, classes):
    if isinstance(labels, Tracer) or not labels.is_fully_addressable:
        return
    values = np.asarray(labels)
    outside = values[(values < 0) | (values >= classes)]
    if outside.size:
        raise ValueError(
            f"labels must be in [0, {classes}), the classes of the logits, got "
            f"{sorted(set(outside.tolist()))[:5]}; give the head more classes, or mask "
            "these examples with where."
        )
