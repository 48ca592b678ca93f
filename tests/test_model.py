"""Linen and NNX as the same pair of pure functions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtransfer import tree
from jaxtransfer.model import from_linen, from_nnx, with_head
from jaxtransfer.typing import Variables
from tests.twins import KINDS, jitted, network, same

X = jax.random.normal(jax.random.key(7), (16, 6))
NETS = {kind: jitted(network(kind, rate=0.5, normalized=True)) for kind in KINDS}
PARAMS = {
    "blocks_0/dense/bias",
    "blocks_0/dense/kernel",
    "blocks_0/norm/bias",
    "blocks_0/norm/scale",
    "blocks_1/dense/bias",
    "blocks_1/dense/kernel",
    "blocks_1/norm/bias",
    "blocks_1/norm/scale",
    "head/bias",
    "head/kernel",
}
STATE = {
    f"batch_stats/blocks_{block}/norm/{name}"
    for block in (0, 1)
    for name in ("mean", "var")
}
TAPS = (
    "blocks_0",
    "blocks_0/dense",
    "blocks_0/dropout",
    "blocks_0/norm",
    "blocks_1",
    "blocks_1/dense",
    "blocks_1/dropout",
    "blocks_1/norm",
    "head",
)


@pytest.fixture(scope="module", params=KINDS)
def net(request):
    return NETS[request.param]


@pytest.fixture(scope="module")
def variables():
    """Made by Linen, with running statistics that are not those of the start."""
    start = NETS["linen"].init(jax.random.key(1), X)
    _, _, state = NETS["linen"].apply(
        start, 2 * X + 1, train=True, key=jax.random.key(2)
    )
    return Variables(start.params, state)


def paths(values):
    return set(tree.flatten(values))


def test_parameters_and_state_have_the_same_paths(net):
    made = net.init(jax.random.key(0), X)
    assert paths(made.params) == PARAMS
    assert paths(made.model_state) == STATE
    assert type(made.params) is dict


def test_variables_of_one_are_those_of_the_other(net, variables):
    made = net.init(jax.random.key(0), X)
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, variables)


def test_init_repeats_per_key_and_differs_between_keys(net):
    first, again, other = (net.init(jax.random.key(seed), X) for seed in (0, 0, 1))
    assert same(first, again)
    kernels = [v.params["head"]["kernel"] for v in (first, other)]
    assert not same(*kernels)


def test_same_output_and_taps_for_the_same_variables(variables):
    results = [NETS[kind].apply(variables, X, taps=TAPS) for kind in KINDS]
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_same_output_and_state_in_training(variables):
    """Without dropout: the random streams of the two are not each other's."""
    results = [
        jitted(network(kind, normalized=True)).apply(variables, X, train=True)
        for kind in KINDS
    ]
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert not same(results[0][2], variables.model_state)


@pytest.mark.parametrize("train", [False, True])
def test_taps_change_no_bit_of_the_output(net, variables, train):
    def run(taps):
        return net.apply(variables, X, train=train, key=jax.random.key(3), taps=taps)

    output, features, state = run(TAPS)
    bare_output, none, bare_state = run(())
    assert none == {} and set(features) == set(TAPS)
    assert same((output, state), (bare_output, bare_state))
    assert same(features["head"], output)


def flops(function, *arguments):
    cost = jax.jit(function).lower(*arguments).compile().cost_analysis()
    return cost["flops"]


def test_what_lies_behind_a_tap_is_not_computed(kind_and_wide):
    net, variables = kind_and_wide

    def tap(variables, x):
        return net.apply(variables, x, taps=("blocks_0",))[1]["blocks_0"]

    def whole(variables, x):
        return net.apply(variables, x)[0]

    assert flops(tap, variables, X) < 0.1 * flops(whole, variables, X)


@pytest.fixture(params=KINDS)
def kind_and_wide(request):
    net = jitted(network(request.param, widths=(8, 64, 64)))
    return net, net.init(jax.random.key(0), X)


