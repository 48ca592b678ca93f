import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer.losses import neighbors
from tests.losses.case import det


def softmax(logits):
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


EXAMPLES, CLASSES, WIDTH = 14, 4, 3
FEATURES, BEFORE = det((EXAMPLES, WIDTH), 92), det((EXAMPLES, CLASSES), 93, 2.0)
INDICES = np.array([4, 0, 12, 8, 2, 5])
LOGITS = det((6, CLASSES), 91, 3.0)


def full_bank():
    """Of all examples, those of the batch as they are now."""
    logits = BEFORE.copy()
    logits[INDICES] = LOGITS
    features = FEATURES / np.linalg.norm(FEATURES, axis=1, keepdims=True)
    return neighbors.NeighborBank(
        jnp.asarray(features), jnp.asarray(softmax(logits)), jnp.ones(EXAMPLES, bool)
    )


_loss = jax.jit(
    neighbors.neighborhood_reciprocal_clustering,
    static_argnames=("neighbors", "expanded", "form"),
)


def compiled(*arrays, **options):
    return _loss(*jax.tree.map(jnp.asarray, arrays), **options)


def loss(logits=LOGITS, indices=INDICES, bank=None, *, fn=compiled, **options):
    options = {"neighbors": 4, "expanded": 3} | options
    return fn(logits, indices, full_bank() if bank is None else bank, **options)


def wrong(*args, **options):
    return loss(*args, fn=neighbors.neighborhood_reciprocal_clustering, **options)


def slow(logits, indices, bank, k, m, r, form):
    """One example, one neighbour and one neighbour's neighbour after the other."""
    features, stored, filled = (np.asarray(leaf) for leaf in bank)

    def nearest(i, count):
        others = [j for j in range(len(features)) if j != i and filled[j]]
        others.sort(key=lambda j: -(features[i] @ features[j]))
        return others[:count]

    p = softmax(logits)
    total, kinds = 0.0, []
    for row, i in enumerate(indices):
        for near in nearest(i, k) if filled[i] else []:
            its = nearest(near, m)
            kinds.append(i in its)
            total -= (1.0 if i in its else r) * (stored[near] @ p[row])
            for far in its:
                if form == "code" or far != i:
                    total -= r * (stored[far] @ p[row])
        if form == "paper" and filled[i]:
            total -= stored[i] @ p[row]
    if filled.all() and k > 1:  # else it would say nothing of the affinity
        assert set(kinds) == {True, False}
    q = p.mean(axis=0)
    return total / len(indices) + np.sum(q * np.log(q * len(q)))


@pytest.mark.parametrize("form", ["paper", "code"])
@pytest.mark.parametrize(("k", "m", "r"), [(4, 3, 0.1), (5, 5, 0.3), (1, 13, 0.0)])
def test_twin(float64, form, k, m, r):
    got = loss(neighbors=k, expanded=m, affinity=r, form=form)
    expected = slow(LOGITS, INDICES, full_bank(), k, m, r, form)
    np.testing.assert_allclose(got, expected, rtol=1e-11)


def test_twin_in_float32():
    got = loss()
    assert got.dtype == jnp.float32
    expected = slow(LOGITS, INDICES, full_bank(), 4, 3, 0.1, "paper")
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def only(indices):
    return jnp.asarray(np.isin(np.arange(EXAMPLES), indices))


@pytest.mark.parametrize("form", ["paper", "code"])
def test_what_was_not_seen_is_nobodys_neighbour(float64, form):
    """Neither is there one for who was not seen; with less than K, those there are."""
    bank = full_bank()._replace(filled=only([0, 2, 4, 5]))
    got = loss(bank=bank, form=form)
    expected = slow(LOGITS, INDICES, bank, 4, 3, 0.1, form)
    np.testing.assert_allclose(got, expected, rtol=1e-11)
    garbage = bank._replace(
        features=jnp.where(bank.filled[:, None], bank.features, 7.0),
        probabilities=jnp.where(bank.filled[:, None], bank.probabilities, 7.0),
    )
    np.testing.assert_allclose(loss(bank=garbage, form=form), got, rtol=1e-12)


def test_nobody_is_its_own_neighbour_among_equals(float64):
    """All features equal: the neighbours are others, and the first ones."""
    bank = full_bank()._replace(features=jnp.ones((EXAMPLES, WIDTH)))
    got = loss(bank=bank, form="code", neighbors=2, expanded=2)
    expected = slow(LOGITS, INDICES, bank, 2, 2, 0.1, "code")
    np.testing.assert_allclose(got, expected, rtol=1e-11)


def test_only_logits_get_gradient(float64):
    bank = full_bank()

    def total(logits, features, probabilities):
        changed = bank._replace(features=features, probabilities=probabilities)
        return loss(logits, bank=changed)

    gradient = jax.grad(total, (0, 1, 2))(
        jnp.asarray(LOGITS), bank.features, bank.probabilities
    )
    assert np.any(gradient[0]) and not np.any(gradient[1]) and not np.any(gradient[2])


def test_descent_joins_neighbours():
    """Two groups, one example of each unsure: it takes the class of its group."""
    features = np.repeat(np.array([[1.0, 0.1], [0.1, 1.0]]), 4, axis=0)
    features += 0.01 * det(features.shape, 5)
    logits = jnp.repeat(3.0 * jnp.eye(2), 4, axis=0)
    logits = logits.at[0].set(jnp.array([0.0, 0.5])).at[4].set(jnp.array([0.5, 0.0]))
    indices = jnp.arange(8)

    @jax.jit
    def step(logits, bank):
        bank = neighbors.update_neighbor_bank(features, logits, indices, bank)
        gradient = jax.grad(neighbors.neighborhood_reciprocal_clustering)(
            logits, indices, bank, neighbors=3, expanded=2
        )
        return logits - gradient, bank

    bank = neighbors.neighbor_bank(2, 2, 8)
    for _ in range(60):
        logits, bank = step(logits, bank)
    np.testing.assert_array_equal(jnp.argmax(logits, axis=1), [0] * 4 + [1] * 4)


