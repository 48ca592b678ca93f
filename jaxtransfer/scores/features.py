"""Transferability from features: how well a head on them would tell the classes."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer, Num

from jaxtransfer.losses.reduction import widen
from jaxtransfer.ops.products import product
from jaxtransfer.scores.labelled import (
    centred,
    decomposed,
    labelled_rows,
    mean_of_present,
    rows_and_weights,
)
from jaxtransfer.typing import AnyArray


def log_maximum_evidence(
    features: Float[AnyArray, "batch features"],
    labels: Num[AnyArray, "batch ..."],
    *,
    classes: int | None = None,
    iterations: int = 11,
    tolerance: float = 0.01,
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, ""]:
    r"""Logarithm of maximum evidence (LogME) of a Bayesian linear head, per example.

    For each class, with the targets y (1 where the label is that class, else 0):

    .. math:: \max_{\alpha, \beta} \frac1n \log \int
              N(w; 0, \alpha^{-1} I)\, N(y; F w, \beta^{-1} I)\, dw

    by MacKay's fixed point, then the mean over the classes that occur. Computed from a
    thin singular value decomposition, which is exact for fewer examples than features
    too.

    Args:
        features: F [batch, features].
        labels: Integer classes [batch] in [0, classes), or targets of a regression
            [batch] or [batch, outputs] as floats.
        classes: Number of classes; default one more than the largest label. Needed
            under ``jit``; without meaning for a regression.
        iterations: Most steps of the fixed point, at least 1.
        tolerance: The fixed point stops at a smaller relative change of alpha / beta.
        where: Which examples count [batch]; default all.

    Returns:
        Scalar in nats, float32 or wider; larger is better. 0 if no example counts.
        Targets that the features fit without error have no largest evidence: what
        rounding leaves of their residual bounds it.

    Raises:
        ValueError: If shapes do not match, labels are out of range, or traced without
            ``classes``; if ``iterations`` is below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> labels = jnp.array([0, 0, 1, 1])
        >>> told = jnp.array([[1.0], [1.1], [-1.0], [-1.1]])
        >>> mixed = jnp.array([[1.0], [-1.1], [-1.0], [1.1]])
        >>> print(f"{float(log_maximum_evidence(told, labels)):.4f}")
        -1.0075
        >>> print(f"{float(log_maximum_evidence(mixed, labels)):.4f}")
        -1.0724

    Reference:
        You et al., "LogME: Practical Assessment of Pre-trained Models for Transfer
        Learning", ICML 2021, eq. 2 and sec. 4. Deviations: a class without any example
        does not enter the mean, and the logarithms of alpha for the directions without
        features are kept, which the authors' faster code drops.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}.")
    if jnp.issubdtype(jnp.asarray(labels).dtype, jnp.floating):
        rows, weights = rows_and_weights("features", features, where)
        targets = widen(labels)
        if targets.shape[:1] != rows.shape[:1] or targets.ndim > 2:
            raise ValueError(
                f"labels must be [{len(rows)}] or [{len(rows)}, outputs], the rows of "
                f"features, got shape {targets.shape}."
            )
        targets = targets.reshape(len(rows), -1)
        targets = jnp.where(weights[:, None] > 0, targets, 0.0)
        present = jnp.broadcast_to(weights[:, None], targets.shape)
    else:
        rows, targets, weights = labelled_rows(
            "features", features, labels, classes, where
        )
        present = targets
    left, values = decomposed(rows)
    count = jnp.maximum(jnp.sum(weights), 1.0)
    evidence = _evidence(left, values**2, targets, count, tolerance, iterations)
    return mean_of_present(evidence, present)


log_me = log_maximum_evidence


@functools.partial(jax.jit, static_argnames="iterations")
@functools.partial(jax.vmap, in_axes=(None, None, 1, None, None, None))
def _evidence(left, squares, target, count, tolerance, iterations):
    """The evidence of one output, per example.

    With t = alpha / beta, gamma of the features' directions are determined by the data,
    and ``alpha |w|^2 = gamma`` and ``beta residual = count - gamma``: t and beta are
    all that is needed.
    """
    limits = jnp.finfo(squares.dtype)
    along = product(left.T, target)
    beyond = jnp.sum((target - product(left, along)) ** 2)
    kept = ~(squares <= 0)
    unkept = count - jnp.sum(kept, dtype=count.dtype)
    # What rounding leaves of a residual or of a ratio that is 0 or infinite.
    least = limits.eps**2 * jnp.sum(target**2) + limits.tiny / limits.eps
    largest = jnp.where(squares[0] > 0, squares[0], 1.0)

    def step(state):
        ratio, _, turn = state
        shares = jnp.where(kept, 1.0 / (squares + ratio), 0.0)
        gamma = jnp.sum(squares * shares)
        free = unkept + ratio * jnp.sum(shares)  # count - gamma, without its loss
        norm = jnp.sum(squares * (along * shares) ** 2)
        residual = beyond + jnp.sum((ratio * along * shares) ** 2)
        residual = jnp.maximum(residual, least)
        after = gamma * residual / jnp.maximum(free * norm, limits.tiny)
        after = jnp.clip(after, limits.eps**2 * largest, largest / limits.eps)
        moved = jnp.abs(after - ratio) >= tolerance * ratio
        # The step that converges is the last one taken.
        return after, free / residual, jnp.where(moved, turn + 1, iterations)

    one = jnp.ones((), squares.dtype)
    ratio, beta, _ = jax.lax.while_loop(
        lambda state: state[-1] < iterations, step, (one, one, jnp.zeros((), int))
    )
    determinant = jnp.sum(jnp.where(kept, jnp.log1p(squares / ratio), 0.0))
    return (jnp.log(beta) - 1.0 - jnp.log(2 * jnp.pi) - determinant / count) / 2


