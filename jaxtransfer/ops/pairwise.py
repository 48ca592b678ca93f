"""Sums of Gaussian kernels over all pairs of two sets, in tiles: any size fits."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxtransfer.ops.dtypes import common_dtype
from jaxtransfer.ops.products import product
from jaxtransfer.ops.varying import vary, varying_axes


def gaussian_kernel_sum(
    x: Float[Array, "n features"],
    y: Float[Array, "m features"],
    *,
    coefficients: Float[Array, "3"] | tuple[float, float, float] = (1.0, 1.0, 1.0),
    bandwidths: Float[Array, " kernels"] | tuple[float, ...] = (1.0,),
    kernel_weights: Float[Array, " kernels"] | None = None,
    x_weights: Float[Array, " n"] | None = None,
    y_weights: Float[Array, " m"] | None = None,
    offset: Float[Array, ""] | float = 0.0,
    tile: int | None = None,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    """Sum of Gaussian kernels within and between two sets, never as an n x m matrix.

    ``c_1 S_xx + c_2 S_yy + c_3 S_xy`` with ``S_xy = sum_ij u_i v_j k(x_i, y_j)`` and
    ``k(a, b) = sum_k w_k exp(-|a - b|^2 / b_k)``; S_xx and S_yy are the same within x
    and within y, over pairs of different rows in both orders. The rows are taken in
    square tiles, those within a set once for both orders. When differentiated, the
    gradient is summed in the same pass, so memory beside the arguments and the result
    is O((n + m) features + tile^2). Tiles are added with compensation.

    Args:
        x: Rows [n, features].
        y: Rows [m, features].
        coefficients: c [3], of the sums within x, within y and between them.
        bandwidths: b_k [kernels], positive, in units of squared distance.
        kernel_weights: w_k [kernels]; default 1.
        x_weights: u_i [n]; default 1. Rows with weight 0 may not hold NaN.
        y_weights: v_j [m]; default 1.
        offset: Subtracted from every value of the kernel. If it cancels in the
            combination, as in a discrepancy, more digits are kept with a typical value
            of the kernel.
        tile: Rows of a tile; sets that are no longer are taken at once. Default: 512 on
            a CPU, whose caches hold that. Elsewhere (measured on a GPU) small steps
            take as long as their start: up to 4096, as many as leave every device
            several tiles, and sets of up to 2048 at once.
        axis_name: Name of a mapped axis (of ``shard_map`` or ``pmap``) that the rows
            are divided over: the sum is that of the rows of all devices, and every
            device computes its share of the tiles.

    Returns:
        Scalar, float32 or wider. Its gradient reaches x and y only; second
        derivatives work, at the memory of all tiles.

    Raises:
        ValueError: If the inputs are not matrices of equal width, or the tile is not
            positive.

    Example:
        >>> import jax.numpy as jnp
        >>> x, y = jnp.zeros((2, 1)), jnp.ones((3, 1))
        >>> between = gaussian_kernel_sum(x, y, coefficients=(0.0, 0.0, 1.0))
        >>> print(f"{between:.4f} = 6 exp(-1)")
        2.2073 = 6 exp(-1)
    """
    if jnp.ndim(x) != 2 or jnp.ndim(y) != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(
            "x and y must be [rows, features] of equal width, got shapes "
            f"{jnp.shape(x)} and {jnp.shape(y)}."
        )
    if tile is not None and tile < 1:
        raise ValueError(f"tile must be positive, got {tile}.")
    dtype = common_dtype(x.dtype, y.dtype, jnp.float32)
    bandwidths = jnp.atleast_1d(jnp.asarray(bandwidths, dtype))
    x, y = x.astype(dtype), y.astype(dtype)
    given = (
        jnp.ones(len(x), dtype) if x_weights is None else x_weights.astype(dtype),
        jnp.ones(len(y), dtype) if y_weights is None else y_weights.astype(dtype),
        jnp.asarray(coefficients, dtype),
        bandwidths,
        jnp.ones_like(bandwidths)
        if kernel_weights is None
        else jnp.asarray(kernel_weights, dtype),
        jnp.asarray(offset, dtype),
    )
    u, v, *given = jax.lax.stop_gradient(given)
    if axis_name is not None:
        gather = functools.partial(
            jax.lax.all_gather, axis_name=axis_name, axis=0, tiled=True
        )
        x, y, u, v = gather(x), gather(y), gather(u), gather(v)
    # A common shift leaves the distances alone and removes most of the cancellation.
    total = jnp.sum(jnp.abs(u))
    shift = product(jnp.abs(u), x) / jnp.where(total > 0, total, 1.0)
    # In a few digits less, or x - shift may become a fused multiply in some of its uses
    # and not in others: rows that are equal would no longer be.
    bits = jnp.finfo(dtype)
    shift = jax.lax.reduce_precision(shift, bits.nexp, bits.nmant - 3)
    shift = jax.lax.stop_gradient(shift)[None]
    if tile is None:
        tile = _rows_of_a_tile(len(x), len(y), axis_name)
    value: Any = _sum(tile, axis_name, x, y, shift, u, v, *given)
    return value if axis_name is None else jax.lax.psum(value, axis_name)


def _rows_of_a_tile(n, m, axis_name):
    longest = max(n, m, 1)
    if jax.default_backend() == "cpu":
        most = 512
    elif axis_name is None:
        most = 2048 if longest <= 2048 else 4096
    else:
        most = min(4096, max(512, (n + m) // (2 * jax.lax.axis_size(axis_name))))
    if longest <= most:
        return most
    even = -(-longest // -(-longest // most))  # the last tile is not nearly empty
    return -(-even // 16) * 16


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _sum(tile, axis_name, *arrays):
    return _pass(tile, axis_name, False, *arrays)[0]


@_sum.defjvp
def _sum_jvp(tile, axis_name, arrays, tangents):
    passed: Any = _pass(tile, axis_name, True, *arrays)
    value, (of_x, of_y) = passed
    return value, jnp.sum(of_x * tangents[0]) + jnp.sum(of_y * tangents[1])


def _pass(tile, axis_name, with_slopes, x, y, shift, u, v, coefficients, *kernel):
    """The sum and, if asked for, its gradients by x and y, in one sweep."""
    if axis_name is None and max(len(x), len(y)) <= tile:
        return _at_once(with_slopes, x - shift, y - shift, u, v, coefficients, kernel)
    # Short sets need no tile longer than they are.
    tile = min(tile, max(len(x), len(y), 1))
    x, y, u, v = vary((x, y, u, v), varying_axes((x, y, u, v)))
    of_x, of_y = -(-len(x) // tile), -(-len(y) // tile)
    weights = jnp.concatenate([_padded(u, of_x * tile), _padded(v, of_y * tile)])
    sets = _padded(x, tile), _padded(y, tile)

    def stretch(index):
        """Its rows, without a copy of the sets, and their weights: 0 beyond the end."""
        rows = jax.lax.cond(
            index < of_x,
            lambda: _cut(sets[0], index, tile),
            lambda: _cut(sets[1], index - of_x, tile),
        )
        return rows - shift, jax.lax.dynamic_slice_in_dim(weights, index * tile, tile)

    def step(carry, where, of_one):
        """One tile: of the pairs within one stretch of rows, or of two stretches."""
        totals, lost, slopes = carry
        p, q, kind, live = where
        first, second = stretch(p), stretch(q)
        rows, both = zip(first, second, strict=True)
        value, slope = _tile(rows, both, kernel, of_one)
        # Pairs within a set count in both orders: two stretches have one of them.
        orders = jnp.where(kind < 2, 2.0, 1.0)
        value = live * (1.0 if of_one else orders) * value
        totals, lost = _compensated(totals, lost, kind, value)
        if with_slopes:
            slope = live * orders * coefficients[kind] * slope
            slopes = _added(slopes, p * tile, product(slope, _weighted(*second)))
            if not of_one:
                moved = product(slope.T, _weighted(*first))
                slopes = _added(slopes, q * tile, moved)
        return (totals, lost, slopes), None

    zeros = jnp.zeros(3, x.dtype)
    slopes = jnp.zeros((len(weights), x.shape[1] + 1) if with_slopes else (), x.dtype)
    carry = zeros, zeros, slopes
    for of_one in (True, False):
        order = _tiles(of_x, of_y, of_one, axis_name, x.dtype)
        carry = vary(carry, varying_axes((x, order)))
        carry, _ = jax.lax.scan(functools.partial(step, of_one=of_one), carry, order)
    totals, lost, slopes = carry
    value = jnp.sum(coefficients * (totals + lost))
    if not with_slopes:
        return value, None

    def gradient(rows, weights, slopes):
        slopes = slopes[: len(rows)]
        moved = slopes[:, -1:] * (rows - shift) - slopes[:, :-1]
        return weights[:, None] * moved

    return value, (gradient(x, u, slopes), gradient(y, v, slopes[of_x * tile :]))


def _at_once(with_slopes, x, y, u, v, coefficients, kernel):
    """The same of sets that are no longer than a tile: no loop, nothing padded."""
    within_x, of_x = _tile((x, x), (u, u), kernel, True)
    within_y, of_y = _tile((y, y), (v, v), kernel, True)
    between, of_both = _tile((x, y), (u, v), kernel, False)
    value = jnp.sum(coefficients * jnp.stack([within_x, within_y, between]))
    if not with_slopes:
        return value, None

    def gradient(slope, rows, others, u, v):
        slope = u[:, None] * slope * v[None]
        return jnp.sum(slope, axis=1)[:, None] * rows - product(slope, others)

    by_x, by_y, by_both = coefficients * jnp.array([2.0, 2.0, 1.0], x.dtype)
    return value, (
        gradient(by_x * of_x, x, x, u, u) + gradient(by_both * of_both, x, y, u, v),
        gradient(by_y * of_y, y, y, v, v) + gradient(by_both * of_both.T, y, x, v, u),
    )


def _tile(rows, weights, kernel, of_one):
    """Weighted sum of the kernel over pairs, and its slope by the rows' difference.

    ``of_one``: both stretches are the same, whose rows make no pair with themselves.
    """
    bandwidths, kernel_weights, offset = kernel
    first, second = rows
    norms = jnp.sum(first**2, axis=1)[:, None] + jnp.sum(second**2, axis=1)[None]
    distances = jnp.maximum(norms - 2.0 * product(first, second.T), 0.0)
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
    return product(weights[0], product(values, weights[1])), slope


def _cut(rows, index, tile):
    """A tile of at least as many rows; beyond their end, any of them."""
    start = index * tile
    part = jax.lax.dynamic_slice_in_dim(rows, start, tile)  # the last rows, at the end
    return jnp.roll(part, jnp.minimum(len(rows) - tile - start, 0), axis=0)


def _weighted(rows, weights):
    """Weighted rows and weights: a product with slopes gives their sums too."""
    extended = jnp.pad(rows, ((0, 0), (0, 1)), constant_values=1.0)
    return extended * weights[:, None]


def _added(array, start, part):
    """The array with a part added to its rows from a start."""
    before = jax.lax.dynamic_slice_in_dim(array, start, len(part))
    return jax.lax.dynamic_update_slice_in_dim(array, before + part, start, axis=0)


def _padded(array, least):
    """With zeros at its end, to at least so many rows."""
    missing = max(least - len(array), 0)
    return jnp.pad(array, ((0, missing),) + ((0, 0),) * (array.ndim - 1))


def _tiles(of_x, of_y, of_one, axis_name, dtype):
    """Which pairs of tiles there are: (p, q, kind, live), this device's share.

    Those of equal p and q, or the others. Kinds: 0 within x, 1 within y, 2 between;
    live is 0 for the last few that only give every device the same number.
    """
    p, q = (index.astype(np.int32) for index in np.triu_indices(of_x + of_y))
    wanted = (p == q) == of_one
    p, q = p[wanted], q[wanted]
    kind = np.where(q < of_x, 0, np.where(p >= of_x, 1, 2)).astype(np.int32)
    live = np.ones(len(p), dtype)
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
