"""Normalised discounted cumulative gain against scikit-learn, with ties and masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from jaxtransfer.train.ranking import ndcg

RANDOM = np.random.default_rng(0)
LISTS, ITEMS = 40, 10


def lists(tied):
    """Labels 1 ... 5 as gains, and scores, of which half of the lists' are tied."""
    gains = 2.0 ** RANDOM.integers(1, 6, (LISTS, ITEMS)) - 1
    scores = RANDOM.normal(size=(LISTS, ITEMS))
    if tied:
        scores[::2] = RANDOM.integers(0, 3, (LISTS // 2, ITEMS))
        scores[:2] = 0.0
    return scores.astype(np.float32), gains.astype(np.float32)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("top", [1, 3, ITEMS, ITEMS + 5, None])
def test_as_scikit_learn(top, tied):
    scores, gains = lists(tied)
    wanted = [
        ndcg_score(g[None], s[None], k=top) for g, s in zip(gains, scores, strict=True)
    ]
    found = ndcg(scores, gains, top=top)
    assert found.shape == (LISTS,)
    np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_padding_has_no_rank():
    """Whatever stands in the rows that don't count, the best scores included."""
    scores, gains = lists(True)
    extra = jnp.full((LISTS, 3), 1e9), jnp.full((LISTS, 3), 31.0)
    there = jnp.arange(ITEMS + 3) < ITEMS
    order = RANDOM.permutation(ITEMS + 3)
    padded = ndcg(
        jnp.concatenate([scores, extra[0]], -1)[:, order],
        jnp.concatenate([gains, extra[1]], -1)[:, order],
        top=3,
        where=jnp.broadcast_to(there[order], (LISTS, ITEMS + 3)),
    )
    np.testing.assert_allclose(padded, ndcg(scores, gains, top=3), atol=1e-6)


def test_lists_without_gain_and_without_items_are_0():
    assert float(ndcg(jnp.arange(4.0), jnp.zeros(4))) == 0
    nothing = jnp.zeros(4, bool)
    assert float(ndcg(jnp.arange(4.0), jnp.ones(4), where=nothing)) == 0


def test_under_transformations():
    scores, gains = lists(True)
    one = jax.jit(jax.vmap(lambda s, g: ndcg(s, g, top=3)))
    np.testing.assert_allclose(one(scores, gains), ndcg(scores, gains, top=3))


def test_top_must_be_positive():
    with pytest.raises(ValueError, match="top: got 0; it must be 1 or more"):
        ndcg(jnp.ones(3), jnp.ones(3), top=0)
