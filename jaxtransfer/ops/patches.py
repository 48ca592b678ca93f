"""Convolution and pooling that stay fast when every task has its own kernel."""

import functools
import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxtransfer.ops.dtypes import common_dtype
from jaxtransfer.ops.winograd import winograd_conv

Algorithm = Literal["auto", "patches", "winograd"]
Padding = str | int | Sequence[int | tuple[int, int]]
_NAMED = ("SAME", "SAME_LOWER", "VALID")


def conv(
    inputs: Float[Array, "... channels"],
    kernel: Float[Array, "*window channels features"],
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    precision: jax.lax.PrecisionLike = None,
    algorithm: Algorithm = "auto",
) -> Float[Array, "... features"]:
    """Convolution (cross-correlation) as static strided slices and products.

    Equal to ``jax.lax.conv_general_dilated`` with channels last. Under ``vmap`` over
    kernels that one becomes a grouped convolution, whose weight gradient is slow on
    CPU; here it becomes a batched matrix product.

    Args:
        inputs: [..., *spatial, channels]; the kernel says how many spatial axes.
        kernel: [*window, channels, features].
        strides: Step of the window, one for all or one per spatial axis.
        padding: "SAME", "SAME_LOWER", "VALID", one width, or a width or (before, after)
            per axis.
        precision: Precision of the product, as in ``jax.numpy.matmul``.
        algorithm: "patches": all patches times the kernel, one product. "winograd":
            see `winograd_conv`; 3x3 windows of step 1 only. "auto": that one on a CPU
            where it is faster (at least 16 channels and features, 4x4 outputs) and as
            exact (float32 or wider).

    Returns:
        [..., *spatial, features].

    Raises:
        ValueError: If ranks or channels do not match, the padding or the algorithm is
            unknown, or the algorithm can't do this window.

    Example:
        >>> import jax.numpy as jnp
        >>> conv(jnp.ones((1, 4, 4, 3)), jnp.ones((3, 3, 3, 8)), strides=2).shape
        (1, 2, 2, 8)
    """
    rank = kernel.ndim - 2
    if rank < 1 or inputs.ndim < rank + 1:
        raise ValueError(
            "kernel must be [*window, channels, features] and inputs [..., *spatial, "
            f"channels], got shapes {kernel.shape} and {inputs.shape}."
        )
    *window, channels, features = kernel.shape
    if inputs.shape[-1] != channels:
        raise ValueError(
            f"inputs have {inputs.shape[-1]} channels (shape {inputs.shape}), kernel "
            f"expects {channels} (shape {kernel.shape}); inputs are channels last."
        )
    inputs, strides, sizes = padded_windows(inputs, window, strides, padding)
    if algorithm not in ("auto", "patches", "winograd"):
        raise ValueError(
            f'algorithm must be "auto", "patches" or "winograd", got {algorithm!r}.'
        )
    possible = tuple(window) == (3, 3) and strides == (1, 1)
    if algorithm == "winograd" and not possible:
        raise ValueError(
            'algorithm="winograd" takes 3x3 windows of step 1, got a window of '
            f"{tuple(window)} and strides of {strides}."
        )
    large = min(channels, features) >= 16 and min(sizes) >= 4
    exact = _is_wide(inputs) and _is_wide(kernel)
    wins = possible and large and exact and jax.default_backend() == "cpu"
    if algorithm == "winograd" or (algorithm == "auto" and wins):
        return winograd_conv(inputs, kernel, precision=precision)

    columns = _columns(inputs, window, strides, sizes)
    weights = kernel.reshape(math.prod(window) * channels, features)
    dtype = common_dtype(columns, weights)
    return jnp.matmul(columns.astype(dtype), weights.astype(dtype), precision=precision)


