"""On real digits the scores put the better network first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.neural_network import MLPClassifier

from jaxtransfer import losses, scores
from jaxtransfer.methods.features import logistic_regression
from tests.digits import digits, few, shifted


@pytest.fixture(scope="module")
def networks():
    """Hidden features and class probabilities of a trained and a random network."""
    train, test = digits()
    network = MLPClassifier(32, max_iter=60, tol=0.0, random_state=0)
    with pytest.warns(UserWarning, match="t converged"):
        network.fit(train["inputs"], train["labels"])
    rng = np.random.default_rng(0)
    random = [0.1 * rng.standard_normal(w.shape) for w in network.coefs_]

    def run(weights, biases):
        hidden = np.maximum(test["inputs"] @ weights[0] + biases[0], 0)
        logits = jnp.asarray(hidden @ weights[1] + biases[1], jnp.float32)
        return jnp.asarray(hidden, jnp.float32), jax.nn.softmax(logits)

    return run(network.coefs_, network.intercepts_), run(random, [0.0, 0.0])


@pytest.fixture(scope="module")
def task():
    """Another task than the source's: which of five pairs of digits it is."""
    return digits()[1]["labels"] // 2


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("leep", {}),
        ("nce", {}),
        ("log_me", {}),
        ("h_score", {}),
        ("h_score", {"shrinkage": "ledoit_wolf"}),
        ("transrate", {}),
        ("gbc", {}),
        ("gbc", {"covariance": "diagonal", "components": 16}),
    ],
)
def test_a_trained_source_ranks_above_a_random_one(name, options, networks, task):
    def score(features, probabilities):
        first = {"leep": probabilities, "nce": probabilities.argmax(axis=1)}
        return float(getattr(scores, name)(first.get(name, features), task, **options))

    trained, random = (score(*network) for network in networks)
    assert trained > random


def probe(batch):
    weights = logistic_regression(
        jnp.asarray(batch["inputs"]), jnp.asarray(batch["labels"]), classes=10
    )
    return lambda inputs: inputs @ weights["kernel"] + weights["bias"]


@pytest.fixture(scope="module")
def probes():
    """Of two examples a class, of labels half of them random, of all, of the target."""
    train, _ = digits()
    rng = np.random.default_rng(0)
    wrong = np.where(rng.random(1000) < 0.5, rng.integers(0, 10, 1000), train["labels"])
    noisy = {**train, "labels": wrong.astype(np.int32)}
    return [probe(batch) for batch in (few(train, 2), noisy, train, shifted(train))]


def chosen(name, runs):
    return int(scores.choose(jax.vmap(getattr(scores, name))(runs)))


VALIDATORS = [
    "negative_entropy",
    "prediction_diversity",
    "mutual_information",
    "nuclear_norm",
    "snd",
]


@pytest.mark.parametrize("name", VALIDATORS)
def test_the_best_of_three_classifiers_is_chosen_without_labels(name, probes):
    test = digits()[1]
    runs = jnp.stack([run(test["inputs"]) for run in probes[:3]])
    oracle = jax.vmap(lambda z: scores.oracle_target_accuracy(z, test["labels"]))(runs)
    assert oracle[2] > max(oracle[:2]) + 0.1
    assert chosen(name, runs) == 2


@pytest.mark.parametrize("name", VALIDATORS)
def test_on_another_domain_sureness_alone_is_taken_in(name, probes):
    """Unadapted classifiers predict one class throughout there, and are sure of it."""
    target = shifted(digits()[1])
    runs = jnp.stack([run(target["inputs"]) for run in probes])
    labels = target["labels"]
    oracle = jax.vmap(lambda z: scores.oracle_target_accuracy(z, labels))(runs)
    assert oracle[3] > 0.9 and max(oracle[:3]) < 0.2
    blind = ("negative_entropy", "snd")
    assert (chosen(name, runs) == 3) == (name not in blind)


def test_domains_apart_are_seen_and_weighed():
    train, test = digits()
    inputs = jnp.asarray(train["inputs"])
    same = scores.held_out_domain_logits(inputs, jnp.asarray(test["inputs"]))
    other = scores.held_out_domain_logits(inputs, shifted(test)["inputs"])
    near, far = scores.proxy_a_distance(*same), scores.proxy_a_distance(*other)
    assert abs(near) < 0.3 and far > 1.9
    error = losses.cross_entropy(jnp.zeros((1000, 10)), jnp.asarray(train["labels"]))
    for risk in (scores.iwcv, scores.dev):
        assert np.isfinite(risk(error, scores.density_ratio(other[0])))
