"""Losses of predictions on unlabelled data: how sure, how varied, how consistent."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from jaxtransfer.losses.directions import unit
from jaxtransfer.losses.maps import inner_axes
from jaxtransfer.losses.reduction import check_mask, widen
from jaxtransfer.losses.softened import (
    check_positive,
    mean_prediction,
    softmax_divergence,
)
from jaxtransfer.ops.order import argmax
from jaxtransfer.ops.products import gram, product
from jaxtransfer.typing import AnyArray


def entropy(
    logits: Float[AnyArray, "*batch classes"],
    *,
    where: Bool[AnyArray, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Entropy of softmax predictions, per example; TENT and entropy minimisation.

    ``-sum_c p_c log p_c`` with ``p = softmax(z)``, exact: no constant in the logarithm.

    Args:
        logits: [..., classes], finite.
        where: Which examples count [...]; the others give 0 and no gradient.

    Returns:
        Entropies [...] in [0, log(classes)] nats, float32 or wider.

    Raises:
        ValueError: If there is no axis of classes, or ``where`` does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> print(f"{float(entropy(jnp.zeros(2))):.4f}")
        0.6931

    Reference:
        Grandvalet and Bengio, "Semi-supervised Learning by Entropy Minimization",
        NeurIPS 2004, sec. 2; Wang et al., "Tent: Fully Test-Time Adaptation by Entropy
        Minimization", ICLR 2021, sec. 3.
    """
    logits, where = _given(logits, where)
    logits -= jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    raised = jnp.exp(logits)
    total = jnp.sum(raised, axis=-1)
    # log sum_c exp z_c - sum_c p_c z_c: no matrix of logarithms.
    values = jnp.log(total) - jnp.sum(raised * logits, axis=-1) / total
    return values if where is None else jnp.where(where, values, 0.0)


def diversity(
    logits: Float[AnyArray, "*batch classes"],
    *,
    where: Bool[AnyArray, "..."] | None = None,
) -> Float[Array, ""]:
    """Negative entropy of the mean prediction: least when all classes are predicted.

    ``sum_c q_c log q_c`` with ``q = mean_i softmax(z_i)``.

    Args:
        logits: [..., classes], finite.
        where: Which examples count [...]; default all.

    Returns:
        Scalar in [-log(classes), 0] nats, float32 or wider; 0 if no example counts.

    Raises:
        ValueError: If there is no axis of classes, or ``where`` does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> print(f"{float(diversity(jnp.array([[9.0, 0.0], [0.0, 9.0]]))):.4f}")
        -0.6931

    Reference:
        Krause, Perona and Gomes, "Discriminative Clustering by Regularized Information
        Maximization", NeurIPS 2010, sec. 2.
    """
    logits, where = _given(logits, where)
    rows = logits.reshape(-1, logits.shape[-1])
    weights = jnp.ones(len(rows)) if where is None else where.reshape(-1)
    q = mean_prediction(rows, weights.astype(rows.dtype))
    return jnp.sum(q * jnp.log(jnp.where(q > 0, q, 1.0)))


def information_maximization(
    logits: Float[AnyArray, "*batch classes"],
    *,
    where: Bool[AnyArray, "..."] | None = None,
) -> Float[Array, ""]:
    """Information maximisation (IM, SHOT): sure of each example, varied over all.

    Mean `entropy` plus `diversity`: the negative mutual information of example and
    prediction.

    Args:
        logits: [..., classes], finite.
        where: Which examples count [...]; default all.

    Returns:
        Scalar in [-log(classes), 0] nats, float32 or wider; 0 if no example counts.

    Raises:
        ValueError: If there is no axis of classes, or ``where`` does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> logits = jnp.array([[99.0, 0.0], [0.0, 99.0]])
        >>> print(f"{float(information_maximization(logits)):.4f}")
        -0.6931

    Reference:
        Liang, Hu and Feng, "Do We Really Need to Access the Source Data? Source
        Hypothesis Transfer for Unsupervised Domain Adaptation", ICML 2020, eq. 3.
        Deviation: exact logarithms; the authors' code adds 1e-5 inside.
    """
    values = entropy(logits, where=where)
    count = values.size if where is None else jnp.sum(where, dtype=values.dtype)
    return jnp.sum(values) / jnp.maximum(count, 1) + diversity(logits, where=where)


