"""Places in a permutation: a bijection for every size and key, and a random one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer.ops import shuffled


@functools.partial(jax.jit, static_argnames="size")
def everything(key, size):
    return shuffled(key, jnp.arange(size), size)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 65, 1297])
def test_every_key_gives_a_permutation(size):
    for seed in range(3):
        order = everything(jax.random.key(seed), size)
        assert sorted(order.tolist()) == list(range(size))


def test_keys_give_different_orders_and_the_same_key_the_same():
    first, second = (everything(jax.random.key(seed), 1297) for seed in (0, 1))
    assert jnp.mean(first == second) < 0.01
    assert jnp.array_equal(first, everything(jax.random.key(0), 1297))


def test_a_place_alone_is_the_place_in_the_whole():
    whole = everything(jax.random.key(2), 65)
    assert int(shuffled(jax.random.key(2), jnp.array([40]), 65)[0]) == int(whole[40])


def test_each_value_is_as_likely_at_each_place():
    size, draws = 10, 4000
    keys = jax.random.split(jax.random.key(3), draws)
    orders = np.asarray(jax.vmap(lambda key: everything(key, size))(keys))
    counts = np.stack([np.bincount(orders[:, i], minlength=size) for i in range(size)])
    chi_square = np.sum((counts - draws / size) ** 2 / (draws / size))
    assert chi_square < 81 + 5 * np.sqrt(2 * 81)  # mean and deviation of a fair one
    together = np.bincount(orders[:, 0] * size + orders[:, 1], minlength=size**2)
    expected = draws / (size * (size - 1))
    pairs = together[together > 0]
    assert len(pairs) == size * (size - 1)
    assert np.sum((pairs - expected) ** 2 / expected) < 89 + 6 * np.sqrt(2 * 89)


@pytest.mark.parametrize("size", [0, 2**30 + 1])
def test_size_out_of_range_is_refused(size):
    with pytest.raises(ValueError, match="size must be"):
        shuffled(jax.random.key(0), jnp.arange(1), size)
