import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
from jax.test_util import check_grads

from jaxtransfer.losses import transport

CONVERGED = {"threshold": 1e-10, "max_iterations": 20_000}
KEY = jax.random.key(0)
LABELS = np.arange(6) % 3
jdot = transport.deep_joint_distribution_transport


@pytest.fixture(scope="module")
def target_logits():
    i, c = np.meshgrid(np.arange(1, 7), np.arange(1, 4), indexing="ij")
    logits = 2 * np.cos(0.8 * i - 0.7 * c + 0.19 * i * c)
    assert abs(logits.sum() - 2.958908461734072) < 1e-12
    return logits


def _squared(source, target):
    return ((source[:, None] - target) ** 2).sum(axis=-1)


def _exact(costs):
    """The least mean cost of an assignment, and its plan."""
    rows, columns = scipy.optimize.linear_sum_assignment(costs)
    plan = np.zeros_like(costs)
    plan[rows, columns] = 1 / len(rows)
    return costs[rows, columns].mean(), plan


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize(("n", "m"), [(6, 6), (6, 4), (2, 5), (1, 3)])
def test_sliced_wasserstein_equals_its_definition(float64, domains, n, m, power):
    source, target = domains[0][:n], domains[1][:m]
    directions = np.array([[0.6, 0.8, 0.0, 0.0], [0.5, -0.5, 0.5, -0.5]])
    expected = []
    for direction in directions:
        # As many copies of every row as make both sets equally large.
        lines = [
            np.sort(np.repeat(rows @ direction, copies))
            for rows, copies in ((source, m), (target, n))
        ]
        expected.append((np.abs(lines[0] - lines[1]) ** power).mean())
    value = transport.sliced_wasserstein(
        source, target, directions=directions, power=power
    )
    np.testing.assert_allclose(value, np.mean(expected), rtol=1e-12)
    if power == 1:
        whole = [
            scipy.stats.wasserstein_distance(source @ r, target @ r) for r in directions
        ]
        np.testing.assert_allclose(value, np.mean(whole), rtol=1e-12)


@pytest.mark.parametrize("counts", [(3, 4), (5, 5), (1, 2)])
def test_sliced_wasserstein_mask_is_the_subset(domains, counts):
    source, target = (jnp.asarray(rows, jnp.float32) for rows in domains)
    order = np.array([4, 1, 5, 0, 3, 2])
    masks = [order < count for count in counts]
    expected = transport.sliced_wasserstein(source[masks[0]], target[masks[1]], key=KEY)
    value = jax.jit(transport.sliced_wasserstein)(
        source, target, key=KEY, source_where=masks[0], target_where=masks[1]
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_sliced_wasserstein_of_a_shift(float64, domains):
    """Along a unit vector r, a shift by s costs (r.s)^2: on average |s|^2 / d."""
    source, shift = domains[0], np.array([1.0, -2.0, 0.5, 3.0])
    exact = transport.sliced_wasserstein(source, source + shift, directions=jnp.eye(4))
    np.testing.assert_allclose(exact, (shift**2).mean(), rtol=1e-12)
    drawn = transport.sliced_wasserstein(
        source, source + shift, key=KEY, projections=20_000
    )
    np.testing.assert_allclose(drawn, (shift**2).mean(), rtol=0.03)
    other = transport.sliced_wasserstein(source, source + shift, key=jax.random.key(1))
    again = transport.sliced_wasserstein(source, source + shift, key=KEY)
    assert other != again


def test_sliced_wasserstein_is_zero_for_the_same_rows_in_another_order(domains):
    source = jnp.asarray(domains[0], jnp.float32)
    value, gradient = jax.value_and_grad(transport.sliced_wasserstein)(
        source, source[::-1], key=KEY
    )
    np.testing.assert_allclose(value, 0.0, atol=1e-12)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


@pytest.mark.parametrize("sizes", [(6, 6), (6, 4)])
def test_sinkhorn_divergence_of_much_entropy_compares_means(float64, domains, sizes):
    source, target = domains[0][: sizes[0]], domains[1][: sizes[1]]
    value = transport.sinkhorn_divergence(source, target, epsilon=1e7, **CONVERGED)
    expected = ((source.mean(axis=0) - target.mean(axis=0)) ** 2).sum()
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_sinkhorn_divergence_of_little_entropy_is_exact_transport(float64, domains):
    expected, _ = _exact(_squared(*domains))
    value = transport.sinkhorn_divergence(*domains, epsilon=1e-2, **CONVERGED)
    np.testing.assert_allclose(value, expected, rtol=1e-3)


@pytest.mark.parametrize("epsilon", [0.3, None])
def test_sinkhorn_divergence_equals_the_library(float64, domains, epsilon):
    from ott.tools.sinkhorn_divergence import sinkdiv

    source, target = map(jnp.asarray, domains)
    expected, _ = sinkdiv(source, target[:4], epsilon=epsilon)
    value = transport.sinkhorn_divergence(source, target[:4], epsilon=epsilon)
    np.testing.assert_allclose(value, expected, rtol=1e-3)


def test_sinkhorn_divergence_gradient_once_converged(float64, domains):
    source, target = map(jnp.asarray, domains)

    @jax.jit
    def loss(s, t):
        return transport.sinkhorn_divergence(s, t, epsilon=0.5, **CONVERGED)

    check_grads(loss, (source, target[:4]), order=1, modes=["rev"])
    value, gradient = jax.value_and_grad(loss)(source, source[::-1])
    np.testing.assert_allclose(value, 0.0, atol=1e-9)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-9)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1e4])
