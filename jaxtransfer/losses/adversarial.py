"""Losses of a critic that tells source from target, and what it is conditioned on."""

from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Key

from jaxtransfer.losses.reduction import check_mask, mean, widen
from jaxtransfer.losses.sets import critic_outputs
from jaxtransfer.ops.products import product
from jaxtransfer.typing import AnyArray


def domain_adversarial(
    source_logits: Float[AnyArray, "n ..."],
    target_logits: Float[AnyArray, "m ..."],
    *,
    source_weights: Float[AnyArray, " n"] | None = None,
    target_weights: Float[AnyArray, " m"] | None = None,
    source_where: Bool[AnyArray, " n"] | None = None,
    target_where: Bool[AnyArray, " m"] | None = None,
) -> Float[Array, ""]:
    """Domain-adversarial loss (DANN, CDAN): the critic's binary cross-entropy.

    ``(mean -w_s log sigmoid(c_s) + mean -w_t log(1 - sigmoid(c_t))) / 2``: source is 1,
    target 0, and both sides weigh the same whatever their sizes. Give the critic
    features that went through `jaxtransfer.ops.gradient_reversal`; for CDAN, their
    `multilinear_map`, and for CDAN+E the weights of `entropy_weights`.

    Args:
        source_logits: The critic's logits on source features, [n] or [n, 1].
        target_logits: The critic's logits on target features, [m] or [m, 1].
        source_weights: Weights w_s of the examples [n], of mean 1 over those that
            count; default 1. They get no gradient.
        target_weights: Weights w_t of the examples [m], in the same way.
        source_where: Which source examples count [n]; default all.
        target_where: Which target examples count [m]; default all.

    Returns:
        Scalar, float32 or wider; log 2 = 0.693 when the critic can't tell. A side
        without any example that counts adds 0.

    Raises:
        ValueError: If the logits are not [n] or [n, 1], or the weights not [n].

    Example:
        >>> import jax.numpy as jnp
        >>> print(f"{float(domain_adversarial(jnp.zeros(2), jnp.zeros(3))):.4f}")
        0.6931

    Reference:
        Ganin et al., "Domain-Adversarial Training of Neural Networks", JMLR 17, 2016,
        eq. 7. Deviations: half of the paper's sum, as in TLlib, so that a weight of 1
        here is 1/2 there; the paper numbers source 0 and target 1, which only flips
        the sign of the critic's logits. Weights: Long et al., "Conditional Adversarial
        Domain Adaptation", NeurIPS 2018, sec. 3. Deviation: weights are constants, as
        in TLlib; the authors' code reverses a gradient through the entropy too.
    """
    source, source_where = critic_outputs("source", source_logits, source_where)
    target, target_where = critic_outputs("target", target_logits, target_where)
    losses = optax.losses.sigmoid_binary_cross_entropy
    of_source = losses(source, jnp.ones_like(source))
    of_target = losses(target, jnp.zeros_like(target))
    of_source = _weighted("source", of_source, source_weights, source_where)
    of_target = _weighted("target", of_target, target_weights, target_where)
    return 0.5 * (
        mean(of_source, where=source_where) + mean(of_target, where=target_where)
    )


def domain_accuracy(
    source_logits: Float[AnyArray, "n ..."],
    target_logits: Float[AnyArray, "m ..."],
    *,
    source_where: Bool[AnyArray, " n"] | None = None,
    target_where: Bool[AnyArray, " m"] | None = None,
) -> Float[Array, ""]:
    """Balanced accuracy of a critic that tells source (positive) from target.

    ``(mean 1[c_s > 0] + mean 1[c_t <= 0]) / 2``.

    Args:
        source_logits: The critic's logits on source features, [n] or [n, 1].
        target_logits: The critic's logits on target features, [m] or [m, 1].
        source_where: Which source examples count [n]; default all.
        target_where: Which target examples count [m]; default all.

    Returns:
        Scalar in [0, 1]; 0.5 is chance, the aim of the features.

    Raises:
        ValueError: If the logits are not [n] or [n, 1].

    Example:
        >>> import jax.numpy as jnp
        >>> float(domain_accuracy(jnp.array([1.0, -1.0]), jnp.array([-1.0])))
        0.75
    """
    source, source_where = critic_outputs("source", source_logits, source_where)
    target, target_where = critic_outputs("target", target_logits, target_where)
    return 0.5 * (
        mean(source > 0, where=source_where) + mean(target <= 0, where=target_where)
    )


