"""The encoder–decoder: masks, decoding token by token, taps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import nets, ops
from jaxtransfer.model import from_linen
from jaxtransfer.typing import Variables

NET = nets.Transformer(
    13, width=16, heads=2, hidden=32, encoder_layers=2, decoder_layers=2, dropout=0.1
)
MODEL = from_linen(NET)
SOURCE = jnp.array([[4, 5, 6, 7, 2], [8, 9, 2, 0, 0]])
TARGET = jnp.array([[1, 5, 6, 7], [1, 9, 4, 0]])


@pytest.fixture(scope="module")
def variables():
    return jax.jit(MODEL.init)(jax.random.key(0), {"source": SOURCE, "target": TARGET})


def logits(variables, source, target):
    return MODEL.apply(variables, {"source": source, "target": target})[0]


def test_padding_changes_nothing(variables):
    plain = logits(variables, SOURCE, TARGET)
    longer = logits(
        variables, jnp.pad(SOURCE, ((0, 0), (0, 3))), jnp.pad(TARGET, ((0, 0), (0, 2)))
    )
    np.testing.assert_allclose(longer[:, :4], plain, rtol=1e-4, atol=1e-5)
    alone = logits(variables, SOURCE[1:, :3], TARGET[1:, :3])
    np.testing.assert_allclose(alone[0], plain[1, :3], rtol=1e-4, atol=1e-5)


def test_no_token_sees_the_ones_after_it(variables):
    plain = logits(variables, SOURCE, TARGET)
    other = logits(variables, SOURCE, TARGET.at[:, 2].set(11))
    np.testing.assert_array_equal(other[:, :2], plain[:, :2])
    assert not np.allclose(other[:, 2], plain[:, 2])


@pytest.mark.parametrize("beams", [1, 3])
def test_token_by_token_equals_all_at_once(variables, beams):
    whole = logits(variables, SOURCE, TARGET)
    step, cache = nets.decoding(NET, variables, SOURCE, length=4)
    cache = jax.tree.map(lambda x: jnp.repeat(x, beams, axis=0), cache)
    for place in range(4):
        tokens = jnp.repeat(TARGET[:, place], beams)
        found, cache = step(cache, tokens)
        np.testing.assert_allclose(
            found, jnp.repeat(whole[:, place], beams, axis=0), rtol=1e-4, atol=1e-5
        )


def test_tokens_past_the_length_are_not_a_number(variables):
    step, cache = nets.decoding(NET, variables, SOURCE, length=1)
    assert step.length == 1
    found, cache = step(cache, TARGET[:, 0])
    assert bool(jnp.isfinite(found).all())
    found, _ = step(cache, TARGET[:, 1])
    assert bool(jnp.isnan(found).all())


def test_a_beam_scores_what_the_network_says(variables):
    step, cache = nets.decoding(NET, variables, SOURCE, length=5)
    found = ops.beam_search(
        step, cache, jnp.ones(2, int), beams=3, length=5, end=2, length_penalty=0.0
    )
    for beam in range(3):
        tokens = found.tokens[:, beam]
        given = jnp.concatenate([jnp.ones((2, 1), int), tokens[:, :-1]], axis=1)
        logs = jax.nn.log_softmax(logits(variables, SOURCE, given))
        each = jnp.take_along_axis(logs, tokens[..., None], axis=-1)[..., 0]
        counts = jnp.arange(5) < found.lengths[:, beam, None]
        np.testing.assert_allclose(
            found.scores[:, beam], jnp.sum(each * counts, axis=1), rtol=1e-4
        )


def test_dropout_needs_a_key_and_taps_find_layers(variables):
    inputs = {"source": SOURCE, "target": TARGET}
    plain, features, _ = MODEL.apply(
        variables, inputs, taps=("encoder_norm", "decoder_1")
    )
    assert features["encoder_norm"].shape == (2, 5, 16)
    assert features["decoder_1"].shape == (2, 4, 16)
    np.testing.assert_array_equal(plain, logits(variables, SOURCE, TARGET))
    dropped = MODEL.apply(variables, inputs, train=True, key=jax.random.key(1))[0]
    assert not np.allclose(dropped, plain)


def test_no_decoder_has_nothing_to_decode_with():
    net = nets.Transformer(5, width=8, heads=2, decoder_layers=0)
    with pytest.raises(ValueError, match="decoder_layers: got 0; decoding needs one"):
        nets.decoding(net, Variables({}), SOURCE, length=4)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="heads"):
        nets.Transformer(5, width=9, heads=2).init(
            jax.random.key(0), {"source": SOURCE, "target": TARGET}
        )