def minimum_class_confusion(
    logits: Float[AnyArray, "batch classes"],
    *,
    temperature: float | Float[AnyArray, ""] = 2.5,
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, ""]:
    """Minimum class confusion (MCC): how often two classes are predicted together.

    With ``p_i = softmax(z_i / T)``, ``w_i`` proportional to ``1 + exp(-H(p_i))`` with
    mean 1, and ``M = sum_i w_i p_i p_i'``, every row divided by its sum: the sum of M
    off its diagonal, divided by the number of classes. The weights are constants of
    the gradient.

    Args:
        logits: [batch, classes], finite.
        temperature: T, positive.
        where: Which examples count [batch]; default all.

    Returns:
        Scalar in [0, 1), float32 or wider; 0 if no example counts.

    Raises:
        ValueError: If the logits are no matrix, ``where`` does not fit or, outside of
            ``jit``, the temperature is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> print(f"{float(minimum_class_confusion(jnp.zeros((3, 4)))):.4f}")
        0.7500

    Reference:
        Jin et al., "Minimum Class Confusion for Versatile Domain Adaptation", ECCV
        2020, sec. 3. Deviation: a class that no example predicts adds nothing.
    """
    logits, where = _given(logits, where)
    if logits.ndim != 2:
        raise ValueError(f"logits must be [batch, classes], got shape {logits.shape}.")
    check_positive("temperature", temperature)
    log_p = jax.nn.log_softmax(logits / temperature)
    p = jnp.exp(log_p)
    weights = jax.lax.stop_gradient(1.0 + jnp.exp(jnp.sum(p * log_p, axis=1)))
    if where is not None:
        weights = jnp.where(where, weights, 0.0)
    count = jnp.asarray(len(p) if where is None else jnp.sum(where), p.dtype)
    total = jnp.sum(weights)
    weights = weights * count / jnp.where(total > 0, total, 1.0)
    confusion = gram((jnp.sqrt(weights)[:, None] * p).T)
    sums = jnp.sum(confusion, axis=1)
    off = jnp.sum(confusion * (1.0 - jnp.eye(len(sums), dtype=p.dtype)), axis=1)
    # Near 1 before they are divided: the square of a tiny sum, in the derivative, is 0.
    size = jax.lax.stop_gradient(jnp.where(sums > 0, sums, 1.0))
    return jnp.mean((off / size) / jnp.where(sums > 0, sums / size, 1.0))


