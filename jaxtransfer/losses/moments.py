"""Losses that match moments of two sets of features; scalars over the sets."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from jaxtransfer.losses.directions import root
from jaxtransfer.losses.sets import check_widths, weighted_rows
from jaxtransfer.ops.products import gram, product
from jaxtransfer.typing import AnyArray


def correlation_alignment(
    source: Float[AnyArray, "n features"],
    target: Float[AnyArray, "m features"],
    *,
    form: Literal["paper", "mean_covariance"] = "paper",
    source_where: Bool[AnyArray, " n"] | None = None,
    target_where: Bool[AnyArray, " m"] | None = None,
) -> Float[Array, ""]:
    """Correlation alignment (CORAL): squared distance between covariances.

    ``|C_s - C_t|_F^2 / (4 d^2)``, the covariances with ``1 / (n - 1)``, d features. The
    form "mean_covariance" is ``|m_s - m_t|^2 / d + |C_s - C_t|_F^2 / d^2``, with the
    means m.

    Args:
        source: Features [n, features].
        target: Features [m, features]; n and m may differ.
        form: "paper" compares covariances only; "mean_covariance" adds the means and
            has no factor 1/4.
        source_where: Which source rows count [n]; default all.
        target_where: Which target rows count [m]; default all.

    Returns:
        Scalar, float32 or wider; 0 if fewer than two rows of a side count.

    Raises:
        ValueError: If the inputs are not matrices of equal width with at least two
            rows, or ``form`` is unknown.

    Example:
        >>> import jax.numpy as jnp
        >>> rows = jnp.array([[0.0], [2.0]])
        >>> float(correlation_alignment(rows, 2.0 * rows))
        9.0

    Reference:
        Sun and Saenko, "Deep CORAL: Correlation Alignment for Deep Domain Adaptation",
        ECCV Workshops 2016, eqs. 1-3. The other form is what DomainBed and TLlib
        compute under this name.
    """
    if form not in ("paper", "mean_covariance"):
        raise ValueError(f'form must be "paper" or "mean_covariance", got {form!r}.')
    sets = _two_sets(source, target, source_where, target_where, 2)
    (source_mean, source_scaled), (target_mean, target_scaled) = map(
        _mean_and_scaled, *zip(*sets, strict=True)
    )
    features = source_mean.size
    value = _squared_difference(source_scaled, target_scaled) / features**2
    if form == "paper":
        value = value / 4.0
    else:
        value = value + jnp.mean((source_mean - target_mean) ** 2)
    return jnp.where(_enough(sets, 2), value, 0.0)


def log_correlation_alignment(
    source: Float[AnyArray, "n features"],
    target: Float[AnyArray, "m features"],
    *,
    epsilon: float | Float[AnyArray, ""] = 1e-5,
    source_where: Bool[AnyArray, " n"] | None = None,
    target_where: Bool[AnyArray, " m"] | None = None,
) -> Float[Array, ""]:
    """Log-Euclidean correlation alignment (log-CORAL): distance of log-covariances.

    ``|log(C_s + e I) - log(C_t + e I)|_F^2 / (4 d^2)`` with the logarithm of a
    symmetric matrix, the covariances with ``1 / (n - 1)`` and d features. The gradient
    is exact at equal eigenvalues too, as with fewer rows than features.

    Args:
        source: Features [n, features].
        target: Features [m, features]; n and m may differ.
        epsilon: What is added to the eigenvalues, e, positive. In float32, choose it
            above 1e-6 times the largest eigenvalue if a set has fewer rows than
            features: smaller eigenvalues are rounding.
        source_where: Which source rows count [n]; default all.
        target_where: Which target rows count [m]; default all.

    Returns:
        Scalar, float32 or wider; 0 if fewer than two rows of a side count.

    Raises:
        ValueError: If the inputs are not matrices of equal width with at least two
            rows, or ``epsilon`` is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> rows = jnp.array([[0.0], [2.0]])
        >>> print(f"{float(log_correlation_alignment(rows, 2.0 * rows)):.4f}")
        0.4805

    Reference:
        Morerio, Cavazza and Murino, "Minimal-Entropy Correlation Alignment for
        Unsupervised Deep Domain Adaptation", ICLR 2018, sec. 3. Deviation: ``epsilon``,
        without which the logarithm of a singular covariance is not finite.
    """
    if not isinstance(epsilon, Tracer) and not epsilon > 0:
        raise ValueError(f"epsilon must be positive, got {epsilon}.")
    sets = _two_sets(source, target, source_where, target_where, 2)
    logarithms = []
    for rows, weights in sets:
        shift = jnp.asarray(epsilon, rows.dtype)
        logarithms.append(_log_plus(_covariance(rows, weights), shift))
    difference = logarithms[0] - logarithms[1]
    value = jnp.sum(difference**2) / (4.0 * len(difference) ** 2)
    return jnp.where(_enough(sets, 2), value, 0.0)


def central_moment_discrepancy(
    source: Float[AnyArray, "n features"],
    target: Float[AnyArray, "m features"],
    *,
    moments: int = 5,
    bounds: tuple[float, float] = (0.0, 1.0),
    source_where: Bool[AnyArray, " n"] | None = None,
    target_where: Bool[AnyArray, " m"] | None = None,
) -> Float[Array, ""]:
    """Central moment discrepancy (CMD): distances between central moments.

    ``|m_s - m_t| / (b - a) + sum_{k=2}^{K} |c_k(s) - c_k(t)| / (b - a)^k`` with the
    means m, the central moments ``c_k(x) = mean (x - mean x)^k`` of each feature, and
    Euclidean norms.

    Args:
        source: Features [n, features].
        target: Features [m, features]; n and m may differ.
        moments: The highest moment K, at least 1.
        bounds: The range (a, b) of the features: (0, 1) after a sigmoid, (-1, 1) after
            tanh. Features outside it are legal, but their high moments outweigh.
        source_where: Which source rows count [n]; default all.
        target_where: Which target rows count [m]; default all.

    Returns:
        Scalar, float32 or wider; 0 if no row of a side counts. Where two moments are
        equal, their norm gets gradient 0.

    Raises:
        ValueError: If the inputs are not matrices of equal width with at least one
            row, or an option is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> rows = jnp.array([[0.0], [1.0]])
        >>> float(central_moment_discrepancy(rows, 0.5 * rows, moments=2))
        0.4375

    Reference:
        Zellinger et al., "Central Moment Discrepancy (CMD) for Domain-Invariant
        Representation Learning", ICLR 2017, sec. 4.
    """
    if moments < 1:
        raise ValueError(f"moments must be at least 1, got {moments}.")
    low, high = bounds
    if not high > low:
        raise ValueError(f"bounds must be (low, high) with low < high, got {bounds}.")
    sets = _two_sets(source, target, source_where, target_where, 1)
    means, centred = zip(*(_centred(*one) for one in sets), strict=True)
    value = _length(means[0] - means[1]) / (high - low)
    for k in range(2, moments + 1):
        of_source, of_target = (
            _average((rows / (high - low)) ** k, weights)
            for rows, (_, weights) in zip(centred, sets, strict=True)
        )
        value = value + _length(of_source - of_target)
    return jnp.where(_enough(sets, 1), value, 0.0)


coral = correlation_alignment


def _two_sets(source, target, source_where, target_where, least):
    """Both sets as rows and the weights 0 or 1 of them."""
    sets = (
        weighted_rows("source", source, source_where, least),
        weighted_rows("target", target, target_where, least),
    )
    check_widths(sets[0][0], sets[1][0])
    return sets


def _enough(sets, least):
    (_, of_source), (_, of_target) = sets
    return (jnp.sum(of_source) >= least) & (jnp.sum(of_target) >= least)


def _length(values):
    """Euclidean norm, 0 without gradient at 0; no square of it over- or underflows."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(values), initial=0.0))
    some = (largest >= jnp.finfo(values.dtype).tiny) & (largest < jnp.inf)
    scale = jnp.where(some, largest, 1.0)
    return scale * root(jnp.sum((values / scale) ** 2))


