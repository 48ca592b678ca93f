"""Writing sequences one token after the other: beam search and sampling."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxtransfer.ops.dtypes import common_dtype
from jaxtransfer.typing import AnyArray

_NEVER = -1e30

Step = Callable[[Any, Array], tuple[Array, Any]]


class Beams(NamedTuple):
    """Sequences that a search has found, the best first.

    Attributes:
        tokens: [batch, beams, length], padding after the end.
        scores: [batch, beams], log-probability over ``length ** length_penalty``;
            not-a-number for an example of which a logit was, -1e30 where there are
            fewer sequences than beams.
        lengths: [batch, beams], tokens with the end's; 0 where there is no sequence.
    """

    tokens: Int[Array, "batch beams length"]
    scores: Float[Array, "batch beams"]
    lengths: Int[Array, "batch beams"]


def beam_search(
    step: Step,
    state: Any,
    begin: Int[AnyArray, "batch"],
    length: int,
    end: int,
    *,
    beams: int = 4,
    padding: int = 0,
    length_penalty: float = 0.6,
    where: Bool[AnyArray, "vocabulary"] | None = None,
) -> Beams:
    """Beam search over batches, of one shape from beginning to end.

    Of the continuations of all unfinished sequences, each step keeps the ``beams``
    likeliest that go on; an end counts if it is among the ``beams`` likeliest of all.
    Finished sequences are compared by ``log p(y) / |y| ** length_penalty`` and the
    ``beams`` best kept; the search stops as soon as no unfinished one can enter them.
    What is unfinished at ``length`` competes as it is. One beam without length penalty
    is greedy search.

    Args:
        step: ``(state, tokens [rows]) -> (logits [rows, vocabulary], state)``; rows are
            batch * beams, the beams of an example beside each other. If it has an
            attribute ``length``, it is asked for no more tokens.
        state: Any pytree of arrays [batch, ...], such as keys and values of attention.
        begin: The token that a sequence begins with, [batch]; it is not part of it.
            Tokens are of its type.
        length: The most tokens of a sequence, the end's among them; positive.
        end: The token that ends a sequence, one of the vocabulary.
        beams: How many sequences an example, positive and less than the vocabulary.
        padding: The token that fills up.
        length_penalty: Exponent of the length, 0 or more. 0 prefers short sequences.
        where: Which tokens may be written [vocabulary]; all by default.

    Returns:
        `Beams`.

    Raises:
        ValueError: If an option is out of its range, ``begin``, ``state`` or ``where``
            of another shape or type, or ``length`` more than the step can write.

    Example:
        >>> import jax.numpy as jnp
        >>> table = jnp.log(jnp.array([[0.1, 0.5, 0.4], [0.1, 0.1, 0.8], [1, 1, 1]]))
        >>> step = lambda state, tokens: (table[tokens], state)
        >>> found = beam_search(
        ...     step, (), jnp.array([0]), beams=1, length=4, end=2, padding=-1)
        >>> found.tokens.tolist(), found.lengths.tolist()
        ([[[1, 2, -1, -1]]], [[2]])

    Reference:
        The length penalty: Wu et al., "Google's Neural Machine Translation System",
        2016, sec. 7. Deviation: the plain power of the length, which is theirs without
        the five tokens added to it.
    """
    if beams < 1 or length < 1 or length_penalty < 0:
        raise ValueError(
            "beams and length must be positive and length_penalty not negative, got "
            f"{beams}, {length} and {length_penalty}."
        )
    begin = _checked(step, begin, length, padding)
    where = _allowed(where)
    batch = len(begin)
    for shape in map(jnp.shape, jax.tree.leaves(state)):
        if shape[:1] != (batch,):
            raise ValueError(
                f"state must have arrays [batch, ...] of {batch} examples, got shape "
                f"{list(shape)}; repeat what is the same for all."
            )

    def flat(tree):
        return jax.tree.map(lambda x: x.reshape(batch * beams, *x.shape[2:]), tree)

    def split(x):
        return x.reshape(batch, beams, *x.shape[1:])

    def pick(x, chosen):
        index = chosen.reshape(*chosen.shape, *(1,) * (x.ndim - 2))
        return jnp.take_along_axis(x, index, axis=1)

    first = jnp.broadcast_to(begin[:, None], (batch, beams))
    filled = jnp.full((batch, beams, length), padding, first.dtype)
    # The sequences of an example are one at the beginning.
    alone = jnp.where(jnp.arange(beams) == 0, 0.0, _NEVER)
    worst = jnp.full((batch, beams), _NEVER)
    begun = (
        jnp.asarray(0),
        first,
        filled,
        jnp.broadcast_to(alone, (batch, beams)),
        jax.tree.map(lambda x: jnp.repeat(x, beams, axis=0), state),
        Beams(filled, worst, jnp.zeros((batch, beams), int)),
    )

    def goes_on(carry):
        count, _, _, live, _, found = carry
        # Log-probabilities only fall; the longest may be divided by the most.
        best = jnp.maximum(live[:, 0] / length**length_penalty, _NEVER)
        hopeless = jnp.all(found.scores[:, -1] >= best)
        return (count < length) & ~hopeless

    def merge(found, other):
        both = [
            jnp.concatenate(pair, axis=1) for pair in zip(found, other, strict=True)
        ]
        chosen = jax.lax.top_k(both[1], beams)[1]
        return Beams(*(pick(x, chosen) for x in both))

    def write(carry):
        count, last, written, live, state, found = carry
        logits, state = step(state, last.reshape(-1))
        logits = logits.astype(common_dtype(logits.dtype, jnp.float32))
        logs = split(jax.nn.log_softmax(logits))
        vocabulary = logs.shape[-1]
        if beams >= vocabulary:
            raise ValueError(f"beams must be less than {vocabulary}, got {beams}.")
        _check_tokens(end, vocabulary, last.dtype)
        if where is not None:
            logs = jnp.where(where, logs, _NEVER)
        total = jnp.maximum(live[..., None] + logs, _NEVER)
        last_of_best = jax.lax.top_k(total.reshape(batch, -1), beams)[0][:, -1:]
        ends = (total[..., end] >= last_of_best) & (total[..., end] > _NEVER / 2)
        ended = total[..., end] / (count + 1.0) ** length_penalty
        ended = jnp.where(ends, ended, _NEVER)
        finished = written.at[:, :, count].set(end)
        found = merge(
            found, Beams(finished, ended, jnp.full((batch, beams), count + 1))
        )
        total = total.at[..., end].set(_NEVER)
        live, index = jax.lax.top_k(total.reshape(batch, -1), beams)
        parent, token = index // vocabulary, (index % vocabulary).astype(last.dtype)
        written = pick(written, parent).at[:, :, count].set(token)
        state = flat(jax.tree.map(lambda x: pick(split(x), parent), state))
        return count + 1, token, written, live, state, found

    count, _, written, live, _, found = jax.lax.while_loop(goes_on, write, begun)
    unfinished = jnp.where(
        (count >= length) & (live > _NEVER / 2), live / length**length_penalty, _NEVER
    )
    found = merge(found, Beams(written, unfinished, jnp.full((batch, beams), length)))
    # It sorts before all numbers, so that what was not-a-number once is so at the end.
    lost = jnp.any(jnp.isnan(live), axis=1, keepdims=True)
    return found._replace(scores=jnp.where(lost, jnp.nan, found.scores))


def _checked(step, begin, length, padding):
    """The tokens to begin with."""
    begin = jnp.asarray(begin)
    if begin.ndim != 1 or not len(begin):
        raise ValueError(
            "begin must have a token for each example, [batch], got shape "
            f"{begin.shape}."
        )
    limits = jnp.iinfo(begin.dtype)
    if not limits.min <= padding <= limits.max:
        raise ValueError(
            f"padding: {padding} is no {begin.dtype}, the type of begin's tokens; give "
            "begin as int32."
        )
    most = getattr(step, "length", None)
    if most is not None and length > most:
        raise ValueError(
            f"length: got {length}, but the step was made for {most} tokens at most; "
            "give both the same."
        )
    return begin


def _allowed(where):
    """Which tokens may be written."""
    if where is None:
        return None
    where = jnp.asarray(where)
    if where.dtype != bool or where.ndim != 1:
        raise ValueError(
            "where must be boolean [vocabulary], the same for every example, got "
            f"{where.dtype} {list(where.shape)}."
        )
    return where


def _check_tokens(end, vocabulary, dtype):
    if vocabulary - 1 > jnp.iinfo(dtype).max:
        raise ValueError(
            f"begin: tokens are of its type, {dtype}, which has no room for a "
            f"vocabulary of {vocabulary}; give it as int32."
        )
    # A negative end would count from the back when read, and never be written.
    if not 0 <= end < vocabulary:
        raise ValueError(f"end must be in 0 … {vocabulary - 1}, got {end}.")


def sample_tokens(
    step: Step,
    state: Any,
    begin: Int[AnyArray, "batch"],
    key: Array,
    length: int,
    end: int,
    *,
    padding: int = 0,
    temperature: float = 1.0,
    where: Bool[AnyArray, "vocabulary"] | None = None,
) -> Int[Array, "batch length"]:
    """Sequences drawn from a model, such as for distillation on a student's own words.

    ``y_t ~ softmax(z_t / temperature)`` until the end.

    Args:
        step: ``(state, tokens [batch]) -> (logits [batch, vocabulary], state)``, as for
            `beam_search`.
        state: Any pytree of arrays.
        begin: The token that a sequence begins with, [batch]; it is not part of it.
            Tokens are of its type.
        key: Of the draws.
        length: The most tokens of a sequence, positive.
        end: The token that ends a sequence, one of the vocabulary.
        padding: The token that fills up.
        temperature: Positive; less is closer to the likeliest token.
        where: Which tokens may be written [vocabulary]; all by default, that of
            ``padding`` among them.

    Returns:
        Tokens [batch, length], padding after the end.

    Raises:
        ValueError: If an option is out of its range, ``begin`` or ``where`` of another
            shape or type, or ``length`` more than the step can write.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> sure = lambda state, tokens: (jnp.eye(3)[(tokens + 1) % 3] * 99, state)
        >>> key, begin = jax.random.key(0), jnp.array([0])
        >>> sample_tokens(sure, (), begin, key=key, length=4, end=2).tolist()
        [[1, 2, 0, 0]]

    Reference:
        Agarwal et al., "On-Policy Distillation of Language Models", ICLR 2024, sec. 3.
    """
    if length < 1 or temperature <= 0:
        raise ValueError(
            f"length and temperature must be positive, got {length} and {temperature}."
        )
    begin = _checked(step, begin, length, padding)
    where = _allowed(where)

    def write(carry, key):
        last, over, state = carry
        logits, state = step(state, last)
        _check_tokens(end, logits.shape[-1], last.dtype)
        logits = logits.astype(common_dtype(logits.dtype, jnp.float32))
        if where is not None:
            logits = jnp.where(where, logits, -jnp.inf)
        token = jax.random.categorical(key, logits / temperature).astype(last.dtype)
        token = jnp.where(over, padding, token)
        return (token, over | (token == end), state), token

    begun = begin, jnp.zeros(begin.shape, bool), state
    _, tokens = jax.lax.scan(write, begun, jax.random.split(key, length))
    return tokens.T


__all__ = ["Beams", "beam_search", "sample_tokens"]
