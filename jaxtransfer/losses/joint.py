"""Discrepancies of several layers, and of every class by itself; scalars."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from jaxtransfer.losses.discrepancy import bandwidths, coefficients, kernel_of, sums_of
from jaxtransfer.losses.sets import (
    check_widths,
    checked_labels,
    matrix,
    weighted_rows,
)
from jaxtransfer.ops.kernels import mean_squared_distance, self_squared_distances
from jaxtransfer.ops.order import argmax
from jaxtransfer.ops.products import product
from jaxtransfer.typing import AnyArray

POWERS = (0.25, 0.5, 1.0, 2.0, 4.0)


def joint_maximum_mean_discrepancy(
    source_layers: Sequence[Float[AnyArray, "n _"]],
    target_layers: Sequence[Float[AnyArray, "m _"]],
    *,
    estimator: Literal["biased", "unbiased"] = "biased",
    multipliers: Sequence[float] = POWERS,
    bandwidth: Sequence[Any] | None = None,
    source_where: Bool[AnyArray, " n"] | None = None,
    target_where: Bool[AnyArray, " m"] | None = None,
) -> Float[Array, ""]:
    """Joint maximum mean discrepancy (JMMD, JAN): of several layers together.

    `maximum_mean_discrepancy` under the product over the layers of their kernels,
    ``K(x, y) = prod_l sum_k exp(-|x_l - y_l|^2 / (r_k b_l))``: it sees how the layers
    go together, as features and predictions do.

    Args:
        source_layers: Features [n, ...] by layer.
        target_layers: Features [m, ...] by layer, as many, of the same widths.
        estimator: "biased" or "unbiased".
        multipliers: The ratios r_k of all layers whose bandwidths are not given.
        bandwidth: By layer what `maximum_mean_discrepancy` takes for one; default the
            mean distance for each.
        source_where: Which source rows count [n]; default all.
        target_where: Which target rows count [m]; default all.

    Returns:
        Scalar, float32 or wider; 0 if too few rows count.

    Raises:
        ValueError: If the layers don't match in number, rows or width, or an option is
            out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> rows = jnp.array([[0.0, 1.0], [2.0, 3.0]])
        >>> layers = [rows, rows[:, :1]]
        >>> print(f"{float(joint_maximum_mean_discrepancy(layers, layers)):.4f}")
        0.0000

    Reference:
        Long et al., "Deep Transfer Learning with Joint Adaptation Networks", ICML 2017,
        eq. 9. Deviation: sums of kernels in every layer, as in the authors' code.
    """
    if estimator not in ("biased", "unbiased"):
        raise ValueError(
            f'estimator must be "biased" or "unbiased", got {estimator!r}.'
        )
    given = [None] * len(source_layers) if bandwidth is None else bandwidth
    if not len(source_layers) or len(source_layers) != len(target_layers):
        raise ValueError(
            "source_layers and target_layers must be as many, at least one, got "
            f"{len(source_layers)} and {len(target_layers)}."
        )
    if len(given) != len(source_layers):
        raise ValueError(
            f"bandwidth must be one a layer, {len(source_layers)}, got {len(given)}."
        )
    kernel = alike = typical = 1.0
    first = len(source_layers[0]), len(target_layers[0])
    for source, target, one in zip(source_layers, target_layers, given, strict=True):
        source, u = weighted_rows("source", source, source_where, 1)
        target, v = weighted_rows("target", target, target_where, 1)
        check_widths(source, target)
        rows, counts = jnp.concatenate([source, target]), jnp.concatenate([u, v])
        if (len(source), len(target)) != first:
            raise ValueError(
                f"all layers must have the same rows, got {len(source)} and "
                f"{len(target)} after {first[0]} and {first[1]}."
            )
        kernels = jax.lax.stop_gradient(bandwidths(rows, counts, multipliers, one))
        ones = jnp.ones_like(kernels)
        kernel = kernel * kernel_of(self_squared_distances(rows), kernels, ones)
        alike = alike * jnp.sum(ones)
        mean = jax.lax.stop_gradient(mean_squared_distance(rows, where=counts))
        typical = typical * kernel_of(mean, kernels, ones)
    # The same off every pair changes nothing but the rounding of the sums.
    of_sums, of_itself = coefficients(jnp.sum(u), jnp.sum(v), estimator)
    pairs = sums_of(kernel - typical, u, v)
    return jnp.sum(of_sums * pairs) + of_itself * (alike - typical)


def local_maximum_mean_discrepancy(
    source: Float[AnyArray, "n features"],
    target: Float[AnyArray, "m features"],
    source_labels: Integer[AnyArray, " n"],
    target_probabilities: Float[AnyArray, "m classes"],
    *,
    multipliers: Sequence[float] = POWERS,
    bandwidth: Any = None,
    source_where: Bool[AnyArray, " n"] | None = None,
    target_where: Bool[AnyArray, " m"] | None = None,
) -> Float[Array, ""]:
    """Local maximum mean discrepancy (LMMD, DSAN): class by class, then averaged.

    The mean over classes c of ``|sum_i w^s_ic phi(s_i) - sum_j w^t_jc phi(t_j)|^2``,
    with ``w^s_ic = 1[y_i = c] / n_c`` and ``w^t_jc = p_jc / sum_j p_jc``, over the
    classes that have a source label and are the likeliest of some target row.

    Args:
        source: Features [n, features].
        target: Features [m, features].
        source_labels: Classes [n] in [0, classes).
        target_probabilities: Predicted probabilities [m, classes]; no gradient flows
            into them.
        multipliers: The ratios r_k of the bandwidths, positive.
        bandwidth: As of `maximum_mean_discrepancy`.
        source_where: Which source rows count [n]; default all.
        target_where: Which target rows count [m]; default all.

    Returns:
        Scalar, not negative up to rounding, float32 or wider; 0 if there is no such
        class.

    Raises:
        ValueError: If shapes do not match, a label is out of range, or an option is.

    Example:
        >>> import jax.numpy as jnp
        >>> rows, labels = jnp.array([[0.0], [4.0]]), jnp.array([0, 1])
        >>> loss = local_maximum_mean_discrepancy(rows, rows, labels, jnp.eye(2))
        >>> print(f"{float(loss):.4f}")
        0.0000

    Reference:
        Zhu et al., "Deep Subdomain Adaptation Network for Image Classification", IEEE
        TNNLS 32, 2021, eqs. 5 and 8. Deviation: classes without rows are left out, as
        in the authors' code.
    """
    kernel, u, v = _kernel(
        source, target, multipliers, bandwidth, source_where, target_where
    )
    probabilities = jax.lax.stop_gradient(matrix("probabilities", target_probabilities))
    _check_count("target_probabilities", probabilities, v)
    classes = probabilities.shape[1]
    own = _one_hot(source_labels, classes, u, source_where, kernel.dtype)
    soft = jnp.where(v[:, None] > 0, probabilities, 0.0).astype(kernel.dtype)
    likeliest = jax.nn.one_hot(argmax(soft), classes, dtype=v.dtype) * v[:, None]
    both = (jnp.sum(own, axis=0) > 0) & (jnp.sum(likeliest, axis=0) > 0)
    signed = jnp.concatenate([_normalized(own), -_normalized(soft)])
    # What each pair of rows counts for does not depend on the features.
    share = product(jnp.where(both, signed, 0.0), signed.T)
    count = jnp.sum(both, dtype=kernel.dtype)
    return jnp.sum(share * kernel) / jnp.maximum(count, 1.0)


def contrastive_domain_discrepancy(
    source: Float[AnyArray, "n features"],
    target: Float[AnyArray, "m features"],
    source_labels: Integer[AnyArray, " n"],
    target_labels: Integer[AnyArray, " m"],
    *,
    classes: int = 2,
    multipliers: Sequence[float] = POWERS,
    bandwidth: Any = None,
    source_where: Bool[AnyArray, " n"] | None = None,
    target_where: Bool[AnyArray, " m"] | None = None,
) -> Float[Array, ""]:
    """Contrastive domain discrepancy (CDD, CAN): within classes less between classes.

    With ``D_cd`` the biased `maximum_mean_discrepancy` between the source rows of
    class c and the target rows of class d: ``mean_c D_cc - mean_{c != d} D_cd``, over
    the classes that both have rows. Classes without rows take no part.

    Args:
        source: Features [n, features].
        target: Features [m, features].
        source_labels: Classes [n] in [0, classes).
        target_labels: Pseudo-labels [m] in [0, classes), from clusters or predictions.
        classes: Number of classes.
        multipliers: The ratios r_k of the bandwidths, positive.
        bandwidth: As of `maximum_mean_discrepancy`.
        source_where: Which source rows count [n]; default all.
        target_where: Which target rows count [m], e.g. those with a sure label.

    Returns:
        Scalar, float32 or wider; negative where classes lie further apart than domains.

    Raises:
        ValueError: If shapes do not match, a label is out of range, or an option is.

    Example:
        >>> import jax.numpy as jnp
        >>> rows, labels = jnp.array([[0.0], [4.0]]), jnp.array([0, 1])
        >>> loss = contrastive_domain_discrepancy(rows, rows, labels, labels)
        >>> print(f"{float(loss):.4f}")
        -7.1299

    Reference:
        Kang et al., "Contrastive Adaptation Network for Unsupervised Domain
        Adaptation", CVPR 2019, eqs. 3-5.
    """
    kernel, u, v = _kernel(
        source, target, multipliers, bandwidth, source_where, target_where
    )
    n = len(u)
    own = _normalized(_one_hot(source_labels, classes, u, source_where, kernel.dtype))
    other = _normalized(_one_hot(target_labels, classes, v, target_where, kernel.dtype))
    here = (jnp.sum(own, axis=0) > 0)[:, None] & (jnp.sum(other, axis=0) > 0)[None]
    same = jnp.eye(classes, dtype=bool)

    def share(which):
        which = which.astype(kernel.dtype)
        return which / jnp.maximum(jnp.sum(which), 1.0)

    # What each pair of classes, and so each pair of rows, counts for.
    table = share(here & same) - share(here & ~same)
    within_source = product(own * jnp.sum(table, axis=1)[None], own.T)
    within_target = product(other * jnp.sum(table, axis=0)[None], other.T)
    between = product(product(own, table), other.T)
    return (
        jnp.sum(within_source * kernel[:n, :n])
        + jnp.sum(within_target * kernel[n:, n:])
        - 2.0 * jnp.sum(between * kernel[:n, n:])
    )


def _kernel(source, target, multipliers, bandwidth, source_where, target_where):
    """The kernel of all pairs of both sets together, and the weights of the rows."""
    source, u = weighted_rows("source", source, source_where, 1)
    target, v = weighted_rows("target", target, target_where, 1)
    check_widths(source, target)
    rows, counts = jnp.concatenate([source, target]), jnp.concatenate([u, v])
    kernels = jax.lax.stop_gradient(bandwidths(rows, counts, multipliers, bandwidth))
    distances = self_squared_distances(rows)
    return kernel_of(distances, kernels, jnp.ones_like(kernels)), u, v


def _one_hot(labels, classes, weights, where, dtype):
    labels, valid, _ = checked_labels(labels, len(weights), classes, where)
    hot = jax.nn.one_hot(labels, classes, dtype=dtype) * weights[:, None]
    return jnp.where(valid[:, None], hot, jnp.nan)


def _normalized(weights):
    total = jnp.sum(weights, axis=0, keepdims=True)
    return weights / jnp.where(total > 0, total, 1.0)


def _check_count(name, rows, weights):
    if len(rows) != len(weights):
        raise ValueError(
            f"{name} must have a row for every row of features, {len(weights)}, got "
            f"{len(rows)}."
        )