def test_an_unknown_tap_names_the_nearest_and_all(net, variables):
    with pytest.raises(ValueError, match=r"tap 'block_0/norm' .*nearest: 'blocks_0"):
        net.apply(variables, X, taps=("block_0/norm",))
    with pytest.raises(ValueError, match=r"all: .*blocks_1/dense.*head"):
        jax.jit(lambda v: net.apply(v, X, taps=("head", "nothing")))(variables)


def test_evaluation_leaves_the_state_alone_and_needs_no_key(net, variables):
    output, _, state = net.apply(variables, X)
    again, _, _ = net.apply(variables, X, key=jax.random.key(5))
    assert same(state, variables.model_state)
    assert same(output, again)


def test_dropout_repeats_per_key_and_differs_between_keys(net, variables):
    def run(key):
        return net.apply(variables, X, train=True, key=key)[0]

    first, again, other = (run(jax.random.key(seed)) for seed in (0, 0, 1))
    assert same(first, again)
    assert not same(first, other)


def test_two_layers_do_not_drop_the_same_units(net):
    kind = "linen" if net is NETS["linen"] else "nnx"
    wide = jitted(network(kind, widths=(6, 6), rate=0.5))
    start = wide.init(jax.random.key(0), X)
    ones = jax.tree.map(jnp.zeros_like, start.params)
    for block in ("blocks_0", "blocks_1"):
        ones[block]["dense"]["bias"] = jnp.ones(6)
    _, features, _ = wide.apply(
        Variables(ones, {}),
        X,
        train=True,
        key=jax.random.key(0),
        taps=("blocks_0", "blocks_1"),
    )
    dropped = [np.asarray(features[tap]) == 0 for tap in ("blocks_0", "blocks_1")]
    assert 0.2 < dropped[0].mean() < 0.8
    assert not np.array_equal(*dropped)


def test_state_that_is_not_the_network_s_is_handed_on(net, variables):
    extra = {"average": {"w": jnp.ones(2)}}
    held = variables._replace(model_state={**variables.model_state, **extra})
    for train in (False, True):
        _, _, state = net.apply(held, X, train=train, key=jax.random.key(0))
        assert same(state["average"], extra["average"])


def test_held_modules_run_as_in_evaluation(net, variables):
    """Running statistics used and left alone, nothing dropped; the others train."""

    def run(key, **mode):
        return net.apply(variables, X, key=key, taps=("blocks_0", "blocks_1"), **mode)

    _, still, _ = run(None)
    _, first, state = run(jax.random.key(0), train=True, held=("blocks_0",))
    _, second, _ = run(jax.random.key(1), train=True, held=("blocks_0",))
    assert same(first["blocks_0"], still["blocks_0"])
    assert not same(first["blocks_1"], second["blocks_1"])
    before = variables.model_state["batch_stats"]
    after = state["batch_stats"]
    assert same(after["blocks_0"], before["blocks_0"])
    assert not same(after["blocks_1"], before["blocks_1"])


def test_a_held_layer_inside_a_block_that_trains(net, variables):
    held = ("blocks_0/norm", "blocks_1")
    _, _, state = net.apply(variables, X, train=True, key=jax.random.key(0), held=held)
    assert same(state, variables.model_state)


def test_held_does_not_take_names_that_only_begin_alike():
    wide = jitted(from_linen(_Begins()))
    variables = wide.init(jax.random.key(0), X)
    _, _, state = wide.apply(variables, X, train=True, held=("norm",))
    before, after = variables.model_state["batch_stats"], state["batch_stats"]
    assert same(before["norm"], after["norm"])
    assert not same(before["norm_1"], after["norm_1"])


