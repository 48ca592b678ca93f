"""Average pooling of images to a size that is asked for."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxtransfer.ops.dtypes import common_dtype
from jaxtransfer.typing import AnyArray


def adaptive_average_pool(
    inputs: Float[AnyArray, "*batch height width channels"], size: tuple[int, int]
) -> Float[Array, "*batch new_height new_width channels"]:
    """Average pooling of images to a given height and width.

    Position i of m on an axis of length n is the mean of the positions from
    ``floor(i n / m)`` up to, not including, ``ceil((i + 1) n / m)``: windows that may
    overlap where m does not divide n, which takes a matrix product an axis. Equal to
    ``adaptive_avg_pool2d`` of PyTorch.

    Args:
        inputs: [..., height, width, channels], finite.
        size: New height and width, positive; larger than the old ones repeats.

    Returns:
        [..., new height, new width, channels] in the dtype of the inputs; half
        precision is summed in float32.

    Raises:
        ValueError: If the inputs have fewer than three axes or an empty image, or the
            size is not two positive integers.

    Example:
        >>> import jax.numpy as jnp
        >>> row = jnp.arange(3.0).reshape(1, 3, 1)
        >>> adaptive_average_pool(row, (1, 2)).ravel().tolist()
        [0.5, 1.5]
    """
    inputs = jnp.asarray(inputs)
    if inputs.ndim < 3 or 0 in inputs.shape[-3:-1]:
        raise ValueError(
            "inputs must be [..., height, width, channels] and hold a position, got "
            f"shape {inputs.shape}."
        )
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size must be two positive integers, got {size}.")
    height, width = inputs.shape[-3:-1]
    if (height, width) == tuple(size):
        return inputs
    dtype = common_dtype(inputs.dtype, jnp.float32)
    if height % size[0] == 0 and width % size[1] == 0:
        blocks = (size[0], height // size[0], size[1], width // size[1])
        blocks = inputs.reshape(*inputs.shape[:-3], *blocks, inputs.shape[-1])
        return jnp.mean(blocks, axis=(-4, -2), dtype=dtype).astype(inputs.dtype)
    pooled = jnp.einsum(
        "...hwc,ih,jw->...ijc",
        inputs.astype(dtype),
        jnp.asarray(_windows(height, size[0]), dtype),
        jnp.asarray(_windows(width, size[1]), dtype),
        precision=jax.lax.Precision.HIGHEST,
    )
    return pooled.astype(inputs.dtype)


def _windows(old, new):
    """The matrix [new, old] of the weights of the means."""
    position, i = np.arange(old), np.arange(new)[:, None]
    inside = (position >= i * old // new) & (position < -(-(i + 1) * old // new))
    return inside / inside.sum(axis=1, keepdims=True)
