"""Losses of a student's feature maps against a teacher's, position by position."""

import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from jaxtransfer.losses.maps import inner_axes, only_counted, same_maps
from jaxtransfer.losses.reduction import last_axes, widen
from jaxtransfer.ops.pooling import adaptive_average_pool
from jaxtransfer.typing import AnyArray


def hint(
    student_maps: Float[AnyArray, "batch *axes"],
    teacher_maps: Float[AnyArray, "batch *axes"],
    *,
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, " batch"]:
    """Hint (FitNets): mean squared error of a feature map, per example.

    ``mean (s - t)^2`` over all positions and channels.

    Args:
        student_maps: [batch, ..., channels], after a learned regressor if the student
            is narrower than the teacher.
        teacher_maps: [batch, ..., channels]; no gradient flows into them.
        where: Which examples count [batch]; the others give 0 and no gradient.

    Returns:
        Losses [batch], non-negative, float32 or wider.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> import jax.numpy as jnp
        >>> maps = jnp.array([[1.0, 2.0]])
        >>> hint(maps, maps + 3.0).tolist()
        [9.0]

    Reference:
        Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, sec. 2.2.
        Deviation: the mean in place of half of the sum.
    """
    student, teacher = same_maps(student_maps, teacher_maps, where)
    return _mean_square(student - teacher)


def reused_classifier(
    student_maps: Float[AnyArray, "batch *axes"],
    teacher_maps: Float[AnyArray, "batch *axes"],
    *,
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, " batch"]:
    """Reused teacher classifier (SimKD): mean squared error of the last maps.

    ``mean (s - t)^2`` over all positions and channels of the maps below the pooling
    and the classifier. It is the whole loss: the student then predicts with the
    teacher's classifier, so it needs no labels and no term of the logits.

    Args:
        student_maps: [batch, ..., channels], after the projector.
        teacher_maps: [batch, ..., channels]; no gradient flows into them.
        where: Which examples count [batch]; the others give 0 and no gradient.

    Returns:
        Losses [batch], non-negative, float32 or wider.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> import jax.numpy as jnp
        >>> maps = jnp.array([[1.0, 2.0]])
        >>> reused_classifier(maps, maps + 3.0).tolist()
        [9.0]

    Reference:
        Chen et al., "Knowledge Distillation with the Reused Teacher Classifier", CVPR
        2022, sec. 3. Deviation: the mean over elements, as in the authors' code.
    """
    student, teacher = same_maps(student_maps, teacher_maps, where)
    return _mean_square(student - teacher)


def variational_information_distillation(
    student_maps: Float[AnyArray, "batch *positions channels"],
    teacher_maps: Float[AnyArray, "batch *positions channels"],
    variance_params: Float[AnyArray, " channels"],
    *,
    least_variance: float | Float[AnyArray, ""] = 1e-5,
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, " batch"]:
    """Variational information distillation (VID): Gaussian likelihood of the teacher.

    ``mean ((t - s)^2 / v_c + log v_c) / 2`` over positions and channels, with one
    variance ``v_c = softplus(a_c) + least_variance`` a channel. Up to a constant it is
    the negative of a lower bound of the mutual information of the two maps.

    Args:
        student_maps: Means [batch, ..., channels] that a regressor on the student's
            map predicts.
        teacher_maps: [batch, ..., channels]; no gradient flows into them.
        variance_params: a [channels], trained with the student;
            ``log(exp(v - 1e-5) - 1)`` starts at the variance v, 5 by the authors.
        least_variance: Added to every variance, positive.
        where: Which examples count [batch]; the others give 0 and no gradient.

    Returns:
        Losses [batch], float32 or wider; negative where small variances fit.

    Raises:
        ValueError: If shapes do not match or ``least_variance`` is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> maps = jnp.zeros((1, 4, 2))
        >>> loss = variational_information_distillation(maps, maps, jnp.zeros(2))
        >>> print(f"{float(loss[0]):.4f}")  # log(log 2) / 2
        -0.1832

    Reference:
        Ahn et al., "Variational Information Distillation for Knowledge Transfer", CVPR
        2019, sec. 2. Deviation: the mean over elements, as in the authors' code.
    """
    if not isinstance(least_variance, Tracer) and not least_variance > 0:
        raise ValueError(f"least_variance must be positive, got {least_variance}.")
    student, teacher = same_maps(student_maps, teacher_maps, where)
    params = widen(variance_params)
    _check_per_channel("variance_params", params, student)
    variances = jax.nn.softplus(last_axes(params, student.ndim)) + least_variance
    terms = (student - teacher) ** 2 / variances + jnp.log(variances)
    return only_counted(0.5 * jnp.mean(terms, axis=inner_axes(terms)), where)


