"""Second derivatives: exact where the functions have them, finite where they do not.

Against central differences of the gradient in float64, forward over reverse and reverse
over reverse.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import losses

FEW = jnp.arange(6) < 3


def drawn(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


def forward(loss, x, along):
    return jax.jvp(jax.grad(loss), (x,), (along,))[1]


def reverse(loss, x, along):
    return jax.grad(lambda x: jnp.vdot(jax.grad(loss)(x), along))(x)


def differences(loss, x, along, step=1e-5):
    slope = jax.grad(loss)
    return (slope(x + step * along) - slope(x - step * along)) / (2 * step)


def dead(rows):
    """Two features that are 0 in all rows, as behind a ReLU."""
    return jax.nn.relu(rows).at[:, :2].set(0.0)


def log_correlation(rows):
    return losses.log_correlation_alignment(rows, rows[::-1] ** 2, epsilon=0.1)


def shifts_of_one(rows):
    return losses.sinkhorn_divergence(rows[:1], rows[1:2], epsilon=0.7)


CASES = {
    "log-CORAL, rows < features": (log_correlation, (4, 7)),
    "log-CORAL, rows > features": (log_correlation, (9, 4)),
    "nuclear norm": (losses.batch_nuclear_norm, (6, 4)),
    "nuclear norm, wide": (losses.batch_nuclear_norm, (4, 6)),
    "nuclear norm, masked": (
        lambda x: losses.batch_nuclear_norm(x, where=FEW),
        (6, 4),
    ),
    "penalisation, masked": (
        lambda x: losses.batch_spectral_penalization(
            x, x, largest=2, source_where=FEW, target_where=FEW
        ),
        (6, 4),
    ),
    "penalisation, dead units": (
        lambda x: losses.batch_spectral_penalization(dead(x), dead(x)),
        (8, 5),
    ),
    "shrinkage": (losses.batch_spectral_shrinkage, (6, 4)),
    "shrinkage, masked": (
        lambda x: losses.batch_spectral_shrinkage(x, smallest=2, where=FEW),
        (6, 5),
    ),
    "nuclear Wasserstein, masked": (
        lambda x: losses.nuclear_wasserstein_discrepancy(x, 2 * x, source_where=FEW),
        (6, 4),
    ),
    # One row a side has one plan, so that the exact curvature is the plan's.
    "Sinkhorn of two rows": (shifts_of_one, (2, 3)),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_that_of_differences(name, float64):
    loss, shape = CASES[name]
    rows, along = drawn(1, *shape), drawn(2, *shape)
    expected = differences(loss, rows, along)
    size = float(jnp.abs(expected).max())
    assert size > 0
    for product in (forward, reverse):
        found = product(loss, rows, along)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7 * size)


def test_of_the_strength_too(float64):
    rows, others = drawn(1, 4, 6), drawn(2, 5, 6)

    def loss(epsilon):
        return losses.log_correlation_alignment(rows, others, epsilon=epsilon)

    expected = differences(loss, jnp.asarray(0.3), jnp.asarray(1.0))
    found = jax.grad(jax.grad(loss))(jnp.asarray(0.3))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def equal_rows(count, width):
    return jnp.ones((count, width))


MAPS = jax.nn.relu(jax.random.normal(jax.random.key(3), (2, 4, 4, 3)))
FINITE = {
    "log-CORAL": (log_correlation, equal_rows(5, 3)),
    "log-CORAL, one direction": (
        log_correlation,
        jnp.outer(jnp.arange(6.0), jnp.ones(4)),
    ),
    "nuclear norm": (losses.batch_nuclear_norm, equal_rows(5, 3)),
    "shrinkage": (losses.batch_spectral_shrinkage, 0 * equal_rows(5, 3)),
    "penalisation": (
        lambda x: losses.batch_spectral_penalization(x, x),
        0 * equal_rows(5, 3),
    ),
    "factors": (lambda x: losses.factor_transfer(x, MAPS).sum(), MAPS),
    "factors, attention": (
        lambda x: losses.factor_transfer(x, MAPS, form="attention", power=1.0).sum(),
        MAPS,
    ),
    "attention": (
        lambda x: losses.attention_transfer(x, MAPS, power=1.0).sum(),
        0 * MAPS,
    ),
    "sliced": (
        lambda x: losses.sliced_wasserstein(x, x, key=jax.random.key(0), power=1),
        equal_rows(4, 3),
    ),
}


@pytest.mark.parametrize("name", FINITE)
def test_it_is_finite(name):
    """At equal eigenvalues, zeros, and where two values are the same."""
    loss, x = FINITE[name]
    found = forward(
        loss, x, jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)
    )
    assert bool(jnp.isfinite(found).all())
