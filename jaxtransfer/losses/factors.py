"""Losses of what is normalised in feature maps: attention, factors, distributions."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from jaxtransfer.losses.directions import root, scaled, unit
from jaxtransfer.losses.maps import inner_axes, masked_maps, same_maps
from jaxtransfer.losses.reduction import absolute_power, check_mask, widen
from jaxtransfer.losses.softened import softmax_divergence
from jaxtransfer.ops.pooling import adaptive_average_pool
from jaxtransfer.typing import AnyArray


def attention_map(
    features: Float[AnyArray, "batch *positions channels"],
    *,
    power: float | Float[Array, ""] = 2.0,
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, "batch *positions"]:
    """Attention map (of AT): where a feature map is large, at unit length.

    ``Q / |Q|_2`` with ``Q = mean_c |f_c|^p``, the norm over all positions.

    Args:
        features: Maps [batch, ..., channels].
        power: p, at least 1; larger ones favour the largest features.
        where: Which examples count [batch]; the others give 0 and no gradient.

    Returns:
        Maps [batch, ...] of unit length; 0 where all features are 0, without gradient
        there. Float32 or wider.

    Raises:
        ValueError: If the features have no positions or the power is below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> maps = attention_map(jnp.array([[[3.0, 1.0], [-1.0, 3.0], [0.0, 0.0]]]))
        >>> [round(value, 4) for value in maps[0].tolist()]
        [0.7071, 0.7071, 0.0]

    Reference:
        Zagoruyko and Komodakis, "Paying More Attention to Attention: Improving the
        Performance of Convolutional Neural Networks via Attention Transfer", ICLR
        2017, sec. 3.1.
    """
    _check_power(power)
    if jnp.ndim(features) < 3:
        raise ValueError(
            f"features must be [batch, ..., channels] with a position, got shape "
            f"{jnp.shape(features)}."
        )
    # A map of unit length does not depend on the scale of the features.
    features = masked_maps(features, where)
    features = scaled(features, inner_axes(features))
    attention = jnp.mean(absolute_power(features, power), axis=-1)
    return unit(attention, inner_axes(attention))


def attention_transfer(
    student_maps: Float[AnyArray, "batch *positions channels"],
    teacher_maps: Float[AnyArray, "batch *teacher_positions teacher_channels"],
    *,
    power: float | Float[Array, ""] = 2.0,
    form: Literal["code", "paper"] = "code",
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, " batch"]:
    """Attention transfer (AT): distance between attention maps, per example.

    With a and b the maps of `attention_map`: ``mean (a - b)^2`` over the positions
    (``form="code"``) or ``|a - b|_2`` (``form="paper"``). Of images of different
    sizes the larger one is averaged to the smaller first.

    Args:
        student_maps: [batch, ..., channels].
        teacher_maps: [batch, ..., channels], of any number of channels; no gradient
            flows into them.
        power: p of the attention maps, at least 1.
        form: "code" for the authors' program, "paper" for the text.
        where: Which examples count [batch]; the others give 0 and no gradient.

    Returns:
        Losses [batch], non-negative, float32 or wider.

    Raises:
        ValueError: If the batches differ, or the positions do and the maps are not
            images, or an option is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> student = jnp.array([[[1.0], [0.0]]])
        >>> attention_transfer(student, student[:, ::-1]).tolist()
        [1.0]

    Reference:
        Zagoruyko and Komodakis, "Paying More Attention to Attention: Improving the
        Performance of Convolutional Neural Networks via Attention Transfer", ICLR
        2017, eq. 2. Deviation: without the factor 1/2 and its weight.
    """
    if form not in ("code", "paper"):
        raise ValueError(f'form must be "code" or "paper", got {form!r}.')
    student, teacher = _same_positions(student_maps, teacher_maps, where)
    difference = attention_map(student, power=power) - attention_map(
        teacher, power=power
    )
    squares = difference**2
    if form == "code":
        return jnp.mean(squares, axis=inner_axes(squares))
    return root(jnp.sum(squares, axis=inner_axes(squares)))


def factor_transfer(
    student_maps: Float[AnyArray, "batch *positions channels"],
    teacher_maps: Float[AnyArray, "batch *teacher_positions teacher_channels"],
    *,
    power: float | Float[Array, ""] = 1.0,
    form: Literal["factor", "attention"] = "factor",
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, " batch"]:
    """Factor transfer (FT): distance between factors of unit length, per example.

    ``mean |a - b|^p`` with ``a = s / |s|_2`` and ``b = t / |t|_2``, each map taken as
    one vector. In ``form="attention"`` they are the maps of `attention_map`.

    Args:
        student_maps: Factors [batch, ..., channels] of the student's translator.
        teacher_maps: Factors [batch, ..., channels] of the teacher's paraphraser; no
            gradient flows into them.
        power: p, at least 1.
        form: "factor" for the paper and its authors' program; "attention" for the
            attention maps that a widely used collection of methods takes. There
            channels may differ, and sizes as in `attention_transfer`.
        where: Which examples count [batch]; the others give 0 and no gradient.

    Returns:
        Losses [batch], non-negative, float32 or wider.

    Raises:
        ValueError: If shapes do not match or an option is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> student = jnp.array([[[2.0], [0.0]]])
        >>> factor_transfer(student, student[:, ::-1]).tolist()
        [1.0]

    Reference:
        Kim, Park and Kwak, "Paraphrasing Complex Network: Network Compression via
        Factor Transfer", NeurIPS 2018, sec. 3. Deviation: the mean over elements, as
        in the authors' code, in place of the p-norm.
    """
    if form not in ("factor", "attention"):
        raise ValueError(f'form must be "factor" or "attention", got {form!r}.')
    _check_power(power)
    if form == "factor":
        student, teacher = same_maps(student_maps, teacher_maps, where)
        axes = inner_axes(student)
        difference = unit(student, axes) - unit(teacher, axes)
    else:
        student, teacher = _same_positions(student_maps, teacher_maps, where)
        difference = attention_map(student) - attention_map(teacher)
    return jnp.mean(absolute_power(difference, power), axis=inner_axes(difference))


def channel_distillation(
    student_maps: Float[AnyArray, "batch *positions channels"],
    teacher_maps: Float[AnyArray, "batch *positions channels"],
    *,
    temperature: float | Float[Array, ""] = 4.0,
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, " batch"]:
    """Channel-wise distillation (CWD): divergence of each channel over the positions.

    ``T^2 mean_c KL(softmax(t_c / T) || softmax(s_c / T))``, the softmax over all
    positions of channel c.

    Args:
        student_maps: [batch, ..., channels]: features or logits, finite.
        teacher_maps: Same shape; no gradient flows into them.
        temperature: T, positive.
        where: Which examples count [batch]; the others give 0 and no gradient.

    Returns:
        Losses [batch], non-negative up to rounding, float32 or wider.

    Raises:
        ValueError: If the shapes differ, the maps have no positions, or the
            temperature is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> maps = jnp.arange(4.0).reshape(1, 2, 2)
        >>> print(f"{float(channel_distillation(maps, maps + 1.0)[0]):.4f}")
        0.0000

    Reference:
        Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV
        2021, sec. 3.
    """
    if not isinstance(temperature, Tracer) and not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")
    student, teacher = same_maps(student_maps, teacher_maps, where)
    if student.ndim < 3:
        raise ValueError(
            "student_maps must be [batch, ..., channels] with a position, got shape "
            f"{student.shape}."
        )
    batch, channels = len(student), student.shape[-1]
    student, teacher = (
        maps.reshape(batch, -1, channels) * (1 / temperature)
        for maps in (student, teacher)
    )
    divergences = softmax_divergence(teacher, student, axis=1)
    return temperature**2 * jnp.mean(divergences, axis=1)


def pearson_feature_distillation(
    student_maps: Float[AnyArray, "batch *positions channels"],
    teacher_maps: Float[AnyArray, "batch *positions channels"],
    *,
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, ""]:
    """Pearson feature distillation (PKD): squared error of standardised channels.

    ``mean (z(s) - z(t))^2 / 2``, where z brings every channel to mean 0 and variance
    1 over the examples and positions. That is the mean over channels of ``1 - r`` with
    Pearson's correlation r, but for a factor ``(n - 1) / n`` of n values a channel.

    Args:
        student_maps: [batch, ..., channels].
        teacher_maps: Same shape; no gradient flows into them.
        where: Which examples count [batch]; default all.

    Returns:
        Scalar, non-negative, float32 or wider; 0 if fewer than two values a channel
        count. A channel that is constant, but for rounding, on both sides adds 0.

    Raises:
        ValueError: If the shapes differ or a channel has fewer than two values.

    Example:
        >>> import jax.numpy as jnp
        >>> maps = jnp.arange(6.0).reshape(3, 2)
        >>> print(f"{float(pearson_feature_distillation(maps, 5.0 * maps)):.4f}")
        0.0000

    Reference:
        Cao et al., "PKD: General Distillation Framework for Object Detectors via
        Pearson Correlation Coefficient", NeurIPS 2022, sec. 3. Maps of different sizes
        are to be brought to one size before.
    """
    student, teacher = same_maps(student_maps, teacher_maps, where)
    batch, channels = len(student), student.shape[-1]
    student, teacher = (m.reshape(batch, -1, channels) for m in (student, teacher))
    positions = student.shape[1]
    if batch * positions < 2:
        raise ValueError(
            "student_maps needs at least two values a channel over examples and "
            f"positions, got shape {jnp.shape(student_maps)}."
        )
    weights = jnp.ones((batch, 1, 1), student.dtype)
    if where is not None:
        where = check_mask("where", where, (batch,))
        weights = where[:, None, None].astype(student.dtype)
    count = positions * jnp.sum(weights)
    difference = _standardised(student, weights, count) - _standardised(
        teacher, weights, count
    )
    total = jnp.sum(weights * difference**2)
    return total / (2.0 * channels * jnp.maximum(count, 1.0))


def _check_power(power):
    if not isinstance(power, Tracer) and not power >= 1:
        raise ValueError(f"power must be at least 1, got {power}.")


def _same_positions(student, teacher, where):
    """Both maps, the larger image averaged to the smaller; no gradient to the second.

    Their channels may differ.
    """
    student, teacher = widen(student), widen(teacher)
    if min(student.ndim, teacher.ndim) < 3 or len(student) != len(teacher):
        raise ValueError(
            "student_maps and teacher_maps must be [batch, ..., channels] of equal "
            f"batches and with a position, got {student.shape} and {teacher.shape}."
        )
    student, teacher = masked_maps(student, where), masked_maps(teacher, where)
    if student.shape[1:-1] != teacher.shape[1:-1]:
        if student.ndim != 4 or teacher.ndim != 4:
            raise ValueError(
                "student_maps and teacher_maps must have the same positions unless "
                "both are [batch, height, width, channels], got shapes "
                f"{student.shape} and {teacher.shape}."
            )
        size = (
            min(student.shape[1], teacher.shape[1]),
            min(student.shape[2], teacher.shape[2]),
        )
        student = adaptive_average_pool(student, size)
        teacher = adaptive_average_pool(teacher, size)
    return student, jax.lax.stop_gradient(teacher)


def _standardised(values, weights, count):
    """Channels of [batch, positions, channels] at mean 0 and unit variance."""
    axes = (0, 1)
    # Summed less one of those that count, equal values have that one as their mean.
    one = jax.lax.stop_gradient(values[jnp.argmax(weights), 0])[None, None]
    total = jnp.sum(weights * (values - one), axis=axes, keepdims=True)
    centred = weights * (values - (one + total / jnp.maximum(count, 1.0)))
    squares = jnp.sum(centred**2, axis=axes, keepdims=True)
    # Values equal but for their own rounding, or too close to divide by twice.
    kind = jnp.finfo(values.dtype)
    floor = jnp.maximum(count * (4 * kind.eps * one) ** 2, np.sqrt(kind.tiny))
    variances = squares / jnp.maximum(count - 1.0, 1.0)
    some = squares > floor
    deviations = jnp.sqrt(jnp.where(some, variances, 1.0))
    return centred * jnp.where(some, 1.0 / (deviations + 1e-6), 0.0)
