"""Losses of a student's predictions against a teacher's, one value per example."""

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from jaxtransfer.losses.reduction import check_mask, widen
from jaxtransfer.typing import AnyArray


def knowledge_distillation(
    student_logits: Float[AnyArray, "*batch classes"],
    teacher_logits: Float[AnyArray, "*batch classes"],
    *,
    temperature: float | Float[Array, ""] = 4.0,
    where: Bool[AnyArray, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """Knowledge distillation (KD): divergence of softened predictions, per example.

    ``T^2 KL(softmax(z_t / T) || softmax(z_s / T))``. The factor T^2 keeps the size of
    the gradient when the temperature changes.

    Args:
        student_logits: [..., classes], finite.
        teacher_logits: [..., classes], finite; no gradient flows into them.
        temperature: T, positive. 1 compares the plain predictions.
        where: Which examples count [...]; the others give 0 and no gradient.

    Returns:
        Losses [...], non-negative up to rounding, float32 or wider.

    Raises:
        ValueError: If the shapes differ or the temperature is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> logits = jnp.array([[1.0, 2.0]])
        >>> knowledge_distillation(logits, logits).tolist()
        [0.0]

    Reference:
        Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015,
        sec. 2. Deviation: the divergence in place of the cross-entropy, which differs
        by the teacher's entropy, a constant; so the best value is 0.
    """
    if not isinstance(temperature, Tracer) and not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")
    student, teacher = widen(student_logits), widen(teacher_logits)
    if student.shape != teacher.shape or student.ndim < 1:
        raise ValueError(
            "student_logits and teacher_logits must have the same shape [..., "
            f"classes], got {student.shape} and {teacher.shape}."
        )
    if where is not None:
        where = check_mask("where", where, student.shape[:-1])
        student = jnp.where(where[..., None], student, 0.0)
        teacher = jnp.where(where[..., None], teacher, 0.0)
    teacher = jax.lax.stop_gradient(teacher)
    return temperature**2 * optax.losses.kl_divergence_with_log_targets(
        jax.nn.log_softmax(student / temperature),
        jax.nn.log_softmax(teacher / temperature),
    )
