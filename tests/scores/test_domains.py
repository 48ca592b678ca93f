import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from jaxtransfer import scores


def gaussians(apart, *, rows=400, columns=5, seed=0):
    rng = np.random.default_rng(seed)
    source = rng.normal(size=(rows, columns))
    target = rng.normal(size=(rows // 2, columns))
    target[:, 0] += apart
    return source.astype(np.float32), target.astype(np.float32)


def distance(source, target, **options):
    return float(
        scores.proxy_a_distance(
            *scores.held_out_domain_logits(source, target, **options)
        )
    )


def test_distance_by_numpy():
    source, target = (
        jnp.array([2.0, -1.0, 1.0, 3.0]),
        jnp.array([[-1.0], [2.0], [-3.0]]),
    )
    error = (1 / 4 + 1 / 3) / 2
    value = scores.proxy_a_distance(source, target)
    np.testing.assert_allclose(value, 2 * (1 - 2 * error), rtol=1e-6)


def test_distance_of_gaussians_is_that_of_the_best_error():
    """Apart by 2: the best error is Phi(-1) = 0.1587."""
    assert abs(distance(*gaussians(2.0)) - 2 * (1 - 2 * 0.1587)) < 0.15
    assert abs(distance(*gaussians(0.0))) < 0.2
    assert distance(*gaussians(12.0)) > 1.99


def test_no_example_is_judged_by_what_has_seen_it():
    """With more features than rows, training examples would be told apart wholly."""
    source, target = gaussians(0.0, rows=40, columns=200)
    assert abs(distance(source, target)) < 0.8


@pytest.mark.parametrize("folds", [2, 3])
def test_logits_are_those_of_scikit_learn(folds, float64):
    source, target = (np.float64(x) for x in gaussians(1.0, rows=60, columns=3))
    source[:, 1] *= 30.0
    l2 = 0.02
    rows = np.concatenate([source, target])
    z = (rows - rows.mean(axis=0)) / rows.std(axis=0)
    labels = np.arange(len(rows)) < len(source)
    fold = np.concatenate([np.arange(len(x)) for x in (source, target)]) % folds
    expected = np.zeros(len(rows))
    for k in range(folds):
        seen = fold != k
        sizes = np.where(labels, *(np.sum(seen & (labels == t)) for t in (1, 0)))
        model = LogisticRegression(C=1 / l2, tol=1e-10, max_iter=10_000)
        model.fit(z[seen], labels[seen], sample_weight=0.5 / sizes[seen])
        expected[~seen] = model.decision_function(z[~seen])
    got = scores.held_out_domain_logits(source, target, folds=folds, l2=l2)
    np.testing.assert_allclose(np.concatenate(got), expected, rtol=1e-4, atol=1e-5)


def test_weights_of_the_logits_stand_for_the_target():
    """The weighted mean of the source is that of the target."""
    source, target = gaussians(1.0, rows=4000, columns=2)
    weights = scores.density_ratio(scores.held_out_domain_logits(source, target)[0])
    moved = float((weights * source[:, 0]).mean() / weights.mean())
    assert abs(moved - 1.0) < 0.15 and abs(weights.mean() - 1.0) < 0.15


@pytest.mark.usefixtures("types_unchecked")
@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda x: scores.held_out_domain_logits(x, x, folds=1),
            "folds must be at least 2, got 1",
        ),
        (
            lambda x: scores.held_out_domain_logits(x, x, l2=0.0),
            "l2 must be positive",
        ),
        (
            lambda x: scores.held_out_domain_logits(x, x[:, :1]),
            "same number of features.*same layer",
        ),
        (lambda x: scores.held_out_domain_logits(x[0], x), "source must be .rows"),
        (lambda x: scores.proxy_a_distance(x, x[:, 0]), "source_logits must be"),
    ],
)
def test_says_what_is_wrong(call, match):
    with pytest.raises(ValueError, match=match):
        call(jnp.ones((4, 2)))
