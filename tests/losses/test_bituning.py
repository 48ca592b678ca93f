import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer.losses import bituning
from tests.losses.case import det

FEATURES, KEYS = det((5, 4), 71), det((5, 4), 72)
PROTOTYPES, QUEUE = det((3, 4), 73), det((3, 2, 4), 74)
LABELS = np.array([0, 2, 1, 2, 0])
FILLED = np.array([[True, True], [True, False], [False, False]])


def unit(vector):
    return vector / np.linalg.norm(vector)


def slow(queries, own, filled=FILLED, temperature=0.07):
    """One example and one key after the other."""
    result = []
    for query, key, label in zip(queries, own, LABELS, strict=True):
        similarities, positive = [unit(query) @ unit(key) / temperature], [True]
        for kind in range(3):
            for place in range(2):
                if filled[kind, place]:
                    similarity = unit(query) @ unit(QUEUE[kind, place])
                    similarities.append(similarity / temperature)
                    positive.append(kind == label)
        logs = similarities - np.log(np.exp(similarities).sum())
        result.append(-logs[positive].mean())
    return result


@pytest.mark.parametrize("filled", [FILLED, np.ones((3, 2), bool)])
def test_categorical_contrastive(float64, filled):
    got = bituning.categorical_contrastive(
        FEATURES, KEYS, LABELS, QUEUE, filled=filled, temperature=0.3
    )
    np.testing.assert_allclose(got, slow(FEATURES, KEYS, filled, 0.3), rtol=1e-11)


def test_contrastive_cross_entropy(float64):
    got = bituning.contrastive_cross_entropy(
        FEATURES, PROTOTYPES, LABELS, QUEUE, filled=FILLED
    )
    np.testing.assert_allclose(got, slow(PROTOTYPES[LABELS], FEATURES), rtol=1e-11)


def test_float32(float64):
    expected = slow(FEATURES, KEYS)
    arrays = [jnp.asarray(a, jnp.float32) for a in (FEATURES, KEYS, QUEUE)]
    got = bituning.categorical_contrastive(
        *arrays[:2], LABELS, arrays[2], filled=FILLED
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_an_empty_queue_says_nothing():
    """Only the own key is left: nothing to tell it from."""

    def total(features):
        return bituning.categorical_contrastive(
            features, KEYS, LABELS, QUEUE, filled=np.zeros((3, 2), bool)
        ).sum()

    value, gradient = jax.value_and_grad(total)(jnp.asarray(FEATURES))
    np.testing.assert_allclose(value, 0.0, atol=1e-6)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-5)


def test_lengths_do_not_matter(float64):
    def both(scale):
        return [
            bituning.categorical_contrastive(
                scale * FEATURES, 2 * scale * KEYS, LABELS, 3 * scale * QUEUE
            ),
            bituning.contrastive_cross_entropy(
                scale * FEATURES, 2 * scale * PROTOTYPES, LABELS, 3 * scale * QUEUE
            ),
        ]

    np.testing.assert_allclose(both(1.0), both(1e3), rtol=1e-11)


def test_best_value_is_the_log_of_the_positives(float64):
    """All keys of the class equal the query, all others are opposite."""
    queue = np.stack([np.ones((2, 4)), -np.ones((2, 4))])
    features, labels = np.ones((1, 4)), np.array([0])
    value = bituning.categorical_contrastive(features, features, labels, queue)
    np.testing.assert_allclose(value, np.log(3.0), rtol=1e-9)


def test_order_of_the_queue_does_not_matter(float64):
    expected = bituning.categorical_contrastive(
        FEATURES, KEYS, LABELS, QUEUE, filled=FILLED
    )
    got = bituning.categorical_contrastive(
        FEATURES, KEYS, LABELS, QUEUE[:, ::-1], filled=FILLED[:, ::-1]
    )
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_a_traced_label_out_of_range_is_seen():
    result = jax.jit(bituning.categorical_contrastive)(
        FEATURES, KEYS, LABELS + 1, QUEUE
    )
    np.testing.assert_array_equal(np.isnan(result), LABELS == 2)


def one_by_one(batches, size):
    """Places of (classes = 3) ring buffers, filled in plain Python."""
    places, counts = np.zeros((3, size, 2)), np.zeros(3, int)
    for features, labels, where in batches:
        for feature, label, counts_in in zip(features, labels, where, strict=True):
            if counts_in:
                places[label, counts[label] % size] = feature
                counts[label] += 1
    return places, counts


@pytest.mark.parametrize("size", [1, 3, 4, 20])
def test_queue_is_that_of_one_key_after_the_other(size, transform):
    random = np.random.default_rng(0)
    batches = [
        (
            random.normal(size=(9, 2)).astype(np.float32),
            random.integers(0, 3, 9),
            random.random(9) < 0.8,
        )
        for _ in range(4)
    ]

    def fill(batches):
        queue = bituning.class_queue(3, 2, size=size)
        for features, labels, where in batches:
            queue = bituning.enqueue(features, labels, queue, where=where)
        return queue, queue.filled

    queue, filled = transform(fill)(batches)
    keys, counts = one_by_one(batches, size)
    np.testing.assert_array_equal(queue.keys, keys.astype(np.float32))
    np.testing.assert_array_equal(queue.counts, counts)
    np.testing.assert_array_equal(filled, np.arange(size) < counts[:, None])


def test_masked_keys_may_hold_anything():
    keys = jnp.array([[1.0, 2.0], [jnp.nan, 0.0]])
    queue = bituning.enqueue(
        keys,
        jnp.array([0, 7]),
        bituning.class_queue(2, 2, size=3),
        where=jnp.array([True, False]),
    )
    assert jnp.isfinite(queue.keys).all() and queue.counts.tolist() == [1, 0]


@pytest.mark.usefixtures("types_unchecked")
@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda: bituning.categorical_contrastive(FEATURES, KEYS[:2], LABELS, QUEUE),
            "features and keys must have the same shape",
        ),
        (
            lambda: bituning.categorical_contrastive(FEATURES, KEYS, LABELS, QUEUE[0]),
            r"queue must be \[classes, size, 4\]",
        ),
        (
            lambda: bituning.categorical_contrastive(
                FEATURES, KEYS, LABELS, QUEUE, temperature=0.0
            ),
            "temperature must be positive, got 0.0",
        ),
        (
            lambda: bituning.categorical_contrastive(
                FEATURES, KEYS, LABELS, QUEUE, filled=FILLED[0, :1, None, None]
            ),
            "filled of shape",
        ),
        (
            lambda: bituning.categorical_contrastive(FEATURES, KEYS, LABELS + 1, QUEUE),
            r"labels must be in \[0, 3\), got \[3, 3\]",
        ),
        (
            lambda: bituning.contrastive_cross_entropy(
                FEATURES, PROTOTYPES.T, LABELS, QUEUE
            ),
            "a kernel of a dense layer must be transposed",
        ),
        (lambda: bituning.class_queue(0, 2), "must be positive, got 0, 2 and 40"),
        (
            lambda: bituning.enqueue(KEYS, LABELS, bituning.class_queue(3, 2)),
            r"as wide as the queue, 2, got \(5, 4\)",
        ),
    ],
)
def test_says_what_is_wrong(call, match):
    with pytest.raises(ValueError, match=match):
        call()