def pseudo_label(
    logits: Float[AnyArray, "*batch classes"],
    labelling_logits: Float[AnyArray, "*batch classes"],
    *,
    threshold: float | Float[AnyArray, ""] = 0.95,
    where: Bool[AnyArray, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Pseudo-label loss (FixMatch): cross-entropy against sure predictions of others.

    ``1[max_c p_c >= t] * -log softmax(z)_{argmax_c p_c}`` with p the softmax of the
    logits that label: of a weakly changed copy of the input (FixMatch), of an averaged
    network (mean teacher), or the same logits (pseudo-label).

    Args:
        logits: [..., classes], finite; of the strongly changed copy.
        labelling_logits: [..., classes], finite; no gradient flows into them.
        threshold: t in [0, 1]; examples below it give 0. Adaptation uses 0.9.
        where: Which examples count [...]; the others give 0 and no gradient.

    Returns:
        Losses [...], float32 or wider. Their plain mean, over the unsure too, is
        FixMatch's.

    Raises:
        ValueError: If the shapes differ, ``where`` does not fit, or the threshold can
            be seen and is not in [0, 1].

    Example:
        >>> import jax.numpy as jnp
        >>> sure = jnp.array([[0.0, 9.0], [0.0, 0.1]])
        >>> print([f"{v:.4f}" for v in pseudo_label(jnp.zeros((2, 2)), sure).tolist()])
        ['0.6931', '0.0000']

    Reference:
        Sohn et al., "FixMatch: Simplifying Semi-Supervised Learning with Consistency
        and Confidence", NeurIPS 2020, eq. 4.
    """
    logits, where = _given(logits, where)
    labelling, _ = _given(labelling_logits, where)
    if logits.shape != labelling.shape:
        raise ValueError(
            "logits and labelling_logits must have the same shape, got "
            f"{logits.shape} and {labelling.shape}."
        )
    if not isinstance(threshold, Tracer) and not 0.0 <= threshold <= 1.0:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}.")
    labelling = jax.lax.stop_gradient(labelling)
    sure = jnp.max(jax.nn.softmax(labelling), axis=-1) >= threshold
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(
        logits, argmax(labelling)
    )
    return jnp.where(sure if where is None else sure & where, losses, 0.0)


def virtual_adversarial(
    inputs: Float[AnyArray, "batch ..."],
    apply: Callable[[Any], Float[Array, "batch classes"]],
    *,
    key: Array | None = None,
    radius: float | Float[AnyArray, ""] = 1.0,
    probe: float = 1e-2,
    iterations: int = 1,
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, " batch"]:
    """Virtual adversarial training (VAT): how far the worst small change moves p.

    ``KL(p(x) || p(x + r d))`` for the unit direction d that moves the prediction most,
    found by power iteration from a random one: ``d <- g / |g|`` with g the gradient of
    ``KL(p(x) || p(x + e d))`` by d. ``p(x)`` and d are constants of the gradient.

    Args:
        inputs: [batch, ...].
        apply: Inputs to logits [batch, classes], without randomness of its own (or with
            a fixed key); what it differentiates is closed over.
        key: Typed key of the first direction; default ``jax.random.key(0)``.
        radius: r, in the inputs' own units.
        probe: e, positive, small.
        iterations: Power iterations, at least 1.
        where: Which examples count [batch]; the others give 0.

    Returns:
        Losses [batch], not negative up to rounding, float32 or wider.

    Raises:
        ValueError: If ``iterations`` is below 1, ``probe`` is not positive, the logits
            are no matrix of the batch, or ``where`` does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.array([[1.0, 2.0]])
        >>> loss = virtual_adversarial(x, lambda x: x @ jnp.ones((2, 3)))
        >>> print(f"{float(loss[0]):.4f}")
        0.0000

    Reference:
        Miyato et al., "Virtual Adversarial Training: A Regularization Method for
        Supervised and Semi-Supervised Learning", IEEE TPAMI 41, 2019, sec. 3.3.
        Deviation: the authors' code has ``probe`` 1e-6, which float32 rounds away in
        inputs near 1, and ``radius`` 2.5 to 10, by data set and preprocessing.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}.")
    check_positive("probe", probe)
    inputs = widen(inputs)
    if where is not None:
        where = check_mask("where", where, inputs.shape[:1])
        inputs = jnp.where(_like(where, inputs), inputs, 0.0)
    logits = widen(apply(inputs))
    if logits.ndim != 2 or len(logits) != len(inputs):
        raise ValueError(
            f"apply must return [batch, classes] for {len(inputs)} inputs, got shape "
            f"{logits.shape}."
        )
    held = jax.lax.stop_gradient(logits)

    def divergence(change):
        return softmax_divergence(held, widen(apply(inputs + change)))

    key = jax.random.key(0) if key is None else key
    direction = unit(
        jax.random.normal(key, inputs.shape, inputs.dtype), inner_axes(inputs)
    )
    for _ in range(iterations):
        slope = jax.grad(lambda change: jnp.sum(divergence(change)))(probe * direction)
        direction = unit(slope, inner_axes(inputs))
    values = divergence(radius * jax.lax.stop_gradient(direction))
    return values if where is None else jnp.where(where, values, 0.0)


def centroid_pseudo_labels(
    features: Float[AnyArray, "batch features"],
    logits: Float[AnyArray, "batch classes"],
    *,
    rounds: int = 1,
    where: Bool[AnyArray, " batch"] | None = None,
) -> Int[Array, " batch"]:
    """Pseudo-labels by the nearest class centroid in angle (SHOT).

    Centroids ``c_k = sum_i p_ik f_i / sum_i p_ik`` of the features, extended by a 1 and
    of length 1; every example takes the centroid with the largest cosine, then the
    centroids are those of the labels, ``rounds`` times over. Only classes with an
    example have one: at first those that are some example's largest logit.

    Args:
        features: [batch, features], best of all target data at once.
        logits: Predictions [batch, classes].
        rounds: How often centroids are computed again from hard labels.
        where: Which examples make the centroids [batch]; all are labelled.

    Returns:
        Labels [batch]; a class without any example that counts is never chosen (0 if
        none counts).

    Raises:
        ValueError: If the inputs are no matrices with equal rows, or ``where`` does not
            fit.

    Example:
        >>> import jax.numpy as jnp
        >>> features = jnp.array([[4.0, 0.0], [3.0, 1.0], [0.0, 4.0]])
        >>> logits = jnp.array([[2.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
        >>> centroid_pseudo_labels(features, logits).tolist()
        [0, 0, 1]

    Reference:
        Liang, Hu and Feng, "Do We Really Need to Access the Source Data? Source
        Hypothesis Transfer for Unsupervised Domain Adaptation", ICML 2020, eqs. 5-6.
        The classes that may be chosen are those of the authors' code.
    """
    features, logits = widen(features), widen(logits)
    if features.ndim != 2 or logits.ndim != 2 or len(features) != len(logits):
        raise ValueError(
            "features and logits must be matrices with the same rows, got shapes "
            f"{features.shape} and {logits.shape}."
        )
    counts = jnp.ones(len(features), features.dtype)
    if where is not None:
        where = check_mask("where", where, features.shape[:1])
        counts = where.astype(features.dtype)
        logits = jnp.where(where[:, None], logits, 0.0)
    extended = unit(jnp.pad(features, ((0, 0), (0, 1)), constant_values=1.0))
    counted = jnp.where(counts[:, None] > 0, extended, 0.0)
    weights, labels = jax.nn.softmax(logits), argmax(logits)
    for _ in range(rounds + 1):
        centroids = unit(product(weights.T, counted))
        cosines = product(extended, centroids.T)
        hot = jax.nn.one_hot(labels, logits.shape[1], dtype=features.dtype)
        some = jnp.sum(hot * counts[:, None], axis=0) > 0
        labels = argmax(jnp.where(some, cosines, -jnp.inf))
        weights = jax.nn.one_hot(labels, logits.shape[1], dtype=features.dtype)
    return labels


def _given(logits, where):
    """Logits widened, 0 where masked, and the mask."""
    logits = widen(logits)
    if logits.ndim < 1:
        raise ValueError("logits must be [..., classes], got a scalar.")
    if where is not None:
        where = check_mask("where", where, logits.shape[:-1])
        logits = jnp.where(where[..., None], logits, 0.0)
    return logits, where


def _like(where, values):
    return where.reshape(-1, *(1,) * (values.ndim - 1))
