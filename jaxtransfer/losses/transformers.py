"""Distillation between the layers of two transformers, with masks of padding.

A mask ``where`` [batch, tokens] marks the real tokens; padding may hold anything. All
but `attention_matching` give one value a token, averaged by ``mean(..., where=where)``.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxtransfer.losses.directions import unit
from jaxtransfer.losses.distillation import knowledge_distillation
from jaxtransfer.losses.reduction import check_mask, mean, widen
from jaxtransfer.losses.softened import counted, soft_cross_entropy
from jaxtransfer.ops.products import gram
from jaxtransfer.typing import AnyArray

# Scores from here down were masked by the network, and are 0 for "mse".
_MASKED_SCORE = -1e2


def attention_matching(
    student_attention: Float[AnyArray, "*batch heads queries keys"],
    teacher_attention: Float[AnyArray, "*batch heads queries keys"],
    *,
    loss: Literal["mse", "cross_entropy"] = "mse",
    softmax: Literal["real", "all"] = "real",
    where: Bool[AnyArray, "*batch tokens"] | None = None,
) -> Float[Array, ""]:
    """Attention transfer of transformers (TinyBERT): scores of one layer, of a set.

    "mse": the mean of ``(s - t)^2`` over all pairs of a query and a key that are both
    real, of all heads and examples, on the scores before the softmax. Scores of -100
    and less, which the network masked, are taken as 0. "cross_entropy": the mean of
    ``-sum_j p_j log q_j`` over the real queries, with ``p = softmax(t)`` and
    ``q = softmax(s)`` over the keys j.

    Args:
        student_attention: Scores [..., heads, queries, keys]; -inf where both mask.
        teacher_attention: Scores of the same shape; no gradient flows into them.
        loss: "mse" or "cross_entropy".
        softmax: Of "cross_entropy" with a mask: "real" goes over the real keys; "all"
            over all keys, whose padding then leaves the sum over j. They agree if the
            scores of padding are already very low; else "all" sees the padding.
        where: Which tokens are real [..., tokens], queries and keys alike.

    Returns:
        Scalar, float32 or wider. A mean over the pairs or queries of the whole set, so
        long examples count for more; 0 if no token counts.

    Raises:
        ValueError: If shapes do not match or an option is unknown.

    Example:
        >>> import jax.numpy as jnp
        >>> scores = jnp.zeros((1, 1, 2, 2))
        >>> float(attention_matching(scores + 3.0, scores))
        9.0
        >>> where = jnp.array([[True, False]])
        >>> float(attention_matching(scores, scores, loss="cross_entropy", where=where))
        0.0

    Reference:
        Jiao et al., "TinyBERT: Distilling BERT for Natural Language Understanding",
        Findings of EMNLP 2020, sec. 3.1. Cross-entropy, and the weight of masked
        sets: Yang et al., "TextBrewer: An Open-Source Knowledge Distillation Toolkit
        for Natural Language Processing", ACL 2020, whose code has "all". Deviation:
        without a mask its cross-entropy drops all negative scores of the teacher; not
        so here.
    """
    student, teacher = _scores(student_attention, teacher_attention)
    if loss not in ("mse", "cross_entropy"):
        raise ValueError(f'loss must be "mse" or "cross_entropy", got {loss!r}.')
    if softmax not in ("real", "all"):
        raise ValueError(f'softmax must be "real" or "all", got {softmax!r}.')
    queries = keys = pairs = None
    if where is not None:
        queries, keys = _queries_and_keys(where, student.shape)
        pairs = keys & queries[..., None]
    if loss == "mse":
        student, teacher = (_fill(s, pairs, 0.0) for s in (student, teacher))
        # The false branch sees no -inf, whose difference has no gradient.
        student, teacher = (
            _fill(s, s > _MASKED_SCORE, 0.0) for s in (student, teacher)
        )
        return mean((student - teacher) ** 2, where=pairs)
    return mean(
        _cross_entropy(student, teacher, queries, keys, softmax == "real"),
        where=queries,
    )


def hidden_matching(
    student_hidden: Float[AnyArray, "*batch features"],
    teacher_hidden: Float[AnyArray, "*batch features"],
    *,
    where: Bool[AnyArray, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Mean squared error (MSE) of hidden states, a token: TinyBERT, TextBrewer.

    ``mean_f (s_f - t_f)^2``. ``mean(..., where=where)`` of it is the sum of squares
    over the number of real tokens and the width.

    Args:
        student_hidden: States [..., tokens, features], after a learned linear map if
            the student is narrower than the teacher.
        teacher_hidden: States of the same shape; no gradient flows into them.
        where: Which tokens count [..., tokens]; the others give 0 and no gradient.

    Returns:
        Losses [..., tokens], non-negative, float32 or wider.

    Raises:
        ValueError: If the shapes differ, or ``where`` does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> hidden = jnp.array([[[1.0, 2.0], [3.0, 4.0]]])
        >>> hidden_matching(hidden + 2.0, hidden).tolist()
        [[4.0, 4.0]]

    Reference:
        Jiao et al., "TinyBERT: Distilling BERT for Natural Language Understanding",
        Findings of EMNLP 2020, sec. 3.1.
    """
    student, teacher, _ = _states(student_hidden, teacher_hidden, where)
    return jnp.mean((student - teacher) ** 2, axis=-1)


