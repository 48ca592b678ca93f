"""Sums of Gaussian kernels over all pairs of two sets, in tiles: any size fits."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxtransfer.ops.varying import vary, varying_axes


class KernelSums(NamedTuple):
    """Weighted sums of a kernel over pairs of rows.

    Attributes:
        within_x: Over pairs of different rows of x, both orders, ``[]``.
        within_y: Over pairs of different rows of y, both orders, ``[]``.
        between: Over all pairs of a row of x and a row of y, ``[]``.
    """

    within_x: Array
    within_y: Array
    between: Array


def gaussian_kernel_sums(
    x: Float[Array, "n features"],
    y: Float[Array, "m features"],
    *,
    bandwidths: Float[Array, " kernels"] | tuple[float, ...] = (1.0,),
    kernel_weights: Float[Array, " kernels"] | None = None,
    x_weights: Float[Array, " n"] | None = None,
    y_weights: Float[Array, " m"] | None = None,
    offset: Float[Array, ""] | float = 0.0,
    tile: int = 512,
    axis_name: str | None = None,
) -> KernelSums:
    """Sums of Gaussian kernels within and between two sets, never as an n x m matrix.

    ``sum_ij u_i v_j k(x_i, y_j)`` with ``k(a, b) = sum_k w_k exp(-|a - b|^2 / b_k)``,
    and the same within x and within y without the pairs of a row with itself. The
    rows are taken in square tiles, those within a set once for both orders. When
    differentiated, the gradient is summed in the same pass, so memory is
    O((n + m) features + tile^2). Tiles are added with compensation.

    Args:
        x: Rows [n, features].
        y: Rows [m, features].
        bandwidths: b_k [kernels], positive, in units of squared distance.
        kernel_weights: w_k [kernels]; default 1.
        x_weights: u_i [n]; default 1. Rows with weight 0 may not hold NaN.
        y_weights: v_j [m]; default 1.
        offset: Subtracted from every value of the kernel. A combination of the sums in
            which it cancels, as in a discrepancy, keeps more digits if it is a typical
            value of the kernel.
        tile: Rows of a tile.
        axis_name: Name of a mapped axis (of ``shard_map`` or ``pmap``) that the rows
            are divided over: the sums are those of the rows of all devices, and every
            device computes its share of the tiles.

    Returns:
        `KernelSums`, float32 or wider. Their gradient reaches x and y only; second
        derivatives work, at the memory of all tiles.

    Raises:
        ValueError: If the inputs are not matrices of equal width, or the tile is not
            positive.

    Example:
        >>> import jax.numpy as jnp
        >>> sums = gaussian_kernel_sums(jnp.zeros((2, 1)), jnp.ones((3, 1)))
        >>> print([f"{float(value):.4f}" for value in sums])
        ['2.0000', '6.0000', '2.2073']
    """
    if jnp.ndim(x) != 2 or jnp.ndim(y) != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(
            "x and y must be [rows, features] of equal width, got shapes "
            f"{jnp.shape(x)} and {jnp.shape(y)}."
        )
    if tile < 1:
        raise ValueError(f"tile must be positive, got {tile}.")
    dtype = jnp.promote_types(jnp.result_type(x, y), jnp.float32)
    bandwidths = jnp.atleast_1d(jnp.asarray(bandwidths, dtype))
    x, y = x.astype(dtype), y.astype(dtype)
    given = (
        jnp.ones(len(x), dtype) if x_weights is None else x_weights.astype(dtype),
        jnp.ones(len(y), dtype) if y_weights is None else y_weights.astype(dtype),
        bandwidths,
        jnp.ones_like(bandwidths)
        if kernel_weights is None
        else jnp.asarray(kernel_weights, dtype),
        jnp.asarray(offset, dtype),
    )
    u, v, *kernel = jax.lax.stop_gradient(given)
    if axis_name is not None:
        gather = functools.partial(
            jax.lax.all_gather, axis_name=axis_name, axis=0, tiled=True
        )
        x, y, u, v = gather(x), gather(y), gather(u), gather(v)
    # A common shift leaves the distances alone and removes most of the cancellation.
    total = jnp.sum(jnp.abs(u))
    shift = jnp.abs(u) @ x / jnp.where(total > 0, total, 1.0)
    shift = jax.lax.stop_gradient(shift)
    totals: Any = _sums(tile, axis_name, x - shift, y - shift, u, v, *kernel)
    sums = KernelSums(*totals)
    return sums if axis_name is None else jax.lax.psum(sums, axis_name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sums(tile, axis_name, *arrays):
    return _pass(tile, axis_name, False, *arrays)[0]


def _sums_forward(tile, axis_name, *arrays):
    sums, slopes = _pass(tile, axis_name, True, *arrays)
    return sums, (slopes, arrays)


def _sums_backward(tile, axis_name, residuals, cotangents):
    (own_x, own_y, cross_x, cross_y), (_, _, *rest) = residuals
    of_x, of_y, of_both = cotangents
    gradient_x = of_x * own_x + of_both * cross_x
    gradient_y = of_y * own_y + of_both * cross_y
    return gradient_x, gradient_y, *map(jnp.zeros_like, rest)


_sums.defvjp(_sums_forward, _sums_backward)


def _pass(tile, axis_name, with_slopes, x, y, u, v, bandwidths, kernel_weights, offset):
    """The three sums and, if asked for, their gradients by x and y, in one sweep."""
    # Short sets need no tile longer than they are.
    tile = min(tile, max(len(x), len(y), 1))
    rows, weights = (_padded(*pair, tile) for pair in ((x, y), (u, v)))
    norms = jnp.sum(rows**2, axis=1)
    order, count = _tiles(-(-len(x) // tile), -(-len(y) // tile), axis_name)
    inverse = 1.0 / bandwidths

    def cut(array, start):
        return jax.lax.dynamic_slice_in_dim(array, start * tile, tile)

    def columns(start):
        """Weighted rows and weights: a product with slopes gives their sums too."""
        return (
            jnp.pad(cut(rows, start), ((0, 0), (0, 1)), constant_values=1.0)
            * (cut(weights, start)[:, None])
        )

    def step(carry, where):
        totals, lost, slopes = carry
        p, q, kind, live = where
        products = jnp.matmul(
            cut(rows, p), cut(rows, q).T, precision=jax.lax.Precision.HIGHEST
        )
        distances = cut(norms, p)[:, None] + cut(norms, q) - 2.0 * products
        distances = jnp.maximum(distances, 0.0)
        diagonal = jnp.eye(tile, dtype=bool) & (p == q)
        terms = [
            w * jnp.exp(-distances * b)
            for w, b in zip(kernel_weights, inverse, strict=True)
        ]
        kernel = jnp.where(diagonal, 0.0, sum(terms) - offset)
        # Pairs within a set stand for both orders, but for the tile that has both.
        twice = live * jnp.where((kind < 2) & (p != q), 2.0, 1.0)
        value = twice * (cut(weights, p) @ (kernel @ cut(weights, q)))
        totals, lost = _compensated(totals, lost, kind, value)
        if with_slopes:
            slope = sum(term * b for term, b in zip(terms, inverse, strict=True))
            # Every pair counts in both orders within a set, and only once between.
            slope = -2.0 * live * jnp.where(kind < 2, 2.0, 1.0) * slope
            mirrored = jnp.where(p != q, slope.T, 0.0)
            plane = (kind == 2).astype(jnp.int32)
            for at, one, other in ((p, slope, q), (q, mirrored, p)):
                moved = jnp.matmul(
                    one, columns(other), precision=jax.lax.Precision.HIGHEST
                )
                place = (plane, at * tile, jnp.zeros_like(plane))
                before = jax.lax.dynamic_slice(slopes, place, (1, *moved.shape))
                slopes = jax.lax.dynamic_update_slice(slopes, before + moved, place)
        return (totals, lost, slopes), None

    slopes = jnp.zeros(
        (2, len(rows), x.shape[1] + 1) if with_slopes else (), rows.dtype
    )
    zeros = jnp.zeros(3, rows.dtype)
    start = vary((zeros, zeros, slopes), varying_axes((rows, order)))
    (totals, lost, slopes), _ = jax.lax.scan(step, start, order, length=count)
    totals = totals + lost
    if not with_slopes:
        return tuple(totals), None
    moved, sums = slopes[..., :-1], slopes[..., -1:]
    gradient = weights[:, None] * (sums * rows - moved)
    cut_y = (-(-len(x) // tile)) * tile
    own_x, cross_x = gradient[:, : len(x)]
    own_y, cross_y = gradient[:, cut_y : cut_y + len(y)]
    return tuple(totals), (own_x, own_y, cross_x, cross_y)


def _padded(first, second, tile):
    """Both sets, each filled up with zeros to whole tiles."""
    return jnp.concatenate(
        [
            jnp.pad(part, ((0, -len(part) % tile),) + ((0, 0),) * (part.ndim - 1))
            for part in (first, second)
        ]
    )


def _tiles(of_x, of_y, axis_name):
    """Which pairs of tiles there are: (p, q, kind, live), this device's share.

    Kinds: 0 within x, 1 within y, 2 between; live is 0 for the last few that only
    give every device the same number.
    """
    count = of_x + of_y
    p, q = (index.astype(np.int32) for index in np.triu_indices(count))
    kind = np.where(q < of_x, 0, np.where(p >= of_x, 1, 2)).astype(np.int32)
    live = np.ones(len(p), np.float32)
    if axis_name is None:
        return (p, q, kind, live), len(p)
    devices = jax.lax.axis_size(axis_name)
    each = -(-len(p) // devices)
    here = jax.lax.axis_index(axis_name)
    share = tuple(
        jnp.asarray(np.pad(part, (0, each * devices - len(part)))).reshape(-1, devices)[
            :, here
        ]
        for part in (p, q, kind, live)
    )
    return share, each


def _compensated(totals, lost, kind, value):
    """Adds the value to one of the totals, what rounding lost to another (Neumaier)."""
    before = totals[kind]
    after = before + value
    error = jnp.where(
        jnp.abs(before) >= jnp.abs(value),
        (before - after) + value,
        (value - after) + before,
    )
    return totals.at[kind].set(after), lost.at[kind].add(error)