def activation_boundary(
    student_maps: Float[AnyArray, "batch *axes"],
    teacher_maps: Float[AnyArray, "batch *axes"],
    *,
    margin: float | Float[Array, ""] = 1.0,
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, " batch"]:
    """Activation boundaries (AB): squared hinge on whether each neuron is active.

    ``sum max(0, m - s)^2`` over the teacher's active neurons (t > 0) plus
    ``sum max(0, m + s)^2`` over the others. How strongly the teacher's neurons are
    active does not count.

    Args:
        student_maps: [batch, ..., channels], before the activation.
        teacher_maps: [batch, ..., channels], before the activation; no gradient flows
            into them.
        margin: m, how far beyond its boundary the student is pushed; non-negative.
        where: Which examples count [batch]; the others give 0 and no gradient.

    Returns:
        Losses [batch], sums over an example's neurons, float32 or wider.

    Raises:
        ValueError: If the shapes differ or the margin is negative.

    Example:
        >>> import jax.numpy as jnp
        >>> student = jnp.array([[0.5, 0.5, 3.0]])
        >>> activation_boundary(student, jnp.array([[7.0, -7.0, 7.0]])).tolist()
        [2.5]

    Reference:
        Heo et al., "Knowledge Transfer via Distillation of Activation Boundaries
        Formed by Hidden Neurons", AAAI 2019, sec. 3.
    """
    if not isinstance(margin, Tracer) and not margin >= 0:
        raise ValueError(f"margin must not be negative, got {margin}.")
    student, teacher = same_maps(student_maps, teacher_maps, where)
    toward = jnp.where(teacher > 0, student, -student)
    terms = jax.nn.relu(margin - toward) ** 2
    return only_counted(jnp.sum(terms, axis=inner_axes(terms)), where)


def overhaul_margin(
    scale: Float[AnyArray, "..."],
    bias: Float[AnyArray, "..."],
    *,
    form: Literal["code", "paper"] = "code",
) -> Float[Array, "..."]:
    """Margins of overhaul distillation (OFD) from a batch norm's parameters.

    ``E[x | x < 0]`` for x normal with mean b and deviation |g|, the mean response of
    a neuron where it is not active: ``b - |g| phi(b / |g|) / Phi(-b / |g|)``. In
    ``form="code"`` it is ``-3 |g|`` where ``P(x < 0)`` is at most 0.001.

    Args:
        scale: g of any shape, of the teacher's batch norm before the activation.
        bias: b of the same shape.
        form: "code" as the authors compute it, "paper" the expectation everywhere.

    Returns:
        Margins of the shape of ``scale``, not positive, float32 or wider; no gradient
        flows through them.

    Raises:
        ValueError: If the shapes differ or the form is unknown.

    Example:
        >>> import jax.numpy as jnp
        >>> print(f"{float(overhaul_margin(jnp.ones(()), jnp.zeros(()))):.4f}")
        -0.7979

    Reference:
        Heo et al., "A Comprehensive Overhaul of Feature Distillation", ICCV 2019,
        sec. 3.
    """
    if form not in ("code", "paper"):
        raise ValueError(f'form must be "code" or "paper", got {form!r}.')
    scale, bias = jax.lax.stop_gradient((jnp.abs(widen(scale)), widen(bias)))
    if scale.shape != bias.shape:
        raise ValueError(
            f"scale and bias must have the same shape, got {scale.shape} and "
            f"{bias.shape}."
        )
    spread = scale > 0
    ratio = bias / jnp.where(spread, scale, 1.0)
    # Beyond 5 deviations the two terms cancel; a continued fraction of the hazard
    # phi / Phi has their difference.
    near, far = jnp.minimum(ratio, 5.0), jnp.maximum(ratio, 5.0)
    log_below = jax.scipy.special.log_ndtr(-near)
    hazard = jnp.exp(jax.scipy.stats.norm.logpdf(near) - log_below)
    fraction = far
    for k in range(14, 1, -1):
        fraction = far + k / fraction
    if form == "code":
        rare = log_below <= math.log(1e-3)
        margins = jnp.where(rare, -3.0 * scale, bias - scale * hazard)
    else:
        margins = jnp.where(ratio > 5.0, -scale / fraction, bias - scale * hazard)
    return jnp.where(spread, margins, jnp.minimum(bias, 0.0))


