"""Losses by optimal transport between two sets; scalars over the sets."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Integer, Key

from jaxtransfer.losses.directions import root
from jaxtransfer.losses.reduction import absolute_power, mean
from jaxtransfer.losses.sets import (
    check_widths,
    checked_labels,
    critic_outputs,
    weighted_rows,
)
from jaxtransfer.ops.dtypes import common_dtype
from jaxtransfer.ops.kernels import self_squared_distances, squared_distances
from jaxtransfer.ops.order import argsort
from jaxtransfer.ops.products import product
from jaxtransfer.typing import AnyArray


def sliced_wasserstein(
    source: Float[AnyArray, "n features"],
    target: Float[AnyArray, "m features"],
    *,
    key: Key[Array, ""] | None = None,
    projections: int = 128,
    directions: Float[AnyArray, "projections features"] | None = None,
    power: Literal[1, 2] = 2,
    source_where: Bool[AnyArray, " n"] | None = None,
    target_where: Bool[AnyArray, " m"] | None = None,
) -> Float[Array, ""]:
    """Sliced Wasserstein discrepancy (SWD): mean transport cost along directions.

    ``mean_r integral_0^1 |F_r^{-1}(q) - G_r^{-1}(q)|^p dq``, with the quantile
    functions F and G of both sets projected onto the unit vector r: the p-th power of
    the sliced p-Wasserstein distance. It is exact for sets of unequal sizes.

    Args:
        source: Features [n, features], or probabilities [n, classes] of two
            classifiers for one batch.
        target: Features [m, features]; n and m may differ.
        key: Draws the directions, uniform on the sphere; a new key every step.
        projections: How many directions to draw, at least 1.
        directions: The directions themselves [projections, features], rows of length
            1, in place of ``key``.
        power: The power p of the distance on the line, 1 or 2.
        source_where: Which source rows count [n]; default all.
        target_where: Which target rows count [m]; default all.

    Returns:
        Scalar, float32 or wider, never negative; 0 if no row of a side counts.

    Raises:
        ValueError: If the inputs are not matrices of equal width, not exactly one of
            ``key`` and ``directions`` is given, or an option is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> rows = jnp.array([[1.0, 0.0], [0.0, 0.0], [3.0, 0.0]])
        >>> float(sliced_wasserstein(rows, rows + 4.0, directions=jnp.eye(2)))
        16.0

    Reference:
        Bonneel et al., "Sliced and Radon Wasserstein Barycenters of Measures", Journal
        of Mathematical Imaging and Vision 51, 2015, sec. 2; Lee et al., "Sliced
        Wasserstein Discrepancy for Unsupervised Domain Adaptation", CVPR 2019, sec. 3,
        which takes it between the outputs of two classifiers.
    """
    source, source_weights = weighted_rows("source", source, source_where, 1)
    target, target_weights = weighted_rows("target", target, target_where, 1)
    check_widths(source, target)
    if power not in (1, 2):
        raise ValueError(f"power must be 1 or 2, got {power}.")
    directions = _directions(key, projections, directions, source)

    def projected(rows, weights, where):
        lines = product(directions, rows.T)
        if where is not None:
            lines = jnp.where(weights > 0, lines, jnp.inf)
        lines = jnp.take_along_axis(lines, argsort(lines), axis=1)
        if where is None:
            return lines
        place = jnp.arange(len(rows), dtype=weights.dtype)
        return jnp.where(place < jnp.sum(weights), lines, 0.0)

    lines = projected(source, source_weights, source_where)
    others = projected(target, target_weights, target_where)
    n, m = len(source), len(target)
    if source_where is None and target_where is None:
        if n == m:
            return jnp.mean(absolute_power(lines - others, power))
        i, j, widths = _quantiles(np.int64(n), np.int64(m), n, m, np)
        enough = True
    else:
        if n * m >= 2**31:
            raise ValueError(
                f"source and target with masks must have fewer than 2^31 pairs, got {n}"
                f" x {m}; take smaller batches."
            )
        count = jnp.sum(source_weights > 0, dtype=jnp.int32)
        other = jnp.sum(target_weights > 0, dtype=jnp.int32)
        enough = (count > 0) & (other > 0)
        count, other = jnp.maximum(count, 1), jnp.maximum(other, 1)
        i, j, widths = _quantiles(count, other, n, m, jnp)
    costs = jnp.mean(absolute_power(lines[:, i] - others[:, j], power), axis=0)
    return jnp.where(enough, jnp.sum(jnp.asarray(widths, costs.dtype) * costs), 0.0)


def sinkhorn_divergence(
    source: Float[AnyArray, "n features"],
    target: Float[AnyArray, "m features"],
    *,
    epsilon: float | Float[AnyArray, ""] | None = None,
    threshold: float = 1e-3,
    max_iterations: int = 2000,
    source_where: Bool[AnyArray, " n"] | None = None,
    target_where: Bool[AnyArray, " m"] | None = None,
) -> Float[Array, ""]:
    """Sinkhorn divergence: entropic optimal transport without its bias.

    ``T(s, t) - T(s, s) / 2 - T(t, t) / 2`` with ``T(s, t) = min_P <P, C> + e KL(P | u
    v^T)`` over the plans P that carry the uniform weights u of the source rows to
    those v of the target rows, and ``C_ij = |s_i - t_j|^2``. The gradient is by the
    envelope theorem: plans and e are constants (to a second derivative too, which
    therefore lacks what moves with the plans). Solved with ott-jax.

    Args:
        source: Features [n, features].
        target: Features [m, features]; n and m may differ.
        epsilon: Strength of the entropy e, positive, in units of squared distance;
            None for 1/20 of the standard deviation of C. Far below, Sinkhorn takes
            many iterations and float32 is not enough.
        threshold: Sinkhorn stops when the marginals of its plan are this close.
        max_iterations: Sinkhorn stops after this many iterations.
        source_where: Which source rows count [n]; default all.
        target_where: Which target rows count [m]; default all.

    Returns:
        Scalar, float32 or wider, not negative but for what ``threshold`` leaves; 0 if
        no row of a side counts.

    Raises:
        ValueError: If the inputs are not matrices of equal width, or an option is out
            of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> rows = jnp.array([[0.0], [10.0]])
        >>> print(f"{float(sinkhorn_divergence(rows, rows + 1.0, epsilon=1.0)):.3f}")
        1.000

    Reference:
        Genevay, Peyre and Cuturi, "Learning Generative Models with Sinkhorn
        Divergences", AISTATS 2018, sec. 3; Feydy et al., "Interpolating between
        Optimal Transport and MMD using Sinkhorn Divergences", AISTATS 2019, eq. 3.
    """
    source, source_weights = weighted_rows("source", source, source_where, 1)
    target, target_weights = weighted_rows("target", target, target_where, 1)
    check_widths(source, target)
    enough, u, v = _marginals(source_weights, target_weights)
    one_type = common_dtype(source.dtype, target.dtype)  # ott-jax takes no two
    source, target, u, v = (x.astype(one_type) for x in (source, target, u, v))
    costs = (
        squared_distances(source, target),
        self_squared_distances(source),
        self_squared_distances(target),
    )
    fixed = jax.lax.stop_gradient(costs)
    epsilon = _entropy_strength(epsilon, fixed[0], u, v)
    geometry, _, divergence = _ott()
    _, out = divergence(
        geometry,
        *fixed,
        a=u,
        b=v,
        epsilon=epsilon,
        solve_kwargs={"threshold": threshold, "max_iterations": max_iterations},
    )
    sides = ((u, v), (u, u), (v, v))
    of_both, of_source, of_target = (
        _dual_value(cost, potentials, *weights, epsilon)
        for cost, potentials, weights in zip(
            costs, jax.lax.stop_gradient(out.potentials), sides, strict=True
        )
    )
    return jnp.where(enough, of_both - 0.5 * (of_source + of_target), 0.0)


def deep_joint_distribution_transport(
    source: Float[AnyArray, "n features"],
    target: Float[AnyArray, "m features"],
    source_labels: Integer[AnyArray, " n"],
    target_logits: Float[AnyArray, "m classes"],
    *,
    feature_weight: float | Float[AnyArray, ""] = 0.001,
    label_weight: float | Float[AnyArray, ""] = 0.0001,
    epsilon: float | Float[AnyArray, ""] | None = None,
    threshold: float = 1e-3,
    max_iterations: int = 2000,
    source_where: Bool[AnyArray, " n"] | None = None,
    target_where: Bool[AnyArray, " m"] | None = None,
) -> Float[Array, ""]:
    """Joint distribution optimal transport (DeepJDOT): cost of features and labels.

    ``<P, C>`` with ``C_ij = alpha |s_i - t_j|^2 - beta log softmax(z_j)_{y_i}`` and the
    plan P between uniform weights for which ``<P, C> + e <P, log P>`` is least. P is a
    constant of the gradient. Solved with ott-jax. The cross-entropy of the source
    examples, which the method adds, is not in it.

    Args:
        source: Features [n, features].
        target: Features [m, features]; n and m may differ.
        source_labels: Classes y of the source rows [n], in [0, classes).
        target_logits: Logits z of the target rows [m, classes].
        feature_weight: The weight alpha.
        label_weight: The weight beta.
        epsilon: Strength of the entropy e, positive, in units of C; None for 1/20 of
            the standard deviation of C. The value is at most ``e log min(n, m)`` above
            that of the exact plan, when Sinkhorn has converged; far below, it takes
            many iterations and float32 is not enough.
        threshold: Sinkhorn stops when the marginals of its plan are this close.
        max_iterations: Sinkhorn stops after this many iterations.
        source_where: Which source rows count [n]; default all.
        target_where: Which target rows count [m]; default all.

    Returns:
        Scalar, float32 or wider; 0 if no row of a side counts. A label out of range
        that can't be seen because it is traced gives not-a-number.

    Raises:
        ValueError: If shapes do not match, an option is out of its range or, outside
            of ``jit``, a label is.

    Example:
        >>> import jax.numpy as jnp
        >>> rows, labels, logits = jnp.ones((2, 3)), jnp.array([1, 0]), 9 * jnp.eye(2)
        >>> loss = deep_joint_distribution_transport(
        ...     rows, rows, labels, logits, label_weight=1.0
        ... )
        >>> print(f"{float(loss):.4f}")
        0.0001

    Reference:
        Damodaran et al., "DeepJDOT: Deep Joint Distribution Optimal Transport for
        Unsupervised Domain Adaptation", ECCV 2018, sec. 3. Deviation: the plan there
        is exact, here entropic.
    """
    source, source_weights = weighted_rows("source", source, source_where, 1)
    target, target_weights = weighted_rows("target", target, target_where, 1)
    check_widths(source, target)
    logits, _ = weighted_rows("target_logits", target_logits, None, 1)
    if len(logits) != len(target):
        raise ValueError(
            "target_logits must have a row for every target row, got shapes "
            f"{logits.shape} and {target.shape}."
        )
    labels, valid, _ = checked_labels(
        source_labels, len(source), logits.shape[1], source_where
    )
    logits = jnp.where(target_weights[:, None] > 0, logits, 0.0)
    enough, u, v = _marginals(source_weights, target_weights)
    costs = feature_weight * squared_distances(source, target)
    costs = costs - label_weight * jax.nn.log_softmax(logits)[:, labels].T
    fixed = jax.lax.stop_gradient(costs)
    u, v = u.astype(fixed.dtype), v.astype(fixed.dtype)
    geometry, solve, _ = _ott()
    out = solve(
        geometry(fixed, epsilon=_entropy_strength(epsilon, fixed, u, v)),
        a=u,
        b=v,
        threshold=threshold,
        max_iterations=max_iterations,
    )
    value = jnp.sum(jax.lax.stop_gradient(out.matrix) * costs)
    value = value * jnp.where(jnp.all(valid), 1.0, jnp.nan).astype(value.dtype)
    return jnp.where(enough, value, 0.0)


def wasserstein_critic(
    source_logits: Float[AnyArray, "n ..."],
    target_logits: Float[AnyArray, "m ..."],
    *,
    source_where: Bool[AnyArray, " n"] | None = None,
    target_where: Bool[AnyArray, " m"] | None = None,
) -> Float[Array, ""]:
    """Wasserstein critic's loss (WDGRL): minus the difference of its mean outputs.

    ``mean D(t) - mean D(s)``, which the critic D lowers together with a multiple
    (gamma = 10) of `gradient_penalty`, and the features raise, through
    `jaxtransfer.ops.gradient_reversal` or as minus this loss.

    Args:
        source_logits: The critic's outputs on source features, [n] or [n, 1].
        target_logits: The critic's outputs on target features, [m] or [m, 1].
        source_where: Which source examples count [n]; default all.
        target_where: Which target examples count [m]; default all.

    Returns:
        Scalar, float32 or wider: minus the critic's estimate of the 1-Wasserstein
        distance; 0 if no example of a side counts.

    Raises:
        ValueError: If the outputs are not [n] or [n, 1].

    Example:
        >>> import jax.numpy as jnp
        >>> float(wasserstein_critic(jnp.array([3.0, 1.0]), jnp.array([0.5])))
        -1.5

    Reference:
        Shen et al., "Wasserstein Distance Guided Representation Learning for Domain
        Adaptation", AAAI 2018, sec. 3.
    """
    source, source_where = critic_outputs("source", source_logits, source_where)
    target, target_where = critic_outputs("target", target_logits, target_where)
    value = mean(target, where=target_where) - mean(source, where=source_where)
    for outputs, where in ((source, source_where), (target, target_where)):
        if where is not None or not outputs.size:
            value = jnp.where(jnp.any(True if where is None else where), value, 0.0)
    return value


def gradient_penalty(
    source: Float[AnyArray, "n features"],
    target: Float[AnyArray, "m features"],
    critic: Callable[[Array], Array],
    *,
    key: Key[Array, ""] | None = None,
    points: Literal["all", "between"] = "all",
    source_where: Bool[AnyArray, " n"] | None = None,
    target_where: Bool[AnyArray, " m"] | None = None,
) -> Float[Array, ""]:
    """Gradient penalty of a Wasserstein critic (WDGRL, WGAN-GP): slopes near 1.

    ``mean (|grad D(x)| - 1)^2`` over points x: one between each source row and its
    target row, at a random place of the line, and for "all" the rows of both sets too.

    Args:
        source: Features [n, features]. To train the critic alone, give features under
            ``jax.lax.stop_gradient``.
        target: Features [m, features]. Row i is paired with source row i; rows that
            have no partner are in no pair.
        critic: The critic D, a function from features [rows, features] to [rows] or
            [rows, 1] that takes every row by itself (no batch normalisation).
        key: Draws the places; a new key every step.
        points: "all" for pairs and rows, as for domain adaptation; "between" for pairs
            only, as for generative networks.
        source_where: Which source rows count [n]; default all.
        target_where: Which target rows count [m]; default all. A pair counts if both
            its rows do.

    Returns:
        Scalar, float32 or wider; 0 if no point counts. Where the critic is flat, the
        penalty is 1 and its gradient 0.

    Raises:
        ValueError: If the inputs are not matrices of equal width, ``key`` is missing,
            ``points`` is unknown or the critic's output is not one number a row.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> rows = jnp.ones((2, 4))
        >>> critic = lambda x: x @ jnp.full(4, 1.5)
        >>> float(gradient_penalty(rows, 2.0 * rows, critic, key=jax.random.key(0)))
        4.0

    Reference:
        Gulrajani et al., "Improved Training of Wasserstein GANs", NIPS 2017, eq. 3;
        Shen et al., "Wasserstein Distance Guided Representation Learning for Domain
        Adaptation", AAAI 2018, sec. 3.
    """
    source, source_weights = weighted_rows("source", source, source_where, 1)
    target, target_weights = weighted_rows("target", target, target_where, 1)
    check_widths(source, target)
    if key is None:
        raise ValueError("gradient_penalty needs a key, as in key=jax.random.key(0).")
    if points not in ("all", "between"):
        raise ValueError(f'points must be "all" or "between", got {points!r}.')
    pairs = min(len(source), len(target))
    places = jax.random.uniform(key, (pairs,), source.dtype)[:, None]
    inputs = target[:pairs] + places * (source[:pairs] - target[:pairs])
    weights = source_weights[:pairs] * target_weights[:pairs]
    if points == "all":
        inputs = jnp.concatenate([inputs, source, target])
        weights = jnp.concatenate([weights, source_weights, target_weights])

    def output(row):
        value = critic(row[None])
        if value.size != 1:
            raise ValueError(
                "critic must return one number a row, [rows] or [rows, 1], got shape "
                f"{value.shape} for one row."
            )
        return value.reshape(())

    slopes = jax.vmap(jax.grad(output))(inputs)
    norms = root(jnp.sum(slopes.astype(inputs.dtype) ** 2, axis=1))
    return mean((norms - 1.0) ** 2, where=weights > 0)


def _directions(key, projections, directions, rows):
    if (key is None) == (directions is None):
        raise ValueError(
            "give either key (as in key=jax.random.key(0)) or directions, got "
            f"{'neither' if key is None else 'both'}."
        )
    if directions is None:
        if projections < 1:
            raise ValueError(f"projections must be at least 1, got {projections}.")
        drawn = jax.random.normal(key, (projections, rows.shape[1]), rows.dtype)
        return drawn / jnp.linalg.norm(drawn, axis=1, keepdims=True)
    directions = jnp.asarray(directions, rows.dtype)
    if directions.ndim != 2 or directions.shape[1] != rows.shape[1]:
        raise ValueError(
            f"directions must be [projections, {rows.shape[1]}], got shape "
            f"{directions.shape}."
        )
    return directions


def _quantiles(count, other_count, n, m, xp):
    """Where both quantile functions are constant: the indices and the width.

    The steps are at i / n and at j / m; in units of 1 / (n m) they are whole numbers.
    """
    # An index past the count ends at 1, where its interval has no width.
    of_one = xp.minimum(xp.arange(1, n + 1, dtype=count.dtype), count) * other_count
    of_other = xp.minimum(xp.arange(1, m + 1, dtype=count.dtype), other_count) * count
    ends = xp.sort(xp.concatenate([of_one, of_other]))
    starts = xp.concatenate([xp.zeros_like(ends[:1]), ends[:-1]])
    i = xp.minimum(starts // other_count, count - 1)
    j = xp.minimum(starts // count, other_count - 1)
    return i, j, (ends - starts) / (count * other_count)


def _marginals(source_weights, target_weights):
    """Whether rows count on both sides, and the mass of each row."""
    n, m = jnp.sum(source_weights), jnp.sum(target_weights)
    u, v = (
        jnp.where(total > 0, weights / jnp.maximum(total, 1.0), 1.0 / len(weights))
        for total, weights in ((n, source_weights), (m, target_weights))
    )
    return (n > 0) & (m > 0), u, v


def _entropy_strength(epsilon, costs, u, v):
    if epsilon is not None:
        if not isinstance(epsilon, Tracer) and not epsilon > 0:
            raise ValueError(f"epsilon must be positive, got {epsilon}.")
        return jax.lax.stop_gradient(jnp.asarray(epsilon, costs.dtype))
    centre = product(product(u, costs), v)
    deviation = jnp.sqrt(product(product(u, (costs - centre) ** 2), v))
    # Costs that are equal but for rounding have no deviation to scale by.
    floor = 16 * jnp.finfo(costs.dtype).eps * jnp.max(jnp.abs(costs))
    strength = jnp.maximum(0.05 * deviation, floor)
    return jnp.where(strength > 0, strength, 1.0)


def _dual_value(costs, potentials, u, v, epsilon):
    """``<P, C> + e KL(P | u v^T)`` by the potentials; its slope in C is the plan P."""
    f, g = potentials
    held = jax.lax.stop_gradient(costs)
    exponents = (f[:, None] + g[None] - held) / epsilon
    counts = (u[:, None] > 0) & (v[None] > 0)
    plan = jnp.where(counts, jnp.exp(jnp.where(counts, exponents, 0.0)), 0.0)

    def of(potential, weights):
        live = weights > 0
        log_weights = jnp.log(jnp.where(live, weights, 1.0))
        return jnp.sum(
            jnp.where(live, weights * (potential - epsilon * log_weights), 0.0)
        )

    value = of(f, u) + of(g, v) + epsilon * (1.0 - jnp.sum(plan))
    # The plan is a constant to the derivative, and to the second one.
    return value + jnp.sum(plan * (costs - held))


def _ott() -> tuple[Any, Any, Any]:
    """What is used of ott-jax: Geometry, solve, sinkhorn_divergence."""
    try:
        from ott.geometry.geometry import Geometry
        from ott.solvers.linear import solve
        from ott.tools.sinkhorn_divergence import sinkhorn_divergence
    except ImportError as error:
        raise ImportError("this loss needs ott-jax: pip install ott-jax") from error
    return Geometry, _leniently(solve), _leniently(sinkhorn_divergence)


def _leniently(function):
    """The function, which mixes ranks and dtypes, under JAX's strict settings too."""

    @functools.wraps(function)
    def call(*arguments, **named):
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return function(*arguments, **named)

    return call
