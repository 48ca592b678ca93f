"""Losses that hold a fine-tuned network to what its source network knows."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Integer

from jaxtransfer.losses.distillation import knowledge_distillation
from jaxtransfer.losses.reduction import check_mask, widen
from jaxtransfer.losses.sets import checked_labels, matrix
from jaxtransfer.ops.products import product
from jaxtransfer.typing import AnyArray


def behavioral_regularization(
    feature_maps: Float[AnyArray, "batch *space channels"],
    anchor_maps: Float[AnyArray, "batch *space channels"],
    *,
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, " batch"]:
    """Behavioural regularisation (DELTA without attention), per example.

    ``|FM - FM_0|^2 / 2``: half the squared distance between the feature maps of the
    network and those of the source network for the same input, summed over places and
    channels.

    Args:
        feature_maps: Feature maps [batch, height, width, channels] of the network being
            tuned; any number of axes of space, none included.
        anchor_maps: The source network's, of the same shape; no gradient flows into
            them.
        where: Which examples count [batch]; the others give 0 and no gradient.

    Returns:
        Losses [batch], float32 or wider.

    Raises:
        ValueError: If the shapes differ or are not [batch, ..., channels].

    Example:
        >>> import jax.numpy as jnp
        >>> maps = jnp.ones((2, 3, 3, 4))
        >>> behavioral_regularization(maps, 0.0 * maps).tolist()
        [18.0, 18.0]

    Reference:
        Li et al., "DELTA: Deep Learning Transfer using Feature Map with Attention for
        Convolutional Networks", ICLR 2019, sec. 3, with equal weights of the channels;
        the half is the authors' code.
    """
    squares = _squares_by_channel(feature_maps, anchor_maps, where)
    return 0.5 * jnp.sum(squares, axis=-1)


def attentive_behavioral_regularization(
    feature_maps: Float[AnyArray, "batch *space channels"],
    anchor_maps: Float[AnyArray, "batch *space channels"],
    attention: Float[AnyArray, " channels"],
    *,
    form: Literal["code", "paper"] = "code",
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, " batch"]:
    """Behavioural regularisation with attention over channels (DELTA), per example.

    ``C / (2 h w) sum_c a_c |FM_c - FM_0c|^2`` for C channels and maps of h x w places:
    with equal weights ``a_c = 1 / C`` half the squared distance per place. Over several
    layers the losses are added up.

    Args:
        feature_maps: Feature maps [batch, height, width, channels] of the network being
            tuned; any number of axes of space, none included.
        anchor_maps: The source network's, of the same shape; no gradient flows into
            them.
        attention: Weights a [channels], as of `channel_attention`; no gradient flows
            into them.
        form: "code" as above; "paper" for ``sum_c a_c |FM_c - FM_0c|^2``.
        where: Which examples count [batch]; the others give 0 and no gradient.

    Returns:
        Losses [batch], float32 or wider.

    Raises:
        ValueError: If the shapes of the maps differ or are not [batch, ..., channels],
            ``attention`` is not [channels] or ``form`` unknown.

    Example:
        >>> import jax.numpy as jnp
        >>> maps = jnp.ones((2, 3, 3, 4))
        >>> attention = jnp.array([1.0, 0.0, 0.0, 0.0])
        >>> attentive_behavioral_regularization(maps, 0.0 * maps, attention).tolist()
        [2.0, 2.0]

    Reference:
        Li et al., "DELTA: Deep Learning Transfer using Feature Map with Attention for
        Convolutional Networks", ICLR 2019, sec. 3.
    """
    if form not in ("code", "paper"):
        raise ValueError(f'form must be "code" or "paper", got {form!r}.')
    squares = _squares_by_channel(feature_maps, anchor_maps, where)
    attention = jax.lax.stop_gradient(widen(attention))
    channels = squares.shape[-1]
    if attention.shape != (channels,):
        raise ValueError(
            f"attention must be [channels], here [{channels}], got {attention.shape}."
        )
    losses = jnp.sum(attention[None] * squares, axis=-1)
    if form == "paper":
        return losses
    places = math.prod(jnp.shape(feature_maps)[1:-1])
    return 0.5 * channels / places * losses


def channel_attention(
    values: Float[AnyArray, " channels"],
    loss: Float[AnyArray, ""],
    *,
    temperature: float | Float[AnyArray, ""] = 5.0,
) -> Float[Array, " channels"]:
    """Attention over channels by what the loss gains without each (DELTA).

    ``softmax((d - mean d) / (std d * T))`` with ``d_c = values_c - loss``: a filter
    weighs the more, the more the source network's loss rises when it is set to zero.

    Args:
        values: Losses [channels] of the source network under a newly fitted head, each
            with the filter of one channel at zero, averaged over data.
        loss: Its loss with all filters, averaged over the same data.
        temperature: T, positive; large ones make the attention more even.

    Returns:
        Attention [channels], of sum 1, float32 or wider; even if all losses are equal.

    Raises:
        ValueError: If ``values`` is not [channels] or ``temperature`` not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> attention = channel_attention(jnp.array([1.0, 3.0]), jnp.array(0.5))
        >>> print([f"{weight:.4f}" for weight in attention.tolist()])
        ['0.4013', '0.5987']

    Reference:
        Li et al., "DELTA: Deep Learning Transfer using Feature Map with Attention for
        Convolutional Networks", ICLR 2019, sec. 3. Deviation: standardised and divided
        by 5 before the softmax, as in the authors' code; that makes the loss of all
        filters cancel.
    """
    if not isinstance(temperature, Tracer) and not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")
    values, loss = widen(values), widen(loss)
    if values.ndim != 1 or values.size == 0 or loss.ndim:
        raise ValueError(
            "values must be [channels], one or more, and loss a scalar, got shapes "
            f"{values.shape} and {loss.shape}."
        )
    rises = values - loss
    centred = rises - jnp.mean(rises)
    variance = jnp.mean(centred**2)
    spread = variance > 0
    deviation = jnp.sqrt(jnp.where(spread, variance, 1.0))
    scores = jnp.where(spread, centred / deviation, 0.0)
    return jax.nn.softmax(scores / temperature)


def learning_without_forgetting(
    logits: Float[AnyArray, "*batch classes"],
    recorded_logits: Float[AnyArray, "*batch classes"],
    *,
    temperature: float | Float[Array, ""] = 2.0,
    where: Bool[AnyArray, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Learning without forgetting (LwF): the old head says what it said, per example.

    ``KL(softmax(z_0 / T) || softmax(z / T))`` for inputs of the new task: distillation
    without the factor T^2, so it is `knowledge_distillation` divided by T^2. Multiply
    by it to keep the gradient's size when T changes.

    Args:
        logits: The network's present outputs by its old head [..., classes], finite.
        recorded_logits: The outputs for the same inputs before the new task, finite; no
            gradient flows into them.
        temperature: T, positive: 2 in the paper, 3 in later libraries.
        where: Which examples count [...]; the others give 0 and no gradient.

    Returns:
        Losses [...], non-negative up to rounding, float32 or wider.

    Raises:
        ValueError: If the shapes differ or the temperature is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> logits = jnp.array([[1.0, 2.0]])
        >>> learning_without_forgetting(logits, logits).tolist()
        [0.0]

    Reference:
        Li and Hoiem, "Learning without Forgetting", ECCV 2016, sec. 3. Deviation: the
        divergence in place of the cross-entropy, which differs by a constant.
    """
    return (
        knowledge_distillation(
            logits, recorded_logits, temperature=temperature, where=where
        )
        / temperature**2
    )