def hidden_cosine(
    student_hidden: Float[AnyArray, "*batch features"],
    teacher_hidden: Float[AnyArray, "*batch features"],
    *,
    where: Bool[AnyArray, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Cosine distance of hidden states, a token: DistilBERT.

    ``1 - s.t / (|s| |t|)``, 1 where a state is all zeros.

    Args:
        student_hidden: States [..., tokens, features] of the last layer.
        teacher_hidden: States of the same shape; no gradient flows into them.
        where: Which tokens count [..., tokens]; the others give 0 and no gradient.

    Returns:
        Losses [..., tokens] in [0, 2] up to rounding, float32 or wider. The paper's
        code weighs their mean 1, against 5 of the distilled logits.

    Raises:
        ValueError: If the shapes differ, or ``where`` does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> student, teacher = jnp.array([[3.0, 0.0]]), jnp.array([[0.0, 2.0]])
        >>> hidden_cosine(student, teacher).tolist()
        [1.0]

    Reference:
        Sanh et al., "DistilBERT, a distilled version of BERT: smaller, faster, cheaper
        and lighter", 2019, sec. 2.
    """
    student, teacher, where = _states(student_hidden, teacher_hidden, where)
    return counted(1.0 - jnp.sum(unit(student) * unit(teacher), axis=-1), where)


def patient_distillation(
    student_hidden: Float[AnyArray, "*batch features"],
    teacher_hidden: Float[AnyArray, "*batch features"],
    *,
    where: Bool[AnyArray, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Patient knowledge distillation (PKD): squared distance of unit hidden states.

    ``|s / |s| - t / |t||^2`` of the first token of intermediate layers, ``[:, 0]``.
    Several layers at once are one more axis; the mean over it divides the paper's sum
    by the number of layers.

    Args:
        student_hidden: States [..., features] of the first ([CLS]) token.
        teacher_hidden: States of the same shape; no gradient flows into them.
        where: Which states count [...]; the others give 0 and no gradient.

    Returns:
        Losses [...] in [0, 4], float32 or wider. The paper's weights are 10 to 1000.

    Raises:
        ValueError: If the shapes differ, or ``where`` does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> student, teacher = jnp.array([[3.0, 0.0]]), jnp.array([[0.0, 2.0]])
        >>> patient_distillation(student, teacher).tolist()
        [2.0]

    Reference:
        Sun et al., "Patient Knowledge Distillation for BERT Model Compression", EMNLP
        2019, sec. 3.
    """
    student, teacher, _ = _states(student_hidden, teacher_hidden, where)
    return jnp.sum((unit(student) - unit(teacher)) ** 2, axis=-1)


def minilm_attention(
    student_attention: Float[AnyArray, "*batch heads queries keys"],
    teacher_attention: Float[AnyArray, "*batch heads queries keys"],
    *,
    where: Bool[AnyArray, "*batch tokens"] | None = None,
) -> Float[Array, "*batch queries"]:
    """Self-attention distillation (MiniLM): divergence of attention, a token.

    ``mean_heads KL(softmax(t) || softmax(s))`` of the last layer, over the real keys.
    The paper adds `minilm_values`.

    Args:
        student_attention: Scores before the softmax [..., heads, queries, keys], finite
            or -inf where both mask.
        teacher_attention: Scores of the same shape; no gradient flows into them.
        where: Which tokens are real [..., tokens], queries and keys alike; the other
            queries give 0 and no gradient.

    Returns:
        Losses [..., queries], non-negative up to rounding, float32 or wider.

    Raises:
        ValueError: If the shapes differ, or ``where`` does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> scores = jnp.zeros((1, 1, 2, 2))
        >>> minilm_attention(scores + 3.0, scores).tolist()
        [[0.0, 0.0]]

    Reference:
        Wang et al., "MiniLM: Deep Self-Attention Distillation for Task-Agnostic
        Compression of Pre-Trained Transformers", NeurIPS 2020, sec. 3.1. Deviation: no
        mean over the tokens, so that padding leaves it in the caller's.
    """
    student, teacher = _scores(student_attention, teacher_attention)
    return _divergence(student, teacher, where)


def minilm_values(
    student_values: Float[AnyArray, "*batch heads tokens features"],
    teacher_values: Float[AnyArray, "*batch heads tokens _"],
    *,
    where: Bool[AnyArray, "*batch tokens"] | None = None,
) -> Float[Array, "*batch tokens"]:
    """Value relations (MiniLM): divergence of the values' similarities, a token.

    ``mean_heads KL(softmax(V_t V_t' / sqrt(d_t)) || softmax(V_s V_s' / sqrt(d_s)))``
    over the real keys, d the width of a head, which may differ. Queries or keys in
    place of values are the relations of MiniLM's second version.

    Args:
        student_values: Values [..., heads, tokens, features] of the last layer.
        teacher_values: Values [..., heads, tokens, features], as many heads; no
            gradient flows into them.
        where: Which tokens are real [..., tokens]; the others give 0 and no gradient.

    Returns:
        Losses [..., tokens], non-negative up to rounding, float32 or wider.

    Raises:
        ValueError: If the numbers of examples, heads or tokens differ, or ``where``
            does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> values = jnp.array([[[[1.0, 0.0], [0.0, 1.0]]]])
        >>> minilm_values(values, -values).tolist()
        [[0.0, 0.0]]

    Reference:
        Wang et al., "MiniLM: Deep Self-Attention Distillation for Task-Agnostic
        Compression of Pre-Trained Transformers", NeurIPS 2020, sec. 3.2. The second
        version: Wang et al., "MiniLMv2", Findings of ACL 2021.
    """
    student = widen(student_values)
    teacher = jax.lax.stop_gradient(widen(teacher_values))
    if student.ndim < 3 or student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            "student_values and teacher_values must agree in [..., heads, tokens], got "
            f"{student.shape} and {teacher.shape}; split both into as many heads."
        )
    if where is not None:
        where = check_mask("where", where, (*student.shape[:-3], student.shape[-2]))
        kept = where[..., None, :, None]
        student, teacher = (jnp.where(kept, v, 0.0) for v in (student, teacher))
    return _divergence(_relations(student), _relations(teacher), where)


def uniform_layers(student_layers: int, teacher_layers: int) -> list[int]:
    """The teacher's layer for each of the student's, evenly spaced (TinyBERT).

    ``g(m) = m L_t / L_s`` for m from 0, the embeddings, to L_s, the last layer.

    Args:
        student_layers: L_s, how many layers the student has.
        teacher_layers: L_t, how many the teacher has; a multiple of L_s.

    Returns:
        g(0) to g(L_s): indices into the teacher's hidden states, the embeddings first.
        Attention has no embeddings: there block m of the student, from 0, learns from
        block ``uniform_layers(...)[m + 1] - 1``.

    Raises:
        ValueError: If a number is not positive, or the teacher's no multiple.

    Example:
        >>> uniform_layers(4, 12)
        [0, 3, 6, 9, 12]

    Reference:
        Jiao et al., "TinyBERT: Distilling BERT for Natural Language Understanding",
        Findings of EMNLP 2020, sec. 3.1.
    """
    if student_layers < 1 or teacher_layers < 1 or teacher_layers % student_layers:
        raise ValueError(
            "teacher_layers must be a multiple of student_layers, both positive, got "
            f"{teacher_layers} and {student_layers}; choose the layers by hand."
        )
    step = teacher_layers // student_layers
    return list(range(0, teacher_layers + 1, step))


def _scores(student, teacher):
    student, teacher = widen(student), jax.lax.stop_gradient(widen(teacher))
    if student.shape != teacher.shape or student.ndim < 3:
        raise ValueError(
            "student_attention and teacher_attention must have the same shape [..., "
            f"heads, queries, keys], got {student.shape} and {teacher.shape}; average "
            "over the heads first if their numbers differ."
        )
    return student, teacher


def _states(student, teacher, where):
    """Both widened, 0 where masked, no gradient into the teacher; and the mask."""
    student, teacher = widen(student), jax.lax.stop_gradient(widen(teacher))
    if student.shape != teacher.shape or student.ndim < 1:
        raise ValueError(
            "student_hidden and teacher_hidden must have the same shape [..., "
            f"features], got {student.shape} and {teacher.shape}; map a narrower "
            "student linearly to the teacher's width."
        )
    if where is not None:
        where = check_mask("where", where, student.shape[:-1])
        student, teacher = (
            jnp.where(where[..., None], h, 0.0) for h in (student, teacher)
        )
    return student, teacher, where


def _queries_and_keys(where, shape):
    """The mask by query [..., heads, queries] and by key [..., heads, 1, keys]."""
    *batch, heads, queries, keys = shape
    if queries != keys:
        raise ValueError(
            "where masks queries and keys alike, of which there must be as many, got "
            f"{queries} queries and {keys} keys; leave the padding out of the scores."
        )
    where = check_mask("where", where, (*batch, queries))[..., None, :]
    by_query = jnp.broadcast_to(where, (*batch, heads, queries))
    return by_query, where[..., None, :]


def _fill(values, where, value):
    return values if where is None else jnp.where(where, values, value)


def _only_real(scores, queries, keys):
    """-inf for the keys that are masked; 0 for the queries, whatever their keys."""
    scores = _fill(scores, keys, -jnp.inf)
    return scores if queries is None else _fill(scores, queries[..., None], 0.0)


def _cross_entropy(student, teacher, queries, keys, only_real):
    among, summed = (keys, None) if only_real else (None, keys)
    both = (_only_real(scores, queries, among) for scores in (teacher, student))
    return soft_cross_entropy(*both, where=summed)


def _divergence(student, teacher, where):
    queries = keys = None
    if where is not None:
        queries, keys = _queries_and_keys(where, student.shape)
    losses = knowledge_distillation(
        _only_real(student, queries, keys),
        _only_real(teacher, queries, keys),
        temperature=1.0,
        where=queries,
    )
    return jnp.mean(losses, axis=-2)


def _relations(values):
    return gram(values) / math.sqrt(values.shape[-1])
