"""Softened predictions, checked: what the losses of distillation share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array

from jaxtransfer.losses.classification import classified
from jaxtransfer.losses.reduction import check_mask, first_axes, last_axes, widen
from jaxtransfer.ops.products import product


def pair(student, teacher, where):
    """Both widened, 0 where masked, no gradient into the teacher; and the mask."""
    student, teacher = widen(student), widen(teacher)
    if student.shape != teacher.shape or student.ndim < 1:
        raise ValueError(
            "student_logits and teacher_logits must have the same shape [..., "
            f"classes], got {student.shape} and {teacher.shape}."
        )
    if where is not None:
        where = check_mask("where", where, student.shape[:-1])
        student = jnp.where(where[..., None], student, 0.0)
        teacher = jnp.where(where[..., None], teacher, 0.0)
    return student, jax.lax.stop_gradient(teacher), where


def tempered(temperature, shape, where, *logits):
    """``T^2`` and ``z / T`` of each, T a number or one an example."""
    if np.ndim(temperature):
        try:
            wide = first_axes(temperature, len(shape))
            temperature = jnp.broadcast_to(wide, shape)
        except ValueError:
            raise ValueError(
                f"temperature of shape {np.shape(temperature)} does not fit {shape}, "
                "the examples; give one number, or one an example."
            ) from None
        if where is not None:
            temperature = jnp.where(where, temperature, 1.0)
    check_positive("temperature", temperature)
    factor = 1 / temperature  # a division a class would be kept as an array
    factor = jnp.expand_dims(factor, -1) if np.ndim(factor) else factor
    return temperature**2, *(z * factor for z in logits)


def soften(temperature, shape, where, *logits):
    """``T^2`` and ``log softmax(z / T)`` of each, T a number or one an example."""
    scale, *logits = tempered(temperature, shape, where, *logits)
    return scale, *map(jax.nn.log_softmax, logits)


def check_positive(name, value):
    """A ValueError if the value can be seen and is not positive."""
    if isinstance(value, Tracer) or not getattr(value, "is_fully_addressable", True):
        return
    if not np.all(np.asarray(value) > 0):
        raise ValueError(f"{name} must be positive, got {value}.")


def mean_prediction(logits, weights) -> Array:
    """``sum_i w_i softmax(z_i) / max(sum_i w_i, 1)`` [classes], of rows z."""
    raised = jnp.exp(
        logits - jax.lax.stop_gradient(jnp.max(logits, axis=1, keepdims=True))
    )
    shares = weights / jnp.maximum(jnp.sum(weights), 1.0) / jnp.sum(raised, axis=1)
    return product(shares, raised)


def kl_divergence(log_p, log_q) -> Array:
    """``sum_c p_c (log p_c - log q_c)``; classes of probability 0 under p add 0."""
    p = jnp.exp(log_p)
    return jnp.sum(p * jnp.where(p > 0, _difference(log_p, log_q), 0.0), axis=-1)


def _difference(log_p, log_q):
    """Of logarithms, and no inf - inf for a class that both lack."""
    return jnp.maximum(log_p, jnp.finfo(log_p.dtype).min) - log_q


def softmax_divergence(taught, logits, axis=-1) -> Array:
    """``KL(p || q)`` of ``p = softmax(taught)`` and ``q = softmax(logits)``.

    As :func:`kl_divergence` of their logarithms, which it needs no arrays for; classes
    that both lack (-inf) add 0.
    """
    return _expected_logarithm(taught, logits, None, axis, True)


def soft_cross_entropy(taught, logits, where=None) -> Array:
    """``-sum_c p_c log q_c`` of ``p = softmax(taught)``, ``q = softmax(logits)``.

    Classes that ``where`` [..., classes] leaves out are missing in the sum only.
    """
    return _expected_logarithm(taught, logits, where, -1, False)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _expected_logarithm(taught, logits, where, axis, relative):
    """``sum_c p_c l_c`` with ``l = log p - log q`` (relative) or ``-log q``.

    The derivatives are written down, for the automatic ones keep several more arrays:
    ``w q - p`` by the logits, w being the sum of p, and ``p (l - value)`` by the taught
    ones.
    """
    return _expectation(taught, logits, where, axis, relative)[0]


def _expectation(taught, logits, where, axis, relative):
    p, q = (
        z - jax.lax.stop_gradient(jnp.max(z, axis, keepdims=True))
        for z in (taught, logits)
    )
    powers_p, powers_q = jnp.exp(p), jnp.exp(q)
    sum_p, sum_q = (jnp.sum(e, axis, keepdims=True) for e in (powers_p, powers_q))
    offset = jnp.log(sum_q) - (jnp.log(sum_p) if relative else 0.0)
    counted_p, share = powers_p, 1.0
    if where is not None:
        counted_p = jnp.where(where, powers_p, 0.0)
        share = jnp.sum(counted_p, axis, keepdims=True) / sum_p
    apart = jnp.where(counted_p > 0, _difference(p, q) if relative else -q, 0.0)
    value = jnp.sum(counted_p * apart, axis, keepdims=True) / sum_p + share * offset

    def by_logits():
        return powers_q * (share / sum_q) - counted_p * (1 / sum_p)

    def by_taught():
        full = apart + offset
        full = full if where is None else jnp.where(where, full, 0.0)
        return powers_p * (1 / sum_p) * (full - value)

    return jnp.squeeze(value, axis), by_logits, by_taught


@functools.partial(_expected_logarithm.defjvp, symbolic_zeros=True)
def _(axis, relative, primals, tangents):
    taught, logits, where = primals
    value, by_logits, by_taught = _expectation(taught, logits, where, axis, relative)
    change = jnp.zeros_like(value)
    for tangent, slope in zip(tangents, (by_taught, by_logits), strict=False):
        if not isinstance(tangent, SymbolicZero):
            change += jnp.sum(slope() * tangent, axis)
    return value, change


def label_mask(logits, labels, where):
    """Which class is the labelled one [..., classes], and 1 or not-a-number [...].

    Not-a-number where a label is out of range but traced, so that it can't be seen.
    """
    logits, labels, _ = classified(logits, labels, where)
    classes = logits.shape[-1]
    if classes < 2:
        raise ValueError(f"student_logits must have two classes or more, got {classes}")
    valid = (labels >= 0) & (labels < classes)
    is_label = labels[..., None] == last_axes(
        jnp.arange(classes, dtype=labels.dtype), logits.ndim
    )
    return is_label, jnp.where(valid, 1.0, jnp.nan).astype(logits.dtype)


def counted(losses, where) -> Array:
    """The losses, exactly 0 where masked."""
    return losses if where is None else jnp.where(where, losses, 0.0)
