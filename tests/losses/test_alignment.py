import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxtransfer import losses

MULTIPLIERS = (0.25, 0.5, 1.0, 2.0, 4.0)
mmd_by_jit = jax.jit(
    lambda s, t, s_where, t_where, estimator: losses.mmd(
        s, t, estimator=estimator, source_where=s_where, target_where=t_where
    ),
    static_argnums=4,
)
coral_by_jit = jax.jit(
    lambda s, t, s_where, t_where: losses.coral(
        s, t, source_where=s_where, target_where=t_where
    )
)


def _mmd_twin(source, target, estimator, bandwidths=None):
    rows = np.concatenate([source, target])
    if bandwidths is None:
        total = sum(((a - b) ** 2).sum() for a in rows for b in rows)
        bandwidths = np.array(MULTIPLIERS) * total / (len(rows) ** 2 - len(rows))

    def average(a, b, same):
        values = [
            np.exp(-((x - y) ** 2).sum() / bandwidths).sum()
            for i, x in enumerate(a)
            for j, y in enumerate(b)
            if not (same and estimator == "unbiased" and i == j)
        ]
        return np.mean(values)

    within = average(source, source, True) + average(target, target, True)
    return within - 2 * average(source, target, False)


def _float32(*arrays):
    return [jnp.asarray(array, jnp.float32) for array in arrays]


def test_mmd_golden(float64, domains):
    source, target = map(jnp.asarray, domains)
    np.testing.assert_allclose(losses.mmd(source, target), 1.0376448061186854, 1e-13)


def test_coral_golden(float64, domains):
    source, target = map(jnp.asarray, domains)
    np.testing.assert_allclose(losses.coral(source, target), 0.10144544495711914, 1e-13)


def test_goldens_in_float32(domains):
    source, target = _float32(*domains)
    np.testing.assert_allclose(losses.mmd(source, target), 1.03764480612, 1e-5)
    np.testing.assert_allclose(losses.coral(source, target), 0.101445444957, 1e-5)


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("sizes", [(6, 6), (6, 3), (2, 5)])
def test_mmd_equals_its_definition(float64, domains, estimator, sizes):
    source, target = domains[0][: sizes[0]], domains[1][: sizes[1]]
    result = losses.mmd(jnp.asarray(source), jnp.asarray(target), estimator=estimator)
    np.testing.assert_allclose(result, _mmd_twin(source, target, estimator), rtol=1e-11)


def test_mmd_bandwidths(float64, domains):
    source, target = map(jnp.asarray, domains)
    own = losses.mmd(source, target, bandwidth=3.0, multipliers=(1.0, 2.0))
    every = losses.mmd(source, target, bandwidth=[3.0, 6.0])
    expected = _mmd_twin(*domains, "biased", np.array([3.0, 6.0]))
    np.testing.assert_allclose(own, expected, rtol=1e-12)
    np.testing.assert_allclose(every, expected, rtol=1e-12)
    traced = jax.jit(lambda b: losses.mmd(source, target, bandwidth=b))
    np.testing.assert_allclose(traced(jnp.array([3.0, 6.0])), expected, rtol=1e-12)
    gradient = jax.grad(lambda b: losses.mmd(source, target, bandwidth=b))(3.0)
    assert gradient == 0.0


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_mmd_gradient(float64, domains, estimator):
    source, target = map(jnp.asarray, domains)

    @jax.jit
    def fixed(s, t):
        return losses.mmd(
            jnp.asarray(s), jnp.asarray(t), estimator=estimator, bandwidth=4.0
        )

    check_grads(fixed, (source, target), order=2, modes=["rev"])
    # The mean-distance bandwidth is a constant of the gradient.
    rows = np.concatenate(domains)
    base = 2 * len(rows) * rows.var(axis=0).sum() / (len(rows) - 1)
    by_mean = jax.grad(lambda s: losses.mmd(s, target, estimator=estimator))(source)
    by_value = jax.grad(
        lambda s: losses.mmd(s, target, estimator=estimator, bandwidth=float(base))
    )(source)
    np.testing.assert_allclose(by_mean, by_value, rtol=1e-11)