class _Begins(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(not train, name="norm")(x)
        return nn.BatchNorm(not train, name="norm_1")(x)


def test_all_held_is_evaluation(net, variables):
    output, _, state = net.apply(
        variables, X, train=True, key=jax.random.key(0), held=("",)
    )
    assert same(output, net.apply(variables, X)[0])
    assert same(state, variables.model_state)


def test_holding_ends_with_the_call(net, variables):
    net.apply(variables, X, train=True, key=jax.random.key(0), held=("blocks_0",))
    _, _, state = net.apply(variables, X, train=True, key=jax.random.key(0))
    assert not same(
        state["batch_stats"]["blocks_0"],
        variables.model_state["batch_stats"]["blocks_0"],
    )


# Every way in which a module may be told to train: all hold dropout and running
# statistics under "part".


class _CallArgument(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(name="norm")(x, use_running_average=not train)
        return nn.Dropout(0.5)(x, deterministic=not train)


class _Positional(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic: bool = True):
        x = nn.BatchNorm(deterministic, name="norm")(x)
        return nn.Dropout(0.5)(x, deterministic)


class _Field(nn.Module):
    train: bool | None = None

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=not self.train, name="norm")(x)
        return nn.Dropout(0.5, deterministic=not self.train)(x)


class _Setup(nn.Module):
    deterministic: bool

    def setup(self):
        self.norm = nn.BatchNorm(use_running_average=self.deterministic)
        self.drop = nn.Dropout(0.5, deterministic=self.deterministic)

    def __call__(self, x):
        return self.drop(self.norm(x))


def _whole(part):
    class Whole(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool = False):
            x = nn.Dense(4, name="stem")(x)
            return nn.Dense(2, name="head")(part(x, train))

    return from_linen(Whole())


LINEN_PARTS = {
    "call keyword": lambda x, train: _CallArgument(name="part")(x, train=train),
    "call positional": lambda x, train: _CallArgument(name="part")(x, train),
    "deterministic positional": lambda x, train: _Positional(name="part")(x, not train),
    "field": lambda x, train: _Field(train, name="part")(x),
    "field and setup": lambda x, train: _Setup(not train, name="part")(x),
}


class _NNXPart(nnx.Module):
    """Told by a field of its layers only."""

    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.norm(x))


class _NNXArgument(_NNXPart):
    def __call__(self, x, train):
        x = self.norm(x, use_running_average=not train)
        return self.drop(x, deterministic=not train)


class _NNXKeys(_NNXPart):
    """Draws from the streams that the call hands down."""

    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5)

    def __call__(self, x, rngs):
        return self.drop(self.norm(x), rngs=rngs)


