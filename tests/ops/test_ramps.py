import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import ops


@pytest.mark.parametrize(
    ("progress", "golden"),
    [
        (0.0, 0.0),
        (0.1, 0.4621171572600098),
        (0.5, 0.9866142981514305),
        (1.0, 0.9999092042625952),
    ],
)
def test_dann_golden(progress, golden):
    with jax.enable_x64(True):
        np.testing.assert_allclose(ops.dann(progress), golden, rtol=1e-13)
    np.testing.assert_allclose(ops.dann(progress), golden, rtol=1e-6)


def test_dann_starts_at_zero_exactly_and_gamma_one_ends_below_half():
    assert ops.dann(0.0) == 0.0
    np.testing.assert_allclose(ops.dann(1.0, gamma=1.0), 0.46211715726, rtol=1e-6)


@pytest.mark.parametrize("ramp", [ops.linear, ops.cosine])
def test_ends_middle_and_clipping(ramp):
    values = jax.jit(lambda p: ramp(p, start=0.2, end=2.2))(
        jnp.array([-1.0, 0.0, 0.5, 1.0, 7.0])
    )
    np.testing.assert_allclose(values, [0.2, 0.2, 1.2, 2.2, 2.2], rtol=1e-6)


@pytest.mark.parametrize("ramp", [ops.linear, ops.cosine, ops.dann])
def test_ramps_never_fall(ramp):
    values = np.asarray(ramp(jnp.linspace(0.0, 1.0, 101)))
    assert (np.diff(values) >= 0).all() and values[-1] > 0.99


def test_cosine_is_the_half_cosine():
    np.testing.assert_allclose(ops.cosine(0.25), (1 - np.sqrt(0.5)) / 2, rtol=1e-6)


def test_progress_of_traced_steps():
    fractions = jax.vmap(lambda step: ops.progress(step, 4))(jnp.arange(6))
    np.testing.assert_allclose(fractions, [0, 0.25, 0.5, 0.75, 1, 1])
    with pytest.raises(ValueError, match="total_steps must be positive, got 0"):
        ops.progress(1, 0)
