import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import losses
from jaxtransfer.losses import confidence
from tests.losses.case import det


@pytest.fixture
def logits():
    """Golden target logits [6, 3]."""
    i, c = np.meshgrid(np.arange(1, 7), np.arange(1, 4), indexing="ij")
    return 2 * np.cos(0.8 * i - 0.7 * c + 0.19 * i * c)


@pytest.mark.parametrize(("dtype", "rtol"), [("float64", 1e-9), ("float32", 1e-5)])
def test_goldens(float64, logits, dtype, rtol):
    logits = jnp.asarray(logits, dtype)
    information = 1.0554545093779513 - 1.0791666050276085
    for value, golden in (
        (losses.mean(confidence.entropy(logits)), 1.0554545093779513),
        (confidence.diversity(logits), -1.0791666050276085),
        (confidence.information_maximization(logits), information),
        (confidence.minimum_class_confusion(logits), 0.6639959776565173),
        (
            confidence.minimum_class_confusion(logits, temperature=1.0),
            0.6512327208778055,
        ),
    ):
        # Information is the small difference of two numbers near 1.
        np.testing.assert_allclose(value, golden, rtol=rtol, atol=0.1 * rtol)


def test_information_is_the_reference_without_its_constant(float64, logits):
    """The reference has 1e-5 inside its logarithms."""
    value = confidence.information_maximization(logits)
    np.testing.assert_allclose(value, -0.023712095622868468, atol=1e-6)


def test_permutations_change_nothing(float64, logits):
    for loss in (
        confidence.diversity,
        confidence.information_maximization,
        confidence.minimum_class_confusion,
    ):
        moved = logits[::-1][:, [2, 0, 1]]
        np.testing.assert_allclose(loss(moved), loss(logits), rtol=1e-12)


def test_confusion_of_sure_predictions_is_none():
    assert confidence.minimum_class_confusion(200.0 * jnp.eye(3)) < 1e-6


@pytest.mark.parametrize("gap", [40.0, 60.0, 90.0, 150.0, 1e4])
def test_confusion_with_a_class_that_is_all_but_absent_has_a_gradient(gap):
    """The square of its share of the batch is 0 in float32."""
    logits = jnp.array([[0.0, 0.5, -gap], [0.1, 0.0, -gap]])
    for temperature in (1.0, 2.5):
        gradient = jax.grad(
            lambda x, t=temperature: confidence.minimum_class_confusion(
                x, temperature=t
            )
        )(logits)
        assert jnp.isfinite(gradient).all() and jnp.any(gradient != 0)


def test_pseudo_label_keeps_the_sure(float64):
    logits = jnp.array([[1.0, 2.0, 0.0], [0.5, 0.0, 0.0]])
    sure = jnp.array([[4.0, 0.0, 0.0], [0.3, 0.0, 0.0]])
    value = confidence.pseudo_label(logits, sure)
    expected = np.log(np.exp(1) + np.exp(2) + 1) - 1
    np.testing.assert_allclose(value, [expected, 0.0], rtol=1e-12)
    everything = confidence.pseudo_label(logits, sure, threshold=0.0)
    assert (everything > 0).all()


def test_virtual_adversary_finds_the_worst_direction(float64):
    """Of a linear network with two classes: the difference of the two columns."""
    kernel = jnp.array([[1.0, -1.0], [2.0, 1.0], [0.0, 0.5]])
    x = jnp.array([[0.1, -0.2, 0.3], [0.5, 0.0, 0.1]])
    value = confidence.virtual_adversarial(
        x, lambda x: x @ kernel, radius=0.1, iterations=3
    )
    worst = kernel[:, 0] - kernel[:, 1]
    worst = worst / jnp.linalg.norm(worst)

    def divergence(change):
        p = jax.nn.softmax(x @ kernel)
        q = jax.nn.softmax((x + change) @ kernel)
        return (p * jnp.log(p / q)).sum(axis=1)

    both = divergence(0.1 * worst), divergence(-0.1 * worst)
    nearest = np.minimum(*(np.abs(value - one) for one in both))
    np.testing.assert_allclose(nearest, 0.0, atol=1e-9)
    assert (value >= divergence(jnp.array([0.1, 0.0, 0.0])) - 1e-4).all()


def _softmax(z):
    return np.exp(z) / np.exp(z).sum()


def test_virtual_adversary_is_its_power_iteration(float64):
    kernel, inputs, key = det((3, 4), 76, 2.0), det((2, 3), 77), jax.random.key(5)
    value, gradient = jax.jit(
        jax.value_and_grad(
            lambda x: confidence.virtual_adversarial(
                x, lambda x: x @ kernel, key=key, radius=0.5, probe=0.2, iterations=2
            ).sum()
        )
    )(jnp.asarray(inputs))
    expected, slopes = 0.0, []
    for x, direction in zip(inputs, jax.random.normal(key, (2, 3)), strict=True):
        p = _softmax(x @ kernel)
        direction = direction / np.linalg.norm(direction)
        for _ in range(2):
            slope = kernel @ (_softmax((x + 0.2 * direction) @ kernel) - p)
            direction = slope / np.linalg.norm(slope)
        q = _softmax((x + 0.5 * direction) @ kernel)
        expected += (p * np.log(p / q)).sum()
        slopes.append(kernel @ (q - p))
    np.testing.assert_allclose(value, expected, rtol=1e-9)
    np.testing.assert_allclose(gradient, slopes, rtol=1e-9)


