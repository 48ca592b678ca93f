"""Whether two sets differ at all, and the kernels that see it best."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from jaxtransfer.losses.discrepancy import bandwidths, kernel_of
from jaxtransfer.losses.sets import check_widths, weighted_rows
from jaxtransfer.ops.kernels import self_squared_distances
from jaxtransfer.ops.order import kth_smallest
from jaxtransfer.ops.products import gram, product
from jaxtransfer.typing import AnyArray

POWERS = (0.25, 0.5, 1.0, 2.0, 4.0)


def permutation_test(
    source: Float[AnyArray, "n features"],
    target: Float[AnyArray, "m features"],
    *,
    key: Array | None = None,
    permutations: int = 1000,
    multipliers: Sequence[float] = POWERS,
    bandwidth: Any = None,
    source_where: Bool[AnyArray, " n"] | None = None,
    target_where: Bool[AnyArray, " m"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Permutation test of two samples by their maximum mean discrepancy (MMD).

    How rare the biased discrepancy is among those of the same rows divided at random,
    ``p = (1 + #{permuted >= observed}) / (1 + permutations)``. Under equal
    distributions ``P(p <= a) <= a`` for every a. One matrix of pairs serves all.

    Args:
        source: Rows [n, features].
        target: Rows [m, features].
        key: Typed key of the permutations; default ``jax.random.key(0)``.
        permutations: How many, at least 1; the least p is 1 / (1 + permutations).
        multipliers: The ratios r_k of the bandwidths, positive.
        bandwidth: As of `maximum_mean_discrepancy`; the rules look at both sets
            together, so the test stays exact.
        source_where: Which source rows count [n]; default all.
        target_where: Which target rows count [m]; default all.

    Returns:
        The observed discrepancy and p in (0, 1], both scalars; 0 and 1 if no row of a
        side counts. No gradient is meant to flow through p.

    Raises:
        ValueError: If the inputs are not matrices of equal width or an option is out of
            its range.

    Example:
        >>> import jax
        >>> rows = jax.random.normal(jax.random.key(1), (30, 2))
        >>> _, p = permutation_test(rows, rows + 2.0, permutations=99)
        >>> print(f"{float(p):.2f}")
        0.01

    Reference:
        Gretton et al., "A Kernel Two-Sample Test", JMLR 13, 2012, sec. 8 (its bootstrap
        without replacement).
    """
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, got {permutations}.")
    source, u = weighted_rows("source", source, source_where, 1)
    target, v = weighted_rows("target", target, target_where, 1)
    check_widths(source, target)
    rows, counts = jnp.concatenate([source, target]), jnp.concatenate([u, v])
    kernels = jax.lax.stop_gradient(bandwidths(rows, counts, multipliers, bandwidth))
    kernel = kernel_of(self_squared_distances(rows), kernels, jnp.ones_like(kernels))
    n, m = jnp.sum(u), jnp.sum(v)
    some = (n > 0) & (m > 0)
    share, other = (jnp.where(some, 1.0 / jnp.maximum(x, 1.0), 0.0) for x in (n, m))

    places = (1 << (len(rows) - 1).bit_length()) - 1
    place = jnp.arange(len(rows), dtype=jnp.int32)
    last = jnp.uint32(jnp.iinfo(jnp.int32).max)

    def divided(key):
        """Signed weights of a random division of the rows that count."""
        draw = jax.random.bits(key, counts.shape, jnp.uint32) >> 1
        draw = jnp.where(counts > 0, draw, last)
        # With the place in the lowest bits no two are equal.
        draw = (draw.astype(jnp.int32) & ~places) | place
        first = draw < kth_smallest(draw, jnp.int32(n))
        return jnp.where(counts > 0, jnp.where(first, share, -other), 0.0)

    keys = jax.random.split(jax.random.key(0) if key is None else key, permutations)
    observed = jnp.concatenate([u * share, -v * other])
    signed = jnp.concatenate([observed[None], jax.vmap(divided)(keys)])
    products = product(signed, kernel)
    values = jnp.sum(products * signed, axis=1)
    # Divisions into the same sets must tie, whatever the order of their sums.
    slack = 16 * jnp.finfo(values.dtype).eps * jnp.max(kernel)
    rarer = jnp.sum(values[1:] >= values[0] - slack, dtype=values.dtype)
    return values[0], (1.0 + rarer) / (1.0 + permutations)