class _NNXWhole(nnx.Module):
    def __init__(self, part, rngs):
        self.stem = nnx.Linear(6, 4, rngs=rngs)
        self.part = part(rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(self.part(self.stem(x)))


class _NNXWholeArgument(_NNXWhole):
    def __call__(self, x, train):
        return self.head(self.part(self.stem(x), train))


class _NNXWholeKeys(_NNXWhole):
    def __call__(self, x, rngs=None):
        return self.head(self.part(self.stem(x), rngs))


MODES = {name: (lambda part=part: _whole(part)) for name, part in LINEN_PARTS.items()}
MODES |= {
    "nnx field": lambda: from_nnx(lambda rngs: _NNXWhole(_NNXPart, rngs)),
    "nnx call": lambda: from_nnx(lambda rngs: _NNXWholeArgument(_NNXArgument, rngs)),
    "nnx rngs": lambda: from_nnx(lambda rngs: _NNXWholeKeys(_NNXKeys, rngs)),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_way_of_telling_a_module_to_train(mode):
    net = jitted(MODES[mode]())
    variables = net.init(jax.random.key(0), X)

    def apply(key, train, held):
        return net.apply(variables, X, train=train, key=key, held=held, taps=("part",))

    _, still, _ = apply(jax.random.key(0), False, ())
    _, first, moved = apply(jax.random.key(0), True, ())
    _, other, _ = apply(jax.random.key(1), True, ())
    assert not same(first, other), "no dropout in training"
    assert not same(moved, variables.model_state), "no statistics in training"
    named = "nnx" in mode or "setup" in mode
    drop = "part/drop" if named else "part/Dropout_0"
    for held in [("part",), ("part/norm", drop)]:
        _, calm, kept = apply(jax.random.key(1), True, held)
        assert same(calm, still), f"held={held} is not evaluation"
        assert same(kept, variables.model_state), f"held={held} moved statistics"


class _LinenEncoder(nn.Module):
    def setup(self):
        self.dense = nn.Dense(4)

    def encode(self, x, train):
        return self.dense(x) * (2.0 if train else 1.0)


class _LinenByMethod(nn.Module):
    def setup(self):
        self.body, self.head = _LinenEncoder(), nn.Dense(2)

    def __call__(self, x, train=False):
        return self.head(self.body.encode(x, train))


class _NNXEncoder(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(X.shape[-1], 4, rngs=rngs)

    def encode(self, x, train):
        return self.dense(x) * (2.0 if train else 1.0)


class _NNXByMethod(nnx.Module):
    def __init__(self, rngs):
        self.body, self.head = _NNXEncoder(rngs), nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x, train=False):
        return self.head(self.body.encode(x, train))


@pytest.mark.parametrize(
    "build", [lambda: from_linen(_LinenByMethod()), lambda: from_nnx(_NNXByMethod)]
)
def test_methods_of_held_modules_run_as_in_evaluation(build):
    net = build()
    variables = net.init(jax.random.key(0), X)
    still, _, _ = net.apply(variables, X)
    calm, _, _ = net.apply(variables, X, train=True, held=("body",))
    moved, _, _ = net.apply(variables, X, train=True)
    assert same(calm, still) and not same(moved, still)


def test_what_a_module_sows_is_not_kept():
    """It would grow with every call. A tuple that stays as it is, is state."""

    class Sower(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            self.sow("losses", "aux", jnp.mean(x**2))
            pair = self.variable("pairs", "kept", lambda: (jnp.zeros(()), jnp.ones(())))
            if train:
                pair.value = tuple(part + 1 for part in pair.value)
            return nn.Dense(2)(x)

    net = from_linen(Sower())
    variables = net.init(jax.random.key(0), X)
    assert set(variables.model_state) == {"pairs"}
    _, _, state = net.apply(variables, X, train=True)
    assert jax.tree.leaves(state) == [1.0, 2.0]


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode.startswith("nnx")])
def test_nnx_asks_for_a_key_where_it_draws(mode):
    """As Linen does; not in evaluation, and not for what is held or has rate 0."""
    net = MODES[mode]()
    variables = net.init(jax.random.key(0), X)

    def shapes(**options):
        return jax.eval_shape(lambda: net.apply(variables, X, **options)[0]).shape

    for taps in ((), ("part",)):
        with pytest.raises(ValueError, match="key: the network draws random numbers"):
            shapes(train=True, taps=taps)
    assert shapes() == shapes(train=True, held=("part",)) == (16, 2)
    assert shapes(train=True, key=jax.random.key(0)) == (16, 2)


# --- inputs, nesting, transformations -------------------------------------------------


class _LinenPair(nn.Module):
    @nn.compact
    def __call__(self, left, right, train: bool = False):
        return nn.Dense(3, name="left")(left) + nn.Dense(3, name="right")(right)


class _NNXPair(nnx.Module):
    def __init__(self, rngs):
        self.left = nnx.Linear(6, 3, rngs=rngs)
        self.right = nnx.Linear(2, 3, rngs=rngs)

    def __call__(self, left, right):
        return self.left(left) + self.right(right)


@pytest.mark.parametrize(
    "pair", [lambda: from_linen(_LinenPair()), lambda: from_nnx(_NNXPair)], ids=KINDS
)
def test_a_tuple_of_inputs_is_the_arguments(pair):
    net, inputs = jitted(pair()), (X, X[:, :2] + 1)
    variables = net.init(jax.random.key(0), inputs)
    output, features, _ = net.apply(variables, inputs, taps=("right", "left"))
    np.testing.assert_allclose(output, features["left"] + features["right"], rtol=1e-6)
    assert set(features) == {"right", "left"}


class _Named(nn.Module):
    @nn.compact
    def __call__(self, inputs):
        return nn.Dense(2)(inputs["a"]) + inputs["b"]


def test_inputs_may_be_any_tree():
    net = jitted(from_linen(_Named()))
    inputs = {"a": X, "b": jnp.ones((16, 2))}
    assert net.apply(net.init(jax.random.key(0), inputs), inputs)[0].shape == (16, 2)


def test_init_and_apply_under_vmap(net):
    seeds = jax.random.split(jax.random.key(0), 3)
    many = jax.jit(jax.vmap(lambda key: net.init(key, X)))(seeds)
    outputs = jax.jit(jax.vmap(lambda v, k: net.apply(v, X, train=True, key=k)[0]))(
        many, seeds
    )
    for number, seed in enumerate(seeds):
        alone = net.init(seed, X)
        taken = jax.tree.map(lambda leaf, n=number: leaf[n], many)
        for one, other in zip(*map(jax.tree.leaves, (alone, taken)), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
        output, _, _ = net.apply(alone, X, train=True, key=seed)
        np.testing.assert_allclose(output, outputs[number], rtol=2e-4, atol=2e-5)


def test_gradients_agree(variables):
    def loss(kind):
        net = network(kind, normalized=True)

        def value(params):
            whole = variables._replace(params=params)
            return jnp.sum(net.apply(whole, X, train=True)[0] ** 2)

        return jax.jit(jax.grad(value))(variables.params)

    pairs = zip(*map(jax.tree.leaves, (loss("linen"), loss("nnx"))), strict=True)
    for one, other in pairs:
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def test_a_module_called_twice_is_tapped_at_its_last_call():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(6, name="dense")
            return dense(nn.relu(dense(x)))

    class NNXTwice(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(6, 6, rngs=rngs)

        def __call__(self, x):
            return self.dense(nnx.relu(self.dense(x)))

    one, other = jitted(from_linen(Twice())), jitted(from_nnx(NNXTwice))
    variables = one.init(jax.random.key(0), X)
    for net in (one, other):
        output, features, _ = net.apply(variables, X, taps=("dense",))
        assert same(features["dense"], output)


def test_nnx_variables_of_another_model_are_refused(variables):
    wrong = Variables({"head": variables.params["head"]}, variables.model_state)
    with pytest.raises(ValueError, match="variables lack 'blocks_0/dense/"):
        NETS["nnx"].apply(wrong, X)


def test_a_trained_nnx_module_comes_in_as_a_copy_of_it(types_unchecked):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(6, 5, rngs=rngs)])
            self.norm = nnx.BatchNorm(5, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.layers[0](x))

    trained = Net(nnx.Rngs(3))
    trained(2 * X + 1)  # its statistics are not those of the start
    with pytest.raises(TypeError, match="build: got a Net; give the function that"):
        from_nnx(trained)
    trained.eval()
    net = from_nnx(lambda rngs: nnx.clone(trained))
    made = net.init(jax.random.key(0), X)
    np.testing.assert_allclose(net.apply(made, X)[0], trained(X), rtol=1e-6, atol=1e-6)
    _, _, state = net.apply(made, X, train=True)
    assert not same(state, made.model_state)
    bare = nnx.to_pure_dict(nnx.state(trained, nnx.Param))
    with pytest.raises(TypeError, match="keys must be strings, got 0 under 'layers'"):
        net.apply(made._replace(params=bare), X)


def test_sequential_has_the_same_paths_in_both():
    linen = from_linen(nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)]))
    other = from_nnx(
        lambda rngs: nnx.Sequential(
            nnx.Linear(6, 4, rngs=rngs), nnx.relu, nnx.Linear(4, 2, rngs=rngs)
        )
    )
    variables = linen.init(jax.random.key(0), X)
    assert paths(other.init(jax.random.key(0), X).params) == paths(variables.params)
    results = [net.apply(variables, X, taps=("layers_0",)) for net in (linen, other)]
    for one, two in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-6)