def inverted_label_adversarial(
    target_logits: Float[AnyArray, "n ..."],
    *,
    where: Bool[AnyArray, " n"] | None = None,
) -> Float[Array, " n"]:
    """Inverted-label loss of a target encoder (ADDA): targets pass for source.

    ``-log sigmoid(c_t)``: the cross-entropy of the target examples with the label 1 of
    the source. The encoder lowers it with the critic frozen, the critic lowers
    `domain_adversarial` with the encoders frozen, in turn and without a gradient
    reversal. Unlike the reversed loss, its gradient does not vanish when the critic
    wins.

    Args:
        target_logits: The critic's logits on target features, [n] or [n, 1].
        where: Which examples count [n]; the others give 0 and no gradient.

    Returns:
        Losses [n], float32 or wider.

    Raises:
        ValueError: If the logits are not [n] or [n, 1].

    Example:
        >>> import jax.numpy as jnp
        >>> losses = inverted_label_adversarial(jnp.array([0.0, -20.0]))
        >>> print([f"{loss:.4f}" for loss in losses.tolist()])
        ['0.6931', '20.0000']

    Reference:
        Tzeng et al., "Adversarial Discriminative Domain Adaptation", CVPR 2017, sec. 4.
    """
    if where is not None:
        where = check_mask("where", where, jnp.shape(target_logits)[:1])
    logits, where = critic_outputs("target", target_logits, where)
    losses = jax.nn.softplus(-logits)
    return losses if where is None else jnp.where(where, losses, 0.0)


def domain_confusion(
    logits: Float[AnyArray, "n ..."],
    *,
    where: Bool[AnyArray, " n"] | None = None,
) -> Float[Array, " n"]:
    """Domain confusion loss: cross-entropy of the critic with the uniform label.

    ``-(1/D) sum_d log q_d`` with the critic's probabilities q of the D domains. The
    features lower it on examples of every domain with the critic frozen, while the
    critic learns the true domains.

    Args:
        logits: The critic's logits: [n] or [n, 1] for two domains (a sigmoid), or
            [n, domains] for a softmax.
        where: Which examples count [n]; the others give 0 and no gradient.

    Returns:
        Losses [n], float32 or wider; at least log D.

    Raises:
        ValueError: If the logits have another number of axes.

    Example:
        >>> import jax.numpy as jnp
        >>> losses = domain_confusion(jnp.array([0.0, 2.0]))
        >>> print([f"{loss:.4f}" for loss in losses.tolist()])
        ['0.6931', '1.1269']

    Reference:
        Tzeng et al., "Simultaneous Deep Transfer Across Domains and Tasks", ICCV 2015,
        sec. 3.
    """
    logits = widen(logits)
    if logits.ndim == 1:
        logits = logits[:, None]
    if logits.ndim != 2:
        raise ValueError(
            f"logits must be [examples] or [examples, domains], got {logits.shape}."
        )
    if where is not None:
        where = check_mask("where", where, logits.shape[:1])
        logits = jnp.where(where[:, None], logits, 0.0)
    if logits.shape[1] == 1:
        logits = jnp.concatenate([logits, jnp.zeros_like(logits)], axis=1)
    losses = -jnp.mean(jax.nn.log_softmax(logits), axis=1)
    return losses if where is None else jnp.where(where, losses, 0.0)


