import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import nets
from jaxtransfer.model import from_linen

KEY = jax.random.key(0)
IMAGES = 3 + 2 * np.random.default_rng(0).normal(size=(4, 5, 5, 2)).astype(np.float32)
ARRAY = jnp.asarray(IMAGES)


def by_hand(inputs, of_set, spread, blend):
    own = inputs.mean(axis=(1, 2), keepdims=True)
    own_spread = inputs.var(axis=(1, 2), keepdims=True)
    centre = blend * of_set + (1 - blend) * own
    variance = blend * (spread + (of_set - centre) ** 2) + (1 - blend) * (
        own_spread + (own - centre) ** 2
    )
    return (inputs - centre) / np.sqrt(variance + 1e-5)


def test_it_blends_the_moments_of_the_support_and_of_an_image():
    layer = nets.TaskNorm(use_running_average=False)
    variables = layer.init(KEY, ARRAY)
    params = {
        **variables["params"],
        "blend_slope": jnp.array(0.25),
        "blend_offset": jnp.array(-1.5),
    }
    outputs, state = layer.apply(
        {**variables, "params": params}, ARRAY, mutable=["batch_stats"]
    )
    moments = IMAGES.mean((0, 1, 2)), IMAGES.var((0, 1, 2))
    blend = 1 / (1 + np.exp(-(0.25 * 4 - 1.5)))
    np.testing.assert_allclose(outputs, by_hand(IMAGES, *moments, blend), atol=1e-5)
    # A query is judged alone, by the support's moments and size.
    alone = nets.TaskNorm(use_running_average=True).apply(
        {"params": params, **state}, ARRAY[:1] + 1
    )
    np.testing.assert_allclose(
        alone, by_hand(IMAGES[:1] + 1, *moments, blend), atol=1e-5
    )


def test_half_precision_leaves_the_state_in_float32():
    layer = nets.TaskNorm(use_running_average=False)
    half = ARRAY.astype(jnp.bfloat16)
    variables = layer.init(KEY, half)
    outputs, state = layer.apply(variables, half, mutable=["batch_stats"])
    wide = layer.apply(variables, half.astype(jnp.float32), mutable=["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, (outputs, state), wide)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32")}
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables["params"])
    evaluated = nets.TaskNorm(True).apply({"params": narrow, **state}, half)
    assert evaluated.dtype == jnp.bfloat16


@pytest.mark.parametrize("norm", ["batch", "group", "layer", "task", "none"])
def test_conv4_takes_each_norm(norm):
    model = from_linen(nets.Conv4(3, filters=4, norm=norm))
    inputs = jax.random.normal(KEY, (4, 8, 8, 1))
    variables = model.init(KEY, inputs)
    has_state = norm in ("batch", "task")
    assert bool(variables.model_state) == has_state
    both = model.apply(variables, inputs, train=True)[0]
    alone = model.apply(variables, inputs[:1], train=True)[0]
    depends = float(jnp.abs(both[:1] - alone).max()) > 1e-4
    assert depends == has_state


def test_an_unknown_norm_is_refused(types_unchecked):
    with pytest.raises(ValueError, match="norm: got 'instance'; choose"):
        nets.Conv4(3, norm="instance").init(KEY, jnp.ones((1, 8, 8, 1)))


def test_a_context_is_not_cut_to_the_integers_of_the_inputs():
    layer = nets.ConcatenatedContext(2)
    params = {"params": {"value": jnp.array([0.25, -0.5])}}
    rows = jnp.array([[3, 1]])
    assert layer.apply(params, rows).tolist() == [[3.0, 1.0, 0.25, -0.5]]
    half = layer.apply(params, jnp.ones((1, 2), jnp.bfloat16))
    assert half.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "net", [nets.Conv4(3, filters=4, context=2), nets.MLP(3, context=2)]
)
def test_a_context_of_zero_is_there_and_moves_the_outputs(net):
    inputs = jax.random.normal(KEY, (4, 8, 8, 1))
    variables = net.init(KEY, inputs)
    params = variables["params"]
    holder = params["features"] if "context" in params["features"] else params
    assert not holder["context"]["value"].any()
    before = net.apply(variables, inputs)
    holder["context"]["value"] = jnp.ones(2)
    assert jnp.abs(net.apply(variables, inputs) - before).max() > 1e-3