# --- heads ----------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[("linen", "nnx"), ("nnx", "linen")])
def headed(request):
    below, above = request.param
    backbone = NETS[below]
    head = jitted(
        network(above, inputs=5, outputs=4, widths=(7,), rate=0.5, normalized=True)
    )
    return backbone, head, jitted(with_head(backbone, head, tap="blocks_1"))


def test_a_head_reads_the_tap(headed):
    backbone, head, model = headed
    variables = model.init(jax.random.key(0), X)
    assert {path.split("/")[0] for path in paths(variables.params)} == {
        "backbone",
        "head",
    }
    output, features, _ = model.apply(
        variables,
        X,
        taps=("backbone/blocks_0", "backbone", "head/blocks_0/dense", "head"),
    )
    below = Variables(*(part["backbone"] for part in variables))
    logits, taps, _ = backbone.apply(below, X, taps=("blocks_0", "blocks_1"))
    above = Variables(*(part["head"] for part in variables))
    result, inner, _ = head.apply(above, taps["blocks_1"], taps=("blocks_0/dense",))
    assert same(output, result) and same(features["head"], result)
    assert same(features["backbone"], logits)
    assert same(features["backbone/blocks_0"], taps["blocks_0"])
    assert same(features["head/blocks_0/dense"], inner["blocks_0/dense"])
    assert model.apply(variables, X)[1] == {}


