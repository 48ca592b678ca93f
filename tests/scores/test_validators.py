import inspect
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import losses, scores
from tests.losses.case import det

TRANSFERABILITY = {
    "gaussian_bhattacharyya",
    "gbc",
    "h_score",
    "leep",
    "log_expected_empirical_prediction",
    "log_maximum_evidence",
    "log_me",
    "nce",
    "negative_conditional_entropy",
    "transrate",
}
VALIDATORS = sorted(set(scores.__all__) - TRANSFERABILITY)


@pytest.fixture
def logits():
    """Golden target logits [6, 3]."""
    i, c = np.meshgrid(np.arange(1, 7), np.arange(1, 4), indexing="ij")
    return 2 * np.cos(0.8 * i - 0.7 * c + 0.19 * i * c)


@pytest.fixture
def weighted():
    """Golden errors and weights [8]."""
    i = np.arange(1, 9)
    return abs(np.cos(1.7 * i)), np.exp(np.sin(i))


def takes_target_labels(function):
    """Whether a parameter is named as labels or can hold classes, of the target."""
    found = []
    for name, parameter in inspect.signature(function).parameters.items():
        options = typing.get_args(parameter.annotation) or (parameter.annotation,)
        held = {getattr(option, "dtypes", ()) for option in options}
        classes = any(any("int" in str(dtype) for dtype in dtypes) for dtypes in held)
        if (classes or "label" in name) and not name.startswith("source_"):
            found.append(name)
    return found


@pytest.mark.parametrize("name", VALIDATORS)
def test_only_the_oracle_takes_target_labels(name):
    found = takes_target_labels(getattr(scores, name))
    assert found == (["target_labels"] if name == "oracle_target_accuracy" else [])


@pytest.mark.parametrize("name", sorted(TRANSFERABILITY))
def test_a_parameter_of_labels_would_be_seen(name):
    assert "labels" in takes_target_labels(getattr(scores, name))


def test_goldens(float64, logits, weighted):
    for value, golden in (
        (scores.snd(logits), 1.393004751754478),
        (-scores.dev(*weighted), 0.6067757433628426),
        (-scores.negative_entropy(logits), 1.0554545093779513),
        (scores.prediction_diversity(logits), 1.0791666050276085),
        (scores.nuclear_norm(logits), 0.29713322910812123),
    ):
        np.testing.assert_allclose(value, golden, rtol=1e-9)


def test_goldens_in_float32(logits, weighted):
    logits = jnp.asarray(logits, jnp.float32)
    weighted = [jnp.asarray(part, jnp.float32) for part in weighted]
    np.testing.assert_allclose(scores.snd(logits), 1.393004752, rtol=1e-5)
    np.testing.assert_allclose(scores.dev(*weighted), -0.606775743, rtol=1e-5)


def test_each_is_the_loss_turned_round(float64, logits):
    for score, loss in (
        (scores.negative_entropy, lambda z: losses.mean(losses.entropy(z))),
        (scores.prediction_diversity, losses.diversity),
        (scores.mutual_information, losses.information_maximization),
        (scores.nuclear_norm, losses.batch_nuclear_norm),
    ):
        np.testing.assert_allclose(score(logits), -loss(logits), rtol=1e-12)


def density_by_matrix(logits, temperature):
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= np.linalg.norm(p, axis=1, keepdims=True)
    similar = p @ p.T / temperature
    entropies = []
    for i in range(len(p)):
        row = np.delete(similar[i], i)
        q = np.exp(row - row.max())
        q /= q.sum()
        entropies.append(-np.sum(q * np.log(np.maximum(q, 1e-300))))
    return np.mean(entropies)


@pytest.mark.parametrize("temperature", [0.05, 1.0])
@pytest.mark.parametrize("tile", [None, 1, 5, 100])
def test_density_is_that_of_the_matrix(temperature, tile, float64):
    logits = det((17, 4), 60, 4.0)
    value = scores.snd(logits, temperature=temperature, tile=tile)
    np.testing.assert_allclose(value, density_by_matrix(logits, temperature), 1e-10)


def test_density_of_equal_and_of_separate_neighbours():
    np.testing.assert_allclose(scores.snd(jnp.zeros((9, 3))), np.log(8), rtol=1e-6)
    groups = 200.0 * jnp.eye(3)[jnp.arange(9) % 3]
    np.testing.assert_allclose(scores.snd(groups), np.log(2), rtol=1e-5)


def test_density_of_60_000_examples_fits_in_half_a_gigabyte():
    """All pairs would be 14 GB."""
    given = jax.ShapeDtypeStruct((60_000, 10), jnp.float32)
    memory = jax.jit(scores.snd).lower(given).compile().memory_analysis()
    assert memory.temp_size_in_bytes + memory.argument_size_in_bytes < 0.5e9


def test_risks_by_numpy(float64):
    errors, weights = abs(det((30,), 61)), np.exp(det((30,), 62))
    weighted = errors * weights
    slope = -np.cov(weighted, weights)[0, 1] / np.var(weights, ddof=1)
    risk = weighted.mean() + slope * (weights.mean() - 1)
    np.testing.assert_allclose(scores.dev(errors, weights), -risk, rtol=1e-12)
    np.testing.assert_allclose(
        scores.iwcv(errors, weights), -weighted.mean(), rtol=1e-12
    )