def test_order_of_the_batch_and_of_the_bank_does_not_matter(float64):
    expected, bank = loss(), full_bank()
    order = np.array([3, 1, 5, 0, 2, 4])
    np.testing.assert_allclose(loss(LOGITS[order], INDICES[order]), expected)
    moved = np.random.default_rng(0).permutation(EXAMPLES)
    shuffled = jax.tree.map(lambda leaf: leaf[moved], bank)
    got = loss(indices=np.argsort(moved)[INDICES], bank=shuffled)
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_masked_examples_do_not_count(float64):
    where = np.array([True, False, True, True, False, True])
    indices = np.where(where, INDICES, -7)
    logits = np.where(where[:, None], LOGITS, np.nan)
    got = loss(logits, indices, where=where)
    np.testing.assert_allclose(got, loss(LOGITS[where], INDICES[where]), rtol=1e-12)
    assert loss(logits, indices, where=np.zeros(6, bool)) == 0.0


def test_a_traced_index_out_of_range_is_seen():
    @jax.jit
    def run(indices):
        bank = full_bank()
        written = neighbors.update_neighbor_bank(
            FEATURES[:6] + 9.0, LOGITS, indices, bank
        )
        changed = jnp.any(written.features != bank.features, axis=1)
        return loss(indices=indices, bank=bank), changed

    value, changed = run(jnp.asarray(INDICES))
    assert np.isfinite(value) and np.sum(changed) == 6
    value, changed = run(jnp.asarray(INDICES) + 2)
    assert np.isnan(value) and np.sum(changed) == 5 and not changed[0]


def test_bank_is_that_of_one_row_after_the_other(transform):
    random = np.random.default_rng(0)
    batches = [
        (
            random.normal(size=(7, WIDTH)).astype(np.float32),
            random.normal(size=(7, CLASSES)).astype(np.float32),
            random.integers(0, EXAMPLES, 7),
            random.random(7) < 0.7,
        )
        for _ in range(3)
    ]

    def fill(batches):
        bank = neighbors.neighbor_bank(CLASSES, WIDTH, EXAMPLES)
        for features, logits, indices, where in batches:
            bank = neighbors.update_neighbor_bank(
                features, logits, indices, bank, where=where
            )
        return bank

    bank = transform(fill)(batches)
    features, stored = np.zeros((EXAMPLES, WIDTH)), np.zeros((EXAMPLES, CLASSES))
    filled = np.zeros(EXAMPLES, bool)
    for some, logits, indices, where in batches:
        for row, i in enumerate(indices):
            if where[row]:
                features[i] = some[row] / np.linalg.norm(some[row])
                stored[i], filled[i] = softmax(logits[row]), True
    assert 0 < filled.sum() < EXAMPLES
    np.testing.assert_allclose(bank.features, features, atol=1e-6)
    np.testing.assert_allclose(bank.probabilities, stored, atol=1e-6)
    np.testing.assert_array_equal(bank.filled, filled)


def test_bank_takes_no_gradient_and_no_masked_garbage():
    bank = neighbors.neighbor_bank(CLASSES, WIDTH, EXAMPLES)
    features = jnp.asarray(FEATURES[:2]).at[1].set(jnp.nan)

    @jax.jit
    def write(features):
        return neighbors.update_neighbor_bank(
            features,
            jnp.asarray(LOGITS[:2]).at[1].set(jnp.nan),
            jnp.array([3, 999]),
            bank,
            where=jnp.array([True, False]),
        )

    got = write(features)
    assert np.isfinite(got.features).all() and np.isfinite(got.probabilities).all()
    np.testing.assert_array_equal(np.flatnonzero(got.filled), [3])
    gradient = jax.grad(lambda features: jnp.sum(write(features).features))(features)
    np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.usefixtures("types_unchecked")
@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: wrong(form="other"), 'form must be "paper" or "code", got \'other\''),
        (lambda: wrong(LOGITS[:, :3]), r"logits must be \[batch, 4\] as the bank"),
        (lambda: wrong(LOGITS[0]), "logits must be a matrix"),
        (lambda: wrong(neighbors=14), r"neighbors must be in \[1, 13\].*got 14"),
        (lambda: wrong(expanded=0), r"expanded must be in \[1, 13\].*got 0"),
        (lambda: wrong(indices=INDICES[:3]), r"indices must be \[6\]"),
        (
            lambda: wrong(indices=INDICES + 2),
            r"indices must be in \[0, 14\), the rows of the memory, got \[14\]",
        ),
        (lambda: wrong(where=np.ones(6)), "where must be boolean"),
        (lambda: neighbors.neighbor_bank(0, 2, 3), "must be positive, got 0, 2 and 3"),
        (
            lambda: neighbors.update_neighbor_bank(
                FEATURES[:6, :2], LOGITS, INDICES, full_bank()
            ),
            r"features and logits must be \(6, 3\) and \(6, 4\)",
        ),
        (
            lambda: neighbors.update_neighbor_bank(
                FEATURES[:6], LOGITS[:5], INDICES, full_bank()
            ),
            r"features and logits must be \(6, 3\) and \(6, 4\)",
        ),
        (
            lambda: neighbors.update_neighbor_bank(
                FEATURES[:6], LOGITS, INDICES - 1, full_bank()
            ),
            r"indices must be in \[0, 14\)",
        ),
    ],
)
def test_says_what_is_wrong(call, match):
    with pytest.raises(ValueError, match=match):
        call()
