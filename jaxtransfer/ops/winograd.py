"""Winograd's convolution: 3x3 windows with 16 products where others take 36."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def winograd_conv(
    inputs: Float[Array, "... height width channels"],
    kernel: Float[Array, "3 3 channels features"],
    *,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "... height_out width_out features"]:
    r"""Convolution of 3x3 windows at every position, by Winograd's F(2x2, 3x3).

    .. math:: Y = A^\top \left[(G g G^\top) \odot (B^\top d B)\right] A

    for each 2x2 block of outputs: 16 products a pair of channels instead of 36, as 16
    matrix products over all blocks, from a third less memory than patches take. In
    float32 its rounding error is of the size of the plain sum's, whose own depends on
    the order in which a library sums; in half precision it is four times that.

    Args:
        inputs: [..., height, width, channels], padded already; at least 3 x 3.
        kernel: [3, 3, channels, features].
        precision: Precision of the products, as in ``jax.numpy.matmul``.

    Returns:
        [..., height - 2, width - 2, features].

    Example:
        >>> import jax.numpy as jnp
        >>> winograd_conv(jnp.ones((1, 5, 5, 2)), jnp.ones((3, 3, 2, 1)))[0, 0, 0]
        Array([18.], dtype=float32)

    Reference:
        Lavin and Gray, "Fast algorithms for convolutional neural networks", CVPR 2016,
        section 4.1.
    """
    *lead, height, width, channels = inputs.shape
    features = kernel.shape[-1]
    rows, columns = (height - 1) // 2, (width - 1) // 2  # blocks of 2 x 2 outputs
    fill = [(0, 2 * rows + 2 - height), (0, 2 * columns + 2 - width)]
    inputs = jnp.pad(inputs, [(0, 0)] * len(lead) + fill + [(0, 0)])
    # Every position of a 4 x 4 block is a run of pairs: no strided reads.
    pairs = inputs.reshape(*lead, rows + 1, 2, columns + 1, 2, channels)

    def turned(even, odd, size, axis):
        first, third = _both_ends(even, size, axis)
        second, fourth = _both_ends(odd, size, axis)
        return first - third, second + third, third - second, second - fourth

    blocks = []
    depth = len(lead)
    for strip in turned(pairs[..., 0, :, :, :], pairs[..., 1, :, :, :], rows, depth):
        blocks += turned(strip[..., 0, :], strip[..., 1, :], columns, depth + 1)
    count = math.prod(lead) * rows * columns

    def spread(first, second, third):  # G times a column: as a product it is slower
        ends, middle = (first + third) / 2, second / 2
        return first, ends + middle, ends - middle, third

    weights = [w for row in spread(*kernel) for w in spread(*row)]
    products = [
        jnp.matmul(block.reshape(count, channels), weight, precision=precision)
        for block, weight in zip(blocks, weights, strict=True)
    ]

    def gathered(parts):
        first, second, third, fourth = parts
        return first + second + third, second - third - fourth

    by_row = [gathered([products[4 * i + j] for i in range(4)]) for j in range(4)]
    halves = []
    for half in range(2):
        pair = gathered([of_column[half] for of_column in by_row])
        pair = [part.reshape(*lead, rows, columns, 1, features) for part in pair]
        halves.append(jnp.concatenate(pair, axis=-2)[..., None, :, :, :])
    outputs = jnp.concatenate(halves, axis=-4)  # [..., rows, 2, columns, 2, features]
    outputs = outputs.reshape(*lead, 2 * rows, 2 * columns, features)
    return outputs[..., : height - 2, : width - 2, :]


def _both_ends(values, size, axis):
    """All but the last and all but the first along an axis."""
    return (
        jax.lax.slice_in_dim(values, 0, size, axis=axis),
        jax.lax.slice_in_dim(values, 1, size + 1, axis=axis),
    )


__all__ = ["winograd_conv"]
