"""Losses of a student's predictions against a teacher's.

One value per example, but for `distillation_from_stronger_teacher`, which compares
sets. The losses of `jaxtransfer.losses.labelled_distillation` also know the label.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Integer

from jaxtransfer.losses.directions import root
from jaxtransfer.losses.reduction import check_mask, integers, mean, widen
from jaxtransfer.losses.softened import (
    check_positive,
    counted,
    kl_divergence,
    pair,
    soften,
    softmax_divergence,
    tempered,
)
from jaxtransfer.typing import AnyArray


def knowledge_distillation(
    student_logits: Float[AnyArray, "*batch classes"],
    teacher_logits: Float[AnyArray, "*batch classes"],
    *,
    temperature: float | Float[AnyArray, "*#batch"] = 4.0,
    divergence: Literal["forward", "reverse", "jensen_shannon"] = "forward",
    beta: float | Float[AnyArray, ""] = 0.5,
    where: Bool[AnyArray, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Knowledge distillation (KD): divergence of softened predictions, per example.

    With ``p = softmax(z_t / T)`` and ``q = softmax(z_s / T)``: ``T^2 KL(p || q)``
    forward, ``T^2 KL(q || p)`` reverse, and the generalised Jensen-Shannon divergence
    (JSD) ``T^2 (b KL(p || m) + (1 - b) KL(q || m))`` with ``m = b p + (1 - b) q``. The
    factor T^2 keeps the size of the gradient when the temperature changes.

    Args:
        student_logits: [..., classes], finite, or -inf for classes that both lack.
        teacher_logits: [..., classes], finite or -inf; no gradient flows into them.
        temperature: T, positive. 1 compares the plain predictions. A number or one an
            example [...], such as of `dynamic_temperature`.
        divergence: "forward", "reverse" or "jensen_shannon".
        beta: Weight b of the generalised JSD, in [0, 1]. At 0 it is the forward, at 1
            the reverse divergence: what it tends to near them, divided by b or 1 - b.
        where: Which examples count [...]; the others give 0 and no gradient.

    Returns:
        Losses [...], non-negative up to rounding, float32 or wider.

    Raises:
        ValueError: If the shapes differ or an option is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> logits = jnp.array([[1.0, 2.0]])
        >>> knowledge_distillation(logits, logits).tolist()
        [0.0]

    Reference:
        Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015,
        sec. 2. Deviation: the divergence in place of the cross-entropy, which differs
        by the teacher's entropy, a constant; so the best value is 0. Reverse and
        Jensen-Shannon: Agarwal et al., "On-Policy Distillation of Language Models:
        Learning from Self-Generated Mistakes" (GKD), ICLR 2024, sec. 2.
    """
    student, teacher, where = pair(student_logits, teacher_logits, where)
    scale, student, teacher = tempered(
        temperature, student.shape[:-1], where, student, teacher
    )
    if divergence == "forward":
        losses = softmax_divergence(teacher, student)
    elif divergence == "reverse":
        losses = softmax_divergence(student, teacher)
    elif divergence == "jensen_shannon":
        log_p, log_q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
        losses = _jensen_shannon(log_p, log_q, beta)
    else:
        raise ValueError(
            'divergence must be "forward", "reverse" or "jensen_shannon", got '
            f"{divergence!r}."
        )
    return counted(scale * losses, where)


