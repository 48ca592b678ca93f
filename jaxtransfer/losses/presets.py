"""The discrepancy as other libraries compute it, to compare numbers with them."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxtransfer.losses.discrepancy import maximum_mean_discrepancy
from jaxtransfer.losses.sets import check_widths, weighted_rows
from jaxtransfer.ops.kernels import mean_squared_distance, self_squared_distances
from jaxtransfer.ops.order import kth_smallest
from jaxtransfer.typing import AnyArray

POWERS = (0.25, 0.5, 1.0, 2.0, 4.0)


def mmd_preset(
    source: Float[AnyArray, "n features"],
    target: Float[AnyArray, "m features"],
    *,
    preset: Literal[
        "xlearn",
        "deepda",
        "tllib",
        "tllib_linear",
        "pytorch_adapt",
        "pytorch_adapt_linear",
        "domainbed",
        "dassl",
    ] = "xlearn",
    source_where: Bool[AnyArray, " n"] | None = None,
    target_where: Bool[AnyArray, " m"] | None = None,
) -> Float[Array, ""]:
    """Maximum mean discrepancy (MMD) with the constants of another library.

    To reproduce a published number. Bandwidths are constants of the gradient.

    - "xlearn", "deepda": `maximum_mean_discrepancy` as it is.
    - "tllib": bandwidths ``2^k mean D`` with the zero diagonal in the mean, unbiased
      within the sets, and ``2 / (n - 1)`` added, which makes the value of two equal
      sets negative. "tllib_linear": the neighbours (i, i + 1), the last with the
      first, in place of all pairs; both sets of one size.
    - "pytorch_adapt": one kernel, the (lower) median distance within the source with
      its zero diagonal, unbiased; "pytorch_adapt_linear": its linear-time default.
    - "domainbed": seven kernels ``exp(-g D)``, g from 0.001 to 1000, biased. In
      float32 the largest g takes rounding of D for distance: two equal sets of 64
      normal rows of width 512 give 3e-3 to 4e-3 in place of 0.
    - "dassl": three kernels ``exp(-D / (2 s^2))``, s in 1, 5, 10, unbiased.

    Args:
        source: Features [n, features].
        target: Features [m, features].
        preset: Whose.
        source_where: Which source rows count [n]; default all.
        target_where: Which target rows count [m]; default all.

    Returns:
        Scalar, float32 or wider; 0 if too few rows count.

    Raises:
        ValueError: If the preset is unknown, or the inputs are not matrices of equal
            width with enough rows, or not of one size where the preset needs that.

    Example:
        >>> import jax.numpy as jnp
        >>> rows = jnp.array([[0.0, 1.0], [2.0, 3.0], [1.0, 0.0]])
        >>> print(f"{float(mmd_preset(rows, rows, preset='tllib')):.4f}")
        -1.1888

    Reference:
        Gretton et al., "A Kernel Two-Sample Test", JMLR 13, 2012, sec. 2; the constants
        are read off the libraries' values.
    """
    masks: dict[str, Any] = {"source_where": source_where, "target_where": target_where}
    if preset in ("xlearn", "deepda"):
        return maximum_mean_discrepancy(source, target, **masks)
    if preset == "domainbed":
        bandwidths = [1.0 / 10.0**power for power in range(-3, 4)]
        return maximum_mean_discrepancy(source, target, bandwidth=bandwidths, **masks)
    if preset == "dassl":
        return maximum_mean_discrepancy(
            source, target, estimator="unbiased", bandwidth=[2.0, 50.0, 200.0], **masks
        )
    if preset not in ("tllib", "tllib_linear", "pytorch_adapt", "pytorch_adapt_linear"):
        raise ValueError(f"preset {preset!r} is not known; see the docstring.")
    rows, u = weighted_rows("source", source, source_where, 2)
    others, v = weighted_rows("target", target, target_where, 2)
    check_widths(rows, others)
    if preset.startswith("pytorch_adapt"):
        estimator = "linear" if preset.endswith("linear") else "unbiased"
        bandwidth = jax.lax.stop_gradient(_lower_median(rows, u))
        return maximum_mean_discrepancy(
            source, target, estimator=estimator, bandwidth=bandwidth[None], **masks
        )
    together, counts = jnp.concatenate([rows, others]), jnp.concatenate([u, v])
    total, n = jnp.sum(counts), jnp.sum(u)
    mean = mean_squared_distance(together, where=counts) * (total - 1.0) / total
    mean = jax.lax.stop_gradient(jnp.where(mean > 0, mean, 1.0))
    bandwidths = mean * jnp.array(POWERS, mean.dtype)
    constant = jnp.where(n > 1, 2.0 / jnp.maximum(n - 1.0, 1.0), 0.0)
    if preset == "tllib":
        value = maximum_mean_discrepancy(
            source, target, estimator="unbiased", bandwidth=bandwidths, **masks
        )
        return value + constant
    if len(rows) != len(others):
        raise ValueError(
            f'"tllib_linear" needs sets of one size, got {len(rows)} and '
            f"{len(others)}; take the first rows of the longer."
        )
    return _neighbours(rows, others, u * v, bandwidths) + constant


def _lower_median(rows, weights):
    """Median of all squared distances within a set, zeros included, the lower one."""
    pairs = (weights[:, None] * weights[None] > 0).ravel()
    distances = jnp.where(pairs, self_squared_distances(rows).ravel(), jnp.inf)
    # The products can't give the exact zeros of the diagonal.
    distances = jnp.where(
        jnp.eye(len(rows), dtype=bool).ravel() & pairs, 0.0, distances
    )
    middle = jnp.maximum((jnp.sum(pairs) - 1) // 2, 0)
    median = kth_smallest(distances, middle)
    return jnp.where(jnp.isfinite(median) & (median > 0), median, 1.0)


def _neighbours(source, target, weights, bandwidths):
    """Mean over the pairs (i, i + 1) of rows that count, the last with the first."""
    place = jnp.arange(len(source))
    count = jnp.sum(weights > 0)
    # Rows that count come first, in their order.
    order = jnp.argsort(jnp.where(weights > 0, place, place + len(source)))
    after = jnp.where(place + 1 < count, place + 1, 0)

    def kernel(a, b):
        distances = jnp.sum((a - b) ** 2, axis=1)
        return sum(jnp.exp(-distances / b) for b in bandwidths)

    s, t = source[order], target[order]
    terms = kernel(s, s[after]) + kernel(t, t[after])
    terms = terms - kernel(s, t[after]) - kernel(s[after], t)
    total = jnp.sum(jnp.where(place < count, terms, 0.0))
    return total / jnp.maximum(count, 1).astype(total.dtype)
