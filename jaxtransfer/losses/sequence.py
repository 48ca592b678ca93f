"""Distillation of models of sequences: by token, by sequence, and in little memory."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from jaxtransfer.losses.classification import cross_entropy
from jaxtransfer.losses.distillation import knowledge_distillation
from jaxtransfer.losses.reduction import check_mask, widen
from jaxtransfer.ops.products import product
from jaxtransfer.typing import AnyArray


def token_distillation(
    student_logits: Float[AnyArray, "*batch tokens vocabulary"],
    teacher_logits: Float[AnyArray, "*batch tokens vocabulary"],
    *,
    temperature: float | Float[AnyArray, "*#batch #tokens"] = 1.0,
    divergence: Literal["forward", "reverse", "jensen_shannon"] = "forward",
    beta: float | Float[AnyArray, ""] = 0.5,
    where: Bool[AnyArray, "*batch tokens"] | None = None,
) -> Float[Array, "*batch tokens"]:
    """Word-level distillation (word-KD): divergence of the next word, a token.

    ``T^2 KL(softmax(z_t / T) || softmax(z_s / T))`` at every position: that of
    `knowledge_distillation`, with the other divergences, at the temperature 1 that is
    usual for sequences. ``mean(..., where=where)`` is its mean over the real tokens.

    Args:
        student_logits: [..., tokens, vocabulary], finite, or -inf where both are.
        teacher_logits: [..., tokens, vocabulary], on the same tokens; no gradient flows
            into them.
        temperature: T, positive: a number or one a token.
        divergence: "forward", "reverse" or "jensen_shannon".
        beta: Weight of the generalised Jensen-Shannon divergence, in [0, 1].
        where: Which tokens are no padding [..., tokens]; the others give 0 and no
            gradient.

    Returns:
        Losses [..., tokens], non-negative up to rounding, float32 or wider.

    Raises:
        ValueError: If the shapes differ or an option is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> logits = jnp.array([[[1.0, 2.0], [jnp.nan, 0.0]]])
        >>> where = jnp.array([[True, False]])
        >>> token_distillation(logits, logits, where=where).tolist()
        [[0.0, 0.0]]

    Reference:
        Kim and Rush, "Sequence-Level Knowledge Distillation", EMNLP 2016, sec. 3.1.
        Deviation: the divergence in place of the cross-entropy, which differs by a
        constant. "jensen_shannon" on sequences of the student: Agarwal et al.,
        "On-Policy Distillation of Language Models", ICLR 2024, sec. 3.
    """
    if jnp.shape(student_logits) != jnp.shape(teacher_logits) or (
        jnp.ndim(student_logits) < 2
    ):
        raise ValueError(
            "student_logits and teacher_logits must have the same shape [..., tokens, "
            f"vocabulary], got {jnp.shape(student_logits)} and "
            f"{jnp.shape(teacher_logits)}; both must read the tokens of one tokenizer."
        )
    return knowledge_distillation(
        student_logits,
        teacher_logits,
        temperature=temperature,
        divergence=divergence,
        beta=beta,
        where=where,
    )


def sequence_distillation(
    student_logits: Float[AnyArray, "*batch tokens vocabulary"],
    teacher_tokens: Integer[AnyArray, "*batch tokens"],
    *,
    where: Bool[AnyArray, "*batch tokens"] | None = None,
) -> Float[Array, "*batch"]:
    """Sequence-level distillation (seq-KD): likelihood of the teacher's sequence.

    ``-sum_t log softmax(z_t)[y_t]`` for the sequence y that the teacher decoded, such
    as the best of a beam search. For the paper's interpolation decode the sequence of
    the beam that is most like the label.

    Args:
        student_logits: [..., tokens, vocabulary], finite; at t those that predict y_t
            from what comes before it in y.
        teacher_tokens: y [..., tokens], in [0, vocabulary) where they count.
        where: Which tokens are no padding [..., tokens]; the others add 0 and have no
            gradient.

    Returns:
        Losses [...], one a sequence, float32 or wider. For one a token there is
        `cross_entropy`. A token out of range that can't be seen because it is traced
        gives not-a-number.

    Raises:
        ValueError: If shapes do not match, tokens are not integers or, outside of
            ``jit``, out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> logits, tokens = jnp.zeros((1, 3, 2)), jnp.array([[1, 0, -1]])
        >>> losses = sequence_distillation(logits, tokens, where=tokens >= 0)
        >>> print(f"{losses[0]:.4f}")  # 2 log 2
        1.3863

    Reference:
        Kim and Rush, "Sequence-Level Knowledge Distillation", EMNLP 2016, sec. 3.2.
    """
    if jnp.shape(student_logits)[:-1] != jnp.shape(teacher_tokens) or (
        jnp.ndim(student_logits) < 2
    ):
        raise ValueError(
            "student_logits must be [..., tokens, vocabulary] and teacher_tokens [..., "
            f"tokens], got {jnp.shape(student_logits)} and {jnp.shape(teacher_tokens)};"
            " run the student on the teacher's sequence."
        )
    losses = cross_entropy(student_logits, teacher_tokens, where=where)
    return jnp.sum(losses, axis=-1)


def chunked_token_distillation(
    student_hidden: Float[AnyArray, "*batch width"],
    student_output: Float[AnyArray, "width vocabulary"],
    teacher_hidden: Float[AnyArray, "*batch teacher_width"],
    teacher_output: Float[AnyArray, "teacher_width vocabulary"],
    *,
    chunk_size: int = 1024,
    temperature: float | Float[AnyArray, ""] = 1.0,
    divergence: Literal["forward", "reverse", "jensen_shannon"] = "forward",
    beta: float | Float[AnyArray, ""] = 0.5,
    where: Bool[AnyArray, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Word-level distillation from hidden states, a chunk of the tokens at a time.

    `token_distillation` of the logits ``h_s W_s`` and ``h_t W_t``. Those of one chunk
    at a time are computed, in the gradient once more: memory for logits grows with
    ``chunk_size * vocabulary``, not with the number of tokens.

    Args:
        student_hidden: h_s, last states [..., tokens, width].
        student_output: W_s, output matrix [width, vocabulary]. A bias is one more row,
            and a 1 at the end of every state.
        teacher_hidden: h_t [..., tokens, teacher_width], on the same tokens; no
            gradient flows into them.
        teacher_output: W_t [teacher_width, vocabulary]; no gradient flows into it.
        chunk_size: How many tokens at a time, positive.
        temperature: T, one positive number.
        divergence: "forward", "reverse" or "jensen_shannon".
        beta: Weight of the generalised Jensen-Shannon divergence, in [0, 1].
        where: Which tokens are no padding [..., tokens]; the others give 0 and no
            gradient.

    Returns:
        Losses [..., tokens], non-negative up to rounding, float32 or wider.

    Raises:
        ValueError: If shapes do not match or an option is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> student, teacher = jnp.ones((1, 3, 2)), jnp.ones((1, 3, 4))
        >>> outputs = jnp.zeros((2, 5)), jnp.zeros((4, 5))
        >>> chunked_token_distillation(
        ...     student, outputs[0], teacher, outputs[1], chunk_size=2
        ... ).tolist()
        [[0.0, 0.0, 0.0]]

    Reference:
        The loss: Kim and Rush, "Sequence-Level Knowledge Distillation", EMNLP 2016,
        sec. 3.1. To compute twice what is not kept: Chen et al., "Training Deep Nets
        with Sublinear Memory Cost", 2016, sec. 4.
    """
    student, student_output = widen(student_hidden), widen(student_output)
    teacher, teacher_output = (
        jax.lax.stop_gradient(widen(a)) for a in (teacher_hidden, teacher_output)
    )
    shape = student.shape[:-1]
    _check_product("student", student, student_output)
    _check_product("teacher", teacher, teacher_output)
    if (
        shape != teacher.shape[:-1]
        or student_output.shape[1:] != (teacher_output.shape[1:])
    ):
        raise ValueError(
            "student and teacher must agree in tokens and vocabulary, got hidden "
            f"states {student.shape} and {teacher.shape}, output matrices "
            f"{student_output.shape} and {teacher_output.shape}."
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be positive, got {chunk_size}.")
    where = check_mask("where", True if where is None else where, shape)

    @jax.checkpoint
    def of_chunk(chunk, outputs):
        *hidden, counts = chunk
        # Before the products, for the gradient of the matrices.
        hidden = [jnp.where(counts[:, None], h, 0.0) for h in hidden]
        logits = [product(h, w) for h, w in zip(hidden, outputs, strict=True)]
        return token_distillation(
            *logits,
            temperature=temperature,
            divergence=divergence,
            beta=beta,
            where=counts,
        )

    size = max(min(chunk_size, where.size), 1)
    chunks = tuple(
        _chunks(array.reshape(where.size, *array.shape[len(shape) :]), size)
        for array in (student, teacher, where)
    )
    outputs = student_output, teacher_output
    losses = jax.lax.map(lambda chunk: of_chunk(chunk, outputs), chunks)
    return losses.reshape(-1)[: where.size].reshape(shape)


def _check_product(name, hidden, output):
    if hidden.ndim < 1 or output.ndim != 2 or hidden.shape[-1] != output.shape[0]:
        raise ValueError(
            f"{name}_hidden must be [..., tokens, width] and {name}_output [width, "
            f"vocabulary], got {hidden.shape} and {output.shape}; transpose the matrix "
            "if it is that of the embeddings."
        )


def _chunks(rows, size):
    """[chunks, size, ...], zeros or False after the last row."""
    missing = -len(rows) % size
    rows = jnp.pad(rows, ((0, missing),) + ((0, 0),) * (rows.ndim - 1))
    return rows.reshape(-1, size, *rows.shape[1:])
