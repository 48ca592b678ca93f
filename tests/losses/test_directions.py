import jax.numpy as jnp
import numpy as np

from jaxtransfer.losses.directions import unit


def test_length_one_whatever_the_size_and_not_a_number_stays():
    rows = jnp.array([[3.0, 4.0], [3e-30, 4e-30], [0.0, 0.0], [jnp.nan, 1.0]])
    found = unit(rows)
    np.testing.assert_allclose(found[:2], [[0.6, 0.8]] * 2, rtol=1e-6)
    assert not found[2].any() and np.isnan(found[3]).all()
