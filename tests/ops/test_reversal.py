import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxtransfer import ops


def _loss(x, strength):
    return jnp.sum(ops.gradient_reversal(x, strength) ** 2)


gradients = jax.jit(jax.grad(_loss, argnums=(0, 1)))


def test_forward_is_the_identity_and_backward_reversed():
    x = jnp.array([1.0, -2.0, 3.0])
    np.testing.assert_array_equal(ops.gradient_reversal(x, 0.3), x)
    for strength in (0.0, 0.3, 1.0):
        got, to_strength = gradients(x, strength)
        np.testing.assert_allclose(got, -strength * 2 * x, rtol=1e-6)
        assert to_strength == 0.0


def test_second_derivative_is_that_of_the_reversed_gradient():
    second = jax.grad(jax.grad(_loss))(3.0, 0.5)
    np.testing.assert_allclose(second, -1.0)  # of the reversed gradient -0.5 * 2x
    forward_over_reverse = jax.jvp(lambda x: jax.grad(_loss)(x, 0.5), (3.0,), (1.0,))
    np.testing.assert_allclose(forward_over_reverse[1], -1.0)


def test_trees_and_integer_leaves():
    tree = {"a": jnp.ones(2), "b": (jnp.ones((), jnp.bfloat16), jnp.arange(3))}
    out = ops.gradient_reversal(tree, 1.0)
    jax.tree.map(np.testing.assert_array_equal, out, tree)
    gradient = jax.grad(
        lambda a: ops.gradient_reversal({**tree, "a": a}, 2.0)["a"].sum()
    )(tree["a"])
    np.testing.assert_array_equal(gradient, -2.0)
    assert out["b"][0].dtype == jnp.bfloat16 and out["b"][1].dtype == jnp.int32


def test_gradient_keeps_half_precision():
    gradient = jax.grad(lambda x: _loss(x, 0.5).astype(jnp.float32))(
        jnp.ones(2, jnp.bfloat16)
    )
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(gradient.astype(jnp.float32), -1.0)


def test_vmap_and_scan_over_the_strength():
    strengths = jnp.array([0.0, 0.5, 1.0])
    by_vmap = jax.vmap(jax.grad(_loss), in_axes=(None, 0))(3.0, strengths)
    _, by_scan = jax.lax.scan(
        lambda c, s: (c, jax.grad(_loss)(3.0, s)), None, strengths
    )
    for got in (by_vmap, by_scan):
        np.testing.assert_allclose(got, -6.0 * strengths)


def test_every_strength_of_a_vmap_reverses_its_own_gradient():
    """Of what is the same for all, too: three critics of the same features."""
    strengths, slopes = jnp.array([1.0, 2.0, 3.0]), jnp.array([1.0, 10.0, 100.0])

    def total(x):
        terms = jax.vmap(lambda s, c: c * ops.gradient_reversal(x, s))(
            strengths, slopes
        )
        return jnp.sum(terms)

    np.testing.assert_allclose(jax.grad(total)(jnp.asarray(1.0)), -321.0)
    np.testing.assert_array_equal(total(jnp.asarray(2.0)), 222.0)


def test_pmap_and_shard_map():
    count = jax.local_device_count()
    x, strength = jnp.arange(1.0, count + 1), jnp.asarray(0.5)
    by_pmap = jax.pmap(jax.grad(_loss), in_axes=(0, None))(x, strength)
    np.testing.assert_allclose(by_pmap, -x)
    mesh = jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,))
    by_shard_map = jax.jit(
        jax.shard_map(
            jax.grad(_loss), mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data")
        )
    )(x, strength)
    np.testing.assert_allclose(by_shard_map, -x)


def test_says_what_is_wrong():
    with pytest.raises(
        ValueError, match=r"strength must be a scalar, got shape \(2,\)"
    ):
        inspect.unwrap(ops.gradient_reversal)(jnp.ones(2), jnp.ones(2))
