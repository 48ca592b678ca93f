"""Distillation that treats the labelled class apart, one value per example."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Integer

from jaxtransfer.losses.distillation import knowledge_distillation
from jaxtransfer.losses.reduction import check_mask, widen
from jaxtransfer.losses.softened import (
    counted,
    kl_divergence,
    label_mask,
    pair,
    soft_cross_entropy,
    soften,
    softmax_divergence,
    tempered,
)
from jaxtransfer.typing import AnyArray


def target_class_distillation(
    student_logits: Float[AnyArray, "*batch classes"],
    teacher_logits: Float[AnyArray, "*batch classes"],
    labels: Integer[AnyArray, "*batch"],
    *,
    temperature: float | Float[AnyArray, "*#batch"] = 4.0,
    where: Bool[AnyArray, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Target class distillation (TCKD): the labelled class against all others.

    ``T^2 KL([p_y, 1 - p_y] || [q_y, 1 - q_y])`` of the softened predictions p and q of
    teacher and student. `knowledge_distillation` is this plus ``1 - p_y`` times
    `nontarget_class_distillation`.

    Args:
        student_logits: [..., classes], finite, two classes or more.
        teacher_logits: [..., classes], finite; no gradient flows into them.
        labels: Classes [...] in [0, classes).
        temperature: T, positive; a number or one an example [...].
        where: Which examples count [...]; the others give 0 and no gradient.

    Returns:
        Losses [...], non-negative up to rounding, float32 or wider. A label out of
        range that can't be seen because it is traced gives not-a-number.

    Raises:
        ValueError: If shapes do not match or an argument is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> student, teacher = jnp.zeros((1, 3)), jnp.log(jnp.array([[1.0, 2.0, 3.0]]))
        >>> losses = target_class_distillation(
        ...     student, teacher, jnp.array([1]), temperature=1.0
        ... )
        >>> print(f"{abs(float(losses[0])):.4f}")
        0.0000

    Reference:
        Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, sec. 3.
    """
    student, teacher, where = pair(student_logits, teacher_logits, where)
    is_label, valid = label_mask(student, labels, where)
    scale, log_q, log_p = soften(
        temperature, student.shape[:-1], where, student, teacher
    )
    binary = kl_divergence(_binary(log_p, is_label), _binary(log_q, is_label))
    return counted(scale * binary * valid, where)


