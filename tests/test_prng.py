import itertools

import jax
import jax.numpy as jnp
import pytest

from jaxtransfer import prng


def bits(key):
    return tuple(jax.random.key_data(key).tolist())


def test_a_stream_depends_on_key_and_name_alone(key):
    names = ("dropout", "params", "episodes", "augment", "a", "b", "")
    roots = [key, jax.random.key(1)]
    derived = {(bits(r), n): bits(prng.stream(r, n)) for r in roots for n in names}
    assert len(set(derived.values())) == len(derived)
    assert bits(prng.stream(jax.random.key(0), "dropout")) == bits(
        prng.stream(key, "dropout")
    )


def test_streams_are_those_of_stream_in_any_order(key):
    for names in itertools.permutations(("init", "data", "dropout")):
        for name, derived in zip(names, prng.streams(key, *names), strict=True):
            assert bits(derived) == bits(prng.stream(key, name))


def test_adding_a_stream_shifts_no_other(key):
    before = prng.streams(key, "init", "data")
    after = prng.streams(key, "new", "init", "data")[1:]
    assert [bits(k) for k in before] == [bits(k) for k in after]


def test_step_keys_differ_and_repeat_traced_or_not(key):
    eager = [bits(prng.step_key(key, step)) for step in range(5)]
    traced = jax.vmap(lambda step: prng.step_key(key, step))(jnp.arange(5))
    assert len(set(eager)) == 5
    assert eager == [bits(k) for k in traced]


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_the_kind_of_key_is_kept(impl):
    root = jax.random.key(0, impl=impl)
    assert prng.stream(root, "x").dtype == root.dtype
    assert prng.step_key(root, 1).dtype == root.dtype
