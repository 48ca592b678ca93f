"""Losses by which classifiers disagree about a domain (MCD, MDD)."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from jaxtransfer.losses.reduction import check_mask, mean, widen
from jaxtransfer.losses.softened import mean_prediction
from jaxtransfer.ops.order import argmax
from jaxtransfer.typing import AnyArray


def classifier_discrepancy(
    first_logits: Float[AnyArray, "... classes"],
    second_logits: Float[AnyArray, "... classes"],
    *,
    where: Bool[AnyArray, "..."] | None = None,
) -> Float[Array, "..."]:
    """Classifier discrepancy (MCD): mean absolute difference of two softmaxes.

    ``(1/C) sum_c |softmax(z)_c - softmax(z')_c|``. On target examples, two classifiers
    raise it and the features lower it, in turn or through
    `jaxtransfer.ops.gradient_reversal`.

    Args:
        first_logits: Logits z of one classifier [..., classes].
        second_logits: Logits z' of the other, of the same shape. Both get gradients.
        where: Which examples count [...]; the others give 0 and no gradient.

    Returns:
        Discrepancies [...], float32 or wider, in [0, 2 / classes].

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> import jax.numpy as jnp
        >>> first, second = jnp.array([[99.0, 0.0]]), jnp.array([[0.0, 99.0]])
        >>> classifier_discrepancy(first, second).tolist()
        [1.0]

    Reference:
        Saito et al., "Maximum Classifier Discrepancy for Unsupervised Domain
        Adaptation", CVPR 2018, sec. 3.
    """
    first, second = widen(first_logits), widen(second_logits)
    if first.shape != second.shape or not first.ndim:
        raise ValueError(
            "first_logits and second_logits must have one shape [..., classes], got "
            f"{first.shape} and {second.shape}."
        )
    if where is not None:
        where = check_mask("where", where, first.shape[:-1])
        first = jnp.where(where[..., None], first, 0.0)
        second = jnp.where(where[..., None], second, 0.0)
    differences = jnp.abs(jax.nn.softmax(first) - jax.nn.softmax(second))
    values = jnp.mean(differences, axis=-1)
    return values if where is None else jnp.where(where, values, 0.0)


def class_balance(
    logits: Float[AnyArray, "n classes"],
    *,
    epsilon: float = 1e-6,
    where: Bool[AnyArray, " n"] | None = None,
) -> Float[Array, ""]:
    """Class-balance loss (MCD): cross-entropy of the mean prediction with uniform.

    ``-(1/C) sum_c log(mean_i softmax(z_i)_c + e)``: least, log C, if all classes are
    predicted equally often.

    Args:
        logits: Logits z of a batch [n, classes].
        epsilon: The constant e, not negative; 1e-6 in the authors' code.
        where: Which examples count [n]; default all.

    Returns:
        Scalar, float32 or wider; 0 if no example counts.

    Raises:
        ValueError: If the logits are not a matrix with rows, or ``epsilon`` is
            negative.

    Example:
        >>> import jax.numpy as jnp
        >>> balanced, one_class = jnp.eye(2) * 9.0, jnp.array([[9.0, 0.0]])
        >>> print([f"{float(class_balance(z)):.4f}" for z in (balanced, one_class)])
        ['0.6931', '4.4961']

    Reference:
        Saito et al., "Maximum Classifier Discrepancy for Unsupervised Domain
        Adaptation", CVPR 2018, sec. 4, which adds 0.01 times it on large data sets.
    """
    logits = widen(logits)
    if logits.ndim != 2 or not logits.size:
        raise ValueError(f"logits must be [examples, classes], got {logits.shape}.")
    if not isinstance(epsilon, Tracer) and not epsilon >= 0:
        raise ValueError(f"epsilon must not be negative, got {epsilon}.")
    where = check_mask("where", True if where is None else where, logits.shape[:1])
    any_counts = jnp.any(where)
    # If no row counts, all do, as zeros: finite, and replaced at the end.
    logits = jnp.where(where[:, None], logits, 0.0)
    weights = jnp.where(any_counts, where, True).astype(logits.dtype)
    if isinstance(epsilon, Tracer) or epsilon > 0:
        log_mean = jnp.log(mean_prediction(logits, weights) + epsilon)
    else:  # the mean may be too small for a float
        log_p = jax.nn.log_softmax(logits)
        log_mean = jax.nn.logsumexp(log_p, axis=0, b=weights[:, None])
        log_mean = log_mean - jnp.log(jnp.sum(weights))
    return jnp.where(any_counts, -jnp.mean(log_mean), 0.0)


def margin_disparity_discrepancy(
    source_logits: Float[AnyArray, "n classes"],
    source_adversarial_logits: Float[AnyArray, "n classes"],
    target_logits: Float[AnyArray, "m classes"],
    target_adversarial_logits: Float[AnyArray, "m classes"],
    *,
    margin: float | Float[AnyArray, ""] = 4.0,
    form: Literal["paper", "code"] = "paper",
    source_where: Bool[AnyArray, " n"] | None = None,
    target_where: Bool[AnyArray, " m"] | None = None,
) -> Float[Array, ""]:
    """Margin disparity discrepancy (MDD) between two domains, by a second classifier.

    ``mean_t log(1 - softmax(a_t)_y) + gamma mean_s log softmax(a_s)_y`` with the class
    y that the first classifier predicts for each example and the logits a of the
    second. The second classifier raises it and the features lower it: subtract it from
    the cross-entropy and let the features go to the second classifier through
    `jaxtransfer.ops.gradient_reversal`.

    Args:
        source_logits: The first classifier's logits on source examples [n, classes],
            at least two classes. Only their argmax counts: no gradient.
        source_adversarial_logits: The second classifier's logits on them [n, classes].
        target_logits: The first classifier's logits on target examples [m, classes].
        target_adversarial_logits: The second classifier's logits on them.
        margin: The factor gamma, the exponential of the margin; positive.
        form: "paper" is exact; "code" has ``log(min(1 - p + 1e-6, 1))`` in the target
            term, as TLlib, which is bounded and has no gradient at p near 0 and 1.
        source_where: Which source examples count [n]; default all.
        target_where: Which target examples count [m]; default all.

    Returns:
        Scalar, float32 or wider, at most 0. A side without any example that counts
        adds 0.

    Raises:
        ValueError: If shapes do not match or an option is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> zeros = jnp.zeros((3, 2))
        >>> print(f"{float(margin_disparity_discrepancy(*[zeros] * 4)):.4f}")
        -3.4657

    Reference:
        Zhang et al., "Bridging Theory and Algorithm for Domain Adaptation", ICML 2019,
        sec. 4.
    """
    if form not in ("paper", "code"):
        raise ValueError(f'form must be "paper" or "code", got {form!r}.')
    if not isinstance(margin, Tracer) and not margin > 0:
        raise ValueError(f"margin must be positive, got {margin}.")
    source, source_where = _log_predicted(
        "source", source_logits, source_adversarial_logits, source_where
    )
    target, target_where = _log_predicted(
        "target", target_logits, target_adversarial_logits, target_where
    )
    if form == "paper":
        apart = target[1]
    else:
        apart = jnp.log(jnp.minimum(-jnp.expm1(target[0]) + 1e-6, 1.0))
    return mean(apart, where=target_where) + margin * mean(
        source[0], where=source_where
    )


def _log_predicted(name, logits, adversarial, where):
    """Log p and log(1 - p) of the classes predicted, by the second classifier."""
    logits, adversarial = widen(logits), widen(adversarial)
    if logits.shape != adversarial.shape or logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"{name}_logits and {name}_adversarial_logits must have one shape "
            f"[examples, classes] with at least two classes, got {logits.shape} and "
            f"{adversarial.shape}."
        )
    if where is not None:
        where = check_mask(f"{name}_where", where, logits.shape[:1])
        logits = jnp.where(where[:, None], logits, 0.0)
        adversarial = jnp.where(where[:, None], adversarial, 0.0)
    predicted = jax.nn.one_hot(argmax(logits), logits.shape[1], dtype=bool)
    logs = jax.nn.log_softmax(adversarial)
    of_predicted = jnp.sum(jnp.where(predicted, logs, 0.0), axis=1)
    of_others = jax.nn.logsumexp(jnp.where(predicted, -jnp.inf, logs), axis=1)
    return (of_predicted, of_others), where
