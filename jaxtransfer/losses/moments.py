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
    covariances = [_covariance(*rows_and_weights) for rows_and_weights in sets]
    value = _log_distance(*covariances, jnp.asarray(epsilon, covariances[0].dtype))
    return jnp.where(_enough(sets, 2), value / (4.0 * len(covariances[0]) ** 2), 0.0)


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
    return mean, (rows - mean[None]) * weights[:, None]


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
def _log_distance(first, second, shift):
    """``|log(A + shift I) - log(B + shift I)|_F^2`` of symmetric matrices.

    Without negative eigenvalues. First and second derivatives are those of the limit
    where eigenvalues are equal.
    """
    logarithms = [_log_and_eigen(matrix, shift)[0] for matrix in (first, second)]
    return jnp.sum((logarithms[0] - logarithms[1]) ** 2)


@_log_distance.defjvp
def _log_distance_jvp(primals, tangents):
    *matrices, shift = primals
    found = [_log_and_eigen(matrix, shift) for matrix in matrices]
    difference = found[0][0] - found[1][0]
    # The derivative of a logarithm is its own transpose. Taken of the difference it is
    # a value, which has a derivative itself; transposed, it would lose that rule.
    of_first, of_second = (
        jnp.sum(_along(difference, _plus(matrix, shift), *eigen) * _plus(moved, by))
        for matrix, (_, *eigen), moved, by in zip(
            matrices, found, tangents[:2], tangents[2:] * 2, strict=True
        )
    )
    return jnp.sum(difference**2), 2.0 * (of_first - of_second)


@jax.custom_jvp
def _log_and_eigen(matrix, shift):
    """The logarithm; eigenvalues and eigenvectors, as constants."""
    values, vectors = jnp.linalg.eigh(matrix)
    values = jnp.maximum(values, 0.0) + shift
    return product(vectors * jnp.log(values)[None], vectors.T), values, vectors


@_log_and_eigen.defjvp
def _log_and_eigen_jvp(primals, tangents):
    logarithm, values, vectors = _log_and_eigen(*primals)
    slope = _along(_plus(*tangents), _plus(*primals), values, vectors)
    held = jnp.zeros_like(values), jnp.zeros_like(vectors)
    return (logarithm, values, vectors), (slope, *held)


def _plus(matrix, shift):
    return matrix + shift * jnp.eye(len(matrix), dtype=matrix.dtype)


def _turned(matrix, vectors):
    return product(product(vectors.T, matrix), vectors)


@jax.custom_jvp
def _along(change, matrix, values, vectors):
    """Derivative of the matrix's logarithm along a change.

    Daleckii and Krein: in the basis of eigenvectors, it multiplies each entry by the
    divided difference of the logarithm at its two eigenvalues.
    """
    del matrix
    slopes = _slope(values[:, None], values[None])
    return _turned(slopes * _turned(change, vectors), vectors.T)


@_along.defjvp
def _along_jvp(primals, tangents):
    # The second derivative has the divided differences at three eigenvalues.
    change, matrix, values, vectors = primals
    of_change, of_matrix = tangents[:2]
    first, second = _turned(change, vectors), _turned(of_matrix, vectors)

    def add(total, k):
        curved = _curvature(values[:, None], values[k], values[None])
        both = jnp.outer(first[:, k], second[k]) + jnp.outer(second[:, k], first[k])
        return total + curved * both, None

    bent = jax.lax.scan(add, jnp.zeros_like(first), jnp.arange(len(values)))[0]
    moved = _along(of_change, matrix, values, vectors) + _turned(bent, vectors.T)
    return _along(*primals), moved


def _slope(a, b):
    """``(log a - log b) / (a - b)``, the divided difference of the logarithm."""
    low, high = jnp.minimum(a, b), jnp.maximum(a, b)
    ratio = (high - low) / low
    apart = ratio > 0
    safe = jnp.where(apart, ratio, 1.0)
    return jnp.where(apart, jnp.log1p(safe) / safe, 1.0) / low


def _curvature(a, b, c):
    """The divided difference of the logarithm at three numbers, in any order."""
    low = jnp.minimum(jnp.minimum(a, b), c)
    high = jnp.maximum(jnp.maximum(a, b), c)
    between = jnp.maximum(jnp.minimum(a, b), jnp.minimum(jnp.maximum(a, b), c))
    apart = high - low > jnp.finfo(low.dtype).eps ** 0.2 * low
    wide = (_slope(between, high) - _slope(low, between)) / jnp.where(
        apart, high - low, 1.0
    )
    # Close together: the series about their mean, whose odd terms are small.
    centre = (low + between + high) / 3.0
    spread = (low - centre) ** 2 + (between - centre) ** 2 + (high - centre) ** 2
    near = -(0.5 + spread / (8.0 * centre**2)) / centre**2
    return jnp.where(apart, wide, near)