def test_sinkhorn_divergence_is_finite_at_any_scale(domains, scale):
    source, target = (scale * jnp.asarray(rows, jnp.float32) for rows in domains)
    for other in (target, source, target + 1.0):
        value, gradient = jax.jit(jax.value_and_grad(transport.sinkhorn_divergence))(
            source, other
        )
        assert np.isfinite(value) and np.isfinite(gradient).all()


def test_joint_transport_golden_as_the_entropy_vanishes(
    float64, domains, target_logits
):
    source, target = domains
    logs = target_logits - scipy.special.logsumexp(target_logits, axis=1, keepdims=True)
    exact, plan = _exact(_squared(source, target) - logs[:, LABELS].T)
    np.testing.assert_allclose(exact, 4.6369200891892355, rtol=1e-12)

    def loss(source, target, logits, epsilon):
        return jdot(
            source,
            target,
            LABELS,
            logits,
            feature_weight=1.0,
            label_weight=1.0,
            epsilon=epsilon,
            **CONVERGED,
        )

    arrays = tuple(map(jnp.asarray, (source, target, target_logits)))
    for epsilon in (1.0, 0.3, 0.1):
        value = loss(*arrays, epsilon)
        assert exact - 1e-8 <= value <= exact + epsilon * np.log(6)
    value, gradients = jax.value_and_grad(loss, (0, 1, 2))(*arrays, 0.02)
    np.testing.assert_allclose(value, exact, rtol=2e-5)
    # With the plan constant, every pair pulls by its own cost.
    probabilities = np.exp(logs)
    pulls = 2 * (source / 6 - plan @ target)
    np.testing.assert_allclose(gradients[0], pulls, atol=2e-4)
    np.testing.assert_allclose(
        gradients[1], 2 * (target / 6 - plan.T @ source), atol=2e-4
    )
    np.testing.assert_allclose(
        gradients[2], probabilities / 6 - plan.T @ np.eye(3)[LABELS], atol=2e-4
    )


def test_joint_transport_mask_is_the_subset(domains, target_logits):
    source, target, logits = (
        jnp.asarray(array, jnp.float32) for array in (*domains, target_logits)
    )
    masks = [np.array([1, 0, 1, 1, 0, 1], bool), np.array([0, 1, 1, 0, 1, 1], bool)]
    options = {"feature_weight": 1.0, "label_weight": 1.0}
    expected = jdot(
        source[masks[0]],
        target[masks[1]],
        LABELS[masks[0]],
        logits[masks[1]],
        **options,
    )
    wrong = np.where(masks[0], LABELS, 99)
    value = jdot(
        source,
        target,
        wrong,
        logits,
        source_where=masks[0],
        target_where=masks[1],
        **options,
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_joint_transport_weights_of_zero(float64, domains, target_logits):
    source, target = map(jnp.asarray, domains)

    def loss(logits, target, weight):
        return jdot(source, target, LABELS, logits, label_weight=weight)

    gradient = jax.grad(loss)(jnp.asarray(target_logits), target, 0.0)
    np.testing.assert_array_equal(gradient, 0.0)
    assert np.isnan(
        jax.jit(jdot)(source, target, jnp.array([0, 1, 2, 3, 0, 1]), target_logits)
    )


def test_wasserstein_critic_is_minus_the_difference_of_means(domains):
    source, target = (jnp.asarray(rows, jnp.float32) for rows in domains)
    value = transport.wasserstein_critic(source[:, 0], target[:4, :1])
    expected = domains[1][:4, 0].mean() - domains[0][:, 0].mean()
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    nobody = jnp.zeros(6, bool)
    assert (
        transport.wasserstein_critic(
            source[:, 0], target[:, 0] + 5, source_where=nobody
        )
        == 0.0
    )


def test_gradient_penalty_of_a_linear_critic(float64, domains):
    weights = jnp.array([3.0, 0.0, 4.0, 0.0])
    for critic in (lambda x: x @ weights, lambda x: x @ weights[:, None]):
        value = transport.gradient_penalty(*domains, critic, key=KEY)
        np.testing.assert_allclose(value, 16.0, rtol=1e-12)


@pytest.mark.parametrize("points", ["all", "between"])
def test_gradient_penalty_is_of_its_points(float64, domains, points):
    source, target = domains[0], domains[1][:4]
    value = transport.gradient_penalty(
        source, target, lambda x: 0.5 * (x**2).sum(axis=1), key=KEY, points=points
    )
    places = np.asarray(jax.random.uniform(KEY, (4,), jnp.float64))[:, None]
    inputs = places * source[:4] + (1 - places) * target
    if points == "all":
        inputs = np.concatenate([inputs, source, target])
    norms = np.linalg.norm(inputs, axis=1)  # the slope of |x|^2 / 2 at x is x
    np.testing.assert_allclose(value, ((norms - 1) ** 2).mean(), rtol=1e-12)


def test_gradient_penalty_of_a_flat_critic_has_no_gradient(domains):
    source, target = (jnp.asarray(rows, jnp.float32) for rows in domains)

    def loss(weights):
        return transport.gradient_penalty(
            source, target, lambda x: x @ weights, key=KEY
        )

    value, gradient = jax.value_and_grad(loss)(jnp.zeros(4))
    assert value == 1.0
    np.testing.assert_array_equal(gradient, 0.0)


def test_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "ott.geometry.geometry", None)
    with pytest.raises(ImportError, match="pip install ott-jax"):
        transport.sinkhorn_divergence(jnp.ones((3, 2)), jnp.ones((3, 2)))


