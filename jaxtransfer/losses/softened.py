"""Softened predictions, checked: what the losses of distillation share."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from jaxtransfer.losses.classification import classified
from jaxtransfer.losses.reduction import check_mask, widen
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


def soften(temperature, shape, where, *logits):
    """``T^2`` and ``log softmax(z / T)`` of each, T a number or one an example."""
    if np.ndim(temperature):
        try:
            temperature = jnp.broadcast_to(temperature, shape)
        except ValueError:
            raise ValueError(
                f"temperature of shape {np.shape(temperature)} does not broadcast to "
                f"{shape}, the examples; give one number, or one an example."
            ) from None
        if where is not None:
            temperature = jnp.where(where, temperature, 1.0)
    check_positive("temperature", temperature)
    divisor = jnp.expand_dims(temperature, -1) if np.ndim(temperature) else temperature
    return temperature**2, *(jax.nn.log_softmax(z / divisor) for z in logits)


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
    # A class that both lack would be inf - inf.
    return jnp.sum(p * jnp.where(p > 0, log_p - log_q, 0.0), axis=-1)


def label_mask(logits, labels, where):
    """Which class is the labelled one [..., classes], and 1 or not-a-number [...].

    Not-a-number where a label is out of range but traced, so that it can't be seen.
    """
    logits, labels, _ = classified(logits, labels, where)
    classes = logits.shape[-1]
    if classes < 2:
        raise ValueError(f"student_logits must have two classes or more, got {classes}")
    valid = (labels >= 0) & (labels < classes)
    is_label = labels[..., None] == jnp.arange(classes)
    return is_label, jnp.where(valid, 1.0, jnp.nan).astype(logits.dtype)


def counted(losses, where) -> Array:
    """The losses, exactly 0 where masked."""
    return losses if where is None else jnp.where(where, losses, 0.0)
