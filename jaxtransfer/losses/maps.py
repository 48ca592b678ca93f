"""Feature maps of a student and a teacher, checked and masked."""

import jax
import jax.numpy as jnp

from jaxtransfer.losses.reduction import check_mask, widen


def same_maps(student, teacher, where, axes="..., channels", rank=None):
    """Both maps, widened and 0 where masked; the teacher's without gradient."""
    student, teacher = jnp.asarray(student), jnp.asarray(teacher)
    if student.shape != teacher.shape:
        raise ValueError(
            "student_maps and teacher_maps must have the same shape, got "
            f"{student.shape} and {teacher.shape}; bring the student's to the shape "
            "of the teacher's with a learned projection."
        )
    if rank is not None and student.ndim != rank or student.ndim < 2:
        raise ValueError(f"student_maps must be [batch, {axes}], got {student.shape}.")
    student, teacher = masked_maps(student, where), masked_maps(teacher, where)
    return student, jax.lax.stop_gradient(teacher)


def masked_maps(maps, where):
    """The maps, widened, and 0 in the examples that do not count."""
    maps = widen(maps)
    if where is None:
        return maps
    where = check_mask("where", where, maps.shape[:1])
    return jnp.where(where.reshape(-1, *[1] * (maps.ndim - 1)), maps, 0.0)


def only_counted(values, where):
    """The losses of the examples that count; 0 for the others."""
    if where is None:
        return values
    return jnp.where(check_mask("where", where, values.shape), values, 0.0)


def inner_axes(maps):
    """All axes but that of the examples."""
    return tuple(range(1, maps.ndim))