def nontarget_class_distillation(
    student_logits: Float[AnyArray, "*batch classes"],
    teacher_logits: Float[AnyArray, "*batch classes"],
    labels: Integer[AnyArray, "*batch"],
    *,
    temperature: float | Float[AnyArray, "*#batch"] = 4.0,
    where: Bool[AnyArray, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Non-target class distillation (NCKD): the classes that are not the label.

    ``T^2 KL(p' || q')`` of the softened predictions of teacher and student on the
    classes ``c != y`` alone, renormalised.

    Args:
        student_logits: [..., classes], finite, two classes or more.
        teacher_logits: [..., classes], finite; no gradient flows into them.
        labels: Classes [...] in [0, classes).
        temperature: T, positive; a number or one an example [...].
        where: Which examples count [...]; the others give 0 and no gradient.

    Returns:
        Losses [...], non-negative up to rounding, float32 or wider; 0 with two classes.
        A label out of range that can't be seen because it is traced gives
        not-a-number.

    Raises:
        ValueError: If shapes do not match or an argument is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> student, teacher = jnp.array([9.0, 1.0, 2.0]), jnp.array([0.0, 3.0, 4.0])
        >>> loss = nontarget_class_distillation(student, teacher, jnp.array(0))
        >>> print(f"{abs(float(loss)):.4f}")
        0.0000

    Reference:
        Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, sec. 3.
    """
    student, teacher, where = pair(student_logits, teacher_logits, where)
    is_label, valid = label_mask(student, labels, where)
    scale, student, teacher = tempered(
        temperature, student.shape[:-1], where, student, teacher
    )
    return counted(scale * _among_others(teacher, student, is_label) * valid, where)


def decoupled_knowledge_distillation(
    student_logits: Float[AnyArray, "*batch classes"],
    teacher_logits: Float[AnyArray, "*batch classes"],
    labels: Integer[AnyArray, "*batch"],
    *,
    alpha: float | Float[AnyArray, ""] = 1.0,
    beta: float | Float[AnyArray, ""] = 8.0,
    temperature: float | Float[AnyArray, "*#batch"] = 4.0,
    where: Bool[AnyArray, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Decoupled knowledge distillation (DKD): its two parts, weighed freely.

    ``a TCKD + b NCKD`` of `target_class_distillation` and
    `nontarget_class_distillation`. In `knowledge_distillation` the second has the
    weight ``1 - p_y``, so a teacher that is sure says little about the other classes.

    Args:
        student_logits: [..., classes], finite, two classes or more.
        teacher_logits: [..., classes], finite; no gradient flows into them.
        labels: Classes [...] in [0, classes).
        alpha: Weight a of the target class.
        beta: Weight b of the other classes. The paper takes 1 to 8, more for a surer
            teacher, and raises the loss over the first 20 epochs on CIFAR-100.
        temperature: T, positive; a number or one an example [...].
        where: Which examples count [...]; the others give 0 and no gradient.

    Returns:
        Losses [...], non-negative up to rounding, float32 or wider. A label out of
        range that can't be seen because it is traced gives not-a-number.

    Raises:
        ValueError: If shapes do not match or an argument is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> logits, labels = jnp.array([[1.0, 2.0, 4.0]]), jnp.array([2])
        >>> decoupled_knowledge_distillation(logits, logits, labels).tolist()
        [0.0]

    Reference:
        Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, sec. 3.
    """
    student, teacher, where = pair(student_logits, teacher_logits, where)
    is_label, valid = label_mask(student, labels, where)
    scale, student, teacher = tempered(
        temperature, student.shape[:-1], where, student, teacher
    )
    log_q, log_p = jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)
    binary = kl_divergence(_binary(log_p, is_label), _binary(log_q, is_label))
    others = _among_others(teacher, student, is_label)
    losses = alpha * (scale * binary) + beta * (scale * others)
    return counted(losses * valid, where)


def normalized_knowledge_distillation(
    student_logits: Float[AnyArray, "*batch classes"],
    teacher_logits: Float[AnyArray, "*batch classes"],
    labels: Integer[AnyArray, "*batch"],
    *,
    gamma: float | Float[AnyArray, ""] = 1.5,
    temperature: float | Float[AnyArray, "*#batch"] = 1.0,
    where: Bool[AnyArray, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Normalised knowledge distillation (NKD): soft label of the target, then the rest.

    ``-p_y log q_y - g T^2 sum_{c != y} p'_c log q'_c``: p and q are the plain
    predictions of teacher and student, p' and q' those softened with T, on the classes
    ``c != y`` alone, renormalised.

    Args:
        student_logits: [..., classes], finite, two classes or more.
        teacher_logits: [..., classes], finite; no gradient flows into them.
        labels: Classes [...] in [0, classes).
        gamma: Weight g of the other classes.
        temperature: T of the other classes, positive; a number or one an example [...].
        where: Which examples count [...]; the others give 0 and no gradient.

    Returns:
        Losses [...], float32 or wider: cross-entropies, so not 0 at equal logits. A
        label out of range that can't be seen because it is traced gives not-a-number.

    Raises:
        ValueError: If shapes do not match or an argument is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> student, teacher = jnp.zeros((1, 2)), jnp.array([[50.0, 0.0]])
        >>> losses = normalized_knowledge_distillation(student, teacher, jnp.array([0]))
        >>> print(f"{float(losses[0]):.4f}")
        0.6931

    Reference:
        Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A
        Unified Approach with Normalized Loss and Customized Soft Labels", ICCV 2023,
        sec. 3. One version of the authors' code left the target among the other
        classes; here it is not.
    """
    student, teacher, where = pair(student_logits, teacher_logits, where)
    is_label, valid = label_mask(student, labels, where)
    plain_q, plain_p = jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)
    target = -jnp.exp(_at(plain_p, is_label)) * _at(plain_q, is_label)
    scale, log_q, log_p = soften(
        temperature, student.shape[:-1], where, student, teacher
    )
    rest_q = jnp.where(is_label, 0.0, _others(log_q, is_label))
    others = -jnp.sum(jnp.exp(_others(log_p, is_label)) * rest_q, axis=-1)
    return counted((target + gamma * (scale * others)) * valid, where)


def weighted_soft_label_distillation(
    student_logits: Float[AnyArray, "*batch classes"],
    teacher_logits: Float[AnyArray, "*batch classes"],
    labels: Integer[AnyArray, "*batch"],
    *,
    temperature: float | Float[AnyArray, "*#batch"] = 2.0,
    where: Bool[AnyArray, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Weighted soft labels (WSLD): less weight where the student beats its teacher.

    ``-(1 - exp(-L_s / L_t)) T^2 sum_c p_c log q_c`` with the softened predictions p and
    q of teacher and student, and their cross-entropies L_t and L_s against the labels
    at temperature 1, which are constants of the gradient.

    Args:
        student_logits: [..., classes], finite, two classes or more.
        teacher_logits: [..., classes], finite; no gradient flows into them.
        labels: Classes [...] in [0, classes).
        temperature: T, positive; a number or one an example [...].
        where: Which examples count [...]; the others give 0 and no gradient.

    Returns:
        Losses [...], float32 or wider: cross-entropies, so not 0 at equal logits. A
        label out of range that can't be seen because it is traced gives not-a-number.

    Raises:
        ValueError: If shapes do not match or an argument is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> logits, labels = jnp.zeros((1, 2)), jnp.array([0])
        >>> losses = weighted_soft_label_distillation(logits, logits, labels)
        >>> print(f"{float(losses[0]):.4f}")  # (1 - 1 / e) * 4 * log(2)
        1.7526

    Reference:
        Zhou et al., "Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance
        Tradeoff Perspective", ICLR 2021, sec. 4. The paper weighs it with 2.5 on
        ImageNet. L_t has 1e-7 added, as in common implementations.
    """
    student, teacher, where = pair(student_logits, teacher_logits, where)
    is_label, valid = label_mask(student, labels, where)
    loss_s, loss_t = (
        jax.nn.logsumexp(z, axis=-1) - _at(z, is_label)
        for z in jax.lax.stop_gradient((student, teacher))
    )
    weights = -jnp.expm1(-loss_s / (loss_t + 1e-7))
    scale, student, teacher = tempered(
        temperature, student.shape[:-1], where, student, teacher
    )
    soft = soft_cross_entropy(teacher, student)
    return counted(weights * (scale * soft) * valid, where)


def virtual_teacher_distillation(
    student_logits: Float[AnyArray, "*batch classes"],
    labels: Integer[AnyArray, "*batch"],
    *,
    correct_probability: float | Float[AnyArray, ""] = 0.99,
    temperature: float | Float[AnyArray, "*#batch"] = 20.0,
    form: Literal["paper", "code"] = "paper",
    where: Bool[AnyArray, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Teacher-free distillation (Tf-KD reg) from a teacher made of the label.

    The virtual teacher u is right with probability a and finds all other classes
    equally likely. "paper" is `knowledge_distillation` from it,
    ``T^2 KL(softmax(log u / T) || softmax(z / T))``; "code" softens the probabilities
    themselves and the student not at all, ``KL(softmax(u / T) || softmax(z))``.

    Args:
        student_logits: [..., classes], finite, two classes or more.
        labels: Classes [...] in [0, classes).
        correct_probability: a in (0, 1]; the paper asks for 0.9 or more, its code takes
            0.99.
        temperature: T, positive; a number or one an example [...]. The paper asks for
            20 or more.
        form: "paper" or "code".
        where: Which examples count [...]; the others give 0 and no gradient.

    Returns:
        Losses [...], non-negative up to rounding, float32 or wider. A label out of
        range that can't be seen because it is traced gives not-a-number.

    Raises:
        ValueError: If shapes do not match or an argument is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> student, labels = jnp.log(jnp.array([[0.9, 0.05, 0.05]])), jnp.array([0])
        >>> losses = virtual_teacher_distillation(
        ...     student, labels, correct_probability=0.9, temperature=1.0
        ... )
        >>> print(f"{abs(float(losses[0])):.4f}")
        0.0000

    Reference:
        Yuan et al., "Revisiting Knowledge Distillation via Label Smoothing
        Regularization", CVPR 2020, sec. 4. Deviation: the factor T^2, as everywhere
        here; "code" is the authors', but for their mean over the classes too and a
        factor of their own.
    """
    if not isinstance(correct_probability, Tracer):
        if not 0.0 < correct_probability <= 1.0:
            raise ValueError(
                f"correct_probability must be in (0, 1], got {correct_probability}."
            )
    student = widen(student_logits)
    if where is not None:
        where = check_mask("where", where, student.shape[:-1])
        student = jnp.where(where[..., None], student, 0.0)
    is_label, valid = label_mask(student, labels, where)
    a = jnp.asarray(correct_probability, student.dtype)
    # A finite "never": divided by the temperature, -inf would have no slope.
    wrong = jnp.maximum(jnp.log1p(-a), -1e30) - jnp.log(student.shape[-1] - 1.0)
    teacher = jnp.where(is_label, jnp.log(a), wrong)
    if form == "paper":
        losses = knowledge_distillation(
            student, teacher, temperature=temperature, where=where
        )
    elif form == "code":
        _, u = tempered(temperature, student.shape[:-1], where, jnp.exp(teacher))
        losses = softmax_divergence(u, student)
    else:
        raise ValueError(f'form must be "paper" or "code", got {form!r}.')
    return counted(losses * valid, where)


def _at(log_p, is_label):
    return jnp.sum(jnp.where(is_label, log_p, 0.0), axis=-1)


def _binary(log_p, is_label):
    """Log-probabilities of the labelled class and of all others together."""
    rest = jax.nn.logsumexp(jnp.where(is_label, -jnp.inf, log_p), axis=-1)
    return jnp.stack([_at(log_p, is_label), rest], axis=-1)


def _among_others(teacher, student, is_label):
    """The divergence of the predictions among the classes but the labelled one."""
    teacher, student = (jnp.where(is_label, -jnp.inf, z) for z in (teacher, student))
    return softmax_divergence(teacher, student)


def _others(log_p, is_label):
    """Log-probabilities among the other classes; -inf for the labelled one."""
    return jax.nn.log_softmax(jnp.where(is_label, -jnp.inf, log_p))
