"""Maximum mean discrepancy: how far apart a kernel sees two sets; a scalar."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Key

from jaxtransfer.losses.sets import check_widths, weighted_rows
from jaxtransfer.ops.fourier import fourier_sums
from jaxtransfer.ops.kernels import mean_squared_distance, self_squared_distances
from jaxtransfer.ops.order import kth_smallest
from jaxtransfer.ops.pairwise import gaussian_kernel_sum
from jaxtransfer.ops.products import product
from jaxtransfer.typing import AnyArray

LEAST_ROWS = {"biased": 1, "unbiased": 2, "linear": 2, "block": 2, "fourier": 1}


def maximum_mean_discrepancy(
    source: Float[AnyArray, "n features"],
    target: Float[AnyArray, "m features"],
    *,
    estimator: Literal["biased", "unbiased", "linear", "block", "fourier"] = "biased",
    multipliers: Sequence[float] = (0.25, 0.5, 1.0, 2.0, 4.0),
    bandwidth: Literal["mean", "median"]
    | float
    | Sequence[float]
    | Float[AnyArray, "..."]
    | None = None,
    kernel_weights: Sequence[float] | Float[AnyArray, " kernels"] | None = None,
    block_size: int = 16,
    frequencies: int = 1024,
    key: Key[Array, ""] | None = None,
    axis_name: str | None = None,
    source_where: Bool[AnyArray, " n"] | None = None,
    target_where: Bool[AnyArray, " m"] | None = None,
) -> Float[Array, ""]:
    """Squared maximum mean discrepancy (MMD, MK-MMD) under a sum of Gaussian kernels.

    ``mean K(s, s') + mean K(t, t') - 2 mean K(s, t)`` with
    ``K(x, y) = sum_k w_k exp(-|x - y|^2 / (r_k b))``. By default b is the mean squared
    distance between distinct rows of both sets together, held constant in the gradient.
    Sets of any size: beyond 512 rows of a side (2048 on a GPU) the pairs are taken in
    tiles, value and gradient in one pass, and no matrix of all of them is held.

    Args:
        source: Features [n, features].
        target: Features [m, features]; n and m may differ.
        estimator: "biased" (V-statistic: never negative, 0 for equal sets);
            "unbiased" (U-statistic: without the pairs of a row with itself; its
            expectation is 0 for equal distributions, so it can be negative);
            "block" (mean of unbiased estimates over blocks of rows, O(n block_size));
            "linear" (the block estimate with blocks of two, O(n)). These two pair the
            rows in their order, as many as both sets have. "fourier": the biased
            estimate with a random approximation of the kernel, O((n + m) features
            frequencies) for sets of a million rows; its expectation over the key is
            that of "biased".
        multipliers: The ratios r_k, positive.
        bandwidth: "mean" or None for the mean squared distance; "median" for the
            median of it, over the pairs of distinct rows (O((n + m)^2) memory); a
            number to set b; a sequence to give every ``r_k b`` itself, in units of
            squared distance.
        kernel_weights: w_k [kernels], not negative; default 1. See
            `optimal_kernel_weights`.
        block_size: Rows of a block, at least 2.
        frequencies: How many random frequencies "fourier" draws; its error falls with
            their square root.
        key: PRNG key of "fourier"; one key is one approximation of the kernel.
        axis_name: Name of a mapped axis that the rows are divided over (in
            ``shard_map`` or ``pmap``): the discrepancy is that of the rows of all
            devices, each computing a part. For "biased", "unbiased" and "fourier".
        source_where: Which source rows count [n]; default all.
        target_where: Which target rows count [m]; default all.

    Returns:
        Scalar, float32 or wider; 0 if too few rows count (one a side, two but for the
        biased estimator).

    Raises:
        ValueError: If the inputs are not matrices of equal width, a side has too few
            rows, or an option is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> rows = jnp.array([[0.0, 1.0], [2.0, 3.0]])
        >>> print(f"{float(maximum_mean_discrepancy(rows, rows + 5.0)):.4f}")
        5.2808

    Reference:
        Gretton et al., "A Kernel Two-Sample Test", JMLR 13, 2012, eqs. 3 and 5, linear
        time sec. 6; blocks: Zaremba, Gretton and Blaschko, "B-tests: Low Variance
        Kernel Two-Sample Tests", NeurIPS 2013, sec. 2; random frequencies: Zhao and
        Meng, "FastMMD: Ensemble of Circular Discrepancy for Efficient Two-Sample Test",
        Neural Computation 27, 2015, sec. 3.1; kernels: Long et al., "Learning
        Transferable Features with Deep Adaptation Networks", ICML 2015. Deviation:
        equal weights of the kernels unless others are given, as in the authors' later
        code.
    """
    least = LEAST_ROWS.get(estimator)
    if least is None:
        raise ValueError(
            f"estimator must be one of {', '.join(LEAST_ROWS)}, got {estimator!r}."
        )
    source, source_weights = weighted_rows("source", source, source_where, least)
    target, target_weights = weighted_rows("target", target, target_where, least)
    check_widths(source, target)
    given: list[Any] = [source, target, source_weights, target_weights]
    if axis_name is not None:
        if estimator in ("linear", "block"):
            raise ValueError(
                "axis_name needs a biased, unbiased or fourier estimator, got "
                f"{estimator!r}."
            )
        # Bandwidths of all rows; the sums divide the gathered rows again.
        given = list(jax.lax.all_gather(given, axis_name, axis=0, tiled=True))
    kernels = jax.lax.stop_gradient(
        bandwidths(
            jnp.concatenate(given[:2]),
            jnp.concatenate(given[2:]),
            multipliers,
            bandwidth,
        )
    )
    weights = _kernel_weights(kernel_weights, kernels)
    if estimator in ("linear", "block"):
        size = 2 if estimator == "linear" else block_size
        return _by_blocks(given, kernels, weights, size)
    local: list[Any] = [source, target, source_weights, target_weights]
    if estimator == "fourier":
        drawn = _frequencies(key, source, frequencies)
        value = _by_frequencies(local, given, kernels, weights, drawn, axis_name)
    else:
        value = _by_pairs(local, given, kernels, weights, estimator, axis_name)
    # Equal on all devices, which only the mean lets `shard_map` know.
    return value if axis_name is None else jax.lax.pmean(value, axis_name)


mmd = maximum_mean_discrepancy


def coefficients(n, m, estimator):
    """Of the three sums over distinct pairs, and of a row with itself; 0 if too few."""
    least = LEAST_ROWS[estimator]
    enough = (n >= least) & (m >= least)
    n, m = jnp.where(enough, n, least), jnp.where(enough, m, least)
    if estimator == "biased":
        sums, itself = (1 / n**2, 1 / m**2, -2.0 / (n * m)), 1 / n + 1 / m
    else:
        itself = jnp.zeros_like(n)
        sums = 1 / (n * (n - 1)), 1 / (m * (m - 1)), -2.0 / (n * m)
    return jnp.where(enough, jnp.stack(sums), 0.0), jnp.where(enough, itself, 0.0)


def bandwidths(rows, weights, multipliers, bandwidth):
    """The bandwidths ``r_k b`` [kernels] by a rule or as given."""
    if bandwidth is None or isinstance(bandwidth, str):
        base = _rule(rows, weights, bandwidth or "mean")
        # Rows that are equal but for rounding have no distance to scale by.
        size = jnp.max(jnp.abs(rows), initial=0.0)
        floor = rows.shape[1] * (16 * jnp.finfo(rows.dtype).eps * size) ** 2
        base = jnp.where(base <= floor, 1.0, base)
    elif np.ndim(bandwidth):
        check_positive("bandwidth", bandwidth)
        return jnp.asarray(bandwidth, rows.dtype)
    else:
        check_positive("bandwidth", [bandwidth])
        base = jnp.asarray(bandwidth, rows.dtype)
    check_positive("multipliers", multipliers)
    return base * jnp.asarray(multipliers, rows.dtype)


def check_positive(name, values):
    """A ValueError if there are no values, or one that is known is not positive."""
    known = _known(values)
    if known is not None and not (known.size and (known > 0).all()):
        raise ValueError(f"{name} must be positive, got {values}.")


def _known(values):
    """The values in NumPy; None if any is traced, or of another process."""
    if isinstance(values, Tracer) or not getattr(values, "is_fully_addressable", True):
        return None
    if not isinstance(values, jax.Array) and any(isinstance(v, Tracer) for v in values):
        return None
    return np.asarray(values)


def _rule(rows, weights, rule):
    if rule == "mean":
        return mean_squared_distance(rows, where=weights)
    if rule != "median":
        raise ValueError(f'bandwidth rules are "mean" and "median", got {rule!r}.')
    pairs = (weights[:, None] * weights[None] > 0) & ~jnp.eye(len(rows), dtype=bool)
    distances = jnp.where(pairs, self_squared_distances(rows), jnp.inf).ravel()
    count = jnp.sum(pairs)
    middle = [jnp.maximum(count - 1, 0) // 2, count // 2]
    low, high = (kth_smallest(distances, k) for k in middle)
    return jnp.where(count > 0, (low + high) / 2, 0.0)


def _kernel_weights(given, kernels):
    if given is None:
        return jnp.ones_like(kernels)
    weights = jax.lax.stop_gradient(jnp.asarray(given, kernels.dtype))
    if weights.shape != kernels.shape:
        raise ValueError(
            f"kernel_weights must be one a kernel, {kernels.shape}, got shape "
            f"{weights.shape}."
        )
    known = _known(given)
    if known is not None and (known < 0).any():
        raise ValueError(f"kernel_weights must not be negative, got {given}.")
    return weights


def _by_pairs(local, every, kernels, weights, estimator, axis_name):
    """The estimate from all pairs, of the kernel less a typical value of it."""
    source, target, u, v = local
    every_source, every_target, p, q = every
    typical = mean_squared_distance(
        every_source, every_target, where=jnp.concatenate([p, q])
    )
    offset = jnp.sum(weights * jnp.exp(-jax.lax.stop_gradient(typical) / kernels))
    of_sums, of_itself = coefficients(jnp.sum(p), jnp.sum(q), estimator)
    pairs = gaussian_kernel_sum(
        source,
        target,
        coefficients=of_sums,
        bandwidths=kernels,
        kernel_weights=weights,
        x_weights=u,
        y_weights=v,
        offset=offset,
        axis_name=axis_name,
    )
    return pairs + of_itself * (jnp.sum(weights) - offset)


def _frequencies(key, rows, count):
    """Standard normal frequencies [features, count]."""
    if key is None:
        raise ValueError('estimator "fourier" needs a PRNG key: key=jax.random.key(0).')
    if count < 1:
        raise ValueError(f"frequencies must be positive, got {count}.")
    return jax.random.normal(key, (rows.shape[1], count), rows.dtype)


def _by_frequencies(local, every, kernels, weights, frequencies, axis_name):
    """Squared distance of the two mean embeddings, weighted by kernel."""
    source, target, u, v = local
    every_source, _, p, q = every
    counts = jnp.sum(p), jnp.sum(q)
    # A common shift changes no distance, and keeps the angles small.
    shift = product(p, every_source) / jnp.maximum(counts[0], 1.0)
    shift, scales = jax.lax.stop_gradient((shift, jnp.sqrt(2.0 / kernels)))
    means = []
    for rows, chosen, count in zip((source, target), (u, v), counts, strict=True):
        sums = fourier_sums(rows - shift[None], frequencies, scales, weights=chosen)
        if axis_name is not None:
            sums = jax.lax.psum(sums, axis_name)
        means.append(sums / jnp.maximum(count, 1.0))
    by_kernel = zip(weights, *means, strict=True)
    total = sum(weight * jnp.sum((s - t) ** 2) for weight, s, t in by_kernel)
    value = total / frequencies.shape[1]
    return jnp.where((counts[0] > 0) & (counts[1] > 0), value, 0.0)


def sums_of(kernel, u, v):
    """The sums over distinct pairs from the matrix of both sets' pairs together."""
    n = len(u)
    kernel = jnp.where(jnp.eye(len(kernel), dtype=bool), 0.0, kernel)
    by_source, by_target = product(kernel[:, :n], u), product(kernel[:, n:], v)
    return jnp.stack(
        [
            product(u, by_source[:n]),
            product(v, by_target[n:]),
            product(u, by_target[:n]),
        ]
    )


