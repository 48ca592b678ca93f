import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax.test_util import check_grads

from jaxtransfer.losses import moments

ALL = [
    moments.correlation_alignment,
    moments.log_correlation_alignment,
    moments.central_moment_discrepancy,
]


def _log_twin(source, target, epsilon):
    eye = epsilon * np.eye(source.shape[1])
    logs = [scipy.linalg.logm(np.cov(rows.T) + eye) for rows in (source, target)]
    return ((logs[0] - logs[1]) ** 2).sum() / (4 * source.shape[1] ** 2)


def _slope(fn, source, target, direction, step=1e-5):
    """The derivative of a NumPy function along a direction."""
    up, down = source + step * direction, source - step * direction
    return (fn(up, target) - fn(down, target)) / (2 * step)


@pytest.mark.parametrize(
    ("form", "golden"),
    [("paper", 0.10144544495711914), ("mean_covariance", 0.5129819643153772)],
)
def test_correlation_alignment_golden(float64, domains, form, golden):
    value = moments.coral(*map(jnp.asarray, domains), form=form)
    np.testing.assert_allclose(value, golden, rtol=1e-12)
    narrow = [jnp.asarray(rows, jnp.float32) for rows in domains]
    np.testing.assert_allclose(moments.coral(*narrow, form=form), golden, rtol=1e-5)


def test_correlation_alignment_equals_its_definition(float64, domains):
    source, target = domains[0], domains[1][:4]
    covariances = ((np.cov(source.T) - np.cov(target.T)) ** 2).sum()
    value = moments.coral(jnp.asarray(source), jnp.asarray(target))
    np.testing.assert_allclose(value, covariances / 64, rtol=1e-12)
    means = ((source.mean(axis=0) - target.mean(axis=0)) ** 2).mean()
    value = moments.coral(source, target, form="mean_covariance")
    np.testing.assert_allclose(value, means + covariances / 16, rtol=1e-12)
    arrays = (jnp.asarray(source), jnp.asarray(target))
    check_grads(jax.jit(moments.coral), arrays, order=2, modes=["rev"])


@pytest.mark.parametrize("epsilon", [1e-5, 0.1])
@pytest.mark.parametrize("rows", [6, 3], ids=["full-rank", "fewer-rows-than-features"])
def test_log_correlation_alignment_equals_its_definition(
    float64, domains, epsilon, rows
):
    source, target = domains[0][:rows], domains[1][:5]
    value = moments.log_correlation_alignment(source, target, epsilon=epsilon)
    np.testing.assert_allclose(value, _log_twin(source, target, epsilon), rtol=1e-8)


@pytest.mark.parametrize("epsilon", [1e-5, 0.5])
def test_log_correlation_alignment_gradient_at_equal_eigenvalues(
    float64, domains, epsilon
):
    axes = np.diag([1.0, 1.0, 2.0, 3.0])
    axes = np.concatenate([axes, -axes])  # two of its eigenvalues are equal
    direction = np.sin(np.arange(32.0)).reshape(8, 4)
    gradient = jax.jit(
        jax.grad(
            lambda s: moments.log_correlation_alignment(s, domains[1], epsilon=epsilon)
        )
    )(jnp.asarray(axes))
    expected = _slope(
        lambda s, t: _log_twin(s, t, epsilon), axes, domains[1], direction
    )
    np.testing.assert_allclose((gradient * direction).sum(), expected, rtol=1e-6)


def test_log_correlation_alignment_of_scaled_rows(float64, domains):
    source = domains[0]
    value = moments.log_correlation_alignment(source, 3.0 * source, epsilon=1e-12)
    np.testing.assert_allclose(value, 4 * (2 * np.log(3.0)) ** 2 / 64, rtol=1e-6)
    epsilon = jax.grad(
        lambda e: moments.log_correlation_alignment(*domains, epsilon=e)
    )(0.5)
    step = 1e-6
    up, down = (_log_twin(*domains, 0.5 + sign * step) for sign in (1, -1))
    np.testing.assert_allclose(epsilon, (up - down) / (2 * step), rtol=1e-6)


def test_log_correlation_alignment_of_singular_sets_in_float32():
    rows = np.sin(np.arange(3 * 40.0)).reshape(3, 40).astype(np.float32)
    for source, target in ((rows, 2 * rows), (rows, rows), (1e4 * rows, rows)):
        value, gradient = jax.value_and_grad(moments.log_correlation_alignment)(
            jnp.asarray(source), jnp.asarray(target)
        )
        assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 1.0)])
