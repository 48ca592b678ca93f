"""Depthwise convolution: JAX's own numbers, at a fraction of the work on a CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from jaxtransfer import nets, ops, parallel
from jaxtransfer.model import from_linen
from jaxtransfer.nets.layers import PatchConv


def _inputs(shape=(2, 7, 6, 3), seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def _lax(inputs, kernel, strides=(1, 1), padding="SAME"):
    return jax.lax.conv_general_dilated(
        inputs,
        kernel,
        strides,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=inputs.shape[-1],
    )


@pytest.mark.parametrize("strides", [(1, 1), (2, 1)])
@pytest.mark.parametrize("padding", ["SAME", "VALID", ((1, 2), (0, 3))])
@pytest.mark.parametrize("window", [(3, 3), (2, 3)])
def test_equals_lax_in_value_and_gradients(strides, padding, window):
    inputs, kernel = _inputs(), _inputs((*window, 1, 3), 1)

    def total(conv, inputs, kernel):
        outputs = conv(inputs, kernel, strides=strides, padding=padding)
        return jnp.sum(jnp.sin(outputs)), outputs

    results = [
        jax.jit(jax.grad(functools.partial(total, conv), argnums=(0, 1), has_aux=True))(
            inputs, kernel
        )
        for conv in (ops.depthwise_conv, _lax)
    ]
    for got, expected in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_derivatives_of_first_and_second_order_both_ways():
    conv = functools.partial(ops.depthwise_conv, strides=2)
    with jax.enable_x64(True):
        inputs, kernel = (
            jnp.asarray(np.random.default_rng(0).normal(size=shape))
            for shape in ((1, 3, 4, 2), (2, 2, 1, 2))
        )
        assert inputs.dtype == jnp.float64
        check_grads(lambda x, w: jnp.sin(conv(x, w)), (inputs, kernel), order=2)
        check_grads(functools.partial(conv, kernel=kernel), (inputs,), order=1)
        check_grads(functools.partial(conv, inputs), (kernel,), order=1)


def test_one_kernel_a_task_and_one_axis_or_three():
    inputs, kernels = _inputs((3, 2, 5, 4, 2)), _inputs((3, 3, 3, 1, 2), 1)
    got = jax.vmap(ops.depthwise_conv)(inputs, kernels)
    expected = [_lax(x, w) for x, w in zip(inputs, kernels, strict=True)]
    np.testing.assert_allclose(got, jnp.stack(expected), rtol=1e-5, atol=1e-5)
    line, window = _inputs((6, 2)), _inputs((3, 1, 2), 1)
    got = ops.depthwise_conv(line, window, padding="VALID")
    expected = [jnp.sum(line[n : n + 3] * window[:, 0], axis=0) for n in range(4)]
    np.testing.assert_allclose(got, jnp.stack(expected), rtol=1e-5, atol=1e-6)
    cube = ops.depthwise_conv(_inputs((4, 4, 4, 2)), _inputs((2, 2, 2, 1, 2)))
    assert cube.shape == (4, 4, 4, 2)


def test_gradients_on_two_devices_are_those_of_one():
    """Of a kernel that is the same on both its gradient is the sum."""
    mesh, split = parallel.make_mesh(devices=jax.devices()[:2]), P("data")
    inputs, kernel = _inputs(), _inputs((3, 3, 1, 3), 1)

    def gradient(inputs, kernel):
        def total(*given):
            return jnp.sum(ops.depthwise_conv(*given, strides=2) ** 2)

        return jax.grad(total, argnums=(0, 1))(inputs, kernel)

    each = jax.shard_map(
        gradient, mesh=mesh, in_specs=(split, P()), out_specs=(split, P())
    )
    results = jax.jit(each)(inputs, kernel), gradient(inputs, kernel)
    for got, expected in zip(*results, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_half_precision_is_summed_in_float32():
    inputs, kernel = (
        x.astype(jnp.bfloat16) for x in (_inputs(), _inputs((3, 3, 1, 3)))
    )
    got = ops.depthwise_conv(inputs, kernel)
    exact = ops.depthwise_conv(inputs.astype(jnp.float32), kernel.astype(jnp.float32))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, exact.astype(jnp.bfloat16))


def test_integers_are_summed_as_integers(types_unchecked):
    inputs = jnp.array([[[20000001]]])
    assert ops.depthwise_conv(inputs, jnp.ones((1, 1, 1, 1), int)).item() == 20000001


def test_the_gradient_keeps_no_copy_for_each_place_of_the_window():
    """Nine products as large as the inputs would be nine times their size."""
    inputs, kernel = jnp.ones((4, 32, 32, 16)), jnp.ones((3, 3, 1, 16))

    def total(inputs, kernel):
        return jnp.sum(jnp.sin(ops.depthwise_conv(inputs, kernel)))

    gradient = jax.jit(jax.grad(total, argnums=(0, 1)))
    memory = gradient.lower(inputs, kernel).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 5 * inputs.nbytes


def test_it_is_counted_as_a_convolution_is():
    """As `compress.measure` counts, before XLA leaves out what nobody takes."""
    inputs, kernel = jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 1, 4))
    found = [
        jax.jit(functools.partial(conv, strides=(2, 2), padding="VALID"))
        .lower(inputs, kernel)
        .cost_analysis()["flops"]
        for conv in (ops.depthwise_conv, _lax)
    ]
    assert found == [17 * 9 * 4, 18 * 9 * 4]


def test_a_kernel_that_is_held_costs_no_gradient():
    def slope(inputs, kernel):
        return jax.grad(lambda x: jnp.sum(ops.depthwise_conv(x, kernel) ** 2))(inputs)

    program = str(jax.make_jaxpr(slope)(_inputs(), _inputs((3, 3, 1, 3))))
    assert "scan" not in program


def test_the_layer_and_mobilenet_have_no_groups_on_a_cpu():
    layer = PatchConv(3, (3, 3), feature_group_count=3)
    variables = layer.init(jax.random.key(0), _inputs())
    kernel, bias = (variables["params"][name] for name in ("kernel", "bias"))
    got = layer.apply(variables, _inputs())
    np.testing.assert_allclose(got, _lax(_inputs(), kernel) + bias, atol=1e-5)
    net = from_linen(nets.MobileNetV2(3, width=0.25, stages=((6, 8, 1, 2),), last=8))
    images = jnp.ones((1, 16, 16, 3))
    program = jax.make_jaxpr(lambda x: net.init(jax.random.key(0), x))(images)
    assert "feature_group_count=1" in str(program)
    assert str(program).count("feature_group_count") == str(program).count(
        "feature_group_count=1\n"
    )


@pytest.mark.parametrize(
    ("inputs", "kernel", "message"),
    [
        ((4, 4, 3), (3, 3, 3, 3), r"kernel must be \[\*window, 1, channels\]"),
        ((4, 3), (3, 3, 1, 3), "kernel must be"),
        ((4, 4, 3), (3, 3, 1, 6), "inputs have 3 channels .* expects 6"),
        ((2, 4, 3), (3, 3, 1, 3), "window .* is larger than the padded inputs"),
    ],
)
def test_refusals(inputs, kernel, message, types_unchecked):
    with pytest.raises(ValueError, match=message):
        ops.depthwise_conv(jnp.ones(inputs), jnp.ones(kernel), padding="VALID")
