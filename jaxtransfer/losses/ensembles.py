"""Distillation from several teachers, or among students; one value per example."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from jaxtransfer.losses.reduction import check_mask, first_axes, widen
from jaxtransfer.losses.softened import (
    counted,
    kl_divergence,
    soften,
    softmax_divergence,
    tempered,
)
from jaxtransfer.typing import AnyArray

_LOWEST = -200.0
"""Below the logarithm of every positive number of float32."""


def multi_teacher_distillation(
    student_logits: Float[AnyArray, "*batch classes"],
    teacher_logits: Float[AnyArray, "teachers *batch classes"],
    *,
    combine: Literal["probabilities", "logits", "divergences"] = "probabilities",
    weights: Float[AnyArray, "teachers ..."] | None = None,
    temperature: float | Float[AnyArray, "*#batch"] = 4.0,
    where: Bool[AnyArray, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Distillation from an ensemble of teachers (multi-teacher KD), per example.

    With the weights w normalised to sum 1 over the teachers k, the softened predictions
    ``p_k = softmax(z_k / T)`` and q of the student: ``T^2 KL(sum_k w_k p_k || q)`` of
    "probabilities" (arithmetic mean), ``T^2 KL(softmax(sum_k w_k z_k / T) || q)`` of
    "logits" (geometric mean), ``T^2 sum_k w_k KL(p_k || q)`` of "divergences", whose
    gradient is that of "probabilities".

    Args:
        student_logits: [..., classes], finite.
        teacher_logits: [teachers, ..., classes], finite; no gradient flows into them.
        combine: What is averaged: "probabilities", "logits" or "divergences".
        weights: Non-negative weights [teachers], or [teachers, ...] to route every
            example to teachers of its own; default equal. What a teacher of weight 0
            says may be anything; an example with weights 0 only gives 0.
        temperature: T, positive; a number or one an example [...].
        where: Which examples count [...]; the others give 0 and no gradient.

    Returns:
        Losses [...], non-negative up to rounding, float32 or wider.

    Raises:
        ValueError: If shapes do not match or an argument is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> student = jnp.array([[1.0, 3.0]])
        >>> teachers = jnp.array([[[0.0, 4.0]], [[2.0, 2.0]]])
        >>> multi_teacher_distillation(student, teachers, combine="logits").tolist()
        [0.0]

    Reference:
        Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015,
        sec. 1 (both means); You et al., "Learning from Multiple Teacher Networks", KDD
        2017 (probabilities).
    """
    if combine not in ("probabilities", "logits", "divergences"):
        raise ValueError(
            'combine must be "probabilities", "logits" or "divergences", got '
            f"{combine!r}."
        )
    student, teachers = widen(student_logits), widen(teacher_logits)
    if student.ndim < 1 or teachers.shape[1:] != student.shape or not len(teachers):
        raise ValueError(
            "teacher_logits must be [teachers, ..., classes] for student_logits [..., "
            f"classes], got {teachers.shape} and {student.shape}; stack the teachers "
            "on a new first axis."
        )
    batch = student.shape[:-1]
    shares = _shares(weights, teachers.shape[:-1], student.dtype)
    taught = jnp.sum(shares, axis=0) > 0
    where = taught if where is None else taught & check_mask("where", where, batch)
    student = jnp.where(where[..., None], student, 0.0)
    heard = where[None] & (shares > 0)
    shares = jnp.where(heard, shares, 0.0)
    teachers = jnp.where(heard[..., None], teachers, 0.0)
    teachers = jax.lax.stop_gradient(teachers)

    if combine == "logits":
        teachers = _average(shares, teachers)
    scale, student, teachers = tempered(temperature, batch, where, student, teachers)
    if combine == "logits":
        return counted(scale * softmax_divergence(teachers, student), where)
    log_q, log_p = jax.nn.log_softmax(student), jax.nn.log_softmax(teachers)
    log_mean = jnp.log(_average(shares, jnp.exp(log_p)))
    losses = kl_divergence(log_mean, log_q)
    if combine == "divergences":
        # sum_k w_k KL(p_k || q) = sum_k w_k KL(p_k || mean) + KL(mean || q), of which
        # the first is a constant; it is finite where the mean is too small for a float.
        apart = kl_divergence(log_p, jnp.maximum(log_mean, _LOWEST)[None])
        losses += jnp.sum(jnp.where(shares > 0, shares * apart, 0.0), axis=0)
    return counted(scale * losses, where)


def mutual_learning(
    cohort_logits: Float[AnyArray, "students *batch classes"],
    *,
    temperature: float | Float[AnyArray, "*#batch"] = 1.0,
    where: Bool[AnyArray, "..."] | None = None,
) -> Float[Array, "students *batch"]:
    """Deep mutual learning (DML): every student against each of its peers.

    ``T^2 mean_{j != i} KL(p_j || p_i)`` for student i with the softened predictions p.
    No gradient flows into the peers, so that the sum over the students trains each of
    them on its own loss.

    Args:
        cohort_logits: [students, ..., classes], finite.
        temperature: T, positive; a number or one an example [...]. The paper has none.
        where: Which examples count [...], for all students; the others give 0 and no
            gradient.

    Returns:
        Losses [students, ...], non-negative up to rounding, float32 or wider; 0 for a
        student without peers.

    Raises:
        ValueError: If there is no student or the temperature is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> cohort = jnp.log(jnp.array([[[0.5, 0.5]], [[0.75, 0.25]]]))
        >>> print([f"{loss:.4f}" for loss in mutual_learning(cohort)[:, 0].tolist()])
        ['0.1308', '0.1438']

    Reference:
        Zhang et al., "Deep Mutual Learning", CVPR 2018, sec. 3.
    """
    cohort = widen(cohort_logits)
    if cohort.ndim < 2 or not len(cohort):
        raise ValueError(
            "cohort_logits must be [students, ..., classes] of one student or more, "
            f"got {cohort.shape}."
        )
    batch = cohort.shape[1:-1]
    if where is not None:
        where = check_mask("where", where, batch)
        cohort = jnp.where(where[..., None], cohort, 0.0)
    scale, log_p = soften(temperature, batch, where, cohort)
    peers, students = jax.lax.stop_gradient(log_p), len(cohort)
    losses = jnp.zeros(cohort.shape[:-1], cohort.dtype)
    for k in range(1, students):
        losses += kl_divergence(jnp.roll(peers, k, axis=0), log_p)
    return counted(scale * losses / max(students - 1, 1), where)


def _average(shares, values):
    """The weighted sum over the teachers, one by one: a sum over an axis is slower."""
    total = jnp.zeros(values.shape[1:], values.dtype)
    for share, value in zip(shares, values, strict=True):
        total += share[..., None] * value
    return total


def _shares(weights, shape, dtype):
    """Weights [teachers, ...] that sum to 1 over the teachers, or are all 0."""
    if weights is None:
        return jnp.full(shape, 1.0 / shape[0], dtype)
    given = jnp.shape(weights)
    weights = jax.lax.stop_gradient(jnp.asarray(weights, dtype))
    if not isinstance(weights, Tracer) and weights.is_fully_addressable:
        if not np.all(np.asarray(weights) >= 0):
            raise ValueError(f"weights must not be negative, got {weights}.")
    try:
        weights = jnp.broadcast_to(first_axes(weights, len(shape)), shape)
    except ValueError:
        weights = None
    if weights is None or given[0] != shape[0]:
        raise ValueError(
            f"weights must be [teachers] or [teachers, ...], {shape}, got {given}."
        )
    total = jnp.sum(weights, axis=0, keepdims=True)
    return weights / jnp.where(total > 0, total, 1.0)
