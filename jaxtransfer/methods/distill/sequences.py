"""Distilling models that write: batches of sequences, and the student's own words."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer import prng
from jaxtransfer.methods.distill.student import check_whole, of_student
from jaxtransfer.train import metrics
from jaxtransfer.typing import (
    Batch,
    Frozen,
    Metrics,
    ModelState,
    Objective,
    Params,
    Scalar,
    Variables,
)

Generate = Callable[[Variables, Batch, jax.Array], Any]
"""``(student, batch, key) -> tokens [batch, length]``."""


def sequence_batch(
    source: Any, tokens: Any, *, begin: int, padding: int = 0, end: int | None = None
) -> Batch:
    """A batch that teaches to write some sequences.

    At each place the token there is to be told from those before it.

    Args:
        source: what the encoder reads, ``[batch, source]``.
        tokens: sequences with the token that ends them, ``[batch, length]``.
        begin: the token that the decoder reads first.
        padding: the token that is none.
        end: the token that ends a sequence. With it what comes after the first one
            doesn't count, and all else does: needed if ``padding`` is the same token,
            or one that a model may write amid its words.

    Returns:
        ``{"inputs": {"source", "target"}, "labels" [batch, length], "where" [batch,
        length]}``: places of padding don't count, or with ``end`` those after it.
        Tokens are int32 whatever integers they were.

    Raises:
        ValueError: the tokens are no integers ``[batch, length]``.

    Example:
        >>> import jax.numpy as jnp
        >>> batch = sequence_batch(
        ...     jnp.ones((1, 2), int), jnp.array([[5, 6, 2, 0]]), begin=1)
        >>> batch["inputs"]["target"].tolist(), batch["where"].tolist()
        ([[1, 5, 6, 2]], [[True, True, True, False]])
        >>> ended = jnp.array([[5, 0, 2, 2]])
        >>> batch = sequence_batch(
        ...     jnp.ones((1, 2), int), ended, begin=1, padding=2, end=2)
        >>> batch["where"].tolist()
        [[True, True, True, False]]
    """
    tokens = _tokens(tokens)
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"tokens: got {tokens.dtype} {list(tokens.shape)}; give integers "
            "[batch, length]"
        )
    first = jnp.full_like(tokens[:, :1], begin)
    return {
        "inputs": {
            "source": source,
            "target": jnp.concatenate([first, tokens[:, :-1]], axis=1),
        },
        "labels": tokens,
        "where": tokens != padding if end is None else _up_to(end, tokens),
    }


def _up_to(end: int, tokens: jax.Array) -> jax.Array:
    """Places up to the first end, that one among them."""
    ends = (tokens == end).astype(jnp.int32)
    return jnp.cumsum(ends, axis=1) - ends == 0


def _check_sequences(batch: Batch) -> None:
    for part, names in (
        (batch, ("inputs", "labels", "where")),
        (batch.get("inputs", {}), ("source", "target")),
    ):
        if missing := [name for name in names if name not in part]:
            raise ValueError(
                f"the batch has no {missing[0]!r}; it has {sorted(part)}; make it "
                "with distill.sequence_batch(source, tokens, begin=...)"
            )


def _tokens(given: Any) -> jax.Array:
    """Tokens of any integers as int32."""
    tokens = jnp.asarray(given)
    integers = jnp.issubdtype(tokens.dtype, jnp.integer)
    return tokens.astype(jnp.int32) if integers else tokens


def on_policy(
    objective: Objective,
    generate: Generate,
    *,
    begin: int,
    padding: int = 0,
    end: int | None = None,
    share: float = 0.5,
) -> Objective:
    r"""Teach a student on sequences that it writes itself (GKD).

    A batch is replaced, with probability ``share``, by the same sources with sequences
    :math:`y \sim s(\cdot \mid x)` that the student as it is now writes; the teacher
    then says at each place what it would have written there. No gradient flows into the
    drawing. The teacher alone teaches: labels are taken out of every batch, for a word
    that the student wrote has none.

    Args:
        objective: such as :func:`~jaxtransfer.methods.distill.objective` with a term of
            :func:`~jaxtransfer.losses.token_distillation`, whose divergence is usually
            "jensen_shannon" or "reverse" here.
        generate: draws the sequences, ``(student, batch, key) -> tokens [batch,
            length]``, as long as those of the batch; for example with
            :func:`~jaxtransfer.ops.sample_tokens`.
        begin: the token that the decoder reads first.
        padding: the token that is none.
        end: as for :func:`sequence_batch`, of the student's own words: without it a
            ``padding`` that the student writes amid its words doesn't count (see
            ``where`` of :func:`~jaxtransfer.ops.sample_tokens`).
        share: of the batches, 0 … 1.

    Returns:
        Objective over batches of :func:`sequence_batch`.

    Raises:
        ValueError: ``share`` is out of range; (at the first call) what is generated has
            another length than the batch, the batch lacks what :func:`sequence_batch`
            makes, or has what a teacher says of the words that are replaced.

    Example:
        >>> from jaxtransfer.methods import distill
        >>> def same(student, batch, key):
        ...     return batch["labels"]
        >>> on_policy(lambda *given: given, same, begin=1, share=2.0)
        Traceback (most recent call last):
        ...
        ValueError: share: got 2.0; a probability is in 0 … 1

    References:
        Agarwal et al., *On-policy distillation of language models*, ICLR 2024.
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share: got {share}; a probability is in 0 … 1")

    def value(
        params: Params,
        frozen: Frozen,
        model_state: ModelState,
        batch: Batch,
        key: jax.Array,
    ) -> tuple[Scalar, tuple[ModelState, Metrics]]:
        check_whole(params, frozen)
        _check_sequences(batch)
        stale = [name for name in ("teacher", "teacher_inputs") if name in batch]
        if share and stale:
            raise ValueError(
                f"the batch has {stale[0]!r}, which belongs to other words than those "
                "that the student writes; leave it out, and give the teacher's "
                "variables to train.init_state(..., frozen={'teacher': ...})"
            )
        draw, words, inner = prng.streams(key, "on policy", "words", "objective")
        student = jax.lax.stop_gradient(of_student(params, model_state))

        def own(batch: Batch) -> Batch:
            tokens = jnp.asarray(generate(student, batch, words))
            if tokens.shape != batch["labels"].shape:
                raise ValueError(
                    f"generate: wrote tokens {tokens.shape} for a batch of "
                    f"{batch['labels'].shape}; write as many"
                )
            source = batch["inputs"]["source"]
            return sequence_batch(source, tokens, begin=begin, padding=padding, end=end)

        target, labels = (
            _tokens(part) for part in (batch["inputs"]["target"], batch["labels"])
        )
        lesson = {  # of the types and shapes that own words have
            "inputs": {**batch["inputs"], "target": target},
            "labels": labels,
            "where": jnp.broadcast_to(
                metrics.cover(batch["where"], labels), labels.shape
            ),
        }
        chosen = jax.lax.cond(
            jax.random.bernoulli(draw, share), own, lambda same: same, lesson
        )
        chosen.pop("labels")
        rest = {name: part for name, part in batch.items() if name != "labels"}
        return objective(params, frozen, model_state, {**rest, **chosen}, inner)

    return value


__all__ = ["on_policy", "sequence_batch"]