def test_coral_equals_its_definition_and_gradient(float64, domains):
    source, target = domains[0], domains[1][:4]
    difference = np.cov(source.T) - np.cov(target.T)
    result = losses.coral(jnp.asarray(source), jnp.asarray(target))
    np.testing.assert_allclose(result, (difference**2).sum() / 64, rtol=1e-12)
    check_grads(
        jax.jit(losses.coral),
        (jnp.asarray(source), jnp.asarray(target)),
        order=2,
        modes=["rev"],
    )


@pytest.mark.parametrize("loss", [losses.mmd, losses.coral])
def test_invariances(float64, domains, loss):
    source, target = map(jnp.asarray, domains)
    expected = loss(source, target)
    np.testing.assert_allclose(loss(target, source), expected, rtol=1e-12)
    order = jax.random.permutation(jax.random.key(0), 6)
    np.testing.assert_allclose(loss(source[order], target), expected, rtol=1e-12)
    np.testing.assert_allclose(loss(source + 9.0, target + 9.0), expected, rtol=1e-10)
    rotation, _ = jnp.linalg.qr(jax.random.normal(jax.random.key(1), (4, 4)))
    rotated = loss(source @ rotation, target @ rotation)
    np.testing.assert_allclose(rotated, expected, rtol=1e-10)
    np.testing.assert_allclose(loss(source, source[order]), 0.0, atol=1e-14)


def test_mmd_by_the_mean_distance_ignores_scale(float64, domains):
    source, target = map(jnp.asarray, domains)
    scaled = losses.mmd(1e3 * source, 1e3 * target)
    np.testing.assert_allclose(scaled, losses.mmd(source, target), rtol=1e-12)


def test_unbiased_mmd_has_mean_zero_for_equal_distributions():
    keys = jax.random.split(jax.random.key(0), 2000)

    @jax.jit
    @jax.vmap
    def draw(key):
        rows = jax.random.normal(key, (2, 6, 2))
        return jnp.stack(
            [
                losses.mmd(*rows, estimator=name, bandwidth=4.0)
                for name in ("unbiased", "biased")
            ]
        )

    unbiased, biased = np.asarray(draw(keys)).T
    error = unbiased.std() / np.sqrt(len(keys))
    assert abs(unbiased.mean()) < 4 * error
    assert biased.mean() > 20 * error
    assert biased.min() >= 0.0 > unbiased.min()


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_mmd_mask_is_the_subset(domains, estimator):
    source, target = _float32(*domains)
    padded = jnp.concatenate([source, jnp.full((2, 4), jnp.nan)])
    source_where = jnp.arange(8) < 6
    target_where = jnp.array([True, False, True, True, False, True])
    expected = losses.mmd(source, target[target_where], estimator=estimator)
    got = mmd_by_jit(padded, target, source_where, target_where, estimator)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    gradient = jax.grad(mmd_by_jit)(
        padded, target, source_where, target_where, estimator
    )
    assert jnp.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[6:], 0.0)


def test_coral_mask_is_the_subset(domains):
    source, target = _float32(*domains)
    padded = jnp.concatenate([source, jnp.full((2, 4), jnp.inf)])
    source_where, target_where = jnp.arange(8) < 6, jnp.arange(6) > 1
    expected = losses.coral(source, target[2:])
    got = coral_by_jit(padded, target, source_where, target_where)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    gradient = jax.grad(coral_by_jit)(padded, target, source_where, target_where)
    assert jnp.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[6:], 0.0)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_rows_under_the_mask_give_zero(domains, count):
    source, target = _float32(*domains)
    few, every = jnp.arange(6) < count, jnp.ones(6, bool)
    results = [
        jax.value_and_grad(coral_by_jit)(source, target, few, every),
        jax.value_and_grad(mmd_by_jit)(source, target, few, every, "unbiased"),
    ]
    if count == 0:
        results += [
            jax.value_and_grad(mmd_by_jit)(source, target, few, every, "biased"),
            jax.value_and_grad(mmd_by_jit)(source, target, few, few, "biased"),
        ]
    for value, gradient in results:
        assert value == 0.0
        np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_finite_where_all_rows_are_equal(value):
    rows, every = jnp.full((6, 4), value), jnp.ones(6, bool)
    for estimator in ("biased", "unbiased"):
        loss, gradient = jax.value_and_grad(mmd_by_jit)(
            rows, rows, every, every, estimator
        )
        np.testing.assert_allclose(loss, 0.0, atol=1e-5)
        np.testing.assert_allclose(gradient, 0.0, atol=1e-3)
    loss, gradient = jax.value_and_grad(coral_by_jit)(rows, rows, every, every)
    np.testing.assert_allclose(loss, 0.0, atol=1e-6)
    assert jnp.isfinite(gradient).all()


