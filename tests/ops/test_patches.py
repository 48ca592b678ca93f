import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from jaxtransfer import ops
from jaxtransfer.nets.layers import NNXPatchConv, PatchConv


def _inputs(shape=(2, 7, 6, 3), seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def _lax_conv(inputs, kernel, strides, padding):
    return jax.lax.conv_general_dilated(
        inputs, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (2, 1)])
@pytest.mark.parametrize("padding", ["SAME", "VALID", ((1, 2), (0, 3))])
@pytest.mark.parametrize("window", [(3, 3), (1, 1), (2, 3)])
def test_conv_equals_lax_in_value_and_gradients(strides, padding, window):
    inputs, kernel = _inputs(), _inputs((*window, 3, 4), 1)

    def total(conv, inputs, kernel):
        outputs = conv(inputs, kernel)
        return jnp.sum(jnp.sin(outputs)), outputs

    ours = functools.partial(ops.conv, strides=strides, padding=padding)
    theirs = functools.partial(_lax_conv, strides=strides, padding=padding)
    results = [
        jax.jit(jax.grad(functools.partial(total, conv), argnums=(0, 1), has_aux=True))(
            inputs, kernel
        )
        for conv in (ours, theirs)
    ]
    for got, expected in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", ["SAME", "VALID", ((1, 2), (0, 3))])
@pytest.mark.parametrize("size", [(7, 6), (4, 3)])
def test_winograd_equals_lax_in_value_and_gradients(padding, size):
    inputs, kernel = _inputs((2, *size, 3)), _inputs((3, 3, 3, 4), 1)

    def total(conv, inputs, kernel):
        return jnp.sum(jnp.sin(conv(inputs, kernel)))

    ours = functools.partial(ops.conv, padding=padding, algorithm="winograd")
    theirs = functools.partial(_lax_conv, strides=(1, 1), padding=padding)
    results = [
        jax.jit(jax.value_and_grad(functools.partial(total, conv), argnums=(0, 1)))(
            inputs, kernel
        )
        for conv in (ours, theirs)
    ]
    for got, expected in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_winograd_is_no_less_exact_than_lax_and_costs_less():
    inputs, kernel = _inputs((4, 8, 8, 64)), _inputs((3, 3, 64, 64), 1)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x), jnp.float64) for x in (inputs, kernel)]
        exact = np.asarray(_lax_conv(*wide, (1, 1), "SAME"))
    theirs = _lax_conv(inputs, kernel, (1, 1), "SAME")
    flops = {}
    for algorithm in ("auto", "patches", "winograd"):
        run = jax.jit(functools.partial(ops.conv, algorithm=algorithm))
        got = run(inputs, kernel)
        assert np.abs(got - exact).max() <= np.abs(theirs - exact).max()
        flops[algorithm] = run.lower(inputs, kernel).compile().cost_analysis()["flops"]
    assert flops["auto"] == flops["winograd"] < 0.55 * flops["patches"]


def test_winograd_is_chosen_in_float32_or_wider_only():
    """In half precision it is less exact, and integers it would halve."""
    conv = inspect.unwrap(ops.conv)
    dtypes = [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32]
    for one, other in itertools.product(dtypes, dtypes):
        inputs, kernel = jnp.ones((6, 6, 16), one), jnp.ones((3, 3, 16, 16), other)
        program = str(jax.make_jaxpr(conv)(inputs, kernel))
        wide = one == other == jnp.float32
        assert program.count("dot_general") == (16 if wide else 1)
        assert jax.eval_shape(conv, inputs, kernel).dtype == jnp.result_type(one, other)


def test_winograd_refuses_other_windows(types_unchecked):
    with pytest.raises(ValueError, match="3x3 windows of step 1"):
        ops.conv(_inputs(), _inputs((3, 3, 3, 4)), strides=2, algorithm="winograd")
    with pytest.raises(ValueError, match="algorithm must be"):
        ops.conv(_inputs(), _inputs((3, 3, 3, 4)), algorithm="fast")


