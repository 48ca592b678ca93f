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
    # In a few digits less, or x - shift may become a fused multiply in some of its uses
    # and not in others: rows that are equal would no longer be.
    bits = jnp.finfo(dtype)
    shift = jax.lax.reduce_precision(shift, bits.nexp, bits.nmant - 3)
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


def _pass(tile, axis_name, with_slopes, x, y, u, v, *kernel):
    """The three sums and, if asked for, their gradients by x and y, in one sweep."""
    if axis_name is None and max(len(x), len(y)) <= tile:
        return _at_once(with_slopes, x, y, u, v, kernel)
    # Short sets need no tile longer than they are.
    tile = min(tile, max(len(x), len(y), 1))
    rows, weights = (_padded(*pair, tile) for pair in ((x, y), (u, v)))

    def cut(array, start):
        return jax.lax.dynamic_slice_in_dim(array, start * tile, tile)

    def columns(start):
        """Weighted rows and weights: a product with slopes gives their sums too."""
        extended = jnp.pad(cut(rows, start), ((0, 0), (0, 1)), constant_values=1.0)
        return extended * cut(weights, start)[:, None]

    def step(carry, where, of_one):
        """One tile: of the pairs within one stretch of rows, or of two stretches."""
        totals, lost, slopes = carry
        p, q, kind, live = where
        both = (cut(rows, p), cut(rows, q)), (cut(weights, p), cut(weights, q))
        value, slope = _tile(*both, kernel, of_one)
        # Pairs within a set count in both orders: two stretches have one of them.
        orders = jnp.where(kind < 2, 2.0, 1.0)
        value = live * (1.0 if of_one else orders) * value
        totals, lost = _compensated(totals, lost, kind, value)
        if with_slopes:
            slope = live * orders * slope
            plane = (kind == 2).astype(jnp.int32)
            slopes = _added(slopes, plane, p * tile, _product(slope, columns(q)))
            if not of_one:
                moved = _product(slope.T, columns(p))
                slopes = _added(slopes, plane, q * tile, moved)
        return (totals, lost, slopes), None

    zeros = jnp.zeros(3, rows.dtype)
    shape = (2, len(rows), x.shape[1] + 1) if with_slopes else ()
    slopes = jnp.zeros(shape, rows.dtype)
    carry = zeros, zeros, slopes
    for of_one in (True, False):
        order = _tiles(-(-len(x) // tile), -(-len(y) // tile), of_one, axis_name)
        carry = vary(carry, varying_axes((rows, order)))
        carry, _ = jax.lax.scan(functools.partial(step, of_one=of_one), carry, order)
    totals, lost, slopes = carry
    totals = totals + lost
    if not with_slopes:
        return tuple(totals), None
    gradient = weights[:, None] * (slopes[..., -1:] * rows - slopes[..., :-1])
    cut_y = (-(-len(x) // tile)) * tile
    own_x, cross_x = gradient[:, : len(x)]
    own_y, cross_y = gradient[:, cut_y : cut_y + len(y)]
    return tuple(totals), (own_x, own_y, cross_x, cross_y)


def _at_once(with_slopes, x, y, u, v, kernel):
    """The same of sets that are no longer than a tile: no loop, nothing padded."""
    within_x, of_x = _tile((x, x), (u, u), kernel, True)
    within_y, of_y = _tile((y, y), (v, v), kernel, True)
    between, of_both = _tile((x, y), (u, v), kernel, False)
    sums = within_x, within_y, between
    if not with_slopes:
        return sums, None

    def gradient(slope, rows, others, u, v):
        slope = u[:, None] * slope * v
        return jnp.sum(slope, axis=1)[:, None] * rows - _product(slope, others)

    return sums, (
        gradient(2.0 * of_x, x, x, u, u),
        gradient(2.0 * of_y, y, y, v, v),
        gradient(of_both, x, y, u, v),
        gradient(of_both.T, y, x, v, u),
    )


def _tile(rows, weights, kernel, of_one):
    """Weighted sum of the kernel over pairs, and its slope by the rows' difference.

    ``of_one``: both stretches are the same, whose rows make no pair with themselves.
    """
    bandwidths, kernel_weights, offset = kernel
    first, second = rows
    norms = jnp.sum(first**2, axis=1)[:, None] + jnp.sum(second**2, axis=1)
    distances = jnp.maximum(norms - 2.0 * _product(first, second.T), 0.0)
    inverse = 1.0 / bandwidths
    terms = [
        w * jnp.exp(-distances * b)
        for w, b in zip(kernel_weights, inverse, strict=True)
    ]
    values = sum(terms) - offset
    slopes = [term * b for term, b in zip(terms, inverse, strict=True)]
    slope = -2.0 * jnp.asarray(sum(slopes))
    if of_one:
        itself = jnp.eye(len(first), dtype=bool)
        # Its slope moves nothing, but under a narrow kernel its rounding would.
        values, slope = (jnp.where(itself, 0.0, v) for v in (values, slope))
    return weights[0] @ (values @ weights[1]), slope


def _product(a, b):
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _added(array, plane, start, part):
    """The array with a part added to rows of one of its two planes."""
    place = plane, start, jnp.zeros_like(plane)
    before = jax.lax.dynamic_slice(array, place, (1, *part.shape))
    return jax.lax.dynamic_update_slice(array, before + part, place)


def _padded(first, second, tile):
    """Both sets, each filled up with zeros to whole tiles."""
    return jnp.concatenate(
        [
            jnp.pad(part, ((0, -len(part) % tile),) + ((0, 0),) * (part.ndim - 1))
            for part in (first, second)
        ]
    )


def _tiles(of_x, of_y, of_one, axis_name):
    """Which pairs of tiles there are: (p, q, kind, live), this device's share.

    Those of equal p and q, or the others. Kinds: 0 within x, 1 within y, 2 between;
    live is 0 for the last few that only give every device the same number.
    """
    p, q = (index.astype(np.int32) for index in np.triu_indices(of_x + of_y))
    wanted = (p == q) == of_one
    p, q = p[wanted], q[wanted]
    kind = np.where(q < of_x, 0, np.where(p >= of_x, 1, 2)).astype(np.int32)
    live = np.ones(len(p), np.float32)
    if axis_name is None:
        return p, q, kind, live
    devices = jax.lax.axis_size(axis_name)
    each = -(-len(p) // devices)
    here = jax.lax.axis_index(axis_name)
    return tuple(
        jnp.asarray(np.pad(part, (0, each * devices - len(part)))).reshape(-1, devices)[
            :, here
        ]
        for part in (p, q, kind, live)
    )


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