def kernel_of(distances, kernels, weights):
    """The sum of weighted Gaussian kernels, of distances of any shape."""
    total = jnp.zeros_like(distances)
    for bandwidth, weight in zip(kernels, weights, strict=True):
        total = total + weight * jnp.exp(-distances / bandwidth)
    return total


def _by_blocks(given, kernels, weights, size):
    """Mean over whole blocks of the unbiased estimate within each."""
    source, target, u, v = given
    if size < 2:
        raise ValueError(f"block_size must be at least 2, got {size}.")
    count = min(len(source), len(target)) // size
    if not count:
        raise ValueError(
            f"blocks of {size} rows need as many on each side, got {len(source)} and "
            f"{len(target)}; give a smaller block_size."
        )

    def blocks(rows):
        return rows[: count * size].reshape(count, size, *rows.shape[1:])

    def one(source, target, u, v):
        each = 1.0 / (size * (size - 1))
        pairs = gaussian_kernel_sum(
            source,
            target,
            coefficients=(each, each, -2.0 * each),
            bandwidths=kernels,
            kernel_weights=weights,
            x_weights=u,
            y_weights=v,
        )
        # Without the pairs of equal places, so that the estimate is a U-statistic of
        # pairs (s_i, t_i).
        at_once = jnp.sum((source - target) ** 2, axis=1)
        paired = product(u * v, kernel_of(at_once, kernels, weights))
        value = pairs + 2.0 * each * paired
        return value, jnp.all(u > 0) & jnp.all(v > 0)

    values, whole = jax.vmap(one)(*map(blocks, (source, target, u, v)))
    total = jnp.sum(jnp.where(whole, values, 0.0))
    return total / jnp.maximum(jnp.sum(whole, dtype=total.dtype), 1.0)