def multilinear_map(
    features: Float[AnyArray, "n features"],
    probabilities: Float[AnyArray, "n classes"],
    *,
    where: Bool[AnyArray, " n"] | None = None,
) -> Float[Array, "n joint"]:
    """Multilinear map (CDAN): what a conditional domain critic sees.

    ``vec(g f^T)``: the products of every probability g with every feature f, class
    after class: entry ``c * features + k`` is ``g_c f_k``.

    Args:
        features: Features f [n, features].
        probabilities: The classifier's probabilities g [n, classes]; a constant of the
            gradient.
        where: Which rows count [n]; the others are 0 and get no gradient.

    Returns:
        Joint features [n, classes * features], float32 or wider.

    Raises:
        ValueError: If the inputs are not matrices with equally many rows.

    Example:
        >>> import jax.numpy as jnp
        >>> features, probabilities = jnp.array([[1.0, 2.0]]), jnp.array([[0.25, 0.75]])
        >>> multilinear_map(features, probabilities).tolist()
        [[0.25, 0.5, 0.75, 1.5]]

    Reference:
        Long et al., "Conditional Adversarial Domain Adaptation", NeurIPS 2018, sec. 3.
    """
    features, probabilities = _conditioned(features, probabilities, where)
    products = jnp.einsum(
        "nc,nf->ncf", probabilities, features, precision=jax.lax.Precision.HIGHEST
    )
    return products.reshape(len(features), -1)


def randomized_multilinear_map(
    features: Float[AnyArray, "n features"],
    probabilities: Float[AnyArray, "n classes"],
    *,
    key: Key[Array, ""] | None = None,
    width: int = 1024,
    projections: tuple[
        Float[AnyArray, "features width"], Float[AnyArray, "classes width"]
    ]
    | None = None,
    where: Bool[AnyArray, " n"] | None = None,
) -> Float[Array, "n width"]:
    """Randomized multilinear map (CDAN): the multilinear map in fewer dimensions.

    ``(f R_f) * (g R_g) / sqrt(width)`` by entries, with matrices R of independent
    standard normal numbers. Inner products of two results are on average those of
    `multilinear_map`. For use when classes times features exceed 4096.

    Args:
        features: Features f [n, features].
        probabilities: The classifier's probabilities g [n, classes]; a constant of the
            gradient.
        key: Draws both matrices. They must stay the same throughout training and for
            both domains: give the same key every time.
        width: Length of the results, at least 1.
        projections: The matrices (R_f, R_g) themselves, in place of ``key``.
        where: Which rows count [n]; the others are 0 and get no gradient.

    Returns:
        Joint features [n, width], float32 or wider.

    Raises:
        ValueError: If the inputs are not matrices with equally many rows, not exactly
            one of ``key`` and ``projections`` is given, or shapes do not match.

    Example:
        >>> import jax.numpy as jnp
        >>> features, probabilities = jnp.array([[3.0, 2.0]]), jnp.array([[0.5, 0.5]])
        >>> matrices = jnp.eye(2, 4), jnp.ones((2, 4))
        >>> randomized_multilinear_map(
        ...     features, probabilities, projections=matrices
        ... ).tolist()
        [[1.5, 1.0, 0.0, 0.0]]

    Reference:
        Long et al., "Conditional Adversarial Domain Adaptation", NeurIPS 2018, sec. 3.
    """
    features, probabilities = _conditioned(features, probabilities, where)
    if (key is None) == (projections is None):
        raise ValueError(
            "give either key (as in key=jax.random.key(0)) or projections, got "
            f"{'neither' if key is None else 'both'}."
        )
    parts = (features, probabilities)
    if projections is None:
        matrices = _random_matrices(key, parts, width)
    else:
        matrices = tuple(map(widen, projections))
        shapes = [matrix.shape for matrix in matrices]
        width = shapes[0][-1]
        expected = [(part.shape[1], width) for part in parts]
        if shapes != expected:
            raise ValueError(f"projections must have shapes {expected}, got {shapes}.")
    of_features, of_probabilities = (
        product(part, matrix) for part, matrix in zip(parts, matrices, strict=True)
    )
    return of_features * of_probabilities / width**0.5


