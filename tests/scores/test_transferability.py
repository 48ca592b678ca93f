import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA

from jaxtransfer import scores
from tests.losses.case import det

# Of the reference code itself, in float64; see the inputs in conftest.py.
GOLDEN = {
    "leep": -0.6251996539277178,
    "nce": -0.1591285420737032,
    "h_score": 1.2839126824413305,
    "transrate": 4.241292106979341,
    "log_me": -0.8309365113734829,
}


def features_of(seed, rows, columns, classes=3, apart=1.0):
    """Features around a mean for each class, and the labels; nothing is centred."""
    labels = np.arange(rows) % classes
    means = apart * det((classes, columns), seed + 1)
    return det((rows, columns), seed) + means[labels] + 0.2, labels


def first_argument(name, ranking):
    features, source, _ = ranking
    return {"leep": source, "nce": source.argmax(axis=1)}.get(name, features)


@pytest.mark.parametrize("name", GOLDEN)
def test_goldens(name, ranking, float64):
    value = getattr(scores, name)(first_argument(name, ranking), ranking[2])
    np.testing.assert_allclose(value, GOLDEN[name], rtol=1e-9)


@pytest.mark.parametrize("name", GOLDEN)
def test_goldens_in_float32(name, ranking):
    value = getattr(scores, name)(first_argument(name, ranking), ranking[2])
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, GOLDEN[name], rtol=1e-5)


def evidence_by_full_matrix(features, target, steps=11, tolerance=0.01):
    """MacKay's fixed point and the evidence with A = alpha I + beta F'F, [D, D]."""
    count, width = features.shape
    gram, moment = features.T @ features, features.T @ target
    alpha = beta = 1.0
    for _ in range(steps):
        inverse = np.linalg.inv(alpha * np.eye(width) + beta * gram)
        mean = beta * inverse @ moment
        gamma = width - alpha * np.trace(inverse)
        norm, residual = mean @ mean, np.sum((target - features @ mean) ** 2)
        before, alpha, beta = alpha / beta, gamma / norm, (count - gamma) / residual
        if abs(alpha / beta - before) < tolerance * before:
            break
    _, log_determinant = np.linalg.slogdet(alpha * np.eye(width) + beta * gram)
    return (
        width * np.log(alpha)
        + count * np.log(beta)
        - log_determinant
        - beta * residual
        - alpha * norm
        - count * np.log(2 * np.pi)
    ) / (2 * count)


@pytest.mark.parametrize(("rows", "columns"), [(64, 512), (64, 20)])
def test_evidence_is_that_of_the_full_matrix(rows, columns, float64):
    # Correlated features and wrong labels: nothing is fitted without error.
    features, labels = features_of(20, rows, columns, apart=0.1)
    features *= np.exp(-np.arange(columns) / 10)
    labels = np.where(np.arange(rows) % 5 == 0, 0, labels)
    expected = np.mean(
        [evidence_by_full_matrix(features, 1.0 * (labels == c)) for c in range(3)]
    )
    value = scores.log_me(features, labels)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    narrow = scores.log_me(features.astype(np.float32), labels)
    np.testing.assert_allclose(narrow, expected, rtol=1e-3)


@pytest.mark.parametrize(("rows", "columns"), [(24, 40), (40, 6)])
def test_converged_evidence_is_the_largest_marginal_likelihood(rows, columns, float64):
    """Of y ~ N(0, I / beta + F F' / alpha), by a search over alpha and beta."""
    features, _ = features_of(23, rows, columns)
    target = features[:, 0] - features[:, 1] + det((rows,), 25)

    def negative(logs):
        covariance = np.eye(rows) * np.exp(-logs[1])
        covariance += features @ features.T * np.exp(-logs[0])
        _, log_determinant = np.linalg.slogdet(covariance)
        quadratic = target @ np.linalg.solve(covariance, target)
        return (log_determinant + quadratic + rows * np.log(2 * np.pi)) / (2 * rows)

    best = scipy.optimize.minimize(
        negative, np.zeros(2), method="Nelder-Mead", options={"fatol": 1e-12}
    )
    value = scores.log_me(features, target, iterations=2000, tolerance=0.0)
    np.testing.assert_allclose(value, -best.fun, rtol=1e-6)
    np.testing.assert_allclose(scores.log_me(features, target), value, rtol=1e-2)


def test_evidence_of_several_outputs_is_the_mean(float64):
    features, labels = features_of(26, 30, 4)
    targets = det((30, 2), 28)
    each = [scores.log_me(features, targets[:, k]) for k in range(2)]
    np.testing.assert_allclose(scores.log_me(features, targets), np.mean(each), 1e-12)
    codes = np.eye(3)[labels]
    np.testing.assert_allclose(
        scores.log_me(features, codes), scores.log_me(features, labels), rtol=1e-12
    )