@pytest.mark.usefixtures("types_unchecked")
def test_says_what_is_wrong():
    rows, labels, logits = jnp.ones((4, 3)), jnp.zeros(4, int), jnp.zeros((4, 2))
    sliced, penalty = transport.sliced_wasserstein, transport.gradient_penalty
    with pytest.raises(ValueError, match=r"key \(as in .* or directions, got neither"):
        sliced(rows, rows)
    with pytest.raises(ValueError, match="got both"):
        sliced(rows, rows, key=KEY, directions=jnp.eye(3))
    with pytest.raises(ValueError, match=r"directions must be \[projections, 3\]"):
        sliced(rows, rows, directions=jnp.eye(4))
    with pytest.raises(ValueError, match="projections must be at least 1, got 0"):
        sliced(rows, rows, key=KEY, projections=0)
    with pytest.raises(ValueError, match="power must be 1 or 2, got 3"):
        sliced(rows, rows, key=KEY, power=3)
    many, every = np.zeros((50_000, 1), np.float32), np.ones(50_000, bool)
    with pytest.raises(ValueError, match="50000 x 50000; take smaller batches"):
        sliced(many, many, key=KEY, source_where=every)
    with pytest.raises(ValueError, match="epsilon must be positive, got -1"):
        transport.sinkhorn_divergence(rows, rows, epsilon=-1.0)
    with pytest.raises(ValueError, match=r"\(4, 3\) and \(4, 2\).*same layer"):
        transport.sinkhorn_divergence(rows, logits)
    with pytest.raises(ValueError, match="target_logits must have a row for every"):
        jdot(rows, rows, labels, logits[:3])
    with pytest.raises(ValueError, match=r"labels must be in \[0, 2\), got \[2\]"):
        jdot(rows, rows, labels.at[1].set(2), logits)
    with pytest.raises(ValueError, match="gradient_penalty needs a key"):
        penalty(rows, rows, jnp.sum)
    with pytest.raises(ValueError, match="critic must return one number a row"):
        penalty(rows, rows, lambda x: x, key=KEY)
    with pytest.raises(ValueError, match="points must be .* got 'source'"):
        penalty(rows, rows, jnp.sum, key=KEY, points="source")
    with pytest.raises(ValueError, match=r"source_logits must be .* \(4, 3\)"):
        transport.wasserstein_critic(rows, rows)


def test_two_precisions_are_one(float64):
    """Source in float32, target in float64."""
    rows, others = np.random.default_rng(0).normal(size=(2, 5, 3))
    logits, labels = np.eye(5)[:, :3], np.arange(5) % 3
    narrow = rows.astype(np.float32)

    def both(source):
        return (
            transport.sinkhorn_divergence(source, others, epsilon=1.0),
            transport.deep_joint_distribution_transport(source, others, labels, logits),
        )

    for found, expected in zip(both(narrow), both(narrow.astype(float)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)
