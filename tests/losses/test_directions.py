import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer.losses.directions import root, unit


def test_length_one_whatever_the_size_and_not_a_number_stays():
    rows = jnp.array([[3.0, 4.0], [3e-30, 4e-30], [0.0, 0.0], [jnp.nan, 1.0]])
    found = unit(rows)
    np.testing.assert_allclose(found[:2], [[0.6, 0.8]] * 2, rtol=1e-6)
    assert not found[2].any() and np.isnan(found[3]).all()


def test_roots_have_no_slope_below_the_floor_and_not_a_number_stays():
    squares = jnp.array([4.0, 1e-3, 0.0, jnp.nan])
    for floor, expected in ((0.0, [2.0, 1e-3**0.5, 0.0]), (1e-2, [2.0, 0.0, 0.0])):
        found, slopes = jax.vmap(jax.value_and_grad(root), (0, None))(squares, floor)
        np.testing.assert_allclose(found[:3], expected, rtol=1e-6)
        halves = [0.5 / value if value else 0.0 for value in expected]
        np.testing.assert_allclose(slopes[:3], halves, rtol=1e-6)
        assert np.isnan(found[3])