@pytest.mark.parametrize("columns", [3, 30])
def test_evidence_is_finite_where_features_fit_without_error(columns):
    """Then no largest evidence exists if there are more rows than columns."""
    features = det((20, columns), 29).astype(np.float32)
    fitted = float(scores.log_me(features, features @ np.ones(columns, np.float32)))
    ordinary = float(scores.log_me(features, det((20,), 30).astype(np.float32)))
    assert np.isfinite([fitted, ordinary]).all()
    assert columns == 30 or fitted > ordinary + 5
    unrelated = jnp.concatenate([features, jnp.zeros((5, columns))])
    target = jnp.where(jnp.arange(25) < 20, 0.0, 1.0)
    assert np.isfinite(scores.log_me(unrelated, target))


@pytest.mark.parametrize(
    ("rows", "columns"), [(60, 8), (15, 40), (30, 1), (400, 3)], ids=str
)
def test_shrinkage_is_that_of_scikit_learn(rows, columns, float64):
    features, labels = features_of(31, rows, columns)
    fitted = LedoitWolf().fit(features)
    assert columns == 1 or 0 < fitted.shrinkage_ < 1
    means = np.stack([features[labels == c].mean(axis=0) for c in range(3)])[labels]
    between = np.atleast_2d(np.cov(means, rowvar=False))
    expected = (1 - fitted.shrinkage_) * np.trace(
        np.linalg.solve(fitted.covariance_, between)
    )
    value = scores.h_score(features, labels, shrinkage="ledoit_wolf")
    np.testing.assert_allclose(value, expected, rtol=1e-9)
    given = scores.h_score(features, labels, shrinkage=float(fitted.shrinkage_))
    np.testing.assert_allclose(given, expected, rtol=1e-9)


def test_h_score_of_few_examples_needs_shrinkage(float64):
    features, labels = features_of(34, 12, 40, apart=0.0)
    np.testing.assert_allclose(scores.h_score(features, labels), 2.0, rtol=1e-9)
    told, _ = features_of(34, 12, 40, apart=3.0)
    shrunk = [scores.h_score(f, labels, shrinkage=0.5) for f in (features, told)]
    assert shrunk[0] < shrunk[1] - 0.1