def test_held_reaches_through_a_head(headed):
    _, _, model = headed
    variables = model.init(jax.random.key(0), X)

    def run(*held, key=0):
        return model.apply(
            variables, X, train=True, key=jax.random.key(key), held=held
        )[2]

    before = variables.model_state
    after = run("backbone")
    assert same(after["backbone"], before["backbone"])
    assert not same(after["head"], before["head"])
    after = run("backbone/blocks_0", "head")
    stats = [state["backbone"]["batch_stats"] for state in (before, after)]
    assert same(stats[0]["blocks_0"], stats[1]["blocks_0"])
    assert not same(stats[0]["blocks_1"], stats[1]["blocks_1"])
    assert same(after["head"], before["head"])
    assert same(run(""), before)


def test_taps_of_a_head_that_do_not_exist(headed):
    _, _, model = headed
    variables = model.init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="must begin with 'backbone/' or 'head/'"):
        model.apply(variables, X, taps=("blocks_0",))
    for tap in ("backbone/blocks_7", "head/blocks_7"):
        with pytest.raises(ValueError, match="'blocks_7'.*nearest: 'blocks_"):
            model.apply(variables, X, taps=(tap,))
    with pytest.raises(ValueError, match="'nothing' names no module"):
        with_head(*headed[:2], tap="nothing").init(jax.random.key(0), X)


def test_a_part_that_holds_nothing_may_be_missing():
    """As after splitting the parameters and combining them."""
    model = with_head(network("linen"), from_linen(nn.Sequential([jnp.tanh])))
    variables = model.init(jax.random.key(0), X)
    assert variables.params["head"] == {}
    params = tree.combine(*tree.partition(variables.params, "backbone/head"))
    output = model.apply(Variables(params), X)[0]
    assert same(output, model.apply(variables, X)[0])


def test_a_head_without_a_tap_reads_the_output():
    model = jitted(with_head(NETS["linen"], network("nnx", inputs=3, widths=(2,))))
    variables = model.init(jax.random.key(0), X)
    assert model.apply(variables, X)[0].shape == (16, 3)