def extract_patches(
    inputs: Float[Array, "... channels"],
    window: Sequence[int],
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
) -> Float[Array, "... columns"]:
    """All patches of a window, whose product with a kernel is its convolution.

    Args:
        inputs: [..., *spatial, channels].
        window: Size of the window per spatial axis.
        strides: Step of the window, one for all or one per spatial axis.
        padding: "SAME", "SAME_LOWER", "VALID", one width, or a width or (before, after)
            per axis.

    Returns:
        [..., *spatial, columns]: the values under the window, row by row, channels
        last, as ``kernel.reshape(columns, features)`` has them.

    Raises:
        ValueError: If ranks do not match, the window does not fit, or the padding is
            unknown.

    Example:
        >>> import jax.numpy as jnp
        >>> extract_patches(jnp.ones((1, 4, 4, 3)), (3, 3), strides=2).shape
        (1, 2, 2, 27)
    """
    if not window or inputs.ndim < len(window) + 1:
        raise ValueError(
            "inputs must be [..., *spatial, channels], got shape "
            f"{inputs.shape} for a window of {tuple(window)}."
        )
    inputs, strides, sizes = padded_windows(inputs, window, strides, padding)
    return _columns(inputs, window, strides, sizes)


def _is_wide(array):
    """Whether its dtype is float32 or wider: no integers, no half precision."""
    return common_dtype(array, jnp.float32) == common_dtype(array)


