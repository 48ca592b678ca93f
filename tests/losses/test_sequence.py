import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer.losses import sequence
from jaxtransfer.losses.classification import cross_entropy
from jaxtransfer.losses.distillation import knowledge_distillation
from jaxtransfer.losses.reduction import mean
from tests.losses.case import det

LOGITS = det((3, 5, 6), 23, 3.0), det((3, 5, 6), 24, 4.0)
REAL = np.arange(5) < np.array([[5], [3], [2]])
HIDDEN = det((3, 5, 4), 25), det((3, 5, 7), 26)
OUTPUTS = det((4, 6), 27, 2.0), det((7, 6), 28, 2.0)
TOKENS = np.arange(15).reshape(3, 5) % 6


def _log_softmax(rows):
    return rows - np.log(np.exp(rows).sum(-1, keepdims=True))


def _twin(student, teacher, temperature):
    """T^2 times the divergence, one token after the other."""
    result = np.zeros(student.shape[:2])
    for place in np.ndindex(result.shape):
        log_p = _log_softmax(teacher[place] / temperature)
        log_q = _log_softmax(student[place] / temperature)
        result[place] = temperature**2 * (np.exp(log_p) * (log_p - log_q)).sum()
    return result


def test_token_distillation_is_its_twin(float64):
    got = sequence.token_distillation(
        *map(jnp.asarray, LOGITS), temperature=2.0, where=REAL
    )
    expected = np.where(REAL, _twin(*LOGITS, 2.0), 0.0)
    np.testing.assert_allclose(got, expected, rtol=1e-9)
    by_example = knowledge_distillation(LOGITS[0], LOGITS[1], temperature=1.0)
    np.testing.assert_array_equal(sequence.token_distillation(*LOGITS), by_example)


def test_sequence_distillation_is_its_twin(float64):
    log_q = np.take_along_axis(_log_softmax(LOGITS[0]), TOKENS[..., None], -1)
    expected = -(log_q[..., 0] * REAL).sum(-1)
    got = sequence.sequence_distillation(jnp.asarray(LOGITS[0]), TOKENS, where=REAL)
    np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_a_certain_teacher_is_its_own_sequence():
    teacher = 1e4 * jax.nn.one_hot(TOKENS, 6)
    losses = sequence.token_distillation(LOGITS[0].astype(np.float32), teacher)
    sequences = sequence.sequence_distillation(LOGITS[0].astype(np.float32), TOKENS)
    np.testing.assert_allclose(losses.sum(-1), sequences, rtol=1e-5)


OPTIONS = {
    "forward": {},
    "reverse": {"divergence": "reverse", "temperature": 2.0},
    "jensen_shannon": {"divergence": "jensen_shannon", "beta": 0.1},
}


@pytest.mark.parametrize("chunk_size", [1, 4, 15, 100])
@pytest.mark.parametrize("name", OPTIONS)
def test_chunks_change_nothing(float64, name, chunk_size):
    def whole(student, student_output, teacher, teacher_output):
        losses = sequence.token_distillation(
            student @ student_output,
            teacher @ teacher_output,
            where=REAL,
            **OPTIONS[name],
        )
        return mean(losses, where=REAL), losses

    def chunked(*arrays):
        losses = sequence.chunked_token_distillation(
            *arrays, chunk_size=chunk_size, where=REAL, **OPTIONS[name]
        )
        return mean(losses, where=REAL), losses

    (student, teacher), (student_output, teacher_output) = HIDDEN, OUTPUTS
    arrays = [
        jnp.asarray(a) for a in (student, student_output, teacher, teacher_output)
    ]
    gradients = (0, 1, 2, 3)
    got, expected = (
        jax.jit(jax.value_and_grad(fn, gradients, has_aux=True))(*arrays)
        for fn in (chunked, whole)
    )
    jax.tree.map(
        lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-9, atol=1e-14),
        got,
        expected,
    )


def test_chunks_need_the_memory_of_one():
    tokens, width, vocabulary = 2048, 4, 512
    hidden = jax.ShapeDtypeStruct((tokens, width), jnp.float32)
    output = jax.ShapeDtypeStruct((width, vocabulary), jnp.float32)

    def memory(chunk_size):
        def total(*arrays):
            return sequence.chunked_token_distillation(
                *arrays, chunk_size=chunk_size
            ).sum()

        gradient = jax.jit(jax.grad(total, (0, 1)))
        compiled = gradient.lower(hidden, output, hidden, output).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = 4 * tokens * vocabulary
    assert memory(64) < logits / 2 < logits < memory(tokens)


