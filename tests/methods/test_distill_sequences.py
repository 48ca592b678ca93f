"""Distilling models that write: batches, and the student's own words."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtransfer import losses, nets, ops
from jaxtransfer.methods import distill
from jaxtransfer.methods.distill import Term
from jaxtransfer.model import from_linen
from jaxtransfer.train import init_state, train_step

BEGIN, END = 1, 2
NET = nets.Transformer(
    9, width=8, heads=2, hidden=8, encoder_layers=1, decoder_layers=1
)
MODEL = from_linen(NET)
SOURCE = jnp.array([[4, 5, 2], [6, 2, 0]])
BATCH = distill.sequence_batch(SOURCE, jnp.array([[5, 6, 2], [7, 2, 0]]), begin=BEGIN)
WORDS = {"words": Term(loss=losses.token_distillation)}


@pytest.fixture(scope="module")
def variables():
    init = jax.jit(MODEL.init)
    inputs = BATCH["inputs"]
    return init(jax.random.key(0), inputs), init(jax.random.key(1), inputs)


def write(student, batch, key):
    length = batch["labels"].shape[1]
    step, cache = nets.decoding(NET, student, batch["inputs"]["source"], length=length)
    begin = jnp.full(len(batch["labels"]), BEGIN)
    return ops.sample_tokens(step, cache, begin, key=key, length=length, end=END)


def value_of(objective, variables, key, batch=BATCH):
    student, teacher = variables
    begun = distill.init(student)
    return jax.jit(objective)(
        begun.params, {"teacher": teacher}, begun.model_state, batch, key
    )


def test_a_token_is_told_from_those_before_it():
    np.testing.assert_array_equal(
        BATCH["inputs"]["target"], [[BEGIN, 5, 6], [BEGIN, 7, 2]]
    )
    np.testing.assert_array_equal(BATCH["where"], [[1, 1, 1], [1, 1, 0]])


def test_all_up_to_the_end_counts_whatever_padding_is():
    tokens = jnp.array([[5, 0, 2, 0], [7, 2, 2, 2], [5, 6, 0, 7]])
    batch = distill.sequence_batch(SOURCE, tokens, begin=BEGIN, padding=2, end=2)
    expected = [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    np.testing.assert_array_equal(batch["where"], expected)


@pytest.mark.parametrize("tokens", [jnp.ones((2, 3)), jnp.array([5, 2])])
def test_tokens_are_integers_of_sequences(tokens):
    with pytest.raises(ValueError, match=r"tokens: got .*; give integers \[batch, len"):
        distill.sequence_batch(SOURCE, tokens, begin=BEGIN)


def test_word_distillation_does_not_see_padding(variables):
    objective = distill.objective(MODEL, MODEL, terms=WORDS)
    longer = distill.sequence_batch(
        jnp.pad(SOURCE, ((0, 0), (0, 2))),
        jnp.pad(BATCH["labels"], ((0, 0), (0, 3))),
        begin=BEGIN,
    )
    plain, padded = (
        value_of(objective, variables, jax.random.key(0), batch)[0]
        for batch in (BATCH, longer)
    )
    np.testing.assert_allclose(padded, plain, rtol=1e-5)


def test_share_0_is_the_batch_without_labels(variables):
    objective = distill.objective(MODEL, MODEL, terms=WORDS)
    own = distill.on_policy(objective, write, begin=BEGIN, share=0.0)
    unlabelled = {k: v for k, v in BATCH.items() if k != "labels"}
    key = jax.random.key(3)
    found, (_, measured) = value_of(own, variables, key)
    assert set(measured) == {"words"}
    np.testing.assert_allclose(
        found, value_of(objective, variables, key, unlabelled)[0], rtol=1e-6
    )


def test_share_1_teaches_on_what_the_student_writes(variables):
    """The loss is that of the very sequences, drawn by hand."""
    words = []

    def kept(student, batch, key):
        tokens = write(student, batch, key)
        jax.debug.callback(lambda found: words.append(np.asarray(found)), tokens)
        return tokens

    objective = distill.objective(MODEL, MODEL, terms=WORDS)
    own = distill.on_policy(objective, kept, begin=BEGIN, end=END, share=1.0)
    found, _ = value_of(own, variables, jax.random.key(6))
    jax.effects_barrier()
    batch = distill.sequence_batch(SOURCE, words[0], begin=BEGIN, end=END)
    assert np.any(np.asarray(batch["where"]) != (words[0] != 0)), "choose another key"
    assert not np.array_equal(words[0], BATCH["labels"])
    batch.pop("labels")
    expected, _ = value_of(objective, variables, jax.random.key(0), batch)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_student_learns_its_teacher_s_words(variables):
    """And what it writes afterwards is what the teacher would have written."""
    student, teacher = variables
    objective = distill.on_policy(
        distill.objective(MODEL, MODEL, terms=WORDS), write, begin=BEGIN, share=0.5
    )
    optimizer = optax.adam(1e-2)
    step = jax.jit(train_step(objective, optimizer))
    state = init_state(
        jax.random.key(2), distill.init(student), optimizer, frozen={"teacher": teacher}
    )
    before = value_of(
        distill.objective(MODEL, MODEL, terms=WORDS), variables, jax.random.key(0)
    )[1][1]["words"]
    for _ in range(60):
        state, measured = step(state, BATCH)
    after = measured["words"]
    assert after.total / after.count < 0.3 * before.total / before.count


def test_wrong_shares_and_lengths(variables):
    objective = distill.objective(MODEL, MODEL, terms=WORDS)
    with pytest.raises(ValueError, match="share: got -0.1"):
        distill.on_policy(objective, write, begin=BEGIN, share=-0.1)

    def short(student, batch, key):
        return write(student, batch, key)[:, :2]

    wrong = distill.on_policy(objective, short, begin=BEGIN, share=1.0)
    with pytest.raises(ValueError, match=r"wrote tokens \(2, 2\).*\(2, 3\)"):
        value_of(wrong, variables, jax.random.key(0))


@pytest.mark.parametrize("name", ["teacher", "teacher_inputs"])
def test_what_a_teacher_says_of_other_words(variables, name):
    """Is refused, unless no word is replaced."""
    objective = distill.objective(MODEL, MODEL, terms=WORDS)
    parts = {
        "teacher": {"": MODEL.apply(variables[1], BATCH["inputs"])[0]},
        "teacher_inputs": BATCH["inputs"],
    }
    batch, key = {**BATCH, name: parts[name]}, jax.random.key(0)
    own = distill.on_policy(objective, write, begin=BEGIN, share=0.5)
    with pytest.raises(ValueError, match=f"{name}'.* other words.*leave it out"):
        value_of(own, variables, key, batch)
    none = distill.on_policy(objective, write, begin=BEGIN, share=0.0)
    found, expected = (
        value_of(none, variables, key, given)[0] for given in (batch, BATCH)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["where", "labels", "inputs"])
def test_a_batch_that_is_none_of_sequences(variables, name):
    objective = distill.objective(MODEL, MODEL, terms=WORDS)
    own = distill.on_policy(objective, write, begin=BEGIN)
    batch = {part: value for part, value in BATCH.items() if part != name}
    message = f"the batch has no '{name}'; it has .*distill.sequence_batch"
    with pytest.raises(ValueError, match=message):
        value_of(own, variables, jax.random.key(0), batch)
    batch = {**BATCH, "inputs": {"source": SOURCE}}
    with pytest.raises(ValueError, match="the batch has no 'target'; it has .'source'"):
        value_of(own, variables, jax.random.key(0), batch)


@pytest.fixture(scope="module")
def said(variables):
    """The loss on the plain batch, where the student writes never and always."""

    @functools.cache
    def of(share):
        objective = distill.objective(MODEL, MODEL, terms=WORDS)
        own = distill.on_policy(objective, write, begin=BEGIN, share=share)
        return value_of(own, variables, jax.random.key(4), BATCH)[0]

    return of


@pytest.mark.parametrize(
    ("kind", "made"), [(np.uint8, "library"), (np.int16, "hand"), (np.uint32, "hand")]
)
def test_tokens_of_any_integers(variables, said, kind, made):
    """Whether the student writes or not, and whoever made the batch."""
    objective = distill.objective(MODEL, MODEL, terms=WORDS)
    labels = np.asarray(BATCH["labels"])
    batch = distill.sequence_batch(SOURCE, labels.astype(kind), begin=BEGIN)
    assert batch["labels"].dtype == batch["inputs"]["target"].dtype == np.int32
    if made == "hand":
        target = np.asarray(batch["inputs"]["target"]).astype(kind)
        batch["inputs"]["target"], batch["labels"] = target, labels.astype(kind)

    def narrow(student, batch, key):
        return write(student, batch, key).astype(kind)

    for share in (0.0, 1.0):
        own = distill.on_policy(objective, narrow, begin=BEGIN, share=share)
        found, *_ = value_of(own, variables, jax.random.key(4), batch)
        assert found == said(share)


def test_rows_that_count_of_sequences(variables):
    """One a row is one for all of its places."""
    objective = distill.objective(MODEL, MODEL, terms=WORDS)
    own = distill.on_policy(objective, write, begin=BEGIN, share=0.0)
    rows = jnp.array([True, False])
    every = jnp.broadcast_to(rows[:, None], BATCH["where"].shape)
    found, expected = (
        value_of(own, variables, jax.random.key(0), {**BATCH, "where": where})[0]
        for where in (rows, every)
    )
    assert found == expected