def category_relationship(
    probabilities: Float[AnyArray, "n source_classes"],
    labels: Integer[AnyArray, " n"],
    classes: int,
    *,
    where: Bool[AnyArray, " n"] | None = None,
) -> Float[Array, "{classes} source_classes"]:
    """Category relationship of Co-Tuning, directly: ``p(y_s | y_t)``.

    ``R_ts = mean of p_s(x_i) over the i with y_i = t``: what the source classifier says
    on average about the examples of a target class.

    Args:
        probabilities: The source classifier's predictions [n, source classes] for
            target data; calibrate them by a temperature first.
        labels: Target classes [n] in [0, classes).
        classes: How many target classes there are.
        where: Which examples count [n]; default all.

    Returns:
        Rows [classes, source classes] that sum to 1, float32 or wider; 0 for a class
        without an example, which `co_tuning` then leaves alone. A label out of range
        that can't be seen because it is traced gives not-a-number everywhere.

    Raises:
        ValueError: If shapes do not match or, outside of ``jit``, labels are out of
            range.

    Example:
        >>> import jax.numpy as jnp
        >>> probabilities = jnp.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
        >>> category_relationship(probabilities, jnp.array([0, 0, 1]), 2).tolist()
        [[0.75, 0.25], [0.0, 1.0]]

    Reference:
        You et al., "Co-Tuning for Transfer Learning", NeurIPS 2020, sec. 3, the direct
        approach.
    """
    probabilities = matrix("probabilities", probabilities)
    labels, valid, where = checked_labels(labels, len(probabilities), classes, where)
    probabilities = jnp.where(where[:, None], probabilities, 0.0)
    members = jax.nn.one_hot(
        jnp.where(where, labels, -1), classes, dtype=probabilities.dtype
    )
    totals = product(members.T, probabilities)
    means = totals / jnp.maximum(jnp.sum(members, axis=0), 1.0)[:, None]
    return means * jnp.where(jnp.all(valid), 1.0, jnp.nan).astype(means.dtype)


