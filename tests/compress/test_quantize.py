import operator
import sys
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxtransfer import compress, nets, tree
from jaxtransfer.methods import distill, finetune
from jaxtransfer.model import from_linen
from jaxtransfer.train import init_state, train_step
from jaxtransfer.typing import Variables
from tests.digits import accuracy, batches, digits, few, learn
from tests.twins import KINDS, LinenNet, NNXNet, jitted, network, same

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (6, 6))
IMAGES = jax.random.normal(KEY, (4, 8, 8, 3))
RESNET = nets.ResNet(5, depth=8, filters=4)


def int8(kind, **options):
    """A small network, twice: in floating point and quantized."""
    shape = {"outputs": 3, "widths": (8, 5), "normalized": True, "rate": 0.5}
    if kind == "linen":
        module = LinenNet(**shape)
    else:

        def module(rngs):
            return NNXNet(6, rngs=rngs, **shape)

    return network(kind, **shape), compress.quantized(module, X, **options)


@pytest.fixture(scope="module", params=KINDS)
def pair(request):
    return int8(request.param)


@pytest.fixture(scope="module")
def resnet():
    made = compress.quantized(RESNET, IMAGES)
    return made._replace(
        model=jitted(made.model),
        integer=jitted(made.integer),
        convert=jax.jit(made.convert),
    )


def rounded(array, axis):
    """Integers and their scale, the largest magnitude at 127."""
    scale = np.abs(array).max(axis, keepdims=True) / np.float32(127)
    return np.round(array / scale), scale


def test_a_dense_layer_is_a_product_of_integers():
    made = compress.quantized(nn.Dense(4), X)
    variables = made.model.init(KEY, X)
    kernel = np.asarray(variables.params["kernel"])
    (rows, of_rows), (columns, of_columns) = (
        rounded(np.asarray(X), 1),
        rounded(kernel, 0),
    )
    expected = (rows @ columns) * of_rows * of_columns
    held = made.convert(variables)
    np.testing.assert_array_equal(
        held.params["kernel"]["array"]["qvalue"], columns.astype(np.int8)
    )
    for output in (made.model.apply(variables, X)[0], made.integer.apply(held, X)[0]):
        np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)
    plain = from_linen(nn.Dense(4)).apply(variables, X)[0]
    assert 0 < np.abs(plain - expected).max() < 0.03


def test_a_convolution_is_a_product_of_integers():
    layer = nn.Conv(3, (3, 3), padding="VALID", use_bias=False)
    made = compress.quantized(layer, IMAGES)
    variables = made.model.init(KEY, IMAGES)
    images, of_images = rounded(np.asarray(IMAGES), (1, 2, 3))
    kernel, of_kernel = rounded(np.asarray(variables.params["kernel"]), (0, 1, 2))
    windows = np.lib.stride_tricks.sliding_window_view(images, (3, 3), axis=(1, 2))
    expected = np.einsum("bhwcij,ijco->bhwo", windows, kernel) * of_images * of_kernel
    output = made.model.apply(variables, IMAGES)[0]
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_passes_the_rounding():
    made, plain = compress.quantized(nn.Dense(4), X), from_linen(nn.Dense(4))
    variables = plain.init(KEY, X)

    def slope(model):
        def value(params, inputs):
            output = model.apply(Variables(params), inputs)[0]
            return jnp.sum(output * jnp.arange(24.0).reshape(6, 4))

        return jax.grad(value, (0, 1))(variables.params, X)

    for found, expected in zip(
        *map(jax.tree.leaves, (slope(made.model), slope(plain))), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [2, 4])
