"""Distillation of relations between the channels of maps."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxtransfer.losses.directions import root, unit
from jaxtransfer.losses.maps import masked_maps
from jaxtransfer.ops.products import gram, product
from jaxtransfer.typing import AnyArray


def flow_of_solution_procedure(
    student_maps: Float[AnyArray, "batch height width first"],
    student_next_maps: Float[AnyArray, "batch height width second"],
    teacher_maps: Float[AnyArray, "batch height2 width2 first"],
    teacher_next_maps: Float[AnyArray, "batch height2 width2 second"],
    *,
    form: Literal["paper", "norms"] = "paper",
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, " batch"]:
    """Flow of solution procedure (FSP): how one stage's channels lead to the next's.

    With ``G = A' B / (height width)`` [first, second] of two stages' maps: form
    "paper" gives the mean squared difference of the student's G to the teacher's per
    example, form "norms" the sum over the second stage's channels of the lengths of
    the differences' columns.

    Args:
        student_maps: First stage's maps [batch, height, width, channels].
        student_next_maps: Second stage's, of the same height and width: pool the
            larger (`jaxtransfer.ops.adaptive_average_pool`).
        teacher_maps: As the student's in channels; height and width are free. No
            gradient flows into the teacher's.
        teacher_next_maps: Likewise.
        form: Which of the two.
        where: Which examples count [batch]; the others give 0 and no gradient.

    Returns:
        Losses [batch], not negative, float32 or wider.

    Raises:
        ValueError: If ``form`` is unknown, shapes do not match, or ``where`` does not
            fit.

    Example:
        >>> import jax.numpy as jnp
        >>> a, b = jnp.ones((1, 2, 2, 3)), jnp.ones((1, 2, 2, 4))
        >>> flow_of_solution_procedure(a, b, 2.0 * a, b).tolist()
        [1.0]

    Reference:
        Yim et al., "A Gift from Knowledge Distillation: Fast Optimization, Network
        Minimization and Transfer Learning", CVPR 2017, eqs. 1-2. Deviation: the mean
        over the entries of G in place of their sum.
    """
    if form not in ("paper", "norms"):
        raise ValueError(f'form must be "paper" or "norms", got {form!r}.')
    student = _flow("student", student_maps, student_next_maps, where)
    teacher = _flow("teacher", teacher_maps, teacher_next_maps, where)
    if student.shape != teacher.shape:
        raise ValueError(
            "student and teacher must have the same channels in both stages, got "
            f"matrices of shapes {student.shape} and {teacher.shape}; bridge the "
            "student's with 1 x 1 convolutions."
        )
    difference = student - jax.lax.stop_gradient(teacher)
    if form == "norms":
        return jnp.sum(root(jnp.sum(difference**2, axis=1)), axis=1)
    return jnp.mean(difference**2, axis=(1, 2))


def neuron_selectivity_transfer(
    student_maps: Float[AnyArray, "batch height width _"],
    teacher_maps: Float[AnyArray, "batch height width _"],
    *,
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, " batch"]:
    """Neuron selectivity transfer (NST): where in the image the channels respond.

    The biased maximum mean discrepancy between the channels of student and teacher,
    each a map scaled to length 1, under the kernel ``k(x, y) = (x . y)^2``.

    Args:
        student_maps: [batch, height, width, channels].
        teacher_maps: Of the same height and width; channels are free. No gradient
            flows into them.
        where: Which examples count [batch]; the others give 0 and no gradient.

    Returns:
        Losses [batch], not negative up to rounding, float32 or wider.

    Raises:
        ValueError: If batch, height or width differ, or ``where`` does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> maps = jnp.arange(8.0).reshape(1, 2, 2, 2)
        >>> print(f"{abs(float(neuron_selectivity_transfer(maps, 3.0 * maps)[0])):.4f}")
        0.0000

    Reference:
        Huang and Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity
        Transfer", 2017, sec. 4.
    """
    student = _places(student_maps, where)
    teacher = jax.lax.stop_gradient(_places(teacher_maps, where))
    if student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            "student_maps and teacher_maps must agree in batch, height and width, got "
            f"shapes {jnp.shape(student_maps)} and {jnp.shape(teacher_maps)}; pool the "
            "larger."
        )
    # [batch, channels, places]
    s, t = (unit(maps, axis=1, moderate=True).mT for maps in (student, teacher))
    kernels = gram(t), gram(s), product(s, t.mT)
    of_teacher, of_student, between = (jnp.mean(k**2, axis=(1, 2)) for k in kernels)
    return of_teacher + of_student - 2.0 * between


def inter_channel_correlation(
    student_maps: Float[AnyArray, "batch *positions channels"],
    teacher_maps: Float[AnyArray, "batch *_ channels"],
    *,
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, " batch"]:
    """Inter-channel correlation (ICKD): which channels respond together.

    ``|G_t - G_s|_F^2 / channels`` with G the matrix of inner products ``F' F`` of an
    example's channels over all positions, every row scaled to length 1.

    Args:
        student_maps: [batch, ..., channels].
        teacher_maps: As many channels; positions are free. No gradient flows into
            them.
        where: Which examples count [batch]; the others give 0 and no gradient.

    Returns:
        Losses [batch], 0 … 4, float32 or wider.

    Raises:
        ValueError: If examples or channels differ in number, there is no position, or
            ``where`` does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> maps = jnp.arange(8.0).reshape(1, 2, 2, 2)
        >>> print(f"{float(inter_channel_correlation(maps, 3.0 * maps)[0]):.4f}")
        0.0000

    Reference:
        Liu et al., "Exploring Inter-Channel Correlation for Diversity-preserved
        Knowledge Distillation", ICCV 2021, as in the authors' code. torchdistill
        divides by the examples twice: its weight is this one's times their number.
    """
    student = masked_maps(student_maps, where)
    teacher = jax.lax.stop_gradient(masked_maps(teacher_maps, where))
    shapes = student.shape, teacher.shape
    if min(student.ndim, teacher.ndim) < 3 or len({(s[0], s[-1]) for s in shapes}) > 1:
        raise ValueError(
            "student_maps and teacher_maps must be [batch, ..., channels] with a "
            f"position, of the same batch and channels, got shapes {shapes[0]} and "
            f"{shapes[1]}; bring the student's to the teacher's channels with a "
            "learned projection."
        )

    def correlations(maps):
        rows = maps.reshape(len(maps), -1, maps.shape[-1])
        return unit(gram(rows.mT), axis=2, moderate=True)

    difference = correlations(student) - correlations(teacher)
    return jnp.sum(difference**2, axis=(1, 2)) / student.shape[-1]


def _places(maps, where):
    """Maps as [batch, places, channels], 0 where masked."""
    maps = masked_maps(maps, where)
    if maps.ndim != 4:
        raise ValueError(
            f"maps must be [batch, height, width, channels], got shape {maps.shape}."
        )
    return maps.reshape(len(maps), -1, maps.shape[-1])


def _flow(name, first, second, where):
    """Inner products of two stages' channels, over their number of places."""
    first, second = _places(first, where), _places(second, where)
    if first.shape[:2] != second.shape[:2]:
        raise ValueError(
            f"the two stages of the {name} must agree in batch, height and width, got "
            f"{first.shape[:2]} and {second.shape[:2]} (batch, places); pool the "
            "larger."
        )
    return product(first.mT, second) / first.shape[1]