def test_an_appended_row_is_a_bias(float64):
    (student, teacher), (student_output, teacher_output) = HIDDEN, OUTPUTS
    bias = det((6,), 29)
    got = sequence.chunked_token_distillation(
        np.concatenate([student, np.ones((3, 5, 1))], -1),
        np.concatenate([student_output, bias[None]]),
        teacher,
        teacher_output,
        chunk_size=4,
    )
    expected = sequence.token_distillation(
        student @ student_output + bias, teacher @ teacher_output
    )
    np.testing.assert_allclose(got, expected, rtol=1e-9)


def _longer(array):
    """Two more tokens of padding, not-a-number or -1."""
    value = np.nan if array.dtype == np.float32 else -1
    width = ((0, 0), (0, 2)) + ((0, 0),) * (array.ndim - 2)
    return np.pad(array, width, constant_values=value)


def _chunked(student, teacher, *, where):
    return sequence.chunked_token_distillation(
        student, OUTPUTS[0], teacher, OUTPUTS[1], chunk_size=4, where=where
    )


@pytest.mark.parametrize(
    ("loss", "arrays"),
    [
        (sequence.token_distillation, LOGITS),
        (sequence.sequence_distillation, (LOGITS[0], TOKENS)),
        (_chunked, HIDDEN),
    ],
    ids=["token", "sequence", "chunked"],
)
def test_more_padding_changes_nothing(loss, arrays):
    arrays = [a.astype(np.float32) if a.dtype == float else a for a in arrays]

    def total(student, other, where):
        losses = loss(student, other, where=where)
        return losses.sum(), losses

    run = jax.value_and_grad(total, has_aux=True)
    (_, losses), gradient = run(*arrays, REAL)
    real = np.pad(REAL, ((0, 0), (0, 2)))
    (_, got), got_gradient = run(*map(_longer, arrays), real)
    if losses.ndim > 1:
        np.testing.assert_array_equal(got[:, 5:], 0.0)
        got = got[:, :5]
    np.testing.assert_allclose(got, losses, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(got_gradient[:, :5], gradient, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(got_gradient[:, 5:], 0.0)
    (nothing, _), gradient = run(*arrays, np.zeros_like(REAL))
    assert nothing == 0.0 and not gradient.any()


def test_one_token_is_cross_entropy():
    logits, tokens = LOGITS[0][:, :1].astype(np.float32), TOKENS[:, :1]
    np.testing.assert_array_equal(
        sequence.sequence_distillation(logits, tokens),
        cross_entropy(logits, tokens)[:, 0],
    )


def test_no_tokens_are_no_losses():
    arrays = (
        jnp.ones((2, 0, 3)),
        jnp.ones((3, 5)),
        jnp.ones((2, 0, 4)),
        jnp.ones((4, 5)),
    )
    assert sequence.chunked_token_distillation(*arrays).shape == (2, 0)


def test_says_what_is_wrong(types_unchecked):
    logits, tokens = jnp.ones((2, 3, 4)), jnp.zeros((2, 3), int)
    with pytest.raises(ValueError, match="must read the tokens of one tokenizer"):
        sequence.token_distillation(logits, logits[..., :3])
    with pytest.raises(ValueError, match=r"must have the same shape \[..., tokens"):
        sequence.token_distillation(logits[0, 0], logits[0, 0])
    with pytest.raises(ValueError, match="run the student on the teacher's sequence"):
        sequence.sequence_distillation(logits, tokens[:, :2])
    with pytest.raises(ValueError, match=r"labels must be in \[0, 4\)"):
        sequence.sequence_distillation(logits, tokens + 4)
    hidden, output = jnp.ones((3, 2)), jnp.ones((2, 5))
    chunked = sequence.chunked_token_distillation
    with pytest.raises(ValueError, match="teacher_output .* transpose the matrix"):
        chunked(hidden, output, hidden, output.T)
    for other in ((hidden[:2], output), (hidden, output[:, :4])):
        with pytest.raises(ValueError, match="must agree in tokens and vocabulary"):
            chunked(hidden, output, *other)
    with pytest.raises(ValueError, match="chunk_size must be positive, got 0"):
        chunked(hidden, output, hidden, output, chunk_size=0)
    with pytest.raises(ValueError, match="temperature must be positive"):
        chunked(hidden, output, hidden, output, temperature=0.0)
