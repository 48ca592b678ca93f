"""Batch normalisation folded into a convolution is batch normalisation."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import nets
from jaxtransfer.model import from_linen
from jaxtransfer.nets import folding, vision
from tests.tasks import close

KEY = jax.random.key(0)


class Apart(nn.Module):
    """A convolution, then batch normalisation."""

    options: dict

    @nn.compact
    def __call__(self, inputs, train=False):
        x = nets.PatchConv(5, **self.options, name="conv")(inputs)
        return nn.BatchNorm(not train, momentum=0.9, name="norm")(x)


class Folded(Apart):
    """The same in one."""

    @nn.compact
    def __call__(self, inputs, train=False):
        conv = nets.PatchConv(5, **self.options, name="conv")
        conv(inputs)
        return nets.FoldedBatchNorm(not train, momentum=0.9, name="norm")(inputs, conv)


OPTIONS = [
    {"kernel_size": (3, 3)},
    {"kernel_size": (3, 3), "strides": 2, "use_bias": False},
    {"kernel_size": (2, 3), "strides": (1, 2), "padding": "VALID"},
    {"kernel_size": (3,), "padding": 1},
]


def filled(variables):
    """Variables without zeros and ones, variances positive."""
    key = iter(jax.random.split(KEY, 99))
    return jax.tree.map(
        lambda leaf: leaf + jax.random.uniform(next(key), leaf.shape, leaf.dtype),
        variables,
    )


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_outputs_state_and_derivatives_are_those_of_the_two_layers(options, train):
    """In float64; of second order too, and with respect to the inputs."""
    shape = (4, *(6, 7)[: len(options["kernel_size"])], 2)
    with jax.enable_x64(True):
        inputs = 3 + jax.random.normal(KEY, shape, jnp.float64)
        apart, folded = (from_linen(net(options)) for net in (Apart, Folded))
        start = jax.tree.map(lambda x: x.astype(jnp.float64), apart.init(KEY, inputs))
        assert jax.tree.structure(folded.init(KEY, inputs)) == jax.tree.structure(start)
        start = filled(start)

        def seen(model):
            def loss(params, inputs):
                given = start._replace(params=params)
                outputs, _, state = model.apply(given, inputs, train=train)
                return jnp.sum(jnp.sin(outputs)), (outputs, state)

            def slopes(params, inputs):
                return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, inputs)

            given = start.params, inputs
            return jax.jit(lambda: jax.jvp(slopes, given, given))()

        close(seen(folded), seen(apart), 1e-9)


def test_first_values_are_those_of_the_two_layers():
    inputs = jnp.ones((2, 4, 4, 1))
    close(Folded(OPTIONS[0]).init(KEY, inputs), Apart(OPTIONS[0]).init(KEY, inputs), 0)


def test_float32_is_as_near_to_float64_as_the_two_layers_are():
    images = (jax.random.uniform(KEY, (20, 28, 28, 1)) < 0.1).astype(jnp.float32)
    apart, folded = (from_linen(net(OPTIONS[0])) for net in (Apart, Folded))
    start = apart.init(KEY, images)

    def outputs(model, dtype):
        variables, inputs = jax.tree.map(lambda x: x.astype(dtype), (start, images))
        return model.apply(variables, inputs, train=True)[0]

    with jax.enable_x64(True):
        exact = outputs(apart, jnp.float64)
        errors = [
            float(jnp.sqrt(jnp.mean((outputs(model, jnp.float32) - exact) ** 2)))
            for model in (apart, folded)
        ]
    assert errors[1] < 2 * errors[0]


def test_equal_images_and_half_precision_stay_finite():
    net = from_linen(Folded(OPTIONS[0]))
    images = jnp.ones((2, 4, 4, 1), jnp.bfloat16)
    start = jax.tree.map(lambda x: x.astype(jnp.bfloat16), net.init(KEY, images))

    def loss(params):
        outputs, _, state = net.apply(start._replace(params=params), images, train=True)
        return jnp.sum(outputs.astype(jnp.float32) ** 2), (outputs, state)

    gradient, (outputs, state) = jax.grad(loss, has_aux=True)(start.params)
    assert outputs.dtype == jnp.bfloat16
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((gradient, state)))


@pytest.mark.parametrize("train", [True, False])
def test_the_mask_and_the_dtype_of_the_convolution_hold(train):
    inputs = jax.random.normal(KEY, (2, 4, 4, 2))
    mask = jax.random.bernoulli(KEY, 0.5, (2, 2, 2, 5)).astype(jnp.float32)
    plain = Folded({"kernel_size": (2, 2)})
    net = Folded({"kernel_size": (2, 2), "mask": mask, "dtype": jnp.bfloat16})
    start = filled(plain.init(KEY, inputs))

    def outputs(net, start, inputs):
        return net.apply(start, inputs, train=train, mutable=["batch_stats"])

    def rounded(x):
        return x.astype(jnp.bfloat16).astype(jnp.float32)

    conv = start["params"]["conv"]
    conv = {"kernel": rounded(conv["kernel"] * mask), "bias": rounded(conv["bias"])}
    same = {**start, "params": {**start["params"], "conv": conv}}
    close(outputs(net, start, inputs), outputs(plain, same, rounded(inputs)), 1e-6)


# --- in Conv4 -------------------------------------------------------------------------


@pytest.mark.present_code
def test_the_first_block_of_conv4_is_folded_and_nothing_shows(monkeypatch):
    """With taps nothing changes either, and less memory is needed."""
    net = from_linen(nets.Conv4(3, filters=32, strided=False))
    images = jax.random.uniform(KEY, (6, 28, 28, 1))
    start = jax.jit(net.init)(KEY, images)
    taps = tuple(
        f"features/block_{n}/{part}" for n in (0, 1) for part in ("conv", "norm")
    )

    def compiled(*taps):
        def loss(params):
            outputs, features, state = net.apply(
                start._replace(params=params), images, train=True, taps=taps
            )
            return jnp.sum(outputs**2), (outputs, features, state)

        slope = jax.jit(jax.value_and_grad(loss, has_aux=True))
        return slope.lower(start.params).compile()

    def memory(program):
        return program.memory_analysis().temp_size_in_bytes

    with_taps, alone = compiled(*taps), compiled()
    found = with_taps(start.params)
    close(alone(start.params)[0][1][0], found[0][1][0], 0)
    monkeypatch.setattr(vision, "folding_pays", lambda *_: False)
    close(jax.jit(lambda key: net.init(key, images))(KEY), start, 0)
    apart = compiled(*taps)
    assert memory(alone) < 0.9 * memory(compiled())
    close(found, apart(start.params), 2e-4)


@pytest.mark.parametrize(
    "options",
    [{"kernel_dilation": 2}, {"feature_group_count": 2}, {"padding": "CIRCULAR"}],
)
def test_dilation_groups_and_other_paddings_are_refused(options):
    conv = nn.Conv(4, (3, 3), **options)
    variables = {"params": conv.init(KEY, jnp.ones((1, 8, 8, 2)))["params"]}
    norm = nets.FoldedBatchNorm(use_running_average=False)
    with pytest.raises(ValueError, match="no dilation and no groups"):
        norm.init(KEY, jnp.ones((1, 8, 8, 2)), conv.bind(variables))


def test_many_columns_are_not_folded():
    assert folding.folding_pays(np.ones((1, 8, 8, 3)), (3, 3))
    assert not folding.folding_pays(np.ones((1, 8, 8, 4)), (3, 3))
