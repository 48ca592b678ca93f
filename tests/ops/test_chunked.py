import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtransfer import ops


def _loss(params, key, batch):
    noise = jax.random.normal(key, ())
    errors = (jnp.tanh(batch["x"] @ params["w"]) - noise) ** 2
    return jnp.mean(errors), {"loss": jnp.mean(errors), "largest": jnp.max(errors)}


PARAMS = {"w": np.array([1.0, -0.5, 0.25], np.float32)}
BATCH = {"x": np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32)}


@pytest.fixture
def case(key):
    return jax.tree.map(jnp.asarray, PARAMS), key, jax.tree.map(jnp.asarray, BATCH)


def _value_and_grad(fn):
    def run(*args):
        (value, _), gradient = jax.value_and_grad(fn, has_aux=True)(*args)
        return value, gradient

    return run


def _assert_close(got, expected, rtol=1e-6, atol=1e-7):
    close = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol)
    jax.tree.map(close, got, expected)


@pytest.mark.parametrize("chunk_size", [1, 4, 32, None])
def test_equals_the_plain_mean_and_gradient(case, chunk_size):
    chunked = jax.jit(_value_and_grad(ops.chunked_mean(_loss, chunk_size)))
    _assert_close(chunked(*case), _value_and_grad(_loss)(*case))


def test_value_alone_takes_no_gradient(case):
    chunked = ops.chunked_mean(_loss, 4)
    value, aux = chunked(*case)
    np.testing.assert_allclose(value, _loss(*case)[0], rtol=1e-6)
    np.testing.assert_allclose(aux["loss"], value, rtol=1e-6)
    text = str(jax.make_jaxpr(lambda *a: chunked(*a)[0])(*case))
    assert "transpose" not in text.replace("transpose[permutation", "")


def test_aux_is_averaged_or_stacked(case):
    _, stacked = ops.chunked_mean(_loss, 8, aux="stack")(*case)
    _, averaged = ops.chunked_mean(_loss, 8)(*case)
    assert stacked["largest"].shape == (4,)
    every_fourth = {"x": case[2]["x"][1::4]}
    expected = _loss(case[0], case[1], every_fourth)[1]["largest"]
    np.testing.assert_allclose(stacked["largest"][1], expected, rtol=1e-6)
    np.testing.assert_allclose(
        averaged["largest"], stacked["largest"].mean(), rtol=1e-6
    )


def test_only_params_get_a_gradient(case):
    params, key, batch = case
    to_batch = jax.grad(lambda b: ops.chunked_mean(_loss, 4)(params, key, b)[0])(batch)
    np.testing.assert_array_equal(to_batch["x"], 0.0)
    to_aux = jax.grad(lambda p: ops.chunked_mean(_loss, 4)(p, key, batch)[1]["loss"])
    np.testing.assert_array_equal(to_aux(params)["w"], 0.0)


def test_scaled_and_second_order(case):
    params, key, batch = case
    hessians = [
        jax.jit(
            jax.jacrev(jax.grad(lambda w, fn=fn: 3.0 * fn({"w": w}, key, batch)[0]))
        )(params["w"])
        for fn in (ops.chunked_mean(_loss, 4), _loss)
    ]
    np.testing.assert_allclose(*hessians, rtol=1e-5, atol=1e-6)


def test_vmap_over_params_and_a_closed_over_key(case):
    params, key, batch = case
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)

    def gradient(wrap, params, key):
        fn = wrap(lambda p, b: _loss(p, key, b))
        return jax.grad(fn, has_aux=True)(params, batch)[0]

    keys = jax.random.split(key)
    chunked = functools.partial(gradient, lambda fn: ops.chunked_mean(fn, 4))
    plain = functools.partial(gradient, lambda fn: fn)
    _assert_close(
        jax.jit(jax.vmap(chunked))(stacked, keys), jax.vmap(plain)(stacked, keys)
    )


def test_batches_of_keys_and_integers(key):
    def loss(weight, batch):
        noise = jax.vmap(jax.random.normal)(batch["keys"])
        return jnp.mean(weight * noise + batch["labels"]), ()

    batch = {"keys": jax.random.split(key, 8), "labels": jnp.arange(8)}
    got = jax.jit(_value_and_grad(ops.chunked_mean(loss, 2)))(2.0, batch)
    _assert_close(got, _value_and_grad(loss)(2.0, batch))