@pytest.mark.parametrize("average", ["classes", "examples"])
@pytest.mark.parametrize(("rows", "columns"), [(25, 4), (10, 30)])
def test_transrate_is_that_of_determinants(average, rows, columns, float64):
    features, labels = features_of(37, rows, columns)
    labels = np.where(np.arange(rows) < rows // 2, 0, labels)

    def rate(f):
        return np.linalg.slogdet(np.eye(columns) + f.T @ f / (len(f) * 0.01))[1] / 2

    centred = features - features.mean(axis=0)
    rates = [rate(centred[labels == c]) for c in range(3)]
    weights = None if average == "classes" else np.bincount(labels)
    expected = rate(centred) - np.average(rates, weights=weights)
    value = scores.transrate(features, labels, distortion=0.01, average=average)
    np.testing.assert_allclose(value, expected, rtol=1e-9)
    traced = jax.jit(
        lambda f, y: scores.transrate(f, y, distortion=0.01, average=average, classes=5)
    )(features, labels)
    np.testing.assert_allclose(traced, expected, rtol=1e-9)


@pytest.mark.parametrize("covariance", ["spherical", "diagonal", "spherical_code"])
def test_bhattacharyya_is_that_of_full_covariances(covariance, float64):
    features, labels = features_of(40, 30, 4, apart=0.3)
    features[:, 3] = 1.0  # what has no variance gets the least
    expected = 0.0
    for i in range(3):
        for j in range(3):
            if i == j:
                continue
            means = [features[labels == c].mean(axis=0) for c in (i, j)]
            variances = [
                np.maximum(features[labels == c].var(axis=0), 1e-4) for c in (i, j)
            ]
            if covariance != "diagonal":
                variances = [np.full(4, v.mean()) for v in variances]
            both = [np.diag(v) for v in variances]
            middle = (both[0] + both[1]) / 2
            apart = means[0] - means[1]
            logs = [np.linalg.slogdet(m)[1] for m in (middle, *both)]
            spread = logs[0] - (logs[1] + logs[2]) / 2
            if covariance == "spherical_code":
                spread /= 4
            distance = apart @ np.linalg.solve(middle, apart) / 8 + spread / 2
            expected -= np.exp(-distance)
    value = scores.gbc(features, labels, covariance=covariance)
    np.testing.assert_allclose(value, expected, rtol=1e-10)


def test_components_are_those_of_scikit_learn(float64):
    features, labels = features_of(43, 40, 9)
    projected = PCA(3).fit_transform(features)
    options = {"covariance": "diagonal"}
    value = scores.gbc(features, labels, components=3, **options)
    expected = scores.gbc(projected, labels, **options)
    np.testing.assert_allclose(value, expected, rtol=1e-9)


def test_leep_by_loops(float64):
    source = np.exp(det((20, 5), 46, 2.0))
    source /= source.sum(axis=1, keepdims=True)
    labels = np.arange(20) % 3
    total = 0.0
    for i in range(20):
        expected = 0.0
        for z in range(5):
            among = sum(source[k, z] for k in range(20) if labels[k] == labels[i])
            expected += source[i, z] * among / source[:, z].sum()
        total += np.log(expected)
    np.testing.assert_allclose(scores.leep(source, labels), total / 20, rtol=1e-12)


def test_a_source_class_that_is_never_predicted_adds_nothing(float64, ranking):
    _, source, labels = ranking
    wide = np.pad(source, ((0, 0), (1, 2)))
    np.testing.assert_allclose(scores.leep(wide, labels), GOLDEN["leep"], rtol=1e-12)
    given = source.argmax(axis=1)
    more = scores.nce(given, labels, source_classes=9, classes=7)
    np.testing.assert_allclose(more, GOLDEN["nce"], rtol=1e-12)


def test_leep_bounds(float64):
    """A perfect source: 0. A source that knows nothing: minus the labels' entropy."""
    labels = np.array([0, 0, 0, 1, 2, 2])
    np.testing.assert_allclose(scores.leep(np.eye(3)[labels], labels), 0.0, atol=1e-12)
    shares = np.array([3, 1, 2]) / 6
    entropy = -np.sum(shares * np.log(shares))
    for value in (
        scores.leep(np.full((6, 4), 0.25), labels),
        scores.nce(np.zeros(6, int), labels),
    ):
        np.testing.assert_allclose(value, -entropy, rtol=1e-12)


def rotation(width):
    return np.linalg.qr(det((width, width), 49))[0]


@pytest.mark.parametrize(
    ("score", "change"),
    [
        (scores.log_me, lambda f: f @ rotation(5)),
        (scores.h_score, lambda f: f @ (rotation(5) * [1, 2, 3, 4, 5]) + 7.0),
        (
            lambda f, y: scores.h_score(f, y, shrinkage="ledoit_wolf"),
            lambda f: 3.0 * f @ rotation(5) - 1.0,
        ),
        (scores.transrate, lambda f: f @ rotation(5) + 3.0),
        (scores.gbc, lambda f: f @ rotation(5) + 3.0),
        (
            lambda f, y: scores.gbc(f, y, covariance="diagonal"),
            lambda f: f[:, ::-1] * [1, -2, 3, 4, 5] + 1.0,
        ),
    ],
    ids=["log_me", "h_score", "ledoit_wolf", "transrate", "spherical", "diagonal"],
)
def test_changes_of_coordinates_that_change_nothing(score, change, float64):
    features, labels = features_of(50, 40, 5)
    value = score(change(features), labels)
    np.testing.assert_allclose(value, score(features, labels), rtol=1e-8)


def test_features_are_not_centred_for_the_evidence(float64):
    """As the authors' head has no bias, a shift changes it."""
    features, labels = features_of(53, 30, 4)
    value = scores.log_me(features, labels)
    assert abs(scores.log_me(features + 5.0, labels) - value) > 1e-3


@pytest.mark.usefixtures("types_unchecked")
@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda f, y: scores.log_me(f[:, 0], y), "features must be a matrix, got"),
        (lambda f, y: scores.log_me(f[:0], y[:0]), "features is empty.*some rows"),
        (lambda f, y: scores.log_me(f, y[:2]), "labels must be one integer a row"),
        (lambda f, y: scores.log_me(f, 1.0 * y[:2]), r"labels must be \[4\] or \[4, o"),
        (lambda f, y: scores.log_me(f, y, iterations=0), "iterations must be at least"),
        (lambda f, y: scores.h_score(f, 1.0 * y), "labels must be one integer.*argmax"),
        (lambda f, y: scores.h_score(f, y, shrinkage=2), "shrinkage must be.*got 2"),
        (lambda f, y: scores.h_score(f, y, shrinkage="oas"), "shrinkage must be"),
        (lambda f, y: scores.h_score(f, y, classes=2), r"in \[0, 2\).*with where"),
        (lambda f, y: scores.h_score(f, y, where=y), "where must be boolean"),
        (lambda f, y: scores.transrate(f, y, distortion=0), "distortion must be posit"),
        (lambda f, y: scores.transrate(f, y, average="all"), "average must be"),
        (lambda f, y: scores.gbc(f, y, covariance="full"), "covariance must be"),
        (lambda f, y: scores.gbc(f, y, components=0), "components must be at least 1"),
        (lambda f, y: scores.gbc(f, y, least_variance=0.0), "least_variance must be p"),
        (lambda f, y: scores.leep(f, y), "not be negative, got -.*softmax"),
        (lambda f, y: scores.leep(-f, y), "sum to 1, got a sum of 2.*softmax"),
        (lambda f, y: scores.nce(f, y), "predictions must be one integer a row"),
        (lambda f, y: scores.nce(y, y[:2]), "labels must be one integer a row"),
    ],
)
def test_says_what_is_wrong(call, match):
    with pytest.raises(ValueError, match=match):
        call(-jnp.ones((4, 2)), jnp.array([0, 1, 2, 0]))
