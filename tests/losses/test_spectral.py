import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer.losses import spectral


@pytest.fixture
def logits():
    """Golden target logits [6, 3]."""
    i, c = np.meshgrid(np.arange(1, 7), np.arange(1, 4), indexing="ij")
    return 2 * np.cos(0.8 * i - 0.7 * c + 0.19 * i * c)


@pytest.mark.parametrize(("dtype", "rtol"), [("float64", 1e-9), ("float32", 1e-5)])
def test_goldens(float64, logits, domains, dtype, rtol):
    logits, source, target = (jnp.asarray(a, dtype) for a in (logits, *domains))
    for value, golden in (
        (spectral.batch_nuclear_norm(logits), -0.29713322910812123),
        (spectral.batch_nuclear_norm(logits, form="code"), -0.5942664582162424),
        (spectral.batch_spectral_penalization(source, target), 19.190326732154965),
        (spectral.batch_spectral_shrinkage(source), 0.09601843358790131),
        (spectral.adaptive_feature_norm(source).mean(), 1.0),
    ):
        np.testing.assert_allclose(value, golden, rtol=rtol)


@pytest.mark.parametrize(("dtype", "rtol"), [("float64", 1e-9), ("float32", 1e-5)])
def test_adaptive_norm_golden_gradient(float64, domains, dtype, rtol):
    gradient = jax.grad(lambda f: spectral.adaptive_feature_norm(f).mean())(
        jnp.asarray(domains[0], dtype)
    )
    np.testing.assert_allclose(jnp.linalg.norm(gradient), 0.816496580927726, rtol)


def test_several_values(float64, domains):
    values = np.linalg.svd(domains[0], compute_uv=False) ** 2
    twice = spectral.batch_spectral_penalization(domains[0], domains[0], largest=2)
    np.testing.assert_allclose(twice, 2 * values[:2].sum(), rtol=1e-12)
    least = spectral.batch_spectral_shrinkage(domains[0], smallest=3)
    np.testing.assert_allclose(least, values[-3:].sum(), rtol=1e-12)


def test_wasserstein_discrepancy_is_the_difference(float64, logits):
    soft = [np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (logits, logits[:4])]
    expected = [np.linalg.norm(p, "nuc") / len(p) for p in soft]
    value = spectral.nuclear_wasserstein_discrepancy(logits, logits[:4])
    np.testing.assert_allclose(value, expected[0] - expected[1], rtol=1e-10)


def test_sure_and_varied_predictions_are_the_least():
    sure = 99.0 * jnp.eye(4)
    np.testing.assert_allclose(spectral.batch_nuclear_norm(sure), -1.0, rtol=1e-6)
    same = jnp.tile(sure[:1], (4, 1))
    assert spectral.batch_nuclear_norm(same) > -0.51


def test_says_what_is_wrong(types_unchecked):
    rows = jnp.ones((3, 2))
    with pytest.raises(ValueError, match="smallest must be at least 1, got 0"):
        spectral.batch_spectral_shrinkage(rows, smallest=0)
    with pytest.raises(ValueError, match="largest must be at least 1, got 0"):
        spectral.batch_spectral_penalization(rows, rows, largest=0)
    with pytest.raises(ValueError, match="form must be"):
        spectral.batch_nuclear_norm(rows, form="mean")


def test_a_network_that_diverged_is_seen(types_unchecked):
    assert np.isnan(spectral.batch_nuclear_norm(jnp.full((3, 2), jnp.nan)))
    with pytest.raises(ValueError, match="^where must be boolean"):
        spectral.batch_nuclear_norm(jnp.ones((3, 2)), where=jnp.ones(3))