def padded_windows(
    inputs: Array, window: Sequence[int], strides: Any, padding: Any
) -> tuple[Array, tuple[int, ...], list[int]]:
    """Padded inputs, the step per axis, and how many windows fit along each."""
    rank = len(window)
    strides = _per_axis(strides, rank, "strides")
    lead = inputs.ndim - rank - 1
    pads = _pads(padding, inputs.shape[lead:-1], window, strides)
    inputs = jnp.pad(inputs, [(0, 0)] * lead + pads + [(0, 0)])
    spatial = inputs.shape[lead:-1]
    sizes = [(s - w) // t + 1 for s, w, t in zip(spatial, window, strides, strict=True)]
    if min(sizes) < 1:
        raise ValueError(
            f"the window {tuple(window)} is larger than the padded inputs {spatial}."
        )
    return inputs, strides, sizes


def _columns(inputs, window, strides, sizes):
    """The values under every window, of inputs that are padded."""

    def shifted(offsets):
        index = tuple(
            slice(o, o + (n - 1) * t + 1, t)
            for o, n, t in zip(offsets, sizes, strides, strict=True)
        )
        return inputs[(..., *index, slice(None))]

    patches = [shifted(o) for o in itertools.product(*map(range, window))]
    return patches[0] if len(patches) == 1 else jnp.concatenate(patches, axis=-1)


def max_pool(
    inputs: Float[Array, "*batch height width channels"],
    *,
    window: int | Sequence[int] = 2,
    strides: int | Sequence[int] | None = None,
    padding: Padding = "VALID",
) -> Float[Array, "*batch height_out width_out channels"]:
    """Maximum over windows, by choices between two.

    Equal to ``flax.linen.max_pool``, also in its gradient, which goes to the first of
    equal maxima, and on a CPU two to four times as fast as ``reduce_window`` with its
    gradient; elsewhere windows that overlap are left to that one. (The gradient of
    ``jnp.max`` compares the maximum with the values once more; where a compiler
    computes those anew and rounds otherwise, nothing is equal and the gradient is not a
    number.)

    Args:
        inputs: [..., height, width, channels].
        window: Height and width of the window, or one number for both.
        strides: Its step down and to the right, or one number for both; default the
            window itself, so that none overlap.
        padding: "VALID" drops an incomplete last window; "SAME" completes it, one half
            in front and one behind, the odd row or column behind ("SAME_LOWER": in
            front); one width, or a width or (before, after) per axis, smaller than the
            window.

    Returns:
        [..., height_out, width_out, channels].

    Raises:
        ValueError: If the padding is unknown or too wide, or no window fits.

    Example:
        >>> import jax.numpy as jnp
        >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1)).ravel().tolist()
        [5.0, 7.0, 13.0, 15.0]
    """
    window = _per_axis(window, 2, "window")
    strides = window if strides is None else _per_axis(strides, 2, "strides")
    if inputs.ndim < 3:
        raise ValueError(
            f"inputs must be [..., height, width, channels], got shape {inputs.shape}."
        )
    lead, spatial = inputs.shape[:-3], inputs.shape[-3:-1]
    fill = _pads(padding, spatial, window, strides)
    if any(max(pad) >= size for pad, size in zip(fill, window, strict=True)):
        raise ValueError(
            f"padding must be smaller than the window {window}, got {padding!r}: "
            "there is no maximum of nothing."
        )
    least = _least(inputs.dtype)
    none = (0, 0, 0)
    pads = [*(none for _ in lead), *((*pad, 0) for pad in fill), none]
    inputs = jax.lax.pad(inputs, least, pads)
    spatial = inputs.shape[-3:-1]
    if any(size < needed for size, needed in zip(spatial, window, strict=True)):
        raise ValueError(f"the window {window} is larger than the inputs {spatial}.")
    if strides != window and jax.default_backend() != "cpu":
        sizes, steps = ((*(1 for _ in lead), *n, 1) for n in (window, strides))
        return jax.lax.reduce_window(inputs, least, jax.lax.max, sizes, steps, "VALID")
    if strides != window:
        for axis in (-2, -3):
            inputs = _largest(_shifted(inputs, axis, window, strides))
        return inputs
    rows, columns = (size // step for size, step in zip(spatial, window, strict=True))
    inputs = inputs[..., : rows * window[0], : columns * window[1], :]
    inputs = inputs.reshape(
        *lead, rows, window[0], columns, window[1], inputs.shape[-1]
    )
    for axis in (-2, -3):
        places = range(inputs.shape[axis])
        inputs = _largest(
            jax.lax.index_in_dim(inputs, n, axis, keepdims=False) for n in places
        )
    return inputs


def _least(dtype):
    """What no value is below; of NumPy, a constant in a trace, too."""
    if dtype == jnp.dtype(bool):
        return np.array(False)
    if not jnp.issubdtype(dtype, jnp.floating):
        return np.array(jnp.iinfo(dtype).min, dtype)
    infinite = np.array(-np.inf, dtype)  # not-a-number where there is none
    return infinite if np.isinf(infinite) else np.array(jnp.finfo(dtype).min, dtype)


def _largest(parts):
    """The largest of arrays; the first of equals, and not-a-number above all."""

    def larger(first, second):
        return jnp.where((first >= second) | (first != first), first, second)

    return functools.reduce(larger, parts)


def _shifted(values, axis, window, strides):
    """What lies under each place of a window along one of the axes -3 and -2."""
    window, stride = window[axis + 1], strides[axis + 1]
    span = (values.shape[axis] - window) // stride * stride + 1
    for place in range(window):
        yield jax.lax.slice_in_dim(values, place, place + span, stride, axis)


def _integers(value: Any, rank: int) -> tuple[int, ...]:
    """One integer so many times, or the integers given; none if it is neither."""
    try:
        values = value if np.iterable(value) else (value,) * rank
        return tuple(map(operator.index, values))
    except TypeError:
        return ()


def _per_axis(value, rank, name):
    values = _integers(value, rank)
    if len(values) != rank or min(values) < 1:
        raise ValueError(
            f"{name} must be a positive integer or {rank} of them, got {value!r}."
        )
    return values


def _pads(padding, spatial, window, strides):
    if isinstance(padding, str):
        if padding.upper() not in _NAMED:
            raise ValueError(
                'padding must be "SAME", "SAME_LOWER", "VALID" or widths, got '
                f"{padding!r}."
            )
        return list(jax.lax.padtype_to_pads(spatial, window, strides, padding))
    widths = tuple(padding) if np.iterable(padding) else (padding,) * len(window)
    if len(widths) != len(window):
        raise ValueError(
            f"padding must have one entry per spatial axis ({len(window)}), got "
            f"{padding!r}."
        )
    pads = [_integers(width, 2) for width in widths]
    if any(len(pad) != 2 or min(pad) < 0 for pad in pads):
        raise ValueError(
            "padding must be widths, or (before, after), of 0 or more, got "
            f"{padding!r}; slice the inputs to drop some."
        )
    return pads