def calibrated_category_relationship(
    logits: Float[AnyArray, "source_classes classes"],
    probabilities: Float[AnyArray, "n source_classes"],
    *,
    where: Bool[AnyArray, " n"] | None = None,
) -> Float[Array, "classes source_classes"]:
    """Category relationship of Co-Tuning, by the reverse classifier and Bayes' rule.

    ``R_ts = p(t | s) p(s) / sum_s' p(t | s') p(s')`` with ``p(t | s)`` the softmax over
    t of the logits and ``p(s)`` the mean of the probabilities.

    Args:
        logits: Kernel [source classes, classes] of a linear classifier without bias
            that predicts the target label from the source probabilities, times its
            calibrated inverse temperature: row s is its answer to a sure s.
        probabilities: The source classifier's predictions [n, source classes] for
            target data.
        where: Which examples count [n]; default all.

    Returns:
        Rows [classes, source classes] that sum to 1, float32 or wider.

    Raises:
        ValueError: If shapes do not match.

    Example:
        >>> import jax.numpy as jnp
        >>> logits = jnp.array([[9.0, 0.0], [0.0, 9.0]])
        >>> rows = calibrated_category_relationship(logits, jnp.array([[0.5, 0.5]]))
        >>> print([[f"{p:.3f}" for p in row] for row in rows.tolist()])
        [['1.000', '0.000'], ['0.000', '1.000']]

    Reference:
        You et al., "Co-Tuning for Transfer Learning", NeurIPS 2020, sec. 3, the reverse
        approach. Deviation: as in the authors' code, p(y_t) follows from the other two,
        so that the rows are distributions.
    """
    logits = matrix("logits", logits)
    probabilities = matrix("probabilities", probabilities)
    if probabilities.shape[1] != len(logits):
        raise ValueError(
            "probabilities must be [n, source classes] for logits [source classes, "
            f"classes], got {probabilities.shape} and {logits.shape}."
        )
    where = check_mask(
        "where", True if where is None else where, probabilities.shape[:1]
    )
    probabilities = jnp.where(where[:, None], probabilities, 0.0)
    count = jnp.sum(where, dtype=probabilities.dtype)
    prior = jnp.sum(probabilities, axis=0) / jnp.maximum(count, 1.0)
    # A finite "never": no row is without a largest entry.
    log_prior = jnp.where(prior > 0, jnp.log(jnp.where(prior > 0, prior, 1.0)), -1e30)
    return jax.nn.softmax(jax.nn.log_softmax(logits).T + log_prior[None])


def co_tuning(
    logits: Float[AnyArray, "batch source_classes"],
    labels: Integer[AnyArray, " batch"],
    relationship: Float[AnyArray, "classes source_classes"],
    *,
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, " batch"]:
    """Co-Tuning: the source head learns the source view of the label, per example.

    ``-sum_s p(s | y) log softmax(z)_s``. Added to the cross-entropy of the target head,
    with weight 2.3 in the authors' code.

    Args:
        logits: The network's outputs by the source head, which is tuned along
            [batch, source classes], finite.
        labels: Target classes [batch] in [0, classes).
        relationship: ``p(s | y)``, of `category_relationship` or
            `calibrated_category_relationship` [classes, source classes]; no gradient
            flows into it.
        where: Which examples count [batch]; the others give 0 and no gradient.

    Returns:
        Losses [batch], float32 or wider. A label out of range that can't be seen
        because it is traced gives not-a-number.

    Raises:
        ValueError: If shapes do not match or, outside of ``jit``, labels are out of
            range.

    Example:
        >>> import jax.numpy as jnp
        >>> relationship = jnp.array([[0.5, 0.5], [0.0, 1.0]])
        >>> losses = co_tuning(jnp.zeros((1, 2)), jnp.array([1]), relationship)
        >>> print(f"{losses[0]:.4f}")
        0.6931

    Reference:
        You et al., "Co-Tuning for Transfer Learning", NeurIPS 2020, sec. 3.
    """
    logits = matrix("logits", logits)
    relationship = jax.lax.stop_gradient(matrix("relationship", relationship))
    if relationship.shape[1] != logits.shape[1]:
        raise ValueError(
            "relationship must be [classes, source classes] for logits [batch, source "
            f"classes], got {relationship.shape} and {logits.shape}."
        )
    labels, valid, where = checked_labels(labels, len(logits), len(relationship), where)
    logits = jnp.where(where[:, None], logits, 0.0)
    losses = optax.losses.softmax_cross_entropy(logits, relationship[labels])
    losses = losses * jnp.where(valid, 1.0, jnp.nan).astype(losses.dtype)
    return jnp.where(where, losses, 0.0)


delta = attentive_behavioral_regularization


def _squares_by_channel(maps, anchor_maps, where):
    """Squared differences [batch, channels], summed over the places."""
    maps, anchor = widen(maps), jax.lax.stop_gradient(widen(anchor_maps))
    if maps.shape != anchor.shape or maps.ndim < 2:
        raise ValueError(
            "feature_maps and anchor_maps must have the same shape [batch, ..., "
            f"channels], got {maps.shape} and {anchor.shape}."
        )
    differences = maps - anchor
    if where is not None:
        where = check_mask("where", where, maps.shape[:1])
        shape = (-1, *(1,) * (maps.ndim - 1))
        differences = jnp.where(where.reshape(shape), differences, 0.0)
    return jnp.sum(differences**2, axis=tuple(range(1, maps.ndim - 1)))
