"""Beam search against all sequences there are; sampling."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import ops

VOCABULARY, END, PADDING = 4, 3, 0


def of_tables(tables):
    """A model whose logits depend on place and last token, of one table an example."""

    def step(state, tokens):
        table, place = state
        return table[jnp.arange(len(tokens)), place, tokens], (table, place + 1)

    return step, (tables, jnp.zeros(len(tables), int))


def tables(batch, length, seed=0):
    key = jax.random.key(seed)
    return 2 * jax.random.normal(key, (batch, length, VOCABULARY, VOCABULARY))


def every_sequence(table, length, penalty):
    """Scores of all sequences that end, or are of the full length, best first."""
    logs = np.asarray(jax.nn.log_softmax(table), np.float64)
    others = [t for t in range(VOCABULARY) if t != END]
    found = {}
    for size in range(1, length + 1):
        for front in itertools.product(others, repeat=size - 1):
            lasts = range(VOCABULARY) if size == length else [END]
            for last in lasts:
                sequence, before, total = (*front, last), 1, 0.0
                for place, token in enumerate(sequence):
                    total += logs[place, before, token]
                    before = token
                found[sequence] = total / size**penalty
    return sorted(found.items(), key=lambda pair: -pair[1])


@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0])
def test_beams_that_hold_everything_find_the_best_sequences(penalty):
    length, some = 3, tables(2, 3)
    # Three beams hold every unfinished sequence of one token; nine are as many as two
    # tokens have, but a beam must be less than the vocabulary: the first is compared.
    step, state = of_tables(some)
    found = ops.beam_search(
        step,
        state,
        jnp.ones(2, int),
        beams=3,
        length=length,
        end=END,
        padding=PADDING,
        length_penalty=penalty,
    )
    for example in range(2):
        best = dict(every_sequence(some[example], length, penalty))
        for beam in range(3):
            size = int(found.lengths[example, beam])
            tokens = tuple(np.asarray(found.tokens[example, beam, :size]).tolist())
            np.testing.assert_allclose(
                found.scores[example, beam], best[tokens], rtol=1e-5
            )
            assert np.all(found.tokens[example, beam, size:] == PADDING)
    # Of these tables no prefix of the best is outside of the beams.
    firsts = [every_sequence(some[n], length, penalty)[0][0] for n in range(2)]
    for example, first in enumerate(firsts):
        assert tuple(found.tokens[example, 0, : len(first)].tolist()) == first
    assert np.all(np.diff(found.scores, axis=1) <= 0)


@pytest.mark.parametrize("seed", range(5))
def test_one_beam_without_penalty_is_greedy_search(seed):
    some = tables(8, 6, seed)
    step, state = of_tables(some)
    options = {"beams": 1, "length": 6, "end": END, "length_penalty": 0.0}
    found = ops.beam_search(step, state, jnp.ones(8, int), **options)
    for example in range(8):
        token, greedy = 1, []
        while token != END and len(greedy) < 6:
            token = int(jnp.argmax(some[example, len(greedy), token]))
            greedy.append(token)
        size = int(found.lengths[example, 0])
        assert found.tokens[example, 0, :size].tolist() == greedy


def test_an_end_that_is_not_among_the_likeliest_does_not_count():
    """Its score by length would be the best, but no beam would have taken it."""
    logits = jnp.log(jnp.array([0.0, 0.45, 0.40, 0.15]))
    step, state = of_tables(jnp.broadcast_to(logits, (1, 4, 4, 4)))
    options = {"beams": 2, "length": 4, "end": END, "length_penalty": 0.0}
    found = ops.beam_search(step, state, jnp.ones(1, int), **options)
    assert not np.any(found.tokens == END)
    assert found.tokens[0, 0].tolist() == [1, 1, 1, 1]


def test_tokens_that_may_not_be_written_are_not():
    step, state = of_tables(tables(4, 5, seed=1))
    where = jnp.array([False, True, True, True])
    options = {"beams": 2, "length": 5, "end": END, "padding": -1}
    begin = jnp.ones(4, int)
    with_it = ops.beam_search(step, state, begin, **options)
    without = ops.beam_search(step, state, begin, **options, where=where)
    assert np.any(with_it.tokens == 0) and not np.any(without.tokens == 0)
    some = {**options, "key": jax.random.key(0)}
    some.pop("beams")
    drawn, others = (
        ops.sample_tokens(step, state, begin, **some, where=mask)
        for mask in (None, where)
    )
    assert np.any(drawn == 0) and not np.any(others == 0)


def test_jitted_and_by_itself_the_same():
    some = tables(3, 4, seed=2)
    step, _ = of_tables(some)

    def search(some):
        _, state = of_tables(some)
        return ops.beam_search(
            step, state, jnp.ones(len(some), int), beams=3, length=4, end=END
        )

    together = jax.jit(search)(some)
    for example in range(3):
        alone = search(some[example : example + 1])
        jax.tree.map(
            lambda x, y, n=example: np.testing.assert_allclose(x[n], y[0], rtol=1e-6),
            together,
            alone,
        )


@pytest.mark.parametrize("wrong", [{"beams": 0}, {"length": 0}, {"beams": 9}])
def test_options_out_of_range(wrong):
    step, state = of_tables(tables(1, 4))
    options = {"beams": 2, "length": 4, "end": END, **wrong}
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ops.beam_search(step, state, jnp.ones(1, int), **options)


def test_samples_follow_the_probabilities():
    some = jnp.broadcast_to(tables(1, 2, seed=5), (20_000, 2, VOCABULARY, VOCABULARY))
    step, state = of_tables(some)
    tokens = ops.sample_tokens(
        step, state, jnp.ones(20_000, int), key=jax.random.key(1), length=2, end=END
    )
    expected = jax.nn.softmax(some[0, 0, 1])
    counted = jnp.bincount(tokens[:, 0], length=VOCABULARY) / len(tokens)
    np.testing.assert_allclose(counted, expected, atol=0.012)
    assert np.all(tokens[tokens[:, 0] == END, 1] == 0)
    with pytest.raises(ValueError, match="temperature"):
        ops.sample_tokens(
            step,
            state,
            jnp.ones(1, int),
            key=jax.random.key(1),
            length=2,
            end=END,
            temperature=0.0,
        )


@pytest.mark.parametrize("end", [-1, VOCABULARY])
def test_ends_that_can_not_be_written(end):
    step, state = of_tables(tables(1, 4))
    begin, message = jnp.ones(1, int), f"end must be in 0 … 3, got {end}"
    with pytest.raises(ValueError, match=message):
        ops.beam_search(step, state, begin, beams=2, length=4, end=end)
    with pytest.raises(ValueError, match=message):
        ops.sample_tokens(step, state, begin, jax.random.key(0), length=4, end=end)


def test_tokens_that_begin_has_no_room_for():
    def step(state, tokens):
        return jnp.zeros((len(tokens), 300)), state

    begin, message = jnp.ones(1, jnp.int8), "begin: .* int8, which has no room for"
    with pytest.raises(ValueError, match=message):
        ops.beam_search(step, (), begin, beams=2, length=4, end=0)
    with pytest.raises(ValueError, match=message):
        ops.sample_tokens(step, (), begin, jax.random.key(0), length=4, end=0)


BOTH = {
    "beam_search": lambda *given, **options: ops.beam_search(
        *given, beams=2, **{"length": 4, "end": END, **options}
    ),
    "sample_tokens": lambda *given, **options: ops.sample_tokens(
        *given, jax.random.key(0), **{"length": 4, "end": END, **options}
    ),
}


@pytest.mark.parametrize("search", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize(
    ("begin", "options", "message"),
    [
        (jnp.ones((), int), {}, r"begin must have a token for each .* shape \(\)"),
        (jnp.ones(0, int), {}, r"begin must have a token for each .* shape \(0,\)"),
        (jnp.ones(1, jnp.int8), {"padding": 300}, "padding: 300 is no int8"),
    ],
)
def test_beginnings_that_can_not_be(search, begin, options, message, types_unchecked):
    step, state = of_tables(tables(1, 4))
    with pytest.raises(ValueError, match=message):
        search(step, state, begin, **options)


@pytest.mark.parametrize("search", BOTH.values(), ids=BOTH)
def test_a_step_for_fewer_tokens_is_not_asked_for_more(search):
    step, state = of_tables(tables(1, 4))
    step.length = 3
    with pytest.raises(ValueError, match="length: got 4, .* made for 3 tokens at most"):
        search(step, state, jnp.ones(1, int))
    search(step, state, jnp.ones(1, int), length=3)


@pytest.mark.parametrize(
    "where", [jnp.ones((2, VOCABULARY), bool), jnp.arange(VOCABULARY)]
)
@pytest.mark.parametrize("search", BOTH.values(), ids=BOTH)
def test_a_mask_of_tokens_is_one_for_all(search, where, types_unchecked):
    step, state = of_tables(tables(2, 4))
    with pytest.raises(ValueError, match=r"where must be boolean \[vocabulary\]"):
        search(step, state, jnp.ones(2, int), where=where)


def test_a_state_is_one_an_example():
    def step(place, tokens):
        return jnp.zeros((len(tokens), VOCABULARY)), place + 1

    with pytest.raises(ValueError, match=r"arrays \[batch, ...\] of 2 .* shape \[\]"):
        BOTH["beam_search"](step, jnp.array(0), jnp.ones(2, int))


@pytest.mark.parametrize("place", [0, 2])
def test_an_example_of_lost_logits_has_no_score(place):
    some = tables(2, 4)
    lost = some.at[1, place].set(jnp.nan)
    found, expected = (
        BOTH["beam_search"](*of_tables(these), jnp.ones(2, int))
        for these in (lost, some)
    )
    assert np.isnan(found.scores[1]).all()
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x[0], y[0]), found, expected
    )
