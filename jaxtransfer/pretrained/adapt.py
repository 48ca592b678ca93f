"""Values of another shape or order: other channels, resolutions, classes, layouts.

Each is a function ``(values, shape) -> values`` of that shape, for ``adapt=`` of
:func:`~jaxtransfer.pretrained.load`.
"""

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np

Adapter = Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
"""``(values, shape of the leaf) -> values`` of that shape."""


def input_channels(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    r"""First kernel for another number of input channels.

    To one channel the kernels of all are summed: grey images give what they gave as
    RGB. To more, or to others, they are repeated in turn and scaled,

    .. math:: w'_j = \frac{c}{c'}\, w_{j \bmod c}, \qquad j = 0 … c' - 1,

    so that an input that is the same in all channels gives about the same output, and
    exactly the same where c divides c'.

    Args:
        values: kernel ``[..., c, out]``.
        shape: of the new kernel, ``[..., c', out]``.

    Returns:
        The new kernel.

    Raises:
        ValueError: the shapes differ in more than the input channels.

    Example:
        >>> input_channels(np.ones((7, 7, 3, 8)), (7, 7, 1, 8))[0, 0, 0, 0].item()
        3.0
    """
    same = values.shape[:-2] == shape[:-2] and values.shape[-1:] == shape[-1:]
    if len(shape) < 2 or not same:
        raise ValueError(
            f"input_channels: got {values.shape} in the file and {shape} in the "
            "network; only the last axis but one may differ"
        )
    old, new = values.shape[-2], shape[-2]
    if old == new:
        return values
    if new == 1:
        return values.sum(axis=-2, keepdims=True)
    repeated = values[..., np.arange(new) % old, :]
    return repeated * np.asarray(old / new, values.dtype)


def position_embeddings(
    *,
    tokens: int = 1,
    old_grid: tuple[int, int] | None = None,
    grid: tuple[int, int] | None = None,
) -> Adapter:
    """Position embeddings of a vision transformer for another resolution.

    The embeddings of the patches are resampled as an image of their grid, by cubic
    interpolation, antialiased where it gets smaller; those of other tokens are kept.
    The same as PyTorch's ``interpolate(mode="bicubic", antialias=True)``.

    Args:
        tokens: tokens before the patches, such as the class token.
        old_grid: (rows, columns) of patches in the file; by default square.
        grid: (rows, columns) of patches of the network; by default square.

    Returns:
        The function for ``adapt=``, of embeddings ``[1, tokens + rows * columns,
        width]``; it raises ``ValueError`` where a grid does not fit the patches.

    Example:
        >>> to_other = position_embeddings()
        >>> to_other(np.ones((1, 1 + 7 * 7, 4)), (1, 1 + 9 * 9, 4)).shape
        (1, 82, 4)
    """

    def adapter(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        ends = values.ndim == len(shape) == 3 and values.shape[-1] == shape[-1]
        if not ends or values.shape[0] != 1:
            raise ValueError(
                f"position_embeddings: got {values.shape} in the file and {shape} in "
                "the network; both must be [1, tokens, width] of one width"
            )
        old = _grid(values.shape[1] - tokens, old_grid, "old_grid")
        new = _grid(shape[1] - tokens, grid, "grid")
        if old == new:
            return values
        kept, patches = values[:, :tokens], values[0, tokens:]
        image = patches.reshape(*old, -1).astype(np.float32)
        resampled = jax.image.resize(
            image,
            (*new, image.shape[-1]),
            "cubic",
            antialias=True,
            precision=jax.lax.Precision.HIGHEST,
        )
        resampled = np.asarray(resampled).reshape(1, -1, image.shape[-1])
        return np.concatenate([kept, resampled.astype(values.dtype)], axis=1)

    return adapter


def _grid(patches: int, grid: tuple[int, int] | None, argument: str) -> tuple[int, int]:
    side = math.isqrt(max(patches, 0))
    chosen = (side, side) if grid is None else grid
    if patches < 1 or math.prod(chosen) != patches:
        raise ValueError(
            f"{argument}: got {grid}, but there are {patches} patches; give (rows, "
            f"columns) as {argument}=, and the other tokens as tokens="
        )
    return chosen


def flattened(grid: tuple[int, int]) -> Adapter:
    """Kernel of a dense layer that reads a map which PyTorch flattened.

    There the rows are in the order (channels, height, width), here in the order
    (height, width, channels); the shapes are the same. ``save`` writes the order that
    the network has.

    Args:
        grid: (height, width) of the map.

    Returns:
        The function for ``adapt=``, of kernels ``[height * width * channels, out]``; it
        raises ``ValueError`` for kernels of other axes or another number of rows. The
        bias ``[out]`` stays as it is.

    Example:
        >>> rows = np.array([[0], [1], [10], [11]])  # two channels of 1 x 2
        >>> flattened((1, 2))(rows, (4, 1)).ravel().tolist()
        [0, 10, 1, 11]
    """

    def adapter(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        del shape
        if values.ndim == 1:
            return values
        if min(grid) < 1 or values.ndim != 2 or len(values) % math.prod(grid):
            raise ValueError(
                f"flattened: got the grid {grid} for a kernel of shape {values.shape}; "
                "give (height, width) of the map, for [height * width * channels, out]"
            )
        maps = values.reshape(-1, *grid, values.shape[-1])
        return np.moveaxis(maps, 0, 2).reshape(values.shape)

    return adapter


def classes(chosen: Sequence[int]) -> Adapter:
    """Outputs of a head for some of its classes.

    Args:
        chosen: numbers of the classes in the file, in the order of the new outputs.

    Returns:
        The function for ``adapt=``, of kernels ``[..., classes]`` and biases
        ``[classes]``; it raises ``ValueError`` for a class that the file doesn't have.

    Example:
        >>> classes([7, 0])(np.arange(10.0), (2,)).tolist()
        [7.0, 0.0]
    """
    index = np.asarray(chosen, int)

    def adapter(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        del shape
        outside = index[(index < 0) | (index >= values.shape[-1])]
        if outside.size:
            raise ValueError(
                f"classes: got {outside[0]}; the file has 0 … {values.shape[-1] - 1}"
            )
        return values[..., index]

    return adapter


__all__ = ["Adapter", "classes", "flattened", "input_channels", "position_embeddings"]
