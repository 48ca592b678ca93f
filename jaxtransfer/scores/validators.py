"""Validators of adapted models that see no label of the target; larger is better.

What they take of the target is named ``target_logits``, and nothing they take holds a
target label: that is left to `oracle_target_accuracy`.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from jaxtransfer import losses
from jaxtransfer.losses.reduction import check_mask, widen
from jaxtransfer.losses.softened import check_positive
from jaxtransfer.ops.products import product
from jaxtransfer.scores.labelled import rows_and_weights
from jaxtransfer.typing import AnyArray


def source_accuracy(
    source_logits: Float[AnyArray, "batch classes"],
    source_labels: Integer[AnyArray, " batch"],
    *,
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, ""]:
    """Accuracy on labelled source examples, best on held-out ones.

    ``mean_i 1[argmax_c z_ic = y_i]``. Blind to how well the target is done, yet often
    the choice that is hardest to beat.

    Args:
        source_logits: [batch, classes].
        source_labels: Classes [batch] in [0, classes).
        where: Which examples count [batch]; default all.

    Returns:
        Scalar in [0, 1], float32; larger is better. 0 if no example counts.

    Raises:
        ValueError: If shapes do not match, or labels are out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> float(source_accuracy(jnp.eye(2), jnp.array([0, 0])))
        0.5
    """
    return losses.mean(
        losses.accuracy(source_logits, source_labels, where=where), where=where
    )


def negative_entropy(
    target_logits: Float[AnyArray, "batch classes"],
    *,
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, ""]:
    """How sure the predictions are: minus their mean entropy.

    ``mean_i sum_c p_ic log p_ic`` with ``p = softmax(z)``. Largest, too, for a model
    that predicts one class throughout.

    Args:
        target_logits: [batch, classes], finite.
        where: Which examples count [batch]; default all.

    Returns:
        Scalar in [-log(classes), 0] nats, float32 or wider; larger is better. 0 if no
        example counts.

    Raises:
        ValueError: If ``where`` does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> print(f"{float(negative_entropy(jnp.zeros((3, 2)))):.4f}")
        -0.6931

    Reference:
        Morerio, Cavazza and Murino, "Minimal-Entropy Correlation Alignment for
        Unsupervised Deep Domain Adaptation", ICLR 2018, sec. 3.
    """
    return -losses.mean(losses.entropy(target_logits, where=where), where=where)


def prediction_diversity(
    target_logits: Float[AnyArray, "batch classes"],
    *,
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, ""]:
    """How varied the predictions are: entropy of their mean.

    ``-sum_c q_c log q_c`` with ``q = mean_i softmax(z_i)``. Largest, too, for a model
    that knows nothing; see `mutual_information`.

    Args:
        target_logits: [batch, classes], finite.
        where: Which examples count [batch]; default all.

    Returns:
        Scalar in [0, log(classes)] nats, float32 or wider; larger is better. 0 if no
        example counts.

    Raises:
        ValueError: If ``where`` does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> print(f"{float(prediction_diversity(9.0 * jnp.eye(2))):.4f}")
        0.6931

    Reference:
        Musgrave, Belongie and Lim, "Three New Validators and a Large-Scale Benchmark
        Ranking for Unsupervised Domain Adaptation", 2022, sec. 3.
    """
    return -losses.diversity(target_logits, where=where)


def mutual_information(
    target_logits: Float[AnyArray, "batch classes"],
    *,
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, ""]:
    """Information maximisation (IM): sure of each example, varied over all.

    `negative_entropy` plus `prediction_diversity`: the mutual information of example
    and prediction.

    Args:
        target_logits: [batch, classes], finite.
        where: Which examples count [batch]; default all.

    Returns:
        Scalar in [0, log(classes)] nats, float32 or wider; larger is better. 0 if no
        example counts.

    Raises:
        ValueError: If ``where`` does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> print(f"{float(mutual_information(99.0 * jnp.eye(2))):.4f}")
        0.6931

    Reference:
        Musgrave, Belongie and Lim, "Three New Validators and a Large-Scale Benchmark
        Ranking for Unsupervised Domain Adaptation", 2022, sec. 3.
    """
    return -losses.information_maximization(target_logits, where=where)


def nuclear_norm(
    target_logits: Float[AnyArray, "batch classes"],
    *,
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, ""]:
    """Batch nuclear norm (BNM) of all predictions: sure and varied in one number.

    ``|P|_* / batch``, the mean over the examples of the sum of the singular values of
    ``P = softmax(z)``. Comparable between sets of one size only.

    Args:
        target_logits: [batch, classes], finite; all of the target at once.
        where: Which examples count [batch]; default all.

    Returns:
        Scalar in [0, 1], float32 or wider; larger is better. 0 if no example counts.

    Raises:
        ValueError: If the logits are no matrix, or ``where`` does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> print(f"{float(nuclear_norm(99.0 * jnp.eye(2))):.4f}")
        1.0000

    Reference:
        Cui et al., "Towards Discriminability and Diversity: Batch Nuclear-norm
        Maximization under Label Insufficient Situations", CVPR 2020, eq. 10; as a
        validator: Musgrave, Belongie and Lim, 2022.
    """
    return -losses.batch_nuclear_norm(target_logits, where=where)


def soft_neighborhood_density(
    target_logits: Float[AnyArray, "batch classes"],
    *,
    temperature: float | Float[AnyArray, ""] = 0.05,
    tile: int | None = None,
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, ""]:
    """Soft neighbourhood density (SND): how many neighbours a prediction has.

    With the predictions ``p_i = softmax(z_i)`` divided by their lengths and, over the
    others j of an example i, ``q_ij`` proportional to ``exp(p_i . p_j / T)``: the mean
    of the entropies ``-sum_j q_ij log q_ij``. The pairs are taken a tile of rows at a
    time. Largest, too, for a model that predicts one class throughout.

    Args:
        target_logits: [batch, classes], finite.
        temperature: T, positive.
        tile: Rows of a tile; default as many as give 2^23 pairs. Memory is that of a
            few arrays [tile, batch].
        where: Which examples count [batch]; default all.

    Returns:
        Scalar in [0, log(batch - 1)] nats, float32 or wider; larger is better. 0 with
        fewer than two examples that count.

    Raises:
        ValueError: If the logits are no matrix, ``temperature`` or ``tile`` is not
            positive, or ``where`` does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> print(f"{float(soft_neighborhood_density(jnp.zeros((3, 2)))):.4f}")
        0.6931

    Reference:
        Saito et al., "Tune it the Right Way: Unsupervised Validation of Domain
        Adaptation via Soft Neighborhood Density", ICCV 2021, sec. 3.
    """
    check_positive("temperature", temperature)
    if tile is not None and tile < 1:
        raise ValueError(f"tile must be at least 1 or None, got {tile}.")
    logits, weights = rows_and_weights("target_logits", target_logits, where)
    predictions = jax.nn.softmax(logits)
    lengths = jnp.sqrt(jnp.sum(predictions**2, axis=1, keepdims=True))
    unit = predictions / lengths
    size = min(tile or max(2**23 // len(unit), 1), len(unit))
    return losses.mean(
        _neighbor_entropies(unit, weights > 0, temperature, size), where=weights > 0
    )


snd = soft_neighborhood_density


@functools.partial(jax.jit, static_argnames="size")
def _neighbor_entropies(unit, counts, temperature, size):
    """Entropy of the neighbours of each row, so many rows at a time."""
    number = jnp.arange(len(unit))

    def entropy_of(one):
        row, place = one
        similar = product(unit, row) / temperature
        others = counts & (number != place)
        similar = jnp.where(others, similar, -jnp.inf)
        # Without others, of 0: nothing is inf - inf.
        most = jnp.where(jnp.any(others), jnp.max(similar), 0.0)
        shifted = jnp.where(others, similar - most, 0.0)
        shares = jnp.where(others, jnp.exp(shifted), 0.0)
        total = jnp.sum(shares)
        total = jnp.where(total == 0, 1.0, total)
        return jnp.log(total) - jnp.sum(shares * shifted) / total

    return jax.lax.map(entropy_of, (unit, number), batch_size=size)


def importance_weighted_validation(
    source_losses: Float[AnyArray, " batch"],
    weights: Float[AnyArray, " batch"],
    *,
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, ""]:
    """Importance-weighted cross-validation (IWCV): minus the estimated target risk.

    ``-mean_i w_i l_i``: unbiased if the weights are the ratio of the densities.

    Args:
        source_losses: Losses l or errors of held-out source examples [batch].
        weights: w [batch], as of `density_ratio`, not negative. For cross-validation,
            join losses and weights of the folds.
        where: Which examples count [batch]; default all.

    Returns:
        Scalar, float32 or wider; larger is better. 0 if no example counts.

    Raises:
        ValueError: If the shapes are not [batch], or ``where`` does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> errors, weights = jnp.array([1.0, 0.0]), jnp.array([0.5, 1.5])
        >>> float(importance_weighted_validation(errors, weights))
        -0.25

    Reference:
        Sugiyama, Krauledat and Muller, "Covariate Shift Adaptation by Importance
        Weighted Cross Validation", JMLR 8, 2007, sec. 3.
    """
    values, weights, where = _weighted(source_losses, weights, where)
    return -losses.mean(weights * values, where=where)


iwcv = importance_weighted_validation


def deep_embedded_validation(
    source_losses: Float[AnyArray, " batch"],
    weights: Float[AnyArray, " batch"],
    *,
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, ""]:
    """Deep embedded validation (DEV): IWCV with a control variate; minus the risk.

    ``-(mean w l + e mean w - e)`` with ``e = -Cov(w l, w) / Var(w)``: what the mean of
    the weights, which should be 1, is wrong by corrects the risk.

    Args:
        source_losses: Losses l or errors of held-out source examples [batch].
        weights: w [batch], as of `density_ratio` of a classifier on the adapted
            model's features; not negative.
        where: Which examples count [batch]; default all.

    Returns:
        Scalar, float32 or wider; larger is better. With weights that are equal but
        for rounding e is 0. 0 if no example counts.

    Raises:
        ValueError: If the shapes are not [batch], or ``where`` does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> errors = jnp.array([1.0, 0.0, 1.0, 0.0])
        >>> weights = jnp.array([1.0, 1.0, 3.0, 3.0])
        >>> float(deep_embedded_validation(errors, weights))
        -0.5

    Reference:
        You et al., "Towards Accurate Model Selection in Deep Unsupervised Domain
        Adaptation", ICML 2019, sec. 4.
    """
    values, weights, where = _weighted(source_losses, weights, where)
    mean_weight = losses.mean(weights, where=where)
    risk = losses.mean(weights * values, where=where)
    # Scaled, so that squares of the largest legal weights stay finite.
    apart = jnp.where(where, weights - mean_weight, 0.0)
    scale = jnp.max(jnp.abs(apart), initial=0.0)
    largest = jnp.max(jnp.abs(weights), initial=0.0)
    scale = jnp.where(scale <= 16 * jnp.finfo(weights.dtype).eps * largest, 0.0, scale)
    apart = apart / jnp.where(scale == 0, 1.0, scale)
    variance = jnp.sum(apart**2)
    covariance = jnp.sum(apart * jnp.where(where, weights * values - risk, 0.0))
    slope = covariance / jnp.where(scale == 0, 1.0, variance * scale)
    slope = jnp.where(scale == 0, 0.0, slope)
    return slope * (mean_weight - 1.0) - risk


dev = deep_embedded_validation


def _weighted(source_losses, weights, where):
    """Losses and weights, widened and 0 where masked, and the mask."""
    values, weights = widen(source_losses), widen(weights)
    if values.ndim != 1 or weights.shape != values.shape:
        raise ValueError(
            "source_losses and weights must be one a source example, [batch], got "
            f"shapes {values.shape} and {weights.shape}."
        )
    where = check_mask("where", True if where is None else where, values.shape)
    return jnp.where(where, values, 0.0), jnp.where(where, weights, 0.0), where
