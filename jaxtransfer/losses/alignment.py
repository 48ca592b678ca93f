"""Losses that draw two sets of features together; scalars over the sets."""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from jaxtransfer.losses.sets import check_widths, weighted_rows
from jaxtransfer.ops.kernels import mean_squared_distance, self_squared_distances
from jaxtransfer.typing import AnyArray


def maximum_mean_discrepancy(
    source: Float[AnyArray, "n features"],
    target: Float[AnyArray, "m features"],
    *,
    estimator: Literal["biased", "unbiased"] = "biased",
    multipliers: Sequence[float] = (0.25, 0.5, 1.0, 2.0, 4.0),
    bandwidth: float | Sequence[float] | Float[AnyArray, "..."] | None = None,
    source_where: Bool[AnyArray, " n"] | None = None,
    target_where: Bool[AnyArray, " m"] | None = None,
) -> Float[Array, ""]:
    """Squared maximum mean discrepancy (MMD, MK-MMD) under a sum of Gaussian kernels.

    ``mean K(s, s') + mean K(t, t') - 2 mean K(s, t)`` with
    ``K(x, y) = sum_k exp(-|x - y|^2 / (r_k b))``. By default b is the mean squared
    distance between distinct rows of both sets together, held constant in the gradient.

    Args:
        source: Features [n, features].
        target: Features [m, features]; n and m may differ.
        estimator: "biased" (V-statistic: never negative, 0 for equal sets) or
            "unbiased" (U-statistic: without the pairs of a row with itself; its
            expectation is 0 for equal distributions, so it can be negative).
        multipliers: The ratios r_k, positive.
        bandwidth: None for the mean distance; a number to set b; a sequence to give
            every ``r_k b`` itself, in units of squared distance.
        source_where: Which source rows count [n]; default all.
        target_where: Which target rows count [m]; default all.

    Returns:
        Scalar, float32 or wider; 0 if too few rows count (one a side, two for the
        unbiased estimator).

    Raises:
        ValueError: If the inputs are not matrices of equal width, a side has too few
            rows, or an option is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> rows = jnp.array([[0.0, 1.0], [2.0, 3.0]])
        >>> print(f"{float(maximum_mean_discrepancy(rows, rows + 5.0)):.4f}")
        5.2808

    Reference:
        Gretton et al., "A Kernel Two-Sample Test", JMLR 13, 2012, eqs. 3 and 5; Long
        et al., "Learning Transferable Features with Deep Adaptation Networks", ICML
        2015. Deviation: equal weights of the kernels, which are not learned, as in the
        authors' later code.
    """
    least = {"biased": 1, "unbiased": 2}.get(estimator)
    if least is None:
        raise ValueError(
            f'estimator must be "biased" or "unbiased", got {estimator!r}.'
        )
    source, source_weights = weighted_rows("source", source, source_where, least)
    target, target_weights = weighted_rows("target", target, target_where, least)
    check_widths(source, target)
    rows = jnp.concatenate([source, target])
    weights = jnp.concatenate([source_weights, target_weights])
    bandwidths = jax.lax.stop_gradient(
        _bandwidths(rows, weights, multipliers, bandwidth)
    )
    distances = self_squared_distances(rows)
    kernel = sum(jnp.exp(-distances / b) for b in bandwidths)

    n, m = jnp.sum(source_weights), jnp.sum(target_weights)
    enough = (n >= least) & (m >= least)
    n, m = jnp.where(enough, n, least), jnp.where(enough, m, least)
    if estimator == "biased":
        signed = jnp.concatenate([source_weights / n, -target_weights / m])
        value = signed @ kernel @ signed
    else:
        kernel = jnp.where(jnp.eye(len(rows), dtype=bool), 0.0, kernel)
        inside_source = jnp.concatenate(
            [source_weights, jnp.zeros_like(target_weights)]
        )
        inside_target = weights - inside_source
        to_source, to_target = kernel @ inside_source, kernel @ inside_target
        value = (
            inside_source @ to_source / (n * (n - 1))
            + inside_target @ to_target / (m * (m - 1))
            - 2.0 * (inside_source @ to_target) / (n * m)
        )
    return jnp.where(enough, value, 0.0)


def correlation_alignment(
    source: Float[AnyArray, "n features"],
    target: Float[AnyArray, "m features"],
    *,
    source_where: Bool[AnyArray, " n"] | None = None,
    target_where: Bool[AnyArray, " m"] | None = None,
) -> Float[Array, ""]:
    """Correlation alignment (CORAL): squared distance between covariances.

    ``|C_s - C_t|_F^2 / (4 d^2)``, the covariances with ``1 / (n - 1)``, d features.

    Args:
        source: Features [n, features].
        target: Features [m, features]; n and m may differ.
        source_where: Which source rows count [n]; default all.
        target_where: Which target rows count [m]; default all.

    Returns:
        Scalar, float32 or wider; 0 if fewer than two rows of a side count.

    Raises:
        ValueError: If the inputs are not matrices of equal width with at least two
            rows.

    Example:
        >>> import jax.numpy as jnp
        >>> rows = jnp.array([[0.0], [2.0]])
        >>> float(correlation_alignment(rows, 2.0 * rows))
        9.0

    Reference:
        Sun and Saenko, "Deep CORAL: Correlation Alignment for Deep Domain Adaptation",
        ECCV Workshops 2016, eqs. 1-3.
    """
    source, source_weights = weighted_rows("source", source, source_where, 2)
    target, target_weights = weighted_rows("target", target, target_where, 2)
    check_widths(source, target)
    difference = _covariance(source, source_weights) - _covariance(
        target, target_weights
    )
    enough = (jnp.sum(source_weights) >= 2) & (jnp.sum(target_weights) >= 2)
    return jnp.where(enough, jnp.sum(difference**2) / (4.0 * source.shape[1] ** 2), 0.0)


mmd = maximum_mean_discrepancy
coral = correlation_alignment


def _bandwidths(rows, weights, multipliers, bandwidth):
    if bandwidth is not None and np.ndim(bandwidth):
        values = jnp.asarray(bandwidth, rows.dtype)
        _check_positive("bandwidth", bandwidth)
        return values
    _check_positive("multipliers", multipliers)
    if bandwidth is None:
        # Rows that are equal but for rounding have no distance to scale by.
        base = mean_squared_distance(rows, where=weights)
        size = jnp.max(jnp.abs(rows), initial=0.0)
        floor = rows.shape[1] * (16 * jnp.finfo(rows.dtype).eps * size) ** 2
        base = jnp.where(base <= floor, 1.0, base)
    else:
        _check_positive("bandwidth", [bandwidth])
        base = jnp.asarray(bandwidth, rows.dtype)
    return base * jnp.asarray(multipliers, rows.dtype)


def _check_positive(name, values):
    if isinstance(values, Tracer) or any(isinstance(value, Tracer) for value in values):
        return
    if not len(values) or not all(value > 0 for value in values):
        raise ValueError(f"{name} must be positive, got {values}.")


def _covariance(rows, weights):
    total = jnp.sum(weights)
    mean = weights @ rows / jnp.maximum(total, 1.0)
    centred = (rows - mean) * weights[:, None]
    products = jnp.matmul(centred.T, centred, precision=jax.lax.Precision.HIGHEST)
    return products / jnp.maximum(total - 1.0, 1.0)