def overhaul(
    student_maps: Float[AnyArray, "batch *positions channels"],
    teacher_maps: Float[AnyArray, "batch *positions channels"],
    margins: Float[AnyArray, " channels"],
    *,
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, " batch"]:
    """Overhaul of feature distillation (OFD): partial distance to a margin ReLU.

    ``sum (s - r)^2`` with ``r = max(t, m_c)``, without the neurons where r is not
    positive and s is already at or below it.

    Args:
        student_maps: [batch, ..., channels], before the activation, after a learned
            1 x 1 convolution with batch norm.
        teacher_maps: [batch, ..., channels], before the activation; no gradient flows
            into them.
        margins: m [channels], as `overhaul_margin` gives them; no gradient.
        where: Which examples count [batch]; the others give 0 and no gradient.

    Returns:
        Losses [batch], sums over an example's neurons, float32 or wider. The authors
        weigh them with 1e-3, halved for every stage before the last.

    Raises:
        ValueError: If shapes do not match.

    Example:
        >>> import jax.numpy as jnp
        >>> student, teacher = jnp.array([[2.0, -5.0]]), jnp.array([[1.0, -9.0]])
        >>> overhaul(student, teacher, jnp.array([-0.8, -0.8])).tolist()
        [1.0]

    Reference:
        Heo et al., "A Comprehensive Overhaul of Feature Distillation", ICCV 2019,
        sec. 3.
    """
    student, teacher = same_maps(student_maps, teacher_maps, where)
    margins = jax.lax.stop_gradient(widen(margins))
    _check_per_channel("margins", margins, student)
    teacher = jnp.maximum(teacher, last_axes(margins, teacher.ndim))
    counts = (student > teacher) | (teacher > 0)
    terms = jnp.where(counts, (student - teacher) ** 2, 0.0)
    return only_counted(jnp.sum(terms, axis=inner_axes(terms)), where)


def hierarchical_context(
    student_maps: Float[AnyArray, "batch height width channels"],
    teacher_maps: Float[AnyArray, "batch height width channels"],
    *,
    levels: Sequence[int] = (4, 2, 1),
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, " batch"]:
    """Hierarchical context loss (HCL, of ReviewKD): squared error on a pyramid.

    ``sum_j 2^-j mean (P_j s - P_j t)^2 / sum_j 2^-j``, where ``P_0`` is the map itself
    and ``P_j`` averages it to l_j x l_j for the levels l smaller than the map, j = 1
    for the first of them.

    Args:
        student_maps: [batch, height, width, channels], after the fusion of stages.
        teacher_maps: Same shape; no gradient flows into them.
        levels: Sizes l, largest first; those not smaller than the shorter side of the
            map are left out.
        where: Which examples count [batch]; the others give 0 and no gradient.

    Returns:
        Losses [batch], non-negative, float32 or wider.

    Raises:
        ValueError: If the shapes differ, the maps are not images, or a level is not
            positive.

    Example:
        >>> import jax.numpy as jnp
        >>> maps = jnp.zeros((1, 8, 8, 3))
        >>> print(f"{float(hierarchical_context(maps, maps + 2.0)[0]):.4f}")
        4.0000

    Reference:
        Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021, sec. 3.
        The weights of the levels are those of the authors' code.
    """
    if any(level < 1 for level in levels):
        raise ValueError(f"levels must be positive, got {levels}.")
    student, teacher = same_maps(
        student_maps, teacher_maps, where, "height, width, channels", rank=4
    )
    difference = student - teacher
    total, weights, weight = _mean_square(difference), 1.0, 1.0
    for level in levels:
        if level < min(difference.shape[1:3]):
            weight /= 2.0
            pooled = adaptive_average_pool(difference, (level, level))
            total += weight * _mean_square(pooled)
            weights += weight
    return total / weights


def masked_generative(
    student_maps: Float[AnyArray, "batch *axes"],
    teacher_maps: Float[AnyArray, "batch *axes"],
    *,
    weight: float | Float[Array, ""] = 7e-5,
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, " batch"]:
    """Masked generative distillation (MGD): squared error of regenerated maps.

    ``w sum (s - t)^2`` over all positions and channels, where s is what a generator
    network restores from the student's aligned map with a random part of it set to 0.
    Draw that part anew for every example and step: 15 % of the channels for
    classification (weight 7e-5), 65 % of the positions for detection (2e-5).

    Args:
        student_maps: Regenerated maps [batch, ..., channels].
        teacher_maps: [batch, ..., channels]; no gradient flows into them.
        weight: w, non-negative.
        where: Which examples count [batch]; the others give 0 and no gradient.

    Returns:
        Losses [batch], sums over an example's elements, float32 or wider.

    Raises:
        ValueError: If the shapes differ or the weight is negative.

    Example:
        >>> import jax.numpy as jnp
        >>> maps = jnp.zeros((1, 2, 2, 3))
        >>> masked_generative(maps, maps + 1.0, weight=0.5).tolist()
        [6.0]

    Reference:
        Yang et al., "Masked Generative Distillation", ECCV 2022, sec. 3.
    """
    if not isinstance(weight, Tracer) and not weight >= 0:
        raise ValueError(f"weight must not be negative, got {weight}.")
    student, teacher = same_maps(student_maps, teacher_maps, where)
    squares = (student - teacher) ** 2
    return weight * jnp.sum(squares, axis=inner_axes(squares))


simkd = reused_classifier


def _mean_square(difference):
    return jnp.mean(difference**2, axis=inner_axes(difference))


def _check_per_channel(name, values, maps):
    if values.shape != maps.shape[-1:]:
        raise ValueError(
            f"{name} must be [channels], one a channel of maps of shape {maps.shape}, "
            f"got shape {values.shape}."
        )