def test_control_variate_gives_a_constant_loss_back(float64):
    """Whatever the weights: the weighted mean alone does not."""
    weights = 3.0 * np.exp(det((20,), 63))
    loss = np.full(20, 0.7)
    np.testing.assert_allclose(scores.dev(loss, weights), -0.7, rtol=1e-12)
    assert abs(scores.iwcv(loss, weights) + 0.7) > 1.0


def test_equal_weights_leave_the_mean_loss(float64):
    loss = abs(det((20,), 64))
    for weight in (1.0, 0.0, 1e13):
        value = scores.dev(loss, np.full(20, weight))
        np.testing.assert_allclose(value, -weight * loss.mean(), rtol=1e-12)


@pytest.mark.parametrize("weight", [0.1, 1.5 + 2.0**-22, 9.357623e-14])
@pytest.mark.parametrize("count", [3, 7, 20])
def test_weights_equal_but_for_rounding_are_equal(weight, count):
    """Their mean in float32 may be another number than each of them."""
    loss = jnp.asarray(1 + abs(det((count,), 64)), jnp.float32)
    value = scores.dev(loss, jnp.full(count, weight, jnp.float32))
    np.testing.assert_allclose(value, -weight * loss.mean(), rtol=1e-5)


def test_weighted_risks_estimate_the_target_risk():
    """Source N(0, 1), target N(1, 1), with the true ratio of their densities."""
    rng = np.random.default_rng(0)
    source, target = rng.normal(0, 1, 20_000), rng.normal(1, 1, 20_000)

    def error(x):
        return jnp.asarray(np.abs(x) > 1, jnp.float32)

    of_source, of_target = error(source).mean(), error(target).mean()
    weights = scores.density_ratio(jnp.asarray(0.5 - source, jnp.float32))
    for risk in (scores.iwcv, scores.dev):
        value = -risk(error(source), weights)
        assert abs(value - of_target) < 0.02 < abs(of_source - of_target)


def test_density_ratio_weighs_by_the_sizes(float64):
    logits = det((7,), 65, 3.0)
    source = 1 / (1 + np.exp(-logits))
    expected = 50 / 200 * (1 - source) / source
    value = scores.density_ratio(logits[:, None], size_ratio=50 / 200)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    cut = scores.density_ratio(np.array([-9.0, 9.0]), cut=2.0)
    np.testing.assert_allclose(cut, np.exp([2.0, -2.0]), rtol=1e-12)


def test_choice_passes_over_runs_that_diverged():
    values = jnp.array([0.1, jnp.nan, -0.3, 0.4, 0.4])
    assert int(scores.choose(values)) == 3
    assert int(jax.jit(scores.choose)(values)) == 3
    assert int(scores.choose(-values)) == 2
    assert int(scores.choose(values, where=jnp.array([1, 1, 1, 0, 0]) > 0)) == 0
    assert int(scores.choose(jnp.array([jnp.nan, -jnp.inf]))) == 1
    assert int(jax.jit(scores.choose)(jnp.full(3, jnp.nan))) == -1
    with pytest.raises(ValueError, match="no run to choose.*diverged"):
        scores.choose(jnp.full(3, jnp.nan))


def test_logits_that_diverged_are_not_chosen():
    finite = det((8, 4), 66, 2.0).astype(np.float32)
    runs = jnp.stack([jnp.full((8, 4), jnp.nan), finite])
    for name in (
        "negative_entropy",
        "prediction_diversity",
        "mutual_information",
        "nuclear_norm",
        "snd",
    ):
        assert int(scores.choose(jax.vmap(getattr(scores, name))(runs))) == 1, name


@pytest.mark.usefixtures("types_unchecked")
@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda x: scores.snd(x[0]), "target_logits must be a matrix"),
        (lambda x: scores.snd(x, temperature=0.0), "temperature must be positive"),
        (lambda x: scores.snd(x, tile=0), "tile must be at least 1 or None, got 0"),
        (lambda x: scores.snd(x, where=x[0]), "where must be boolean, got"),
        (lambda x: scores.dev(x, x), "one a source example"),
        (lambda x: scores.iwcv(x[0], x[0, :1]), "one a source example"),
        (lambda x: scores.choose(x), r"values must be \[runs\]"),
        (lambda x: scores.choose(x[0, :0]), "no run to choose"),
        (lambda x: scores.density_ratio(x), "source_logits must be"),
        (lambda x: scores.density_ratio(x[0], cut=0.0), "cut must be positive"),
        (lambda x: scores.density_ratio(x[0], size_ratio=-1.0), "size_ratio must be"),
        (lambda x: scores.source_accuracy(x, x[0, :1]), "labels must have the shape"),
    ],
)
def test_says_what_is_wrong(call, match):
    with pytest.raises(ValueError, match=match):
        call(jnp.ones((3, 2)))