def test_virtual_adversary_ignores_masked_rows():
    x = jnp.array([[0.1, -0.2], [jnp.nan, 1.0]])
    value = confidence.virtual_adversarial(
        x, lambda x: jnp.sin(x), where=jnp.array([True, False])
    )
    assert np.isfinite(value).all() and value[1] == 0.0


def test_centroids_correct_labels(float64):
    rng = np.random.default_rng(0)
    labels = np.arange(30) % 3
    features = 4 * np.eye(3)[labels] + 0.1 * rng.standard_normal((30, 3))
    logits = 2.0 * np.eye(3)[labels]
    logits[:3] = logits[[1, 2, 0]]  # three wrong predictions
    found = confidence.centroid_pseudo_labels(features, logits)
    np.testing.assert_array_equal(found, labels)
    # A class that none has is none's.
    wide = np.pad(logits, ((0, 0), (0, 1)), constant_values=-1e9)
    np.testing.assert_array_equal(
        confidence.centroid_pseudo_labels(features, wide), labels
    )
    # Masked rows don't count.
    features[0] = np.nan
    where = np.arange(30) > 0
    found = confidence.centroid_pseudo_labels(features, logits, where=where)
    np.testing.assert_array_equal(found[1:], labels[1:])


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_centroids_are_those_of_the_definition(float64, rounds):
    features, logits = det((12, 3), 78), det((12, 4), 79, 2.0)
    counts = np.arange(12) % 5 != 0
    extended = np.array([np.append(f, 1.0) for f in features])
    extended /= np.linalg.norm(extended, axis=1, keepdims=True)
    shares, hot = np.array([_softmax(z) for z in logits]), np.eye(4)[logits.argmax(1)]
    for _ in range(rounds + 1):
        cosines = np.full((12, 4), -np.inf)
        for c in range(4):
            rows = [
                s[c] * f for s, f in zip(shares[counts], extended[counts], strict=True)
            ]
            if hot[counts, c].any():
                centroid = sum(rows) / np.linalg.norm(sum(rows))
                cosines[:, c] = extended @ centroid
        shares = hot = np.eye(4)[cosines.argmax(axis=1)]
    got = confidence.centroid_pseudo_labels(
        features, logits, rounds=rounds, where=jnp.asarray(counts)
    )
    np.testing.assert_array_equal(got, cosines.argmax(axis=1))  # of all rows


def test_a_class_that_is_no_example_s_largest_has_no_centroid():
    """Though the first two examples lie nearest to where the soft one would be."""
    features = jnp.array([[4.0, 0.0], [4.0, 0.1], [0.0, 4.0], [1.0, 4.0]])
    logits = jnp.array(
        [[2.0, 0.0, 1.9], [0.0, 0.5, 0.4], [0.0, 2.0, -9.0], [2.0, 0.0, -9.0]]
    )
    find = functools.partial(confidence.centroid_pseudo_labels, features, logits)
    for rounds in (0, 1):
        assert find(rounds=rounds).tolist() == [0, 0, 1, 1]
    # A masked example gives its class no centroid either.
    counts = jnp.array([True, True, True, False])
    logits = logits.at[3, 2].set(9.0)
    found = confidence.centroid_pseudo_labels(features, logits, where=counts)
    assert 2 not in found


def test_says_what_is_wrong(types_unchecked):
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        confidence.virtual_adversarial(jnp.ones((2, 2)), lambda x: x, iterations=0)
    with pytest.raises(ValueError, match=r"apply must return \[batch, classes\]"):
        confidence.virtual_adversarial(jnp.ones((2, 2)), lambda x: x.sum())
    with pytest.raises(ValueError, match="must have the same shape"):
        confidence.pseudo_label(jnp.ones((2, 2)), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\], got 95"):
        confidence.pseudo_label(jnp.ones((2, 2)), jnp.ones((2, 2)), threshold=95.0)
    with pytest.raises(ValueError, match="probe must be positive, got 0"):
        confidence.virtual_adversarial(jnp.ones((2, 2)), lambda x: x, probe=0.0)
    with pytest.raises(ValueError, match=r"logits must be \[batch, classes\]"):
        confidence.minimum_class_confusion(jnp.ones(3))
    for temperature in (0.0, -1.0, jnp.array(0.0)):
        with pytest.raises(ValueError, match="temperature must be positive, got"):
            confidence.minimum_class_confusion(
                jnp.ones((2, 3)), temperature=temperature
            )
