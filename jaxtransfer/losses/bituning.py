"""Contrast of two views of labelled examples with a queue of keys by class.

Bi-tuning: `contrastive_cross_entropy` at the classifier, `categorical_contrastive` at a
projection. The keys come from a slow copy of the network,
``optax.incremental_update(params, slow, 0.001)``.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Integer

from jaxtransfer.losses.directions import unit
from jaxtransfer.losses.memory import gathered
from jaxtransfer.losses.reduction import check_mask, widen
from jaxtransfer.losses.sets import checked_labels, matrix
from jaxtransfer.typing import AnyArray


class ClassQueue(NamedTuple):
    """The newest keys of every class.

    Attributes:
        keys: [classes, size, features].
        counts: How many keys of each class have ever been put in [classes].
    """

    keys: Array
    counts: Array

    @property
    def filled(self) -> Array:
        """Which places hold a key [classes, size]."""
        return jnp.arange(self.keys.shape[1]) < self.counts[:, None]


def class_queue(classes: int, features: int, *, size: int = 40) -> ClassQueue:
    """Make an empty queue of keys by class.

    ``size`` places for each of ``classes``, 0 and not filled.

    Args:
        classes: How many classes there are.
        features: Width of a key.
        size: How many keys of a class are kept: 40 in the authors' code.

    Returns:
        The queue.

    Raises:
        ValueError: If a number is not positive.

    Example:
        >>> class_queue(3, 8, size=5).keys.shape
        (3, 5, 8)

    Reference:
        Zhong et al., "Bi-tuning of Pre-trained Representations", 2020, sec. 3.
        Deviation: it starts empty, not with random keys.
    """
    if min(classes, features, size) < 1:
        raise ValueError(
            "classes, features and size must be positive, got "
            f"{classes}, {features} and {size}."
        )
    return ClassQueue(
        jnp.zeros((classes, size, features), jnp.float32),
        jnp.zeros(classes, jnp.int32),
    )


def enqueue(
    features: Float[AnyArray, "batch features"],
    labels: Integer[AnyArray, " batch"],
    queue: ClassQueue,
    *,
    where: Bool[AnyArray, " batch"] | None = None,
    axis_name: str | None = None,
) -> ClassQueue:
    """Put keys into the queue of their class, in place of the oldest.

    The same as one key after the other, but at once. Key number k of a class goes to
    place ``k mod size``.

    Args:
        features: Keys [batch, features].
        labels: Their classes [batch] in [0, classes).
        queue: The queue.
        where: Which keys go in [batch]; default all.
        axis_name: Axis of ``pmap`` or ``shard_map`` over which the batch is divided, so
            that every device writes the rows of all; without it each would write its
            own, and a training step would average the copies.

    Returns:
        The new queue; no gradient flows through it.

    Raises:
        ValueError: If shapes do not match or, outside of ``jit``, labels are out of
            range.

    Example:
        >>> import jax.numpy as jnp
        >>> queue = class_queue(2, 1, size=2)
        >>> keys, labels = jnp.array([[1.0], [2.0], [3.0]]), jnp.array([1, 1, 1])
        >>> queue = enqueue(keys, labels, queue)
        >>> queue.keys[1, :, 0].tolist(), queue.counts.tolist()
        ([3.0, 2.0], [0, 3])

    Reference:
        Zhong et al., "Bi-tuning of Pre-trained Representations", 2020, sec. 3.
    """
    features, labels, where = gathered(axis_name, features, labels, where)
    features = jax.lax.stop_gradient(matrix("features", features))
    classes, size, width = queue.keys.shape
    if features.shape[1] != width:
        raise ValueError(
            f"features must be as wide as the queue, {width}, got {features.shape}."
        )
    labels, valid, where = checked_labels(labels, len(features), classes, where)
    members = jax.nn.one_hot(
        jnp.where(valid & where, labels, -1), classes, dtype=jnp.int32
    )
    total = jnp.sum(members, axis=0)
    rank = jnp.sum(members * (jnp.cumsum(members, axis=0) - 1), axis=1)
    # Of more keys than places only the last ones stay: no place is written twice.
    stays = valid & where & (rank >= total[labels] - size)
    place = (queue.counts[labels] + rank) % size
    keys = queue.keys.at[jnp.where(stays, labels, classes), place].set(
        features.astype(queue.keys.dtype), mode="drop"
    )
    return ClassQueue(keys, queue.counts + total.astype(queue.counts.dtype))


def categorical_contrastive(
    features: Float[AnyArray, "batch features"],
    keys: Float[AnyArray, "batch features"],
    labels: Integer[AnyArray, " batch"],
    queue: Float[AnyArray, "classes size features"],
    *,
    temperature: float | Float[AnyArray, ""] = 0.07,
    filled: Bool[AnyArray, "classes size"] | None = None,
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, " batch"]:
    """Categorical contrastive learning (CCL) of Bi-tuning, per example.

    ``-mean_p log(exp(z.k_p / T) / sum_j exp(z.k_j / T))`` over the positives p: the
    example's own key and the keys of its class; j runs over its own key and the queues
    of all classes. All vectors are scaled to unit length first.

    Args:
        features: Projected queries z [batch, features].
        keys: The same examples by the slow network [batch, features]; no gradient flows
            into them.
        labels: Classes [batch] in [0, classes).
        queue: Earlier keys by class [classes, size, features], as of `enqueue`; no
            gradient flows into them.
        temperature: T, positive.
        filled: Which places of the queue hold a key [classes, size]; default all.
        where: Which examples count [batch]; the others give 0 and no gradient.

    Returns:
        Losses [batch], at least ``log P`` for P positives, float32 or wider. A label
        out of range that can't be seen because it is traced gives not-a-number.

    Raises:
        ValueError: If shapes do not match, the temperature is not positive or, outside
            of ``jit``, labels are out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> z = jnp.array([[1.0, 0.0]])
        >>> queue = jnp.array([[[1.0, 0.0]], [[0.0, 1.0]]])
        >>> losses = categorical_contrastive(z, z, jnp.array([0]), queue)
        >>> print(f"{losses[0]:.4f}")
        0.6931

    Reference:
        Zhong et al., "Bi-tuning of Pre-trained Representations", 2020, sec. 3; T from
        the authors' code, which reports the divergence from the even distribution over
        the positives: smaller by the constant ``log P``.
    """
    features, where = _queries(features, where)
    keys = matrix("keys", keys)
    if keys.shape != features.shape:
        raise ValueError(
            "features and keys must have the same shape, got "
            f"{features.shape} and {keys.shape}."
        )
    keys = jnp.where(where[:, None], keys, 0.0)
    queue = _queue(queue, features.shape[1])
    labels, valid, _ = checked_labels(labels, len(features), len(queue), where)
    queries, own = unit(features), jax.lax.stop_gradient(unit(keys))
    return _contrast(queries, own, queue, labels, valid, where, filled, temperature)


def contrastive_cross_entropy(
    features: Float[AnyArray, "batch features"],
    prototypes: Float[AnyArray, "classes features"],
    labels: Integer[AnyArray, " batch"],
    queue: Float[AnyArray, "classes size features"],
    *,
    temperature: float | Float[AnyArray, ""] = 0.07,
    train_prototypes: bool = False,
    filled: Bool[AnyArray, "classes size"] | None = None,
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, " batch"]:
    """Contrastive cross-entropy (CCE) of Bi-tuning, per example.

    ``-mean_p log(exp(w_y.h_p / T) / sum_j exp(w_y.h_j / T))`` over the positives p: the
    example's own features h and the keys of its class; j runs over its own features and
    the queues of all classes. The query is the prototype w of the class. All vectors
    are scaled to unit length first.

    Args:
        features: Features h [batch, features] that the classifier sees. For one with a
            bias append a column of ones here, and the bias to the prototypes.
        prototypes: The classifier's kernel by class [classes, features], transposed.
        labels: Classes [batch] in [0, classes).
        queue: Earlier features by the slow network [classes, size, features], as of
            `enqueue`; no gradient flows into them.
        temperature: T, positive.
        train_prototypes: Whether gradient flows into the prototypes; in the authors'
            code it does not.
        filled: Which places of the queue hold a key [classes, size]; default all.
        where: Which examples count [batch]; the others give 0 and no gradient.

    Returns:
        Losses [batch], at least ``log P`` for P positives, float32 or wider. A label
        out of range that can't be seen because it is traced gives not-a-number.

    Raises:
        ValueError: If shapes do not match, the temperature is not positive or, outside
            of ``jit``, labels are out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> h, prototypes = jnp.array([[1.0, 0.0]]), jnp.eye(2)
        >>> queue = jnp.array([[[1.0, 0.0]], [[0.0, 1.0]]])
        >>> losses = contrastive_cross_entropy(h, prototypes, jnp.array([0]), queue)
        >>> print(f"{losses[0]:.4f}")
        0.6931

    Reference:
        Zhong et al., "Bi-tuning of Pre-trained Representations", 2020, sec. 3; T from
        the authors' code, which reports the divergence from the even distribution over
        the positives: smaller by the constant ``log P``.
    """
    features, where = _queries(features, where)
    queue = _queue(queue, features.shape[1])
    prototypes = matrix("prototypes", prototypes)
    if prototypes.shape != (len(queue), features.shape[1]):
        raise ValueError(
            f"prototypes must be [classes, features], here {len(queue)} x "
            f"{features.shape[1]}, got {prototypes.shape}; a kernel of a dense layer "
            "must be transposed."
        )
    if not train_prototypes:
        prototypes = jax.lax.stop_gradient(prototypes)
    labels, valid, _ = checked_labels(labels, len(features), len(queue), where)
    queries, own = unit(prototypes)[labels], unit(features)
    return _contrast(queries, own, queue, labels, valid, where, filled, temperature)


def _contrast(queries, own, queue, labels, valid, where, filled, temperature):
    """Losses of unit queries [n, features] against their own keys and the queue.

    ``-mean over positives of log softmax``, the own key and those of the label's class
    being the positives.
    """
    if not isinstance(temperature, Tracer) and not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")
    filled = check_mask("filled", True if filled is None else filled, queue.shape[:2])
    own = jnp.sum(queries * own, axis=1) / temperature
    others = jnp.einsum(
        "nf,csf->ncs", queries, queue, precision=jax.lax.Precision.HIGHEST
    )
    others = jnp.where(filled, others / temperature, -jnp.inf)
    scores = jnp.concatenate([own[:, None], others.reshape(len(own), -1)], axis=1)
    everything = jax.nn.logsumexp(scores, axis=1)
    same = jnp.take_along_axis(others, labels[:, None, None], axis=1)[:, 0]
    present = filled[labels]
    total = own + jnp.sum(jnp.where(present, same, 0.0), axis=1)
    losses = everything - total / (1.0 + jnp.sum(present, axis=1, dtype=total.dtype))
    return jnp.where(where, losses * jnp.where(valid, 1.0, jnp.nan), 0.0)


def _queries(features, where):
    features = matrix("features", features)
    where = check_mask("where", True if where is None else where, features.shape[:1])
    return jnp.where(where[:, None], features, 0.0), where


def _queue(queue, width):
    queue = widen(queue)
    if queue.ndim != 3 or queue.shape[2] != width:
        raise ValueError(
            f"queue must be [classes, size, {width}], the width of the features, got "
            f"shape {queue.shape}."
        )
    return jax.lax.stop_gradient(unit(queue))
