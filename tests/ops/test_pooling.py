import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import ops


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 7), (8, 4)])
def test_every_place_is_the_mean_of_its_window(size):
    images = np.random.default_rng(0).standard_normal((2, 5, 7, 3)).astype(np.float32)
    pooled = ops.adaptive_average_pool(images, size)
    for i in range(size[0]):
        rows = slice(i * 5 // size[0], -(-(i + 1) * 5 // size[0]))
        for j in range(size[1]):
            columns = slice(j * 7 // size[1], -(-(j + 1) * 7 // size[1]))
            expected = images[:, rows, columns].mean(axis=(1, 2))
            np.testing.assert_allclose(pooled[:, i, j], expected, rtol=1e-5, atol=1e-6)


def test_says_what_is_wrong(types_unchecked):
    with pytest.raises(ValueError, match="two positive integers"):
        ops.adaptive_average_pool(jnp.ones((1, 2, 2, 1)), (0, 1))
    with pytest.raises(ValueError, match="hold a position"):
        ops.adaptive_average_pool(jnp.ones((1, 0, 2, 1)), (1, 1))
