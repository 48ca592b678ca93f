import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import ops
from tests.losses.case import det

SCALES = np.array([0.5, 1.5])


def test_chunks_change_nothing():
    with jax.enable_x64(True):
        rows, frequencies, weights = (
            jnp.asarray(a) for a in (det((11, 3), 71), det((3, 5), 72), det((11,), 73))
        )

        def total(rows, chunk_size):
            sums = ops.fourier_sums(
                rows,
                frequencies,
                jnp.asarray(SCALES),
                weights=weights,
                chunk_size=chunk_size,
            )
            return jnp.sum(sums * jnp.arange(20.0).reshape(sums.shape)), sums

        run = jax.value_and_grad(total, has_aux=True)
        (_, sums), gradient = run(rows, 4)
        (_, expected), expected_gradient = run(rows, 11)
        angles = SCALES[:, None, None] * (rows @ frequencies)
        twin = np.stack([weights @ np.cos(angles), weights @ np.sin(angles)], 1)
        np.testing.assert_allclose(sums, twin, rtol=1e-12)
        np.testing.assert_allclose(sums, expected, rtol=1e-12)
        np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-12)


def test_memory_does_not_grow_with_the_rows():
    def temporary(n):
        def total(rows):
            sums = ops.fourier_sums(
                rows, jnp.ones((4, 64)), jnp.ones(2), chunk_size=128
            )
            return jnp.sum(sums**2)

        rows = jax.ShapeDtypeStruct((n, 4), jnp.float32)
        compiled = jax.jit(jax.grad(total)).lower(rows).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # What grows are the rows and their gradient.
    assert temporary(8192) - temporary(1024) < 3 * 4 * 4 * 7168


def test_says_what_is_wrong(types_unchecked):
    with pytest.raises(ValueError, match=r"frequencies \[features, frequencies\], got"):
        ops.fourier_sums(jnp.ones((2, 3)), jnp.ones((2, 4)), jnp.ones(1))
    with pytest.raises(ValueError, match="chunk_size must be positive, got 0"):
        ops.fourier_sums(jnp.ones((2, 3)), jnp.ones((3, 4)), jnp.ones(1), chunk_size=0)