def test_finite_at_large_features_and_some_equal_rows(domains):
    source, target = _float32(*domains)
    source = source.at[1].set(source[0])
    target = target.at[2].set(source[0])
    every = jnp.ones(6, bool)
    for scale in (1.0, 1e4):
        for loss in (
            lambda s, t: mmd_by_jit(s, t, every, every, "biased"),
            lambda s, t: coral_by_jit(s, t, every, every),
        ):
            value, gradient = jax.value_and_grad(loss)(scale * source, scale * target)
            assert jnp.isfinite(value) and jnp.isfinite(gradient).all()


def test_float32_survives_a_common_offset(float64, domains):
    """Features far from the origin: the Gram form must not cancel."""
    source, target = _float32(*domains)
    expected = losses.mmd(*(jnp.asarray(d) for d in domains))
    offset = losses.mmd(source + 1e3, target + 1e3)
    assert offset.dtype == jnp.float32
    np.testing.assert_allclose(offset, expected, rtol=1e-3)


def test_half_precision_is_accumulated_in_float32(domains):
    source, target = (jnp.asarray(d, jnp.bfloat16) for d in domains)
    for loss in (losses.mmd, losses.coral):
        result = loss(source, target)
        expected = loss(source.astype(jnp.float32), target.astype(jnp.float32))
        assert result.dtype == jnp.float32
        np.testing.assert_allclose(result, expected, rtol=1e-6)
        gradient = jax.grad(loss)(source, target)
        assert gradient.dtype == jnp.bfloat16 and jnp.isfinite(gradient).all()


@pytest.mark.parametrize("loss", [losses.mmd, losses.coral])
def test_agrees_under_transformations(transform, domains, loss):
    def both(s, t):
        return jax.value_and_grad(loss, argnums=(0, 1))(s, t)

    inputs = _float32(*domains)
    got, expected = jax.tree.leaves(transform(both)(*inputs)), both(*inputs)
    for a, b in zip(got, jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_says_what_is_wrong():
    mmd, coral = inspect.unwrap(losses.mmd), inspect.unwrap(losses.coral)
    for loss in (mmd, coral):
        with pytest.raises(ValueError, match=r"\(5, 3\) and \(5, 4\).*same layer"):
            loss(jnp.ones((5, 3)), jnp.ones((5, 4)))
        with pytest.raises(ValueError, match=r"source must be \[rows, features\]"):
            loss(jnp.ones((5, 2, 2)), jnp.ones((5, 4)))
        with pytest.raises(ValueError, match="source_where of shape"):
            loss(jnp.ones((5, 3)), jnp.ones((5, 3)), source_where=jnp.ones(4, bool))
    with pytest.raises(ValueError, match="target needs at least 2 rows, got 1"):
        coral(jnp.ones((5, 3)), jnp.ones((1, 3)))
    with pytest.raises(ValueError, match="estimator must be .* got 'mean'"):
        mmd(jnp.ones((5, 3)), jnp.ones((5, 3)), estimator="mean")
    for options in ({"multipliers": (1.0, 0.0)}, {"multipliers": ()}):
        with pytest.raises(ValueError, match="multipliers must be positive"):
            mmd(jnp.ones((5, 3)), jnp.ones((5, 3)), **options)
    for bandwidth in (-1.0, [1.0, 0.0], []):
        with pytest.raises(ValueError, match="bandwidth must be positive"):
            mmd(jnp.ones((5, 3)), jnp.ones((5, 3)), bandwidth=bandwidth)