def _average(rows, weights):
    total = jnp.maximum(jnp.sum(weights), 1.0)
    return product(weights, rows) / total


def _centred(rows, weights):
    mean = _average(rows, weights)
    return mean, (rows - mean) * weights[:, None]


def _covariance(rows, weights):
    return gram(_mean_and_scaled(rows, weights)[1].T)


def _mean_and_scaled(rows, weights):
    """The mean, and rows whose products with themselves are the covariance."""
    mean, centred = _centred(rows, weights)
    return mean, centred / jnp.sqrt(jnp.maximum(jnp.sum(weights) - 1.0, 1.0))


@jax.custom_jvp
def _squared_difference(source, target):
    """``|S'S - T'T|_F^2``."""
    return jnp.sum((product(source.T, source) - product(target.T, target)) ** 2)


@_squared_difference.defjvp
def _squared_difference_jvp(primals, tangents):
    # One product a side, of a difference that is known to be symmetric.
    source, target = primals
    difference = product(source.T, source) - product(target.T, target)
    slopes = (
        product(rows, difference) * tangent
        for rows, tangent in zip(primals, tangents, strict=True)
    )
    of_source, of_target = map(jnp.sum, slopes)
    return jnp.sum(difference**2), 4.0 * (of_source - of_target)


@jax.custom_jvp
def _log_plus(matrix, shift):
    """``log(matrix + shift I)`` of a symmetric matrix without negative eigenvalues."""
    values, vectors = _eigen(matrix, shift)
    return product(vectors * jnp.log(values), vectors.T)


@_log_plus.defjvp
def _log_plus_jvp(primals, tangents):
    # Daleckii and Krein: in the basis of eigenvectors, the derivative multiplies each
    # entry by the divided difference of the logarithm at its two eigenvalues.
    matrix, shift = primals
    values, vectors = _eigen(matrix, shift)
    logarithm = product(vectors * jnp.log(values), vectors.T)
    low = jnp.minimum(values[:, None], values)
    ratio = (jnp.maximum(values[:, None], values) - low) / low
    apart = ratio > 0
    safe = jnp.where(apart, ratio, 1.0)
    slopes = jnp.where(apart, jnp.log1p(safe) / safe, 1.0) / low
    change = tangents[0] + tangents[1] * jnp.eye(len(values), dtype=matrix.dtype)
    change = product(product(vectors.T, change), vectors)
    return logarithm, product(product(vectors, slopes * change), vectors.T)


def _eigen(matrix, shift):
    values, vectors = jnp.linalg.eigh(matrix)
    return jnp.maximum(values, 0.0) + shift, vectors