@pytest.mark.parametrize("highest", [1, 2, 5])
def test_central_moment_discrepancy_equals_its_definition(
    float64, domains, bounds, highest
):
    source, target = domains[0], domains[1][:4]
    means = source.mean(axis=0), target.mean(axis=0)
    width = bounds[1] - bounds[0]
    expected = np.linalg.norm(means[0] - means[1]) / width
    for k in range(2, highest + 1):
        central = [
            ((rows - mean) ** k).mean(axis=0)
            for rows, mean in zip((source, target), means, strict=True)
        ]
        expected += np.linalg.norm(central[0] - central[1]) / width**k
    value = moments.central_moment_discrepancy(
        source, target, moments=highest, bounds=bounds
    )
    np.testing.assert_allclose(value, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("scale", "bounds"),
    [(1e4, (0.0, 1.0)), (1e7, (0.0, 1.0)), (1e12, (-1e12, 1e12)), (1e-25, (0.0, 1.0))],
)
def test_central_moment_discrepancy_of_large_features(domains, scale, bounds):
    def run(dtype):
        with jax.enable_x64(dtype == "float64"):
            result = jax.value_and_grad(moments.central_moment_discrepancy)(
                *(jnp.asarray(np.float32(scale * rows), dtype) for rows in domains),
                bounds=bounds,
            )
            return [np.asarray(leaf, np.float64) for leaf in result]

    (value, gradient), (exact, slope) = run("float32"), run("float64")
    np.testing.assert_allclose(value, exact, rtol=1e-5)
    largest = np.abs(slope).max()
    np.testing.assert_allclose(gradient / largest, slope / largest, atol=1e-5)


def test_central_moment_discrepancy_scales_with_its_bounds(float64, domains):
    source, target = domains
    unit = moments.central_moment_discrepancy(source, target)
    wide = moments.central_moment_discrepancy(
        3.0 * source + 2.0, 3.0 * target + 2.0, bounds=(2.0, 5.0)
    )
    np.testing.assert_allclose(wide, unit, rtol=1e-12)


@pytest.mark.parametrize("loss", ALL)
def test_invariances(float64, domains, loss):
    source, target = map(jnp.asarray, domains)
    expected = loss(source, target)
    np.testing.assert_allclose(loss(target, source), expected, rtol=1e-10)
    order = np.array([3, 0, 5, 1, 4, 2])
    np.testing.assert_allclose(loss(source[order], target), expected, rtol=1e-10)
    np.testing.assert_allclose(loss(source + 9.0, target + 9.0), expected, rtol=1e-8)
    if loss is not moments.central_moment_discrepancy:
        rotation, _ = jnp.linalg.qr(jax.random.normal(jax.random.key(1), (4, 4)))
        rotated = loss(source @ rotation, target @ rotation)
        np.testing.assert_allclose(rotated, expected, rtol=1e-9)
    value, gradient = jax.value_and_grad(loss)(source, source)
    assert value == 0.0
    np.testing.assert_allclose(gradient, 0.0, atol=1e-12)


@pytest.mark.parametrize("loss", ALL)
def test_too_few_rows_under_the_mask_give_zero(domains, loss):
    source, target = (jnp.asarray(rows, jnp.float32) for rows in domains)
    count = 0 if loss is moments.central_moment_discrepancy else 1
    value, gradient = jax.value_and_grad(loss)(
        source, target, target_where=jnp.arange(6) < count
    )
    assert value == 0.0
    np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.usefixtures("types_unchecked")
def test_says_what_is_wrong():
    rows = jnp.ones((5, 3))
    for loss in ALL:
        with pytest.raises(ValueError, match=r"\(5, 3\) and \(5, 4\).*same layer"):
            loss(rows, jnp.ones((5, 4)))
        with pytest.raises(ValueError, match=r"source must be \[rows, features\]"):
            loss(jnp.ones((5, 2, 2)), rows)
        with pytest.raises(ValueError, match="target_where of shape"):
            loss(rows, rows, target_where=jnp.ones(4, bool))
    with pytest.raises(ValueError, match="target needs at least 2 rows, got 1"):
        moments.coral(rows, rows[:1])
    with pytest.raises(ValueError, match="form must be .* got 'code'"):
        moments.coral(rows, rows, form="code")
    with pytest.raises(ValueError, match="epsilon must be positive, got 0"):
        moments.log_correlation_alignment(rows, rows, epsilon=0.0)
    with pytest.raises(ValueError, match="moments must be at least 1, got 0"):
        moments.central_moment_discrepancy(rows, rows, moments=0)
    with pytest.raises(ValueError, match=r"low < high, got \(1.0, 1.0\)"):
        moments.central_moment_discrepancy(rows, rows, bounds=(1.0, 1.0))