def entropy_weights(
    source_logits: Float[AnyArray, "n classes"],
    target_logits: Float[AnyArray, "m classes"],
    *,
    normalization: Literal["per_domain", "joint"] = "per_domain",
    epsilon: float | Float[AnyArray, ""] = 0.0,
    source_where: Bool[AnyArray, " n"] | None = None,
    target_where: Bool[AnyArray, " m"] | None = None,
) -> tuple[Float[Array, " n"], Float[Array, " m"]]:
    """Entropy weights of examples (CDAN+E): certain ones count more, up to twice.

    ``w = 1 + exp(-H(p))`` with the entropy H of the class probabilities p, divided by
    the mean of w.

    Args:
        source_logits: The classifier's logits on source examples [n, classes].
        target_logits: The classifier's logits on target examples [m, classes].
        normalization: "per_domain", the authors' code, divides each side by its own
            mean; "joint", as TLlib, divides both by the mean over all examples.
        epsilon: What is added to p inside the logarithm of H, not negative. Both codes
            add 1e-5.
        source_where: Which source examples count [n]; the others get weight 0.
        target_where: Which target examples count [m]; the others get weight 0.

    Returns:
        Weights [n] and [m], float32 or wider, for `domain_adversarial`. They are
        constants: no gradient reaches the logits.

    Raises:
        ValueError: If the logits are not matrices or an option is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> sure, unsure = jnp.array([[99.0, 0.0]]), jnp.array([[0.0, 0.0]])
        >>> weights = entropy_weights(sure, unsure, normalization="joint")
        >>> print([f"{float(w[0]):.4f}" for w in weights])
        ['1.1429', '0.8571']

    Reference:
        Long et al., "Conditional Adversarial Domain Adaptation", NeurIPS 2018, sec. 3.
    """
    if normalization not in ("per_domain", "joint"):
        raise ValueError(
            f'normalization must be "per_domain" or "joint", got {normalization!r}.'
        )
    traced = isinstance(epsilon, Tracer)
    if not traced and not epsilon >= 0:
        raise ValueError(f"epsilon must not be negative, got {epsilon}.")
    weights = []
    for name, logits, where in (
        ("source", source_logits, source_where),
        ("target", target_logits, target_where),
    ):
        logits = jax.lax.stop_gradient(widen(logits))
        if logits.ndim != 2:
            raise ValueError(
                f"{name}_logits must be [examples, classes], got shape {logits.shape}."
            )
        where = True if where is None else where
        where = check_mask(f"{name}_where", where, logits.shape[:1])
        logits = jnp.where(where[:, None], logits, 0.0)
        of_log = jax.nn.log_softmax(logits)
        exact = not traced and epsilon == 0
        shifted = of_log if exact else jnp.log(jnp.exp(of_log) + epsilon)
        entropy = -jnp.sum(jnp.exp(of_log) * shifted, axis=1)
        weights.append((jnp.where(where, 1.0 + jnp.exp(-entropy), 0.0), where))
    if normalization == "joint":
        together = (jnp.concatenate(parts) for parts in zip(*weights, strict=True))
        scales = [_mean_weight(*together)] * 2
    else:
        scales = [_mean_weight(*side) for side in weights]
    (of_source, _), (of_target, _) = weights
    return of_source / scales[0], of_target / scales[1]


def _mean_weight(weights, where):
    """The mean weight of the examples that count; 1 if none does."""
    count = jnp.sum(where, dtype=weights.dtype)
    return jnp.where(count > 0, jnp.sum(weights) / jnp.maximum(count, 1.0), 1.0)


def _weighted(name, losses, weights, where):
    if weights is None:
        return losses
    weights = jax.lax.stop_gradient(widen(weights))
    if weights.shape != losses.shape:
        raise ValueError(
            f"{name}_weights must be one an example, {losses.shape}, got shape "
            f"{weights.shape}."
        )
    return losses * (weights if where is None else jnp.where(where, weights, 0.0))


def _random_matrices(key, parts, width):
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}.")
    keys = jax.random.split(key)
    return tuple(
        jax.random.normal(one, (part.shape[1], width), part.dtype)
        for one, part in zip(keys, parts, strict=True)
    )


def _conditioned(features, probabilities, where):
    """Features and constant probabilities, 0 where masked."""
    features = widen(features)
    probabilities = jax.lax.stop_gradient(widen(probabilities))
    if (
        features.ndim != 2
        or probabilities.ndim != 2
        or len(features) != len(probabilities)
    ):
        raise ValueError(
            "features and probabilities must be [examples, features] and [examples, "
            f"classes], got shapes {features.shape} and {probabilities.shape}."
        )
    if where is None:
        return features, probabilities
    where = check_mask("where", where, features.shape[:1])[:, None]
    return jnp.where(where, features, 0.0), jnp.where(where, probabilities, 0.0)
