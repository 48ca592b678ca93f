"""Labels and indices of 8 bits mean what wider ones do, however many there are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import losses, scores
from jaxtransfer.losses.reduction import integers

RANDOM = np.random.default_rng(0)
LABELS = np.array([3, 200, 255])
MANY = 256  # in eight bits 0


def normal(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


LOGITS, TEACHER, FEATURES = normal(3, MANY), normal(3, MANY), normal(3, 2)
SOFT = np.abs(normal(3, MANY))
EVEN = np.full((3, 2), 0.5, np.float32)
OF_EXAMPLES = RANDOM.integers(0, 3, 300)


WEIGHTS, TABLE, PAIRS = normal(1, MANY), np.abs(normal(MANY, 2)), normal(3, 2)


def fisher(labels):
    def log_probabilities(params, inputs):
        return jax.nn.log_softmax(inputs.sum() * params["w"][0])

    found = losses.fisher_information(
        {"w": WEIGHTS}, FEATURES, log_probabilities, labels=labels
    )
    return found["w"]


CALLS = {
    "cross_entropy": lambda y: losses.cross_entropy(LOGITS, y),
    "cross_entropy, 1000 classes": functools.partial(
        losses.cross_entropy, normal(3, 1000)
    ),
    "decoupled": lambda y: losses.decoupled_knowledge_distillation(LOGITS, TEACHER, y),
    "normalized": lambda y: losses.normalized_knowledge_distillation(
        LOGITS, TEACHER, y
    ),
    "sequence": lambda y: losses.sequence_distillation(LOGITS[None], y[None]),
    "co_tuning": lambda y: losses.co_tuning(PAIRS, y, TABLE),
    "category_relationship": lambda y: losses.category_relationship(
        EVEN, y, MANY, where=jnp.array([True, True, False])
    ),
    "enqueue": lambda y: losses.enqueue(FEATURES, y, losses.class_queue(MANY, 2)).keys,
    "cached": lambda y: losses.cached_knowledge_distillation(
        LOGITS, jnp.log(EVEN / 2), jnp.stack([y, y - 1], axis=1)
    ),
    "local mmd": lambda y: losses.local_maximum_mean_discrepancy(
        FEATURES, FEATURES + 1, y, SOFT
    ),
    "bank": lambda y: (
        losses.update_neighbor_bank(
            FEATURES, PAIRS, y, losses.neighbor_bank(2, 2, 300)
        ).filled
    ),
    "negatives": lambda y: losses.sample_negatives(
        jax.random.key(0), OF_EXAMPLES, y, count=2
    ),
    "fisher": fisher,
    "h_score": lambda y: scores.h_score(FEATURES, y, classes=MANY),
    "gbc": lambda y: scores.gbc(FEATURES, y, classes=MANY),
    "leep": lambda y: scores.leep(EVEN, y),
    "nce": lambda y: scores.nce(y, y),
}


@pytest.mark.parametrize("name", CALLS)
def test_eight_bits_are_as_good_as_more(name):
    call = CALLS[name]
    expected = np.asarray(call(jnp.asarray(LABELS, jnp.int32)))
    assert np.isfinite(expected).all()
    found = np.asarray(call(jnp.asarray(LABELS, jnp.uint8)))
    np.testing.assert_array_equal(found, expected)


def test_int8():
    logits = LOGITS[:, :200]
    expected = losses.cross_entropy(logits, np.array([3, 100, 127]))
    found = losses.cross_entropy(logits, np.array([3, 100, 127], np.int8))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", ["int32", "uint32", "bool", "float32"])
def test_others_stay(dtype):
    assert integers(jnp.zeros(2, dtype)).dtype == dtype