def h_score(
    features: Float[AnyArray, "batch features"],
    labels: Integer[AnyArray, " batch"],
    *,
    shrinkage: Literal["none", "ledoit_wolf"] | float = "none",
    classes: int | None = None,
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, ""]:
    r"""H-score: variance between classes, relative to the features' covariance.

    .. math:: \mathrm{tr}(\Sigma^{+} \Sigma_B) \quad \text{or, shrunk by } a, \quad
              (1 - a)\, \mathrm{tr}(\Sigma_a^{-1} \Sigma_B), \quad
              \Sigma_a = (1 - a) \Sigma + a \frac{\mathrm{tr} \Sigma}{d} I

    with the covariance of the d features and that of their class means. Without
    shrinkage and with fewer examples than features it can't tell: it is the number of
    classes less 1, whatever the features. No covariance is formed: both follow from a
    thin singular value decomposition.

    Args:
        features: [batch, features], centred here.
        labels: Classes [batch] in [0, classes).
        shrinkage: "none", "ledoit_wolf" (the optimal a of the data) or a in [0, 1].
        classes: Number of classes; default one more than the largest label. Needed
            under ``jit``.
        where: Which examples count [batch]; default all.

    Returns:
        Scalar in [0, classes - 1] (with shrinkage up to n / (n - 1) times that),
        float32 or wider; larger is better. 0 if no example counts.

    Raises:
        ValueError: If shapes do not match, labels are out of range, or traced without
            ``classes``; if the shrinkage is none of those named.

    Example:
        >>> import jax.numpy as jnp
        >>> features = jnp.array([[1.0], [1.0], [-1.0], [-1.0]])
        >>> print(f"{float(h_score(features, jnp.array([0, 0, 1, 1]))):.3f}")
        1.000

    Reference:
        Bao et al., "An Information-Theoretic Approach to Transferability in Task
        Transfer Learning", ICIP 2019, eq. 1; shrunk: Ibrahim, Ponomareva and Mazumder,
        "Newer is not always better: Rethinking transferability metrics, their
        peculiarities, stability and performance", ECML 2022, sec. 4.
    """
    if isinstance(shrinkage, str):
        known = shrinkage in ("none", "ledoit_wolf")
    else:
        known = 0.0 <= shrinkage <= 1.0
    if not known:
        raise ValueError(
            f'shrinkage must be "none", "ledoit_wolf" or in [0, 1], got {shrinkage!r}.'
        )
    rows, member, weights = labelled_rows("features", features, labels, classes, where)
    rows = centred(rows, weights)
    count = jnp.maximum(jnp.sum(weights), 1.0)
    left, values = decomposed(rows)
    of_class = jnp.maximum(jnp.sum(member, axis=0), 1.0)
    between = product(member.T, left) ** 2 / of_class[:, None]
    between = jnp.sum(between, axis=0)
    if shrinkage == "none":
        return jnp.sum(between)
    variances = values**2 / count
    a: Any = shrinkage
    if shrinkage == "ledoit_wolf":
        a = _ledoit_wolf(rows, variances, count)
    shrunk = (1 - a) * variances + a * jnp.sum(variances) / rows.shape[1]
    terms = (1 - a) * values**2 * between / jnp.where(shrunk == 0, 1.0, shrunk)
    return jnp.sum(terms) / jnp.maximum(count - 1.0, 1.0)


def _ledoit_wolf(rows, variances, count):
    """The optimal shrinkage of the covariance towards a multiple of the identity."""
    width = rows.shape[1]
    mean = jnp.sum(variances) / width
    missing = (width - len(variances)) * mean**2
    distance = jnp.sum((variances - mean) ** 2) + missing
    fourth = jnp.sum(jnp.sum(rows**2, axis=1) ** 2) / count
    noise = (fourth - jnp.sum(variances**2)) / count
    ratio = noise / jnp.where(distance == 0, 1.0, distance)
    return jnp.where(distance == 0, 0.0, jnp.clip(ratio, 0.0, 1.0))
