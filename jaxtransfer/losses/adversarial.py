"""Losses of a critic that tells source from target; scalars over both sets."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from jaxtransfer.losses.reduction import check_mask, mean, widen
from jaxtransfer.typing import AnyArray


def domain_adversarial(
    source_logits: Float[AnyArray, "n ..."],
    target_logits: Float[AnyArray, "m ..."],
    *,
    source_where: Bool[AnyArray, " n"] | None = None,
    target_where: Bool[AnyArray, " m"] | None = None,
) -> Float[Array, ""]:
    """Domain-adversarial loss (DANN): the critic's binary cross-entropy.

    ``(mean -log sigmoid(c_s) + mean -log(1 - sigmoid(c_t))) / 2``: source is 1, target
    0, and both sides weigh the same whatever their sizes. Give the critic features
    that went through `jaxtransfer.ops.gradient_reversal`.

    Args:
        source_logits: The critic's logits on source features, [n] or [n, 1].
        target_logits: The critic's logits on target features, [m] or [m, 1].
        source_where: Which source examples count [n]; default all.
        target_where: Which target examples count [m]; default all.

    Returns:
        Scalar, float32 or wider; log 2 = 0.693 when the critic can't tell. A side
        without any example that counts adds 0.

    Raises:
        ValueError: If the logits are not [n] or [n, 1].

    Example:
        >>> import jax.numpy as jnp
        >>> print(f"{float(domain_adversarial(jnp.zeros(2), jnp.zeros(3))):.4f}")
        0.6931

    Reference:
        Ganin et al., "Domain-Adversarial Training of Neural Networks", JMLR 17, 2016,
        eq. 7. Deviation: the paper numbers source 0 and target 1, which only flips the
        sign of the critic's logits.
    """
    source, source_where = _logits("source", source_logits, source_where)
    target, target_where = _logits("target", target_logits, target_where)
    losses = optax.losses.sigmoid_binary_cross_entropy
    return 0.5 * (
        mean(losses(source, jnp.ones_like(source)), where=source_where)
        + mean(losses(target, jnp.zeros_like(target)), where=target_where)
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
    source, source_where = _logits("source", source_logits, source_where)
    target, target_where = _logits("target", target_logits, target_where)
    return 0.5 * (
        mean(source > 0, where=source_where) + mean(target <= 0, where=target_where)
    )


def _logits(name, logits, where):
    """The logits as [n], 0 where masked, and the mask."""
    logits = widen(logits)
    if logits.ndim == 2 and logits.shape[1] == 1:
        logits = logits[:, 0]
    if logits.ndim != 1:
        raise ValueError(
            f"{name}_logits must be [examples] or [examples, 1], got shape "
            f"{logits.shape}; the critic has one output."
        )
    if where is not None:
        where = check_mask(f"{name}_where", where, logits.shape)
        logits = jnp.where(where, logits, 0.0)
    return logits, where