def logit_matching(
    student_logits: Float[AnyArray, "*batch classes"],
    teacher_logits: Float[AnyArray, "*batch classes"],
    *,
    centred: bool = False,
    where: Bool[AnyArray, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Mean squared difference of logits, per example: mimic learning.

    ``mean_c (z_s - z_t)^2``. Centred, each side first loses its mean over the classes,
    which the softmax does not see; half of that is the limit of
    `knowledge_distillation` at high temperature.

    Args:
        student_logits: [..., classes], finite.
        teacher_logits: [..., classes], finite; no gradient flows into them.
        centred: Whether to take off the mean over the classes.
        where: Which examples count [...]; the others give 0 and no gradient.

    Returns:
        Losses [...], float32 or wider.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> import jax.numpy as jnp
        >>> student, teacher = jnp.array([[3.0, 5.0]]), jnp.array([[1.0, 1.0]])
        >>> logit_matching(student, teacher).tolist()
        [10.0]
        >>> logit_matching(student, teacher, centred=True).tolist()
        [1.0]

    Reference:
        Ba and Caruana, "Do Deep Nets Really Need to be Deep?", NeurIPS 2014, sec. 2;
        the limit: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural
        Network", 2015, sec. 2.1.
    """
    student, teacher, where = pair(student_logits, teacher_logits, where)
    differences = student - teacher
    if centred:
        differences -= jnp.mean(differences, axis=-1, keepdims=True)
    return counted(jnp.mean(differences**2, axis=-1), where)


def standardize_logits(
    logits: Float[AnyArray, "*batch classes"],
    *,
    eps: float = 1e-7,
    where: Bool[AnyArray, "..."] | None = None,
) -> Float[Array, "*batch classes"]:
    """Logits of mean 0 and standard deviation 1 over the classes (logit Z-score).

    ``(z - mean z) / (std z + eps)`` with ``1 / (classes - 1)`` in the variance. Give
    the student's and the teacher's to any loss of distillation, which then matches
    their order and ratios and not their size. The paper's temperature is then 2, its
    weight of `knowledge_distillation` 9.

    Args:
        logits: [..., classes], finite, two classes or more.
        eps: Added to the standard deviation, as in the authors' code.
        where: Which examples count [...]; the others give 0 and no gradient.

    Returns:
        Standardised logits [..., classes], float32 or wider; 0 where all are equal.

    Raises:
        ValueError: If there are fewer than two classes.

    Example:
        >>> import jax.numpy as jnp
        >>> scores = standardize_logits(jnp.array([[1.0, 3.0, 5.0], [2.0, 2.0, 2.0]]))
        >>> print(jnp.round(scores, 4).tolist())
        [[-1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]

    Reference:
        Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024,
        sec. 4.
    """
    logits = widen(logits)
    if logits.ndim < 1 or logits.shape[-1] < 2:
        raise ValueError(
            f"logits must be [..., classes] of two classes or more, got {logits.shape}."
        )
    if where is not None:
        where = check_mask("where", where, logits.shape[:-1])
        logits = jnp.where(where[..., None], logits, 0.0)
    centred, length = _centre(logits, -1)
    return centred / (length / math.sqrt(logits.shape[-1] - 1) + eps)


def dynamic_temperature(
    student_logits: Float[AnyArray, "*batch classes"],
    teacher_logits: Float[AnyArray, "*batch classes"],
    *,
    weighting: Literal["flsw", "cwsm"] = "flsw",
    temperature: float = 4.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    minimum: float = 1.0,
    where: Bool[AnyArray, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Temperature per example, sharper where it is hard: dynamic temperatures (DTD).

    ``T_i = max(T + b (mean w - w_i), minimum)`` for the weights
    ``w = (1 - cos(z_s, z_t))^gamma`` (focal loss style, FLSW) or
    ``w = 1 / (max_c softmax(z_s)_c + 0.001)`` (confidence by student maximum, CWSM).
    For the ``temperature`` of `knowledge_distillation`.

    Args:
        student_logits: [..., classes], finite.
        teacher_logits: [..., classes], finite; used by "flsw" only.
        weighting: "flsw" or "cwsm".
        temperature: T, what an example of mean weight gets; positive.
        beta: Strength b.
        gamma: Exponent of "flsw", positive.
        minimum: The lowest temperature, positive.
        where: Which examples count [...], in the mean too; the others give 0.

    Returns:
        Temperatures [...], float32 or wider; no gradient flows through them.

    Raises:
        ValueError: If the shapes differ or an option is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> student = jnp.array([[1.0, 0.0], [1.0, 0.0]])
        >>> teacher = jnp.array([[2.0, 0.0], [0.0, 2.0]])
        >>> dynamic_temperature(student, teacher).tolist()
        [4.5, 3.5]

    Reference:
        Wen, Lai and Qian, "Preparing Lessons: Improve Knowledge Distillation with
        Better Supervision", Neurocomputing 454, 2021, sec. 3. Deviation: the lower
        bound; the paper keeps temperatures positive by the choice of b.
    """
    for name, value in (("temperature", temperature), ("minimum", minimum)):
        check_positive(name, value)
    student, teacher, where = pair(student_logits, teacher_logits, where)
    student = jax.lax.stop_gradient(student)
    if weighting == "flsw":
        check_positive("gamma", gamma)
        cosine = optax.losses.cosine_similarity(student, teacher, epsilon=1e-12)
        weights = jnp.maximum(1.0 - cosine, 0.0) ** gamma
    elif weighting == "cwsm":
        weights = 1.0 / (jnp.max(jax.nn.softmax(student), axis=-1) + 1e-3)
    else:
        raise ValueError(f'weighting must be "flsw" or "cwsm", got {weighting!r}.')
    temperatures = temperature + beta * (mean(weights, where=where) - weights)
    return counted(jnp.maximum(temperatures, minimum), where)


def distillation_from_stronger_teacher(
    student_logits: Float[AnyArray, "n classes"],
    teacher_logits: Float[AnyArray, "n classes"],
    *,
    temperature: float | Float[AnyArray, ""] = 1.0,
    beta: float | Float[AnyArray, ""] = 1.0,
    gamma: float | Float[AnyArray, ""] = 1.0,
    eps: float = 1e-8,
    where: Bool[AnyArray, " n"] | None = None,
) -> Float[Array, ""]:
    """Distillation from a stronger teacher (DIST): correlation of predictions.

    ``T^2 (b (1 - mean_i r(p_i, q_i)) + g (1 - mean_c r(p_:c, q_:c)))`` with Pearson's
    correlation r of the softened predictions p and q: over the classes of an example,
    and over the examples of a class.

    Args:
        student_logits: [examples, classes], finite.
        teacher_logits: [examples, classes], finite; no gradient flows into them.
        temperature: T, positive.
        beta: Weight b of the relation between the classes of an example.
        gamma: Weight g of the relation between the examples of a class.
        eps: Added to the product of the norms, as in the authors' code, which damps
            correlations of tiny probabilities; 0 for the plain correlation.
        where: Which examples count [examples]; default all.

    Returns:
        Scalar in [0, 2 T^2 (b + g)], float32 or wider; 0 if no example counts. What is
        constant, such as each class of a single example, has correlation 0.

    Raises:
        ValueError: If the shapes differ or the temperature is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> logits = jnp.array([[0.0, 1.0, 3.0], [2.0, 1.0, 0.0]])
        >>> print(f"{float(distillation_from_stronger_teacher(logits, logits)):.4f}")
        0.0000

    Reference:
        Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022,
        sec. 3. The paper weighs it with 2 on ImageNet at T = 1.
    """
    student, teacher, where = pair(student_logits, teacher_logits, where)
    if student.ndim != 2:
        raise ValueError(
            f"student_logits must be [examples, classes], got {student.shape}; flatten "
            "the leading axes."
        )
    scale, log_q, log_p = soften(temperature, (), None, student, teacher)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    between = mean(1.0 - _correlation(q, p, 1, eps), where=where)
    counts = jnp.ones(len(p), bool) if where is None else where
    # The means over classes are those of counted examples, or nothing is left.
    within = 1.0 - jnp.mean(_correlation(q, p, 0, eps, counts[:, None]))
    return jnp.where(counts.any(), scale * (beta * between + gamma * within), 0.0)


dist = distillation_from_stronger_teacher


def top_k_knowledge_distillation(
    student_logits: Float[AnyArray, "*batch classes"],
    teacher_logits: Float[AnyArray, "*batch classes"],
    *,
    k: int = 64,
    tail: Literal["renormalize", "bucket"] = "renormalize",
    temperature: float | Float[AnyArray, "*#batch"] = 1.0,
    where: Bool[AnyArray, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Knowledge distillation on the k classes that the teacher finds likeliest.

    ``T^2 KL(p || q)`` of both softened predictions on those classes. The others are
    dropped, and both sides renormalised; or they are added up in one more class.

    Args:
        student_logits: [..., classes], finite.
        teacher_logits: [..., classes], finite; no gradient flows into them.
        k: How many classes, positive. All of them or more is `knowledge_distillation`.
        tail: What becomes of the other classes: "renormalize" or "bucket".
        temperature: T, positive; a number or one an example [...].
        where: Which examples count [...]; the others give 0 and no gradient.

    Returns:
        Losses [...], non-negative up to rounding, float32 or wider.

    Raises:
        ValueError: If the shapes differ or an option is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> student, teacher = jnp.array([1.0, 2.0, 9.0]), jnp.array([4.0, 5.0, 0.0])
        >>> loss = top_k_knowledge_distillation(student, teacher, k=2)
        >>> print(f"{abs(float(loss)):.4f}")
        0.0000

    Reference:
        Tan et al., "Multilingual Neural Machine Translation with Knowledge
        Distillation", ICLR 2019, sec. 3. Deviation: the student is renormalised like
        the teacher; against its prediction of all classes equal logits would not give
        0.
    """
    if k < 1:
        raise ValueError(f"k must be positive, got {k}.")
    student, teacher, where = pair(student_logits, teacher_logits, where)
    _, log_p = soften(temperature, teacher.shape[:-1], where, teacher)
    log_p, indices = jax.lax.top_k(log_p, min(k, teacher.shape[-1]))
    return cached_knowledge_distillation(
        student, log_p, indices, tail=tail, temperature=temperature, where=where
    )


def cached_knowledge_distillation(
    student_logits: Float[AnyArray, "*batch classes"],
    teacher_log_probabilities: Float[AnyArray, "*batch k"],
    indices: Integer[AnyArray, "*batch k"],
    *,
    tail: Literal["renormalize", "bucket"] = "renormalize",
    temperature: float | Float[AnyArray, "*#batch"] = 1.0,
    classes: int | None = None,
    where: Bool[AnyArray, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Knowledge distillation from a teacher's likeliest classes, stored before.

    `top_k_knowledge_distillation` without the teacher at hand.

    Args:
        student_logits: [..., classes], finite.
        teacher_log_probabilities: [..., k], ``log softmax(z_t / T)`` of some classes,
            softened with the T given here; no gradient flows into them.
        indices: Which classes these are [..., k], all different, in [0, classes).
        tail: What becomes of the other classes: "renormalize" drops them, "bucket"
            adds them up in one more class.
        temperature: T, positive; a number or one an example [...].
        classes: How many the teacher has; a student of another number is refused, which
            k of them can't tell.
        where: Which examples count [...]; the others give 0 and no gradient.

    Returns:
        Losses [...], non-negative up to rounding, float32 or wider. An index out of
        range that can't be seen because it is traced gives not-a-number.

    Raises:
        ValueError: If shapes do not match or an argument is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> student = jnp.log(jnp.array([0.1, 0.2, 0.7]))
        >>> stored, at = jnp.log(jnp.array([0.7])), jnp.array([2])
        >>> loss = cached_knowledge_distillation(student, stored, at, tail="bucket")
        >>> print(f"{abs(float(loss)):.4f}")
        0.0000

    Reference:
        Tan et al., "Multilingual Neural Machine Translation with Knowledge
        Distillation", ICLR 2019, sec. 3, with the deviation of
        `top_k_knowledge_distillation`.
    """
    if tail not in ("renormalize", "bucket"):
        raise ValueError(f'tail must be "renormalize" or "bucket", got {tail!r}.')
    student, log_p = widen(student_logits), widen(teacher_log_probabilities)
    log_p, indices = jax.lax.stop_gradient(log_p), integers(indices)
    batch, own = student.shape[:-1], student.shape[-1]
    if classes is not None and classes != own:
        raise ValueError(
            f"the student has {own} classes (student_logits {student.shape}), the "
            f"teacher {classes}; give it an output of as many."
        )
    if log_p.shape != indices.shape or log_p.shape[:-1] != batch:
        raise ValueError(
            "teacher_log_probabilities and indices must be [..., k] for student_logits "
            f"[..., classes], got {log_p.shape}, {indices.shape} and {student.shape}."
        )
    if where is not None:
        where = check_mask("where", where, batch)
        student = jnp.where(where[..., None], student, 0.0)
        log_p = jnp.where(where[..., None], log_p, 0.0)
        indices = jnp.where(where[..., None], indices, 0)
    valid = jnp.all((indices >= 0) & (indices < own), axis=-1)
    if not isinstance(valid, Tracer) and valid.is_fully_addressable:
        if not valid.all():
            raise ValueError(
                f"indices must be in [0, {own}), the classes of student_logits, "
                f"got {int(indices.min())} to {int(indices.max())}."
            )
    indices = jnp.clip(indices, 0, own - 1)

    if tail == "bucket" and indices.shape[-1] < own:
        scale, log_all = soften(temperature, batch, where, student)
        log_q = jnp.take_along_axis(log_all, indices, axis=-1)
        chosen = jnp.put_along_axis(
            jnp.zeros(student.shape, bool), indices, True, axis=-1, inplace=False
        )
        rest_q = jax.nn.logsumexp(jnp.where(chosen, -jnp.inf, log_all), axis=-1)
        total_p = jnp.minimum(jax.nn.logsumexp(log_p, axis=-1), 0.0)
        rest_p = jnp.log(-jnp.expm1(total_p))
        log_p = jnp.concatenate([log_p, rest_p[..., None]], axis=-1)
        log_q = jnp.concatenate([log_q, rest_q[..., None]], axis=-1)
        losses = scale * kl_divergence(log_p, log_q)
    else:
        kept = jnp.take_along_axis(student, indices, axis=-1)
        scale, kept = tempered(temperature, batch, where, kept)
        losses = scale * softmax_divergence(log_p, kept)
    return counted(losses * jnp.where(valid, 1.0, jnp.nan).astype(losses.dtype), where)


def _jensen_shannon(log_p, log_q, beta):
    """``b KL(p || m) + (1 - b) KL(q || m)``, and the limits by name at 0 and 1."""
    traced = isinstance(beta, Tracer)
    if not traced and not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta must be in [0, 1], got {beta}.")
    if not traced and beta in (0.0, 1.0):
        return kl_divergence(*((log_q, log_p) if beta else (log_p, log_q)))
    inside = (beta > 0) & (beta < 1)
    b = jnp.where(inside, beta, 0.5).astype(log_q.dtype)
    some = (log_p > -jnp.inf) | (log_q > -jnp.inf)
    log_m = jnp.logaddexp(
        jnp.where(some, log_p, 0.0) + jnp.log(b),
        jnp.where(some, log_q, 0.0) + jnp.log1p(-b),
    )
    losses = b * kl_divergence(log_p, log_m) + (1 - b) * kl_divergence(log_q, log_m)
    if not traced:
        return losses
    limits = jnp.where(
        beta <= 0, kl_divergence(log_p, log_q), kl_divergence(log_q, log_p)
    )
    return jnp.where(inside, losses, limits)


def _centre(values, axis, counts=None):
    """Values less their mean, and their norm: exactly 0 where constant."""
    if counts is None:
        total, count = jnp.sum(values, axis, keepdims=True), values.shape[axis]
    else:
        values = jnp.where(counts, values, 0.0)
        total = jnp.sum(values, axis, keepdims=True)
        count = jnp.sum(counts, axis, keepdims=True, dtype=values.dtype)
        count = jnp.maximum(count, 1.0)
    centred = values - total / count
    if counts is not None:
        centred = jnp.where(counts, centred, 0.0)
    squares = jnp.sum(centred**2, axis, keepdims=True)
    # What rounding leaves of equal values, or too small to divide by twice.
    kind = jnp.finfo(values.dtype)
    size = jnp.max(jnp.abs(jax.lax.stop_gradient(values)), axis, keepdims=True)
    floor = jnp.maximum(count * (4 * kind.eps * size) ** 2, np.sqrt(kind.tiny))
    return jnp.where(squares <= floor, 0.0, centred), root(squares, floor)


def _correlation(a, b, axis, eps, counts=None):
    (a, length_a), (b, length_b) = _centre(a, axis, counts), _centre(b, axis, counts)
    lengths = jnp.squeeze(length_a * length_b, axis) + eps
    return jnp.sum(a * b, axis) / jnp.where(lengths > 0, lengths, 1.0)
