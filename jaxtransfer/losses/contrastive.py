"""Contrastive distillation of representations, against a memory or within a batch.

With a memory, a training step is three calls: `sample_negatives`,
`contrastive_representation_distillation`, and `update_contrastive_memory` with the same
arguments as the loss.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Integer, Key

from jaxtransfer.losses.directions import unit
from jaxtransfer.losses.memory import (
    checked_indices,
    counted_rows,
    gathered,
    write_rows,
)
from jaxtransfer.losses.reduction import check_mask, widen
from jaxtransfer.losses.sets import matrix
from jaxtransfer.losses.softened import check_positive, counted
from jaxtransfer.ops.products import product
from jaxtransfer.typing import AnyArray


class ContrastiveMemory(NamedTuple):
    """An embedding of every example by the student, and one by the teacher.

    Attributes:
        student: [examples, features].
        teacher: [examples, features].
        log_normalizers: ``log Z`` of the student's and of the teacher's embeddings as
            anchors [2]; of the first batch, -inf before it.
    """

    student: Array
    teacher: Array
    log_normalizers: Array


def contrastive_memory(
    key: Key[Array, ""], examples: int, features: int
) -> ContrastiveMemory:
    """Make the memory of contrastive representation distillation (CRD).

    Uniform in +-``1 / sqrt(features / 3)``: rows of mean square length 1.

    Args:
        key: Typed key.
        examples: How many examples the training set has.
        features: Width of an embedding: 128 in the paper.

    Returns:
        The memory.

    Raises:
        ValueError: If a number is not positive.

    Example:
        >>> import jax
        >>> contrastive_memory(jax.random.key(0), 50, 8).student.shape
        (50, 8)

    Reference:
        Tian, Krishnan and Isola, "Contrastive Representation Distillation", ICLR 2020,
        sec. 3.1; the start from the authors' code.
    """
    if min(examples, features) < 1:
        raise ValueError(
            f"examples and features must be positive, got {examples} and {features}."
        )
    bound = float(np.sqrt(3.0 / features))
    student, teacher = jax.random.uniform(
        key, (2, examples, features), jnp.float32, -bound, bound
    )
    return ContrastiveMemory(student, teacher, jnp.full(2, -jnp.inf, jnp.float32))


def sample_negatives(
    key: Key[Array, ""],
    labels: Integer[AnyArray, " examples"],
    indices: Integer[AnyArray, " batch"],
    *,
    count: int = 16384,
    order: Integer[AnyArray, " examples"] | None = None,
    where: Bool[AnyArray, " batch"] | None = None,
) -> Int[Array, "batch {count}"]:
    """Draw negatives for contrastive distillation (CRD): examples of other classes.

    Each uniform over all examples whose class is not that of the example in the batch,
    with replacement. On the device, in memory of ``examples + batch * count``.

    Args:
        key: Typed key.
        labels: Classes of all examples of the training set [examples]; equal numbers
            are one class.
        indices: Which examples are in the batch [batch].
        count: How many are drawn for each.
        order: ``jnp.argsort(labels)``, for who calls often; default computed here.
        where: Which examples of the batch count [batch]; the others may hold anything
            and draw as if they were example 0.

    Returns:
        Indices [batch, count]. Where an index is out of range or there is no other
        class, and that can't be seen because it is traced, they are -1, which makes the
        loss not-a-number.

    Raises:
        ValueError: If shapes do not match, ``count`` is not positive or, outside of
            ``jit``, an index is out of range or there is no example of another class.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> labels = jnp.array([0, 1, 0, 0])
        >>> sample_negatives(
        ...     jax.random.key(0), labels, jnp.array([0, 2]), count=3
        ... ).tolist()
        [[1, 1, 1], [1, 1, 1]]

    Reference:
        Tian, Krishnan and Isola, "Contrastive Representation Distillation", ICLR 2020,
        sec. 3.1. Deviation: with replacement, as the noise of the bound is; the
        authors' code draws without where a class has enough others.
    """
    labels = jnp.asarray(labels)
    if labels.ndim != 1:
        raise ValueError(f"labels must be [examples], got shape {labels.shape}.")
    if count < 1:
        raise ValueError(f"count must be positive, got {count}.")
    batch = jnp.shape(indices)[:1]
    where = check_mask("where", True if where is None else where, batch)
    indices, valid = checked_indices("indices", indices, batch, len(labels), where)
    order = jnp.argsort(labels) if order is None else jnp.asarray(order)
    if order.shape != labels.shape:
        raise ValueError(
            f"order must be jnp.argsort(labels), {labels.shape}, got {order.shape}."
        )
    ranked, own = labels[order], labels[indices]
    start = jnp.searchsorted(ranked, own)
    size = jnp.searchsorted(ranked, own, side="right") - start
    others = len(labels) - size
    alone = where & (others < 1)
    if not isinstance(alone, Tracer) and alone.any():
        raise ValueError(
            f"labels must have two classes or more, all are {own[alone].tolist()[0]}: "
            "there are no negatives."
        )

    def draw(row, others):
        # A key of its own for every row: more rows change nothing in the others.
        own_key = jax.random.fold_in(key, row)
        return jax.random.randint(own_key, (count,), 0, jnp.maximum(others, 1))

    drawn = jax.vmap(draw)(jnp.arange(len(indices)), others)
    # Places in order of class: those from the own class on come after it.
    places = drawn + jnp.where(drawn >= start[:, None], size[:, None], 0)
    found = (valid & (others > 0))[:, None]
    return jnp.where(found, order[jnp.where(found, places, 0)], -1)


def contrastive_representation_distillation(
    student_embeddings: Float[AnyArray, "batch features"],
    teacher_embeddings: Float[AnyArray, "batch features"],
    indices: Integer[AnyArray, " batch"],
    negatives: Integer[AnyArray, "batch count"],
    memory: ContrastiveMemory,
    *,
    temperature: float | Float[AnyArray, ""] = 0.07,
    epsilon: float | Float[AnyArray, ""] = 0.0,
    normalize: bool = True,
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, " batch"]:
    """Contrastive representation distillation (CRD), per example.

    With the student's embedding z as anchor and the teacher's memory m, over the K
    negatives k of the example and with ``c = K / examples``:

    ``-log x_0 / (x_0 + c) - sum_k log c / (x_k + c)``, ``x = exp(z.m / T) / Z``,

    ``x_0`` being of the example's own row of the memory; plus the same with the
    teacher's embedding as anchor and the student's memory. Z is the mean of
    ``exp(z.m / T)`` over the first batch times ``examples``: of the memory or, before
    its first update, of this batch. It is a constant of the gradient, and so is the
    memory.

    Both embeddings are scaled to length 1 first, and both get gradient: in the method
    each comes from a learned linear layer of its own, which can map them to the same
    width. Whether gradient goes further into the teacher is up to who calls.

    Args:
        student_embeddings: [batch, features].
        teacher_embeddings: [batch, features].
        indices: Which examples these are [batch]: their rows of the memory.
        negatives: Rows of the memory [batch, count], as of `sample_negatives`.
        memory: The memory, not yet updated with this batch.
        temperature: T, positive.
        epsilon: Added to both sums ``x + c``: 1e-7 in the authors' code, where it keeps
            the logarithm finite. Here that is so without.
        normalize: Whether embeddings are scaled to length 1. Without, they should be of
            length 1 already.
        where: Which examples count [batch]; the others give 0 and no gradient.

    Returns:
        Losses [batch], positive, float32 or wider. The paper's weight of their mean is
        0.8. An index out of range that can't be seen because it is traced gives
        not-a-number.

    Raises:
        ValueError: If shapes do not match, the temperature is not positive, or
            ``epsilon`` is negative or, outside of ``jit``, an index is out of range.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> z, zeros = jnp.array([[1.0, 0.0]]), jnp.zeros((2, 2))
        >>> memory = ContrastiveMemory(zeros, zeros, jnp.zeros(2))
        >>> losses = contrastive_representation_distillation(
        ...     z, z, jnp.array([0]), jnp.array([[1]]), memory
        ... )
        >>> print(f"{losses[0]:.4f}")
        3.0082

    Reference:
        Tian, Krishnan and Isola, "Contrastive Representation Distillation", ICLR 2020,
        eq. 18; Z and the memory's use from the authors' code.
    """
    student, teacher, rows, valid, where = _batch(
        student_embeddings, teacher_embeddings, indices, negatives, memory, where
    )
    check_positive("temperature", temperature)
    if not isinstance(epsilon, Tracer) and epsilon < 0:
        raise ValueError(f"epsilon must not be negative, got {epsilon}.")
    if normalize:
        student, teacher = unit(student), unit(teacher)
    scores = _scores(student, teacher, rows, memory) / temperature
    logs = scores - _log_normalizers(scores, memory, where)[:, None, None]
    count = rows.shape[1] - 1
    share = count / len(memory.student)
    log, log1p = math.log, math.log1p
    if isinstance(epsilon, Tracer):
        log, log1p = jnp.log, jnp.log1p
    level = log(share + epsilon)
    own = jax.nn.softplus(level - logs[..., 0])
    others = jnp.sum(jax.nn.softplus(logs[..., 1:] - level), axis=-1)
    constant = 2 * count * log1p(epsilon / share)
    losses = jnp.sum(own + others, axis=0) + constant
    return counted(losses * jnp.where(valid, 1.0, jnp.nan), where)


def update_contrastive_memory(
    student_embeddings: Float[AnyArray, "batch features"],
    teacher_embeddings: Float[AnyArray, "batch features"],
    indices: Integer[AnyArray, " batch"],
    negatives: Integer[AnyArray, "batch count"],
    memory: ContrastiveMemory,
    *,
    temperature: float | Float[AnyArray, ""] = 0.07,
    momentum: float | Float[AnyArray, ""] = 0.5,
    where: Bool[AnyArray, " batch"] | None = None,
    axis_name: str | None = None,
) -> ContrastiveMemory:
    """Write a batch into the memory of contrastive representation distillation (CRD).

    ``m <- unit(r m + (1 - r) unit(z))`` in the rows of the batch, for the student and
    for the teacher. The first batch also sets the normalisers Z, for good: that of the
    student as anchor is ``examples`` times the mean of ``exp(z.m / T)`` over the batch,
    its own and its negative rows of the teacher's memory.

    Args:
        student_embeddings: [batch, features].
        teacher_embeddings: [batch, features].
        indices: Which examples these are [batch]. Of an example that is there more
            than once the last one is written.
        negatives: Rows of the memory [batch, count], those of the loss. They matter
            in the first batch only.
        memory: The memory.
        temperature: T, that of the loss. It matters in the first batch only.
        momentum: r in [0, 1).
        where: Which examples are written [batch].
        axis_name: Axis of ``pmap`` or ``shard_map`` over which the batch is divided, so
            that every device writes the rows of all; without it each would write its
            own, and a training step would average the copies.

    Returns:
        The new memory; no gradient flows through it. An index out of range that can't
        be seen because it is traced is not written.

    Raises:
        ValueError: If shapes do not match, the temperature is not positive, the
            momentum is not in [0, 1) or, outside of ``jit``, an index is out of range.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> memory = contrastive_memory(jax.random.key(0), 4, 2)
        >>> z = jnp.array([[3.0, 0.0]])
        >>> memory = update_contrastive_memory(
        ...     z, z, jnp.array([2]), jnp.array([[0, 3]]), memory, momentum=0.0
        ... )
        >>> memory.student[2].tolist()
        [1.0, 0.0]

    Reference:
        Tian, Krishnan and Isola, "Contrastive Representation Distillation", ICLR 2020,
        sec. 3.1; momentum and Z from the authors' code.
    """
    student, teacher, rows, negatives, where = gathered(
        axis_name, student_embeddings, teacher_embeddings, indices, negatives, where
    )
    student, teacher, rows, valid, where = _batch(
        student, teacher, rows, negatives, memory, where
    )
    check_positive("temperature", temperature)
    if not isinstance(momentum, Tracer) and not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}.")
    memory = jax.lax.stop_gradient(memory)
    student, teacher = jax.lax.stop_gradient((unit(student), unit(teacher)))

    def first():
        scores = _scores(student, teacher, rows, memory) / temperature
        normalizers = _log_normalizers(scores, memory, where)
        return normalizers.astype(memory.log_normalizers.dtype)

    normalizers = jax.lax.cond(
        jnp.all(jnp.isfinite(memory.log_normalizers)),
        lambda: memory.log_normalizers,
        first,
    )
    # With all examples masked there is no first batch.
    started = jnp.any(where) | jnp.isfinite(memory.log_normalizers)
    normalizers = jnp.where(started, normalizers, -jnp.inf)

    def written(old, new):
        blend = momentum * widen(old[rows[:, 0]]) + (1.0 - momentum) * new
        return write_rows(old, rows[:, 0], unit(blend), where & valid)

    return ContrastiveMemory(
        written(memory.student, student), written(memory.teacher, teacher), normalizers
    )


def contrastive_distillation(
    student_embeddings: Float[AnyArray, "batch features"],
    teacher_embeddings: Float[AnyArray, "batch features"],
    *,
    temperature: float | Float[AnyArray, ""] = 0.07,
    symmetric: bool = False,
    labels: Integer[AnyArray, " batch"] | None = None,
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, " batch"]:
    """Contrastive distillation within a batch (InfoNCE), without a memory, per example.

    ``-log(exp(s_i.t_i / T) / sum_j exp(s_i.t_j / T))``: the student's embedding tells
    the teacher's of its own example from those of the others. All embeddings are
    scaled to length 1 first.

    Args:
        student_embeddings: s [batch, features].
        teacher_embeddings: t [batch, features], of the student's width; no gradient
            flows into them.
        temperature: T, positive.
        symmetric: Whether the same with the teacher's embedding as anchor,
            ``sum_j exp(s_j.t_i / T)``, is averaged in.
        labels: Classes [batch]. If given, other examples of the same class are left
            out of the sum.
        where: Which examples count [batch]; the others give 0 and no gradient, and
            are in no sum.

    Returns:
        Losses [batch], not negative, float32 or wider.

    Raises:
        ValueError: If shapes do not match or the temperature is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> losses = contrastive_distillation(
        ...     jnp.eye(2), jnp.eye(2), temperature=1.0
        ... )
        >>> print([f"{loss:.4f}" for loss in losses.tolist()])
        ['0.3133', '0.3133']

    Reference:
        Van den Oord, Li and Vinyals, "Representation Learning with Contrastive
        Predictive Coding", 2018, eq. 4; between student and teacher as in Tian,
        Krishnan and Isola, "Contrastive Representation Distillation", ICLR 2020,
        sec. 3.1, whose own bound is `contrastive_representation_distillation`.
    """
    student, teacher, where = _pair(student_embeddings, teacher_embeddings, where)
    check_positive("temperature", temperature)
    student, teacher = unit(student), jax.lax.stop_gradient(unit(teacher))
    scores = product(student, teacher.T) / temperature
    allowed = where[None]
    if labels is not None:
        labels = jnp.asarray(labels)
        if labels.shape != where.shape:
            raise ValueError(
                f"labels must be one a row, {where.shape}, got shape {labels.shape}."
            )
        allowed = allowed & (labels[:, None] != labels[None])
    itself = jnp.eye(len(where), dtype=bool)
    # Who is allowed is the same from both sides; the own pair always is.
    allowed = allowed | itself
    own = jnp.diagonal(scores)[:, None]

    def of(scores):
        ahead = jnp.where(itself, 0.0, scores - own)
        return jax.nn.logsumexp(ahead, axis=1, where=allowed)

    losses = 0.5 * (of(scores) + of(scores.T)) if symmetric else of(scores)
    return counted(losses, where)


def _pair(student, teacher, where):
    """Both embeddings, widened and 0 where masked, and the mask."""
    student = matrix("student_embeddings", student)
    if jnp.shape(teacher) != student.shape:
        raise ValueError(
            "student_embeddings and teacher_embeddings must have the same shape, got "
            f"{student.shape} and {jnp.shape(teacher)}; map them to one width with a "
            "learned linear layer."
        )
    where = check_mask("where", True if where is None else where, student.shape[:1])
    student = counted_rows("student_embeddings", student, where)
    return student, counted_rows("teacher_embeddings", teacher, where), where


def _batch(student, teacher, indices, negatives, memory, where):
    """Embeddings, their own and negative rows of the memory, in range, and the mask."""
    student, teacher, where = _pair(student, teacher, where)
    examples, width = memory.student.shape
    if width != student.shape[1]:
        raise ValueError(
            f"student_embeddings must be as wide as the memory, {width}, got "
            f"{student.shape}."
        )
    if jnp.ndim(negatives) != 2 or jnp.shape(negatives)[1] < 1:
        raise ValueError(
            "negatives must be [batch, count], one or more an example, got shape "
            f"{jnp.shape(negatives)}."
        )
    shape = (len(student), jnp.shape(negatives)[1])
    own, valid = checked_indices("indices", indices, shape[:1], examples, where)
    others, known = checked_indices(
        "negatives", negatives, shape, examples, where[:, None]
    )
    rows = jnp.concatenate([own[:, None], others], axis=1)
    return student, teacher, rows, valid & jnp.all(known, axis=1), where


def _scores(student, teacher, rows, memory):
    """``z.m`` of both anchors [2, batch, 1 + count], each with the other's memory."""
    memories = jax.lax.stop_gradient((memory.teacher, memory.student))
    return jnp.stack(
        [_of_rows(student, memories[0], rows), _of_rows(teacher, memories[1], rows)]
    )


def _of_rows(anchors, memory, rows):
    # All products and then a choice is faster and smaller than the rows of the choice,
    # unless there are many times as many examples as negatives.
    if len(memory) <= 16 * rows.shape[1]:
        return jnp.take_along_axis(product(anchors, widen(memory).T), rows, axis=1)
    return jnp.einsum(
        "bf,bkf->bk", anchors, widen(memory[rows]), precision=jax.lax.Precision.HIGHEST
    )


def _log_normalizers(scores, memory, where):
    """``log Z`` [2], constants: the memory's or, where it has none, of these scores."""
    kept = jax.lax.stop_gradient(widen(memory.log_normalizers))
    scores = jax.lax.stop_gradient(scores)
    _, _, drawn = scores.shape
    total = jax.nn.logsumexp(scores, axis=(1, 2), where=where[:, None])
    count = jnp.maximum(jnp.sum(where, dtype=scores.dtype), 1.0) * drawn
    fresh = total + math.log(len(memory.student)) - jnp.log(count)
    fresh = jnp.where(jnp.any(where), fresh, 0.0)
    return jnp.where(jnp.isfinite(kept), kept, fresh)