def test_conv_with_one_kernel_per_task():
    inputs, kernels = _inputs((3, 2, 6, 6, 3)), _inputs((3, 3, 3, 3, 4), 1)
    conv = functools.partial(ops.conv, strides=2)
    got = jax.vmap(conv)(inputs, kernels)
    expected = jnp.stack(
        [_lax_conv(x, k, (2, 2), "SAME") for x, k in zip(inputs, kernels, strict=True)]
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    text = str(jax.make_jaxpr(jax.vmap(conv))(inputs, kernels))
    assert "conv_general_dilated" not in text


def test_conv_with_any_leading_axes_and_one_spatial_axis():
    inputs, kernel = _inputs(), _inputs((3, 3, 3, 4), 1)
    expected = ops.conv(inputs, kernel)
    np.testing.assert_allclose(
        ops.conv(inputs[0], kernel), expected[0], rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
        ops.conv(inputs[None], kernel)[0], expected, rtol=1e-5, atol=1e-5
    )
    sequence, window = _inputs((2, 9, 3)), _inputs((4, 3, 5), 1)
    got = ops.conv(sequence, window, strides=2, padding=1)
    expected = jax.lax.conv_general_dilated(
        sequence, window, (2,), [(1, 1)], dimension_numbers=("NWC", "WIO", "NWC")
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_conv_says_what_is_wrong():
    conv, inputs = inspect.unwrap(ops.conv), jnp.ones((2, 7, 6, 3))
    with pytest.raises(ValueError, match=r"inputs have 3 channels .* expects 1"):
        conv(inputs, jnp.ones((3, 3, 1, 4)))
    with pytest.raises(ValueError, match="padding must be .* got 'FULL'"):
        conv(inputs, jnp.ones((3, 3, 3, 4)), padding="FULL")
    with pytest.raises(ValueError, match="padding must have one entry"):
        conv(inputs, jnp.ones((3, 3, 3, 4)), padding=(1,))
    with pytest.raises(ValueError, match="strides must be"):
        conv(inputs, jnp.ones((3, 3, 3, 4)), strides=0)
    with pytest.raises(ValueError, match="window .* is larger"):
        conv(inputs, jnp.ones((9, 9, 3, 4)), padding="VALID")
    with pytest.raises(ValueError, match="kernel must be"):
        conv(inputs, jnp.ones((3, 4)))
    for padding in (-1, ((0, 0), (1, -1)), 0.5, ((1, 1, 1), 0)):
        with pytest.raises(ValueError, match="padding must be widths, .* of 0 or more"):
            conv(inputs, jnp.ones((3, 3, 3, 4)), padding=padding)


def test_integers_of_numpy_are_integers(types_unchecked):
    inputs, kernel = _inputs((5, 6, 3)), _inputs((3, 3, 3, 4), 1)
    two = np.int64(2)
    np.testing.assert_array_equal(
        ops.conv(inputs, kernel, strides=two, padding=two),
        ops.conv(inputs, kernel, strides=2, padding=2),
    )
    np.testing.assert_array_equal(
        ops.max_pool(inputs, window=two), ops.max_pool(inputs)
    )
    with pytest.raises(ValueError, match="window must be a positive integer or 2"):
        ops.max_pool(inputs, window=2.0)


@pytest.mark.parametrize(
    ("padding", "window", "height", "width"),
    [
        ("SAME", 2, 4, 6),
        ("SAME", 2, 5, 7),
        ("VALID", 2, 4, 6),
        ("VALID", 2, 5, 7),
        ("SAME", 3, 7, 4),
        ("same_lower", 4, 5, 2),
    ],
)
def test_max_pool_equals_flax(padding, window, height, width):
    inputs = _inputs((2, height, width, 3)) - 5.0
    inputs = inputs.at[0, 0].set(-jnp.inf)

    def total(pool, x):
        out = pool(x)
        return jnp.sum(jnp.exp(out)), out

    theirs = functools.partial(
        nn.max_pool,
        window_shape=(window, window),
        strides=(window, window),
        padding=padding,
    )
    ours = functools.partial(ops.max_pool, window=window, padding=padding)
    results = [
        jax.grad(functools.partial(total, pool), has_aux=True)(inputs)
        for pool in (ours, theirs)
    ]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), *results)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize(
    ("window", "strides", "padding"),
    [
        ((3, 3), (2, 2), ((1, 1), (1, 1))),
        ((3, 2), (1, 2), ((2, 0), (0, 1))),
        ((2, 3), (3, 1), "VALID"),
        ((3, 3), (2, 2), "SAME"),
    ],
)
def test_windows_that_overlap_or_leave_gaps_equal_flax(
    window, strides, padding, backend, monkeypatch
):
    """Ties among the values, and the gradient of each to the first of them."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    inputs = jnp.round(_inputs((2, 7, 6, 3)))

    def total(pool, x):
        out = pool(x)
        return jnp.sum(jnp.sin(out) * jnp.arange(out.size).reshape(out.shape)), out

    theirs = functools.partial(
        nn.max_pool, window_shape=window, strides=strides, padding=padding
    )
    ours = functools.partial(
        ops.max_pool, window=window, strides=strides, padding=padding
    )
    results = [
        jax.jit(jax.grad(functools.partial(total, pool), has_aux=True))(inputs)
        for pool in (ours, theirs)
    ]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), *results)


def test_max_pool_window_ties_and_errors():
    assert ops.max_pool(jnp.ones((6, 6, 1)), window=(3, 2)).shape == (2, 3, 1)
    gradient = jax.grad(lambda x: ops.max_pool(x).sum())(jnp.zeros((2, 2, 1)))
    assert gradient[..., 0].tolist() == [[1, 0], [0, 0]]
    hidden = ops.max_pool(jnp.array([[1.0, 2.0], [jnp.nan, 0.0]])[..., None])
    assert jnp.isnan(hidden).all()
    with pytest.raises(ValueError, match="padding must be"):
        ops.max_pool(jnp.ones((4, 4, 1)), padding="FULL")
    with pytest.raises(ValueError, match=r"window \(5, 5\) is larger"):
        ops.max_pool(jnp.ones((4, 4, 1)), window=5)
    with pytest.raises(ValueError, match="padding must be smaller than the window"):
        ops.max_pool(jnp.ones((4, 4, 1)), padding=2)
    three = ops.max_pool(jnp.arange(10.0).reshape(5, 2, 1), window=(3, 1), strides=1)
    assert three[..., 0].tolist() == [[4, 5], [6, 7], [8, 9]]


OPTIONS = [
    {},
    {"strides": 2},
    {"padding": "VALID", "use_bias": False},
    {"padding": 1, "strides": (2, 1)},
    {"padding": "same_lower", "strides": 2},
    {"padding": "CIRCULAR"},
    {"dtype": jnp.bfloat16},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_linen_layer_is_a_drop_in(options):
    inputs = _inputs()
    ours, theirs = PatchConv(4, (3, 3), **options), nn.Conv(4, (3, 3), **options)
    variables = theirs.init(jax.random.key(3), inputs)
    own = ours.init(jax.random.key(3), inputs)
    jax.tree.map(np.testing.assert_array_equal, own, variables)
    got, expected = ours.apply(variables, inputs), theirs.apply(variables, inputs)
    assert got.dtype == expected.dtype
    tolerance = 1e-5 if got.dtype == jnp.float32 else 3e-2
    np.testing.assert_allclose(
        got.astype(jnp.float32), expected.astype(jnp.float32), tolerance, tolerance
    )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_nnx_layer_is_a_drop_in(options):
    inputs = _inputs()
    ours = NNXPatchConv(3, 4, (3, 3), **options, rngs=nnx.Rngs(3))
    theirs = nnx.Conv(3, 4, (3, 3), **options, rngs=nnx.Rngs(3))
    states = [nnx.to_pure_dict(nnx.state(layer, nnx.Param)) for layer in (ours, theirs)]
    jax.tree.map(np.testing.assert_array_equal, *states)
    got, expected = ours(inputs), theirs(inputs)
    assert got.dtype == expected.dtype
    tolerance = 1e-5 if got.dtype == jnp.float32 else 3e-2
    np.testing.assert_allclose(
        got.astype(jnp.float32), expected.astype(jnp.float32), tolerance, tolerance
    )


@pytest.mark.parametrize("dtype", [bool, jnp.float16, jnp.float8_e4m3fn])
def test_max_pool_pads_what_has_no_infinity_too(dtype, types_unchecked):
    pooled = ops.max_pool(jnp.zeros((3, 3, 1), dtype), padding="SAME")
    assert pooled.dtype == dtype and not pooled.any()


def test_max_pool_pads_integers_too(types_unchecked):
    pooled = ops.max_pool(jnp.full((3, 3, 1), -5), padding="SAME")
    assert pooled.dtype == jnp.int32
    assert pooled.ravel().tolist() == [-5] * 4


def test_layers_refuse_what_they_lack():
    for options in ({"kernel_dilation": 2}, {"feature_group_count": 3}):
        with pytest.raises(ValueError, match="PatchConv has no dilation, and"):
            PatchConv(6, (3, 3), **options).init(jax.random.key(0), _inputs())
    options = {"dtype": jnp.bfloat16, "preferred_element_type": jnp.float32}
    layer = NNXPatchConv(3, 4, (3, 3), **options, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="PatchConv has no preferred_element_type"):
        layer(_inputs())