def test_grouped_convolutions_are_trained(groups):
    """Qwix has no gradient of them; it is that of the product before rounding."""
    images = jax.random.normal(KEY, (2, 6, 6, 4))
    layer = nn.Conv(8, (3, 3), feature_group_count=groups)
    made, plain = compress.quantized(layer, images), from_linen(layer)
    variables = plain.init(KEY, images)
    along = jax.random.normal(jax.random.key(1), (2, 6, 6, 8))

    def slope(model):
        def value(params, images):
            return jnp.vdot(model.apply(Variables(params), images)[0], along)

        return jax.jit(jax.grad(value, (0, 1)))(variables.params, images)

    for found, expected in zip(
        *map(jax.tree.leaves, (slope(made.model), slope(plain))), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    found = made.model.apply(variables, images)[0]
    served = made.integer.apply(made.convert(variables), images)[0]
    np.testing.assert_allclose(found, served, rtol=1e-6, atol=1e-6)
    assert 0 < jnp.abs(found - plain.apply(variables, images)[0]).max() < 0.1


def test_a_network_of_depthwise_convolutions_learns():
    net = nets.MobileNetV2(3, width=0.25, stages=((6, 8, 1, 2),), last=8)
    made = compress.quantized(net, IMAGES)
    optimizer, batch = optax.sgd(0.1), {"inputs": IMAGES, "labels": jnp.arange(4) % 3}
    begun = jitted(made.model).init(KEY, IMAGES)
    step = jax.jit(train_step(finetune.objective(made.model), optimizer))
    state, measured = step(init_state(KEY, begun, optimizer), batch)
    assert np.isfinite(measured["loss"].total)
    moved = tree.flatten(jax.tree.map(jnp.subtract, state.params, begun.params))
    depthwise = [x for path, x in moved.items() if path.endswith("kernel")]
    assert all(jnp.abs(x).max() > 0 for x in depthwise)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_of_the_shape_of_the_weights_are_inputs(kind):
    """Six rows of a layer of 6 by 6 say the same as among seven."""
    layer = nn.Dense(6) if kind == "linen" else lambda rngs: nnx.Linear(6, 6, rngs=rngs)
    made = compress.quantized(layer, X)
    variables = made.model.init(KEY, X)
    held, more = made.convert(variables), jnp.concatenate([X, X[:1]])

    def value(params, inputs):
        output = made.model.apply(Variables(params), inputs)[0][:6]
        return jnp.sum(output**2), output

    slope = jax.grad(value, has_aux=True)
    found, expected = (slope(variables.params, inputs) for inputs in (X, more))
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
    served = made.integer.apply(held, X)[0]
    np.testing.assert_allclose(served, found[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [0.01, 300.0])
@pytest.mark.parametrize("layer", [nn.Dense, nn.Conv])
def test_products_of_float16_are_made_in_float32(layer, size):
    """Its scales would be 1, so all is 0, and sums of integers are over 65504."""
    options = {"dtype": jnp.float16, "param_dtype": jnp.float16}
    given = ((3,),) if layer is nn.Conv else ()
    layer = layer(4, *given, kernel_init=nn.initializers.constant(0.02), **options)
    inputs = jnp.float16(size) * jnp.ones((2, 9, 32), jnp.float16)
    made = compress.quantized(layer, inputs)
    variables = made.model.init(KEY, inputs)
    expected = from_linen(layer).apply(variables, inputs)[0]
    assert jnp.all(jnp.isfinite(expected) & (expected > 0))
    for model, values in (
        (made.model, variables),
        (made.integer, made.convert(variables)),
    ):
        found = model.apply(values, inputs)[0]
        assert found.dtype == jnp.float16
        np.testing.assert_allclose(found, expected, rtol=5e-3)
    slope = jax.grad(
        lambda params: made.model.apply(Variables(params), inputs)[0].mean()
    )(variables.params)
    assert slope["kernel"].dtype == jnp.float16
    if isinstance(layer, nn.Dense):
        np.testing.assert_allclose(slope["kernel"], size / 4, rtol=5e-3)


def test_it_is_the_plain_network_but_for_the_rounding(pair):
    plain, made = pair
    variables = made.model.init(KEY, X)
    assert same(variables, plain.init(KEY, X))
    options = {"train": True, "key": KEY, "taps": ("blocks_1", "head")}
    mine, features, state = jitted(made.model).apply(variables, X, **options)
    other, others, _ = jitted(plain).apply(variables, X, **options)
    assert list(features) == list(others)
    assert 0 < float(jnp.abs(mine - other).max()) < 0.2
    np.testing.assert_array_equal(features["blocks_1"] == 0, others["blocks_1"] == 0)
    assert not same(state, variables.model_state)
    assert jax.tree.structure(state) == jax.tree.structure(variables.model_state)


def test_integers_say_the_same(pair):
    _, made = pair
    assert made.paths == (
        "blocks_0/dense/kernel",
        "blocks_1/dense/kernel",
        "head/kernel",
    )
    variables = made.model.init(KEY, X)
    held = made.convert(variables)
    assert same(made.integer.init(KEY, X), held)
    leaves, before = tree.flatten(held.params), tree.flatten(variables.params)
    for path, leaf in leaves.items():
        kind = jnp.int8 if path.endswith("qvalue") else jnp.float32
        assert leaf.dtype == kind, path
        if path in before:
            np.testing.assert_array_equal(leaf, before[path])
    scale = leaves["head/kernel/array/scale"]
    close = leaves["head/kernel/array/qvalue"] * scale
    assert scale.shape == (1, 3)
    assert jnp.all(jnp.abs(close - before["head/kernel"]) <= scale * 0.5001)
    found = made.integer.apply(held, X, taps=("blocks_1",))
    expected = made.model.apply(variables, X, taps=("blocks_1",))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(
        found[1]["blocks_1"], expected[1]["blocks_1"], rtol=1e-6, atol=1e-7
    )
    with pytest.raises(ValueError, match="train: a network of integers is not trained"):
        made.integer.apply(held, X, train=True)


def test_a_student_in_integers_is_distilled(resnet):
    """Batch statistics and taps go along; the network of integers says the same."""
    teacher = from_linen(RESNET)
    given = jitted(teacher).init(jax.random.key(3), IMAGES)
    begun = distill.init(resnet.model.init(KEY, IMAGES))
    optimizer = compress.pruned(
        optax.sgd(0.05, momentum=0.9), 0.5, rules="student/(.*/)?kernel"
    )
    state = init_state(KEY, begun, optimizer, frozen={"teacher": given})
    step = jax.jit(train_step(distill.objective(resnet.model, teacher), optimizer))
    batch = {"inputs": IMAGES, "labels": jnp.arange(4)}
    values = []
    for _ in range(6):
        state, measured = step(state, batch)
        values.append(float(measured["loss"].total))
    assert values[-1] < 0.7 * values[0]
    assert same(state.frozen["teacher"], given)
    assert not same(state.model_state["student"], begun.model_state["student"])
    own = distill.of_student(state.params, state.model_state)
    held, own = jax.device_get((resnet.convert(own), own))
    assert len(resnet.paths) == 8
    for path in resnet.paths:
        zero = tree.flatten(own.params)[path] == 0
        assert float(zero.mean()) == pytest.approx(0.5, abs=0.01)
        assert (tree.flatten(held.params)[f"{path}/array/qvalue"][zero] == 0).all()
    np.testing.assert_allclose(
        resnet.integer.apply(held, IMAGES)[0],
        resnet.model.apply(own, IMAGES)[0],
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("use_bias", [True, False])
def test_arrays_of_numpy_do_in_both(use_bias):
    made = compress.quantized(nn.Conv(4, (3, 3), use_bias=use_bias), IMAGES)
    variables = made.model.init(KEY, IMAGES)
    held, images = made.convert(variables), np.asarray(IMAGES)
    expected = made.integer.apply(held, IMAGES)[0]
    for given in (held, jax.device_get(held)):
        output, _, state = made.integer.apply(given, images)
        np.testing.assert_array_equal(output, expected)
        assert state is given.model_state
    trained = made.model.apply(jax.device_get(variables), images)[0]
    np.testing.assert_allclose(trained, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_in_integers_is_not_converted_again(kind):
    _, made = int8(kind)
    held = made.integer.init(KEY, X)
    with pytest.raises(ValueError, match="variables: '.*/kernel' is in integers alre"):
        made.convert(held)


def test_a_model_hides_the_layers(types_unchecked):
    with pytest.raises(TypeError, match="module: got a Model.*give the module itself"):
        compress.quantized(from_linen(nn.Dense(4)), X)


def test_an_example_s_output_is_its_own(resnet):
    """Ranges are measured for each example, so its batch does not matter."""
    held = resnet.integer.init(KEY, IMAGES)
    loud = IMAGES.at[1:].multiply(100.0)
    found = resnet.integer.apply(held, IMAGES)[0][0]
    np.testing.assert_allclose(
        resnet.integer.apply(held, loud)[0][0], found, rtol=1e-5, atol=1e-6
    )


class Products(nn.Module):
    """A product with a weight, and one of a jitted function of jax.numpy."""

    @nn.compact
    def __call__(self, x):
        weight = self.param("weight", nn.initializers.lecun_normal(), (x.shape[-1], 5))
        y = jax.lax.dot_general(x, weight, (((1,), (0,)), ((), ())))
        return jnp.matmul(y, y.T)


@pytest.mark.parametrize("first", ["plain", "quantized"])
def test_networks_that_are_not_quantized_stay_as_they_are(first):
    """JAX keeps traced functions; what was traced for one is no use for the other."""
    rows = {"plain": 11, "quantized": 13}[first]  # shapes that nothing else has
    x = jax.random.normal(KEY, (rows, 6))
    weight = np.asarray(jax.random.normal(jax.random.key(1), (6, 5)))
    variables = Variables({"weight": jnp.asarray(weight)})
    models = {
        "plain": from_linen(Products()),
        "quantized": compress.quantized(Products(), x).model,
    }
    order = sorted(models, key=lambda name: name != first)
    found = {name: models[name].apply(variables, x)[0] for name in order}

    def product(one, other):
        (left, of_left), (right, of_right) = rounded(one, 1), rounded(other, 0)
        return (left @ right) * of_left * of_right

    y = product(np.asarray(x), weight)
    expected = {"plain": (x @ weight) @ (x @ weight).T, "quantized": product(y, y.T)}
    for name in order:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-4)
    assert np.abs(found["plain"] - found["quantized"]).max() > 1e-2


class Bilinear(nn.Module):
    """Multiplies by a product of its weights, which is not one of them."""

    @nn.compact
    def __call__(self, x):
        pair = self.param("kernel", nn.initializers.lecun_normal(), (2, 6, 3))
        both = pair[0] * pair[1]
        return nn.Dense(2)(jax.lax.dot_general(x, both, (((1,), (0,)), ((), ()))))


def test_zeros_and_extremes_stay_finite():
    made = compress.quantized(nets.MLP(3, widths=(4,)), X)
    variables = made.model.init(KEY, X)
    kernel = variables.params["head"]["kernel"].at[:, 0].set(0.0)
    params = {**variables.params, "head": {"kernel": kernel, "bias": jnp.zeros(3)}}

    def total(params, inputs):
        return jnp.sum(made.model.apply(Variables(params), inputs)[0] ** 2)

    for inputs in (jnp.zeros_like(X), 1e-30 * X, 1e12 * X):
        value, slope = jax.value_and_grad(total)(params, inputs)
        assert jnp.isfinite(value)
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(slope))
        assert (made.model.apply(Variables(params), inputs)[0][:, 0] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rules_choose_modules(kind):
    plain, made = int8(kind, rules=["blocks_1", "head"])
    assert made.paths == ("blocks_1/dense/kernel", "head/kernel")
    variables = made.model.init(KEY, X)
    found, expected = (
        model.apply(variables, X, taps=("blocks_0", "head"))[1]
        for model in (made.model, plain)
    )
    np.testing.assert_allclose(found["blocks_0"], expected["blocks_0"], rtol=1e-6)
    assert jnp.abs(found["head"] - expected["head"]).max() > 0


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("hed", "rule 'hed' matches no module; nearest: 'head'"),
        ("blocks_./norm", "matches no module that multiplies by its weights; modules"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_rules_that_quantize_nothing_are_refused(kind, rules, message):
    with pytest.raises(ValueError, match=message):
        int8(kind, rules=rules)


class Tied(nnx.Module):
    """An embedding that is the output matrix too."""

    def __init__(self, rngs):
        self.embedding = nnx.Embed(11, 8, rngs=rngs)
        self.dense = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, tokens):
        return self.embedding.attend(self.dense(self.embedding(tokens)))


TOKENS = jnp.array([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]])
TRANSFORMER = nets.Transformer(
    11, width=8, heads=2, hidden=16, encoder_layers=1, decoder_layers=1
)


@pytest.mark.parametrize(
    ("module", "inputs", "count"),
    [
        (TRANSFORMER, {"source": TOKENS, "target": TOKENS}, 16),
        (lambda rngs: Tied(rngs), TOKENS, 1),
    ],
    ids=["transformer", "nnx"],
)
def test_embeddings_stay_in_floating_point(module, inputs, count):
    made = compress.quantized(module, inputs)
    assert len(made.paths) == count
    assert not any("embedding" in path for path in made.paths)
    variables = jax.jit(made.model.init)(KEY, inputs)
    held = made.convert(variables)
    np.testing.assert_array_equal(
        held.params["embedding"]["embedding"],
        variables.params["embedding"]["embedding"],
    )
    np.testing.assert_allclose(
        jitted(made.integer).apply(held, inputs)[0],
        jitted(made.model).apply(variables, inputs)[0],
        rtol=1e-4,
        atol=1e-5,
    )
    with pytest.raises(ValueError, match="rules: .* matches nothing but embeddings"):
        compress.quantized(module, inputs, rules="embedding")


def test_convolutions_by_patches_are_those_of_jax_in_integers():
    images = jax.random.normal(KEY, (2, 28, 28, 1))
    found = []
    for conv in (nn.Conv, nets.PatchConv):
        made = compress.quantized(nets.LeNet(3, (2, 3), 4, conv=conv), images)
        variables = made.model.init(KEY, images)
        trained = jitted(made.model).apply(variables, images)[0]
        served = jitted(made.integer).apply(made.convert(variables), images)[0]
        found.append((made.paths, trained, served))
    jax.tree.map(np.testing.assert_array_equal, *found)
    assert "features/conv_0/kernel" in found[0][0]


def test_layers_that_can_t_are_refused():
    images = jnp.ones((1, 28, 28, 1))
    net = nets.Conv4(5)
    with pytest.raises(ValueError, match="multiplies its weights in another shape"):
        compress.quantized(net, images)
    with pytest.raises(ValueError, match="in another shape .*'features/block_0/conv'"):
        compress.quantized(net, images)
    with pytest.raises(ValueError, match="'kernel' is one. .* .'Dense_0/kernel"):
        compress.quantized(Bilinear(), X)
    assert compress.quantized(Bilinear(), X, rules="Dense_0").paths
    assert compress.quantized(net, images, rules="head").paths == ("head/kernel",)


class Own(nn.Module):
    """A weight of its own, used in some way."""

    use: Callable

    @nn.compact
    def __call__(self, x):
        weight = self.param("kernel", nn.initializers.lecun_normal(), (6, 3))
        if self.is_initializing():
            return jnp.dot(x, weight)
        return self.use(x, weight)


@pytest.mark.parametrize("use", [operator.matmul, jnp.matmul])
def test_other_ways_to_multiply_are_named(use):
    with pytest.raises(ValueError, match="by @, matmul or .* write jnp.dot or jnp.ein"):
        compress.quantized(Own(use), X)


def test_the_network_to_train_is_tried_too():
    def use(x, weight):
        if isinstance(weight, jax.Array):  # only there
            raise TypeError("floats are refused.")
        return jnp.dot(x, weight)

    with pytest.raises(ValueError, match="use flax's Conv and Dense.*floats are refus"):
        compress.quantized(Own(use), X)


def test_the_setting_that_qwix_can_t_do_with_is_named():
    with (
        jax.numpy_dtype_promotion("strict"),
        pytest.raises(jax.dtypes.TypePromotionError),
    ):
        compress.quantized(nn.Dense(4), X)


def test_without_qwix_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ImportError, match=r"package qwix; run: .*r\[compress"):
        compress.quantized(nn.Dense(2), X)


@pytest.mark.slow
def test_distillation_beats_labels_alone_in_integers():
    """Same seeds, a hundred labels of digits, a large teacher that knows them all."""
    train, test = digits()
    teacher = network("linen", inputs=64, outputs=10, widths=(128,))
    taught = learn(
        distill.objective(teacher, terms={}),
        optax.adam(0.003),
        distill.init(jitted(teacher).init(jax.random.key(9), train["inputs"][:2])),
        batches(train, 64),
        steps=300,
    )
    given = distill.of_student(taught.params, taught.model_state)
    made = compress.quantized(LinenNet(10, (16,)), train["inputs"][:2])
    some = few(train, 10)
    gains = []
    for seed in range(3):
        own = jitted(made.model).init(jax.random.key(seed), train["inputs"][:2])
        found = []
        for task in (
            distill.objective(made.model, terms={}),
            distill.objective(made.model, teacher, alpha=0.9, temperature=4.0),
        ):
            state = learn(
                task,
                optax.adam(0.01),
                distill.init(own),
                batches(some, 64),
                steps=300,
                frozen={"teacher": given},
            )
            held = made.convert(distill.of_student(state.params, state.model_state))
            state = state.replace(params=held.params, model_state=held.model_state)
            found.append(
                accuracy(
                    lambda params, _, state, x: made.integer.apply(
                        Variables(params, state), x
                    )[0],
                    state,
                    test,
                )
            )
        gains.append(found[1] - found[0])
    assert np.mean(gains) > 0.02, gains