def optimal_kernel_weights(
    source: Float[AnyArray, "n features"],
    target: Float[AnyArray, "m features"],
    *,
    multipliers: Sequence[float] = POWERS,
    bandwidth: Any = None,
    regularization: float = 1e-3,
    steps: int = 500,
    source_where: Bool[AnyArray, " n"] | None = None,
    target_where: Bool[AnyArray, " m"] | None = None,
) -> Float[Array, " kernels"]:
    """Weights of several kernels (MK-MMD) that see a difference most surely.

    The w on the simplex that minimises ``w' Q w`` for ``w' d = 1``: d the linear-time
    discrepancies under each kernel, Q the covariance of their terms. That maximises
    ``discrepancy / standard deviation``, so the power of the test. For
    ``maximum_mean_discrepancy(..., kernel_weights=...)``, from rows that the loss
    does not see, or from the last batch.

    Args:
        source: Rows [n, features], in random order.
        target: Rows [m, features]; the first min(n, m) of both are used.
        multipliers: The ratios r_k of the bandwidths, positive.
        bandwidth: As of `maximum_mean_discrepancy`; a sequence gives every kernel's.
        regularization: Added to the diagonal of Q, relative to its mean.
        steps: Projected gradient steps of the quadratic programme.
        source_where: Which source rows count [n]; default all.
        target_where: Which target rows count [m]; default all.

    Returns:
        Weights [kernels], not negative, sum 1, without gradient. Kernels that see no
        difference (d <= 0) get 0; if none sees one, all get the same.

    Raises:
        ValueError: If the inputs are not matrices of equal width with at least four
            rows, or an option is out of its range.

    Example:
        >>> import jax
        >>> rows = jax.random.normal(jax.random.key(1), (64, 2))
        >>> weights = optimal_kernel_weights(rows[:32], rows[32:] + 1.0)
        >>> print(weights.shape, f"{float(weights.sum()):.4f}")
        (5,) 1.0000

    Reference:
        Gretton et al., "Optimal Kernel Choice for Large-Scale Two-Sample Tests",
        NeurIPS 2012, sec. 4. Deviation: kernels with d <= 0 are left out, which keeps
        the programme on a simplex.
    """
    source, u = weighted_rows("source", source, source_where, 4)
    target, v = weighted_rows("target", target, target_where, 4)
    check_widths(source, target)
    rows, counts = jnp.concatenate([source, target]), jnp.concatenate([u, v])
    kernels = bandwidths(rows, counts, multipliers, bandwidth)
    half = min(len(source), len(target)) // 2
    (s, t), (u, v) = (
        (x[: 2 * half], y[: 2 * half]) for x, y in ((source, target), (u, v))
    )
    whole = (u[::2] * u[1::2] * v[::2] * v[1::2])[:, None]

    def kernel(a, b):
        distances = jnp.sum((a - b) ** 2, axis=1)
        return jnp.exp(-distances[:, None] / kernels[None])

    terms = kernel(s[::2], s[1::2]) + kernel(t[::2], t[1::2])
    terms = terms - kernel(s[::2], t[1::2]) - kernel(s[1::2], t[::2])
    count = jnp.maximum(jnp.sum(whole), 1.0)
    seen = jnp.sum(whole * terms, axis=0) / count
    centred = whole * (terms - seen[None])
    covariance = gram(centred.T) / jnp.maximum(count - 1.0, 1.0)
    size = jnp.trace(covariance) / len(kernels)
    ridge = regularization * jnp.where(size > 0, size, 1.0)
    covariance = covariance + ridge * jnp.eye(len(kernels), dtype=covariance.dtype)
    seen, covariance = jax.lax.stop_gradient((seen, covariance))
    # With g = w d the constraint is the simplex of g.
    useful = seen > 0
    scale = jnp.where(useful, 1.0 / jnp.where(useful, seen, 1.0), 0.0)
    quadratic = covariance * scale[:, None] * scale[None]
    length = 1.0 / jnp.maximum(jnp.trace(quadratic), jnp.finfo(quadratic.dtype).tiny)

    def step(_, state):
        before, ahead, momentum = state
        moved = ahead - length * product(quadratic, ahead)
        moved = jnp.where(useful, moved, -1e9)
        with jax.numpy_dtype_promotion("standard"):  # it mixes floats and integers
            after = optax.projections.projection_simplex(moved).astype(moved.dtype)
        later = 0.5 * (1.0 + jnp.sqrt(1.0 + 4.0 * momentum**2))
        ahead = after + (momentum - 1.0) / later * (after - before)
        return after, ahead, later

    even = useful.astype(seen.dtype)
    even = even / jnp.maximum(jnp.sum(even), 1.0)
    start = (even, even, jnp.ones((), even.dtype))
    found = jax.lax.fori_loop(0, steps, step, start)[0] * scale
    total = jnp.sum(found)
    equal = jnp.full_like(found, 1.0 / len(found))
    return jnp.where(total > 0, found / jnp.where(total > 0, total, 1.0), equal)
