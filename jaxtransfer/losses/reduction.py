"""From values per example to one number."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from jaxtransfer.ops.dtypes import common_dtype
from jaxtransfer.typing import AnyArray


def mean(
    values: Shaped[AnyArray, "..."], *, where: Bool[AnyArray, "..."] | None = None
) -> Float[Array, ""]:
    """Mean of the values that count; 0 if none does.

    ``sum_i m_i v_i / max(sum_i m_i, 1)`` for a mask m. Values that do not count may be
    anything, not-a-number included: they reach neither the value nor the gradient.

    Args:
        values: Values [...] of any shape.
        where: Which values count: a mask of the shape of ``values``, or of its first
            axes; default all.

    Returns:
        Scalar, float32 or wider.

    Raises:
        ValueError: If ``where`` does not fit the shape of ``values``, or is not
            boolean.

    Example:
        >>> import jax.numpy as jnp
        >>> values = jnp.array([1.0, 2.0, jnp.nan])
        >>> float(mean(values, where=jnp.array([True, True, False])))
        1.5
    """
    values = widen(values)
    if where is None:
        return jnp.mean(values) if values.size else jnp.zeros((), values.dtype)
    where = check_mask("where", where, values.shape)
    count = jnp.sum(where, dtype=values.dtype)
    total = jnp.sum(jnp.where(where, values, 0.0))
    return total / jnp.maximum(count, 1.0)


def widen(values: AnyArray) -> Array:
    """The values in float32, or wider if they already are: sums lose nothing."""
    values = jnp.asarray(values)
    return values.astype(common_dtype(values.dtype, jnp.float32))


def integers(values: AnyArray) -> Array:
    """The labels or indices, narrow ones in int32: as uint8, 256 classes would be 0."""
    values = jnp.asarray(values)
    narrow = jnp.issubdtype(values.dtype, jnp.integer) and values.dtype.itemsize < 4
    return values.astype(jnp.int32) if narrow else values


def absolute_power(values, power):
    """``|x|^p``, of which every derivative is 0 at 0 for p = 1 too."""
    values = jnp.abs(values)
    return values if isinstance(power, int | float) and power == 1 else values**power


def first_axes(array: AnyArray, ndim: int) -> Array:
    """An array of the first of ``ndim`` axes, so that it broadcasts over the others."""
    array = jnp.asarray(array)
    return array.reshape(array.shape + (1,) * max(ndim - array.ndim, 0))


def last_axes(array: AnyArray, ndim: int) -> Array:
    """An array of the last of ``ndim`` axes, so that it broadcasts over the others."""
    array = jnp.asarray(array)
    return array.reshape((1,) * max(ndim - array.ndim, 0) + array.shape)


def check_mask(name, where, shape):
    """The mask broadcast to ``shape``; a ValueError that names it if it can't be.

    One of fewer axes is of the first: ``[batch]`` of examples, whatever they hold.
    """
    where = jnp.asarray(where)
    if where.dtype != bool:
        raise ValueError(
            f"{name} must be boolean, got {where.dtype}; use `{name} > 0`."
        )
    try:
        return jnp.broadcast_to(first_axes(where, len(shape)), shape)
    except ValueError:
        raise ValueError(
            f"{name} of shape {where.shape} does not fit {shape}, the shape of what it "
            "masks; give a mask of its first axes or of all."
        ) from None
