import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer.losses import transformers
from jaxtransfer.losses.reduction import mean
from tests.losses.case import det

ATTENTION = det((3, 2, 5, 5), 16, 2.0), det((3, 2, 5, 5), 17, 2.0)
HIDDEN = det((3, 5, 7), 18), det((3, 5, 7), 19)
VALUES = det((3, 2, 5, 3), 20), det((3, 2, 5, 4), 21)
REAL = np.arange(5) < np.array([[5], [3], [2]])


def _mean(loss):
    """The mean over the real tokens of a loss that has one value a token."""
    return lambda *arrays, where: mean(loss(*arrays, where=where), where=where)


def _first_token(*hidden, where):
    losses = transformers.patient_distillation(*(h[:, 0] for h in hidden))
    return jnp.mean(losses)


def _attention(**options):
    return functools.partial(transformers.attention_matching, **options)


GOLDEN = {
    "attention": (_attention(), ATTENTION, 2.83302694042, 0.3861433427),
    "attention, cross-entropy": (
        _attention(loss="cross_entropy", softmax="all"),
        ATTENTION,
        1.56501020397,
        0.1066828363,
    ),
    "hidden": (
        _mean(transformers.hidden_matching),
        HIDDEN,
        0.749293530721,
        0.2069221428,
    ),
    "cosine": (_mean(transformers.hidden_cosine), HIDDEN, 1.15102143761, 0.204032504),
    "patient": (_first_token, HIDDEN, 2.07179787941, 0.7455694551),
    "MiniLM, attention": (
        _mean(transformers.minilm_attention),
        ATTENTION,
        0.8513418159498742,
        None,
    ),
    "MiniLM, values": (
        _mean(transformers.minilm_values),
        VALUES,
        0.06805782392706153,
        None,
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(float64, name):
    loss, arrays, golden, length = GOLDEN[name]
    of = jax.value_and_grad(functools.partial(loss, where=jnp.asarray(REAL)))
    for dtype, rtol in ((jnp.float64, 1e-9), (jnp.float32, 1e-5)):
        value, gradient = of(*(jnp.asarray(array, dtype) for array in arrays))
        np.testing.assert_allclose(value, golden, rtol=rtol)
        if length is not None:
            np.testing.assert_allclose(jnp.linalg.norm(gradient), length, rtol=rtol)


def _appended(array, axes):
    """Two more tokens of padding on these axes, which hold not-a-number."""
    width = [(0, 2 * (axis in axes)) for axis in range(array.ndim)]
    return np.pad(array, width, constant_values=np.nan)


LOSSES = {
    "attention": (_attention(), ATTENTION, (2, 3)),
    "cross-entropy": (_attention(loss="cross_entropy"), ATTENTION, (2, 3)),
    "hidden": (transformers.hidden_matching, HIDDEN, (1,)),
    "cosine": (transformers.hidden_cosine, HIDDEN, (1,)),
    "MiniLM, attention": (transformers.minilm_attention, ATTENTION, (2, 3)),
    "MiniLM, values": (transformers.minilm_values, VALUES, (2,)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_more_padding_changes_nothing(name):
    loss, arrays, axes = LOSSES[name]

    def of(student, teacher, where):
        values = loss(student, teacher, where=where)
        return (mean(values, where=where) if values.ndim else values), values

    student, teacher = (jnp.asarray(array, jnp.float32) for array in arrays)
    run = jax.value_and_grad(of, has_aux=True)
    (value, values), gradient = run(student, teacher, REAL)
    longer = [jnp.asarray(_appended(array, axes), jnp.float32) for array in arrays]
    real = np.pad(REAL, ((0, 0), (0, 2)))
    (got, got_values), got_gradient = run(*longer, real)
    np.testing.assert_allclose(got, value, rtol=1e-6)
    if values.ndim:
        np.testing.assert_allclose(got_values[:, :5], values, rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(got_values[~real], 0.0)
    kept = tuple(slice(5 if axis in axes else None) for axis in range(student.ndim))
    np.testing.assert_allclose(got_gradient[kept], gradient, rtol=1e-5, atol=1e-8)
    assert not got_gradient.at[kept].set(0.0).any()


def _softmax(rows):
    exponents = np.exp(rows - rows.max(-1, keepdims=True))
    return exponents / exponents.sum(-1, keepdims=True)


def test_cross_entropy_goes_over_the_real_keys(float64):
    terms = []
    for student, teacher, real in zip(*ATTENTION, REAL, strict=True):
        p = _softmax(teacher[:, real][:, :, real])
        q = _softmax(student[:, real][:, :, real])
        terms += [-(p * np.log(q)).sum(-1).ravel()]
    arrays = [jnp.asarray(array) for array in ATTENTION]
    loss = _attention(loss="cross_entropy", where=REAL)
    np.testing.assert_allclose(loss(*arrays), np.concatenate(terms).mean(), rtol=1e-12)
    masked = [jnp.where(REAL[:, None, None], array, -1e5) for array in arrays]
    for softmax in ("real", "all"):
        np.testing.assert_allclose(
            loss(*masked, softmax=softmax), loss(*arrays), rtol=1e-12
        )


@pytest.mark.parametrize("low", [-1e2, -1e4, -jnp.inf])
def test_scores_that_the_network_masked_are_equal(low):
    student, teacher = (jnp.asarray(array, jnp.float32) for array in ATTENTION)
    causal = jnp.tril(jnp.ones((5, 5), bool))
    hidden = [jnp.where(causal, scores, low) for scores in (student, teacher)]
    value, gradient = jax.value_and_grad(transformers.attention_matching)(*hidden)
    expected = np.mean(np.where(causal, student - teacher, 0.0) ** 2)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert np.isfinite(gradient).all() and not gradient[..., ~causal].any()
    for loss in (
        _attention(loss="cross_entropy"),
        lambda *scores: transformers.minilm_attention(*scores).sum(),
    ):
        value, gradient = jax.value_and_grad(loss)(*hidden)
        assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_directions_do_not_depend_on_lengths(scale):
    student, teacher = (jnp.asarray(array, jnp.float32) for array in HIDDEN)
    cosine = transformers.hidden_cosine(scale * student, teacher)
    unit = transformers.patient_distillation(student, scale * teacher)
    expected = transformers.hidden_cosine(student, teacher)
    np.testing.assert_allclose(cosine, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(unit, 2.0 * expected, rtol=1e-5, atol=1e-6)


def test_relations_do_not_see_rotations_of_the_values():
    values = jnp.asarray(VALUES[0], jnp.float32)
    rotation, _ = np.linalg.qr(det((3, 3), 22))
    rotated = jnp.matmul(values, rotation, precision="highest")
    losses = transformers.minilm_values(values, rotated)
    np.testing.assert_allclose(losses, 0.0, atol=1e-6)


def test_uniform_layers():
    assert transformers.uniform_layers(6, 12) == [0, 2, 4, 6, 8, 10, 12]
    assert transformers.uniform_layers(3, 3) == [0, 1, 2, 3]
    for numbers in ((5, 12), (0, 12), (4, 0)):
        with pytest.raises(ValueError, match="must be a multiple of student_layers"):
            transformers.uniform_layers(*numbers)


def test_says_what_is_wrong(types_unchecked):
    scores, states = jnp.ones((2, 3, 4, 4)), jnp.ones((2, 4, 5))
    for loss in (transformers.attention_matching, transformers.minilm_attention):
        with pytest.raises(ValueError, match="average over the heads first"):
            loss(scores, scores[:, :2])
        with pytest.raises(ValueError, match="4 queries and 3 keys"):
            loss(scores[..., :3], scores[..., :3], where=jnp.ones((2, 4), bool))
    with pytest.raises(ValueError, match='loss must be "mse"'):
        transformers.attention_matching(scores, scores, loss="mae")
    with pytest.raises(ValueError, match='softmax must be "real"'):
        transformers.attention_matching(scores, scores, softmax="some")
    for loss in (
        transformers.hidden_matching,
        transformers.hidden_cosine,
        transformers.patient_distillation,
    ):
        with pytest.raises(ValueError, match="map a narrower student linearly"):
            loss(states, states[..., :3])
        with pytest.raises(ValueError, match="where must be boolean"):
            loss(states, states, where=jnp.ones((2, 4)))
    with pytest.raises(ValueError, match="split both into as many heads"):
        transformers.minilm_values(scores, scores[:, :1])
