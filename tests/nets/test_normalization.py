"""Stochastic normalisation between batch normalisation and frozen statistics."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtransfer.model import from_linen, from_nnx
from jaxtransfer.nets import NNXStochNorm, StochNorm
from jaxtransfer.typing import Variables

KINDS = ("linen", "nnx")
WIDTH = 32
X = 2 * jax.random.normal(jax.random.key(7), (6, 3, 3, WIDTH)) + 1
VARIABLES = Variables(
    {
        "norm": {
            "bias": jnp.linspace(-1.0, 1.0, WIDTH),
            "scale": jnp.linspace(0.5, 2.0, WIDTH),
        }
    },
    {
        "batch_stats": {
            "norm": {
                "mean": jnp.linspace(-0.5, 0.5, WIDTH),
                "var": jnp.linspace(1.0, 3.0, WIDTH),
            }
        }
    },
)


class LinenNet(nn.Module):
    layer: type
    options: dict

    def setup(self):
        self.norm = self.layer(momentum=0.9, **self.options)

    def __call__(self, x, train=False):
        return self.norm(x, use_running_average=not train)


class NNXNet(nnx.Module):
    def __init__(self, layer, options, rngs):
        self.norm = layer(WIDTH, momentum=0.9, rngs=rngs, **options)

    def __call__(self, x):
        return self.norm(x)


def net(kind, probability=None, **options):
    """A network of one layer: batch normalisation, or stochastic with a probability."""
    given = options if probability is None else {"probability": probability, **options}
    if kind == "linen":
        layer = nn.BatchNorm if probability is None else StochNorm
        return from_linen(LinenNet(layer, given))
    layer = nnx.BatchNorm if probability is None else NNXStochNorm
    return from_nnx(lambda rngs: NNXNet(layer, given, rngs))


def run(model, x=X, variables=VARIABLES, **options):
    return model.apply(variables, x, **options)


def equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def by_batch_and_running(kind, x=X):
    plain = net(kind)
    return run(plain, x, train=True)[0], run(plain, x)[0]


every = pytest.mark.parametrize("kind", KINDS)


@every
def test_parameters_and_state_are_those_of_batch_normalisation(kind):
    made, plain = (n.init(jax.random.key(0), X) for n in (net(kind, 0.5), net(kind)))
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, plain)
    equal(made, plain)


@every
def test_one_is_batch_normalisation_and_needs_no_key(kind):
    equal(run(net(kind, 1.0), train=True), run(net(kind), train=True))


@every
def test_zero_is_the_running_statistics_which_are_still_updated(kind):
    output, _, state = run(net(kind, 0.0), train=True)
    plain = net(kind)
    np.testing.assert_allclose(output, run(plain)[0], rtol=1e-6, atol=1e-6)
    equal(state, run(plain, train=True)[2])


@every
@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_evaluation_is_that_of_batch_normalisation(kind, probability):
    equal(run(net(kind, probability)), run(net(kind)))


@every
def test_a_channel_is_one_or_the_other(kind):
    output, _, state = run(net(kind, 0.5), train=True, key=jax.random.key(1))
    batch, running = by_batch_and_running(kind)
    from_batch = np.isclose(output, batch, 1e-5, 1e-5).all(axis=(0, 1, 2))
    from_running = np.isclose(output, running, 1e-5, 1e-5).all(axis=(0, 1, 2))
    assert (from_batch ^ from_running).all()
    assert 0 < from_batch.sum() < WIDTH
    equal(state, run(net(kind), train=True)[2])


@every
@pytest.mark.parametrize("probability", [0.1, 0.8])
def test_probability_is_honoured(kind, probability):
    model = net(kind, probability)
    batch, _ = by_batch_and_running(kind)

    @jax.jit
    def share(key):
        output = run(model, train=True, key=key)[0]
        return jnp.mean(jnp.all(jnp.abs(output - batch) < 1e-4, axis=(0, 1, 2)))

    shares = jax.vmap(share)(jax.random.split(jax.random.key(2), 200))
    np.testing.assert_allclose(shares.mean(), probability, atol=0.03)


@every
def test_repeats_per_key_and_differs_between_keys(kind):
    model = net(kind, 0.5)
    one, again, other = (
        run(model, train=True, key=jax.random.key(seed))[0] for seed in (1, 1, 2)
    )
    equal(one, again)
    assert not np.array_equal(one, other)


@every
@pytest.mark.parametrize("held", ["", "norm"])
def test_held_runs_as_in_evaluation(kind, held):
    output, features, state = run(
        net(kind, 0.5), train=True, key=jax.random.key(1), held=(held,), taps=("norm",)
    )
    equal(output, run(net(kind))[0])
    equal(features["norm"], output)
    equal(state, VARIABLES.model_state)


@every
def test_tap_is_the_output_in_training(kind):
    output, features, _ = run(
        net(kind, 0.5), train=True, key=jax.random.key(1), taps=("norm",)
    )
    equal(features["norm"], output)


@every
@pytest.mark.parametrize(
    "options", [{"use_scale": False}, {"use_bias": False}, {"epsilon": 0.1}]
)
def test_options_of_batch_normalisation_hold(kind, options):
    model, plain = net(kind, 0.0, **options), net(kind, **options)
    made = plain.init(jax.random.key(0), X)
    variables = Variables(made.params, VARIABLES.model_state)
    output = run(model, variables=variables, train=True)[0]
    expected = run(plain, variables=variables)[0]
    np.testing.assert_allclose(output, expected, rtol=1e-6, atol=1e-6)


@every
def test_channels_may_lie_along_another_axis(kind):
    first = jnp.moveaxis(X, -1, 1)
    last_net, first_net = net(kind, 0.5), net(kind, 0.5, axis=1)
    outputs = [
        run(model, x, train=True, key=jax.random.key(3))[0]
        for model, x in ((last_net, X), (first_net, first))
    ]
    np.testing.assert_allclose(jnp.moveaxis(outputs[1], 1, -1), outputs[0], atol=2e-5)


@every
def test_half_precision_stays_so(kind):
    model = net(kind, 0.5, dtype=jnp.bfloat16)
    output = run(model, X.astype(jnp.bfloat16), train=True, key=jax.random.key(1))[0]
    assert output.dtype == jnp.bfloat16


def test_the_field_of_linen_may_say_evaluation():
    layer = StochNorm(use_running_average=True)
    variables = layer.init(jax.random.key(0), X)
    np.testing.assert_allclose(layer.apply(variables, X), X, rtol=1e-4)


def test_init_in_training_mode_leaves_the_statistics():
    variables = StochNorm().init(jax.random.key(0), X, use_running_average=False)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], 0.0)


def test_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"probability must be in \[0, 1\], got 1.5"):
        NNXStochNorm(2, probability=1.5, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"probability must be in \[0, 1\], got -1"):
        StochNorm(probability=-1.0).init(jax.random.key(0), X, True)