def test_half_precision_gradients_are_summed_in_float32():
    def loss(weight, batch):
        return jnp.mean(weight.astype(jnp.float32) * batch), ()

    batch = jnp.full(1024, 1.01)
    gradient = jax.grad(ops.chunked_mean(loss, 1), has_aux=True)(
        jnp.ones((), jnp.bfloat16), batch
    )[0]
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(float(gradient), 1.01, rtol=5e-3)


def _mesh():
    return jax.make_mesh(
        (jax.local_device_count(),), ("data",), axis_types=(AxisType.Auto,)
    )


def _pmean(fn):
    return lambda *args: jax.lax.pmean(_value_and_grad(fn)(*args), "data")


def test_pmap(case):
    params, key, batch = case
    count = jax.local_device_count()
    parts = jax.tree.map(lambda leaf: leaf.reshape(count, -1, *leaf.shape[1:]), batch)
    mapped = jax.pmap(
        _pmean(ops.chunked_mean(_loss, 2)),
        "data",
        in_axes=(None, None, 0),
        out_axes=None,
    )
    _assert_close(mapped(params, key, parts), _value_and_grad(_loss)(*case))


@pytest.mark.parametrize("params_vary", [True, False])
def test_shard_map_with_its_default_checks(case, params_vary):
    """Varying params: a gradient per device. Replicated ones: JAX sums them itself."""
    count = jax.local_device_count()

    def step(params, key, batch):
        if params_vary:
            params = jax.lax.pcast(params, "data", to="varying")
            return _pmean(ops.chunked_mean(_loss, 2))(params, key, batch)
        value, total = _value_and_grad(ops.chunked_mean(_loss, 2))(params, key, batch)
        return jax.lax.pmean(value, "data"), jax.tree.map(lambda g: g / count, total)

    mapped = jax.jit(
        jax.shard_map(step, mesh=_mesh(), in_specs=(P(), P(), P("data")), out_specs=P())
    )
    _assert_close(mapped(*case), _value_and_grad(_loss)(*case))


def test_a_sharded_batch_stays_sharded_within_every_chunk(case):
    params, key, batch = case
    mesh = _mesh()
    sharded = jax.device_put(batch, NamedSharding(mesh, P("data")))
    chunk_size = 2 * jax.local_device_count()
    fn = jax.jit(_value_and_grad(ops.chunked_mean(_loss, chunk_size)))
    _assert_close(fn(params, key, sharded), _value_and_grad(_loss)(*case))
    text = fn.lower(params, key, sharded).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text


def test_memory_does_not_grow_with_the_batch():
    def loss(params, batch):
        hidden = jnp.tanh(batch[:, None, None] * params @ params)
        return jnp.mean((hidden @ params) ** 2), ()

    def temporary(fn, count):
        args = jnp.ones((64, 64)), jnp.ones(count)
        compiled = jax.jit(jax.grad(fn, has_aux=True)).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    chunked = ops.chunked_mean(loss, 2)
    assert temporary(chunked, 64) < 1.1 * temporary(chunked, 8) + 4096
    assert temporary(loss, 64) > 4 * temporary(chunked, 64)


def test_says_what_is_wrong(case):
    params, key, batch = case
    with pytest.raises(ValueError, match="chunk_size=5 does not divide the 32"):
        ops.chunked_mean(_loss, 5)(params, key, batch)
    with pytest.raises(ValueError, match="chunk_size must be positive or None, got 0"):
        ops.chunked_mean(_loss, 0)
    with pytest.raises(ValueError, match="aux must be"):
        inspect.unwrap(ops.chunked_mean)(_loss, 1, aux="sum")
    with pytest.raises(ValueError, match="must share one leading axis"):
        ops.chunked_mean(_loss, 1)(params, key, {"x": jnp.ones(2), "y": jnp.ones(3)})
    with pytest.raises(ValueError, match="the last argument must be the batch"):
        ops.chunked_mean(_loss, 1)(params)
