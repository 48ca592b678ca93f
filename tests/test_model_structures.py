"""Modules of other structure: lifted, stacked, looped, of dicts, arrays and noise."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxtransfer.methods import finetune
from jaxtransfer.model import from_linen, from_nnx, with_head
from jaxtransfer.train import init_state, train_step
from tests.twins import same

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (4, 6))


class _Block(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dropout(0.5, deterministic=not train)(x)


class _Step(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return _Block(name="inner")(x, train), None


class _Rematted(nn.Module):
    @functools.partial(nn.remat, static_argnums=(2,))
    @nn.compact
    def __call__(self, x, train=False):
        return _Block(name="inner")(x, train)


def _scanned(x, train):
    step = nn.scan(
        _Step,
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True, "dropout": True},
        length=2,
        in_axes=nn.broadcast,
    )
    return step(name="part")(x, train)[0]


LIFTED = {
    "remat": lambda x, train: nn.remat(_Block, static_argnums=(2,))(name="part")(
        x, train
    ),
    "remat, decorator": lambda x, train: _Rematted(name="part")(x, train),
    "remat, function": lambda x, train: nn.remat(lambda part, x: part(x, train))(
        _Block(name="part"), x
    ),
    "jit": lambda x, train: nn.jit(_Block, static_argnums=(2,))(name="part")(x, train),
    "scan": _scanned,
    "spectral": lambda x, train: nn.SpectralNorm(
        nn.Dense(6), collection_name="batch_stats", name="part"
    )(x, update_stats=train),
}


class _Lifted(nn.Module):
    form: str

    @nn.compact
    def __call__(self, x, train=False):
        x = LIFTED[self.form](nn.Dense(6, name="stem")(x), train)
        return nn.Dense(2, name="head")(x)


@pytest.mark.parametrize("form", LIFTED)
def test_lifted_modules_can_be_held_and_stand_beside_held_ones(form):
    net = from_linen(_Lifted(form))
    variables = net.init(KEY, X)
    still = net.apply(variables, X)[0]

    def trained(held):
        output, _, state = net.apply(variables, X, train=True, key=KEY, held=held)
        return same(output, still), same(state, variables.model_state)

    assert trained(("part",)) == (True, True)
    moved = trained(("stem", "head"))
    assert moved == ((form == "spectral"), False)


def test_a_name_with_a_slash_in_it_is_one_name():
    """Linen's WeightNorm has a parameter "dense/kernel/scale"."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.WeightNorm(nn.Dense(6, name="dense"))(x)
            return nn.Dense(2, name="head")(x)

    net, optimizer = from_linen(Net()), optax.sgd(0.1)
    variables = net.init(KEY, X)
    for rules in (".*", "head"):
        trained, frozen = finetune.split(variables, rules)
        state = init_state(KEY, trained, optimizer, frozen=frozen)
        step = train_step(finetune.objective(net), optimizer)
        after, _ = jax.eval_shape(
            step, state, {"inputs": X, "labels": jnp.arange(4) % 2}
        )
        assert jax.tree.structure(after.params) == jax.tree.structure(state.params)


def test_a_module_that_sows_and_draws_can_begin():
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x):
            mean = nn.Dense(6, name="mean")(x)
            self.sow("losses", "kl", jnp.mean(mean**2))
            return mean + jax.random.normal(self.make_rng("noise"), mean.shape)

    net = from_linen(Noisy(), key_streams=("noise",))
    variables = net.init(KEY, X)
    assert not variables.model_state
    with pytest.raises(ValueError, match="tap 'men' names no module; nearest: 'mean'"):
        net.apply(variables, X, key=KEY, taps=("men",))


class _Heads(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Linear(6, 6, rngs=rngs)
        self.heads = nnx.Dict({n: nnx.Linear(6, 3, rngs=rngs) for n in "ab"})

    def __call__(self, x):
        x = self.stem(x)
        return sum(head(x) for head in self.heads.values()) / len(self.heads)


class _Looped(nnx.Module):
    def __init__(self, rngs):
        self.rnn = nnx.RNN(nnx.GRUCell(6, 6, rngs=rngs))
        self.stem = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.stem(self.rnn(x[None]))[0]


@pytest.mark.parametrize("build", [_Heads, _Looped])
def test_a_tap_touches_nothing_else(build):
    net = from_nnx(build)
    variables = net.init(KEY, X)
    output, features, _ = net.apply(variables, X, taps=("stem",))
    assert same(output, net.apply(variables, X)[0])
    assert features["stem"].shape[-2] == 4


class _Table(nnx.Module):
    def __init__(self, rngs):
        self.table, self.other = jnp.arange(6.0), nnx.data(np.full(6, 2.0, np.float32))
        self.head = nnx.WeightNorm(nnx.Linear(6, 2, rngs=rngs), rngs=rngs)

    def __call__(self, x):
        return self.head(x * self.table * self.other)


def test_arrays_that_are_no_variables_are_constants():
    module = _Table(nnx.Rngs(0))
    for build in (_Table, lambda rngs: nnx.clone(module)):
        net = from_nnx(build)
        with jax.checking_leaks():
            variables = jax.jit(net.init)(KEY, X)
        assert not variables.model_state
        assert jax.jit(net.apply)(variables, X)[0].shape == (4, 2)
    np.testing.assert_allclose(net.apply(variables, X)[0], module(X), rtol=1e-6)


def test_stacked_layers_draw_each_for_itself():
    class Stack(nnx.Module):
        def __init__(self, rngs):
            @nnx.split_rngs(splits=3)
            @nnx.vmap(in_axes=(0,), out_axes=0)
            def layers(rngs):
                return nnx.Dropout(0.5, rngs=rngs)

            self.layers = layers(rngs)

        def __call__(self, x):
            return nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(
                self.layers, x
            )

    net = from_nnx(Stack)
    variables = net.init(KEY, X)
    still = net.apply(variables, X)[0]
    assert same(still, jnp.broadcast_to(X, still.shape))
    drawn = net.apply(variables, X, train=True, key=KEY)[0]
    assert not same(drawn[0] == 0, drawn[1] == 0)


def test_two_layers_of_one_path_are_refused():
    class Twins(nnx.Module):
        def __init__(self, rngs):
            self.block = nnx.List([nnx.Linear(6, 6, rngs=rngs)])
            self.block_0 = nnx.Linear(6, 6, rngs=rngs)

    with pytest.raises(ValueError, match="both have the path 'block_0/.*'; rename"):
        from_nnx(Twins).init(KEY, X)


NETS = {
    "linen": from_linen(_Lifted("jit")),
    "nnx": from_nnx(_Heads),
    "headed": with_head(from_linen(nn.Dense(4)), from_linen(nn.Dense(2))),
}


@pytest.mark.parametrize("kind", NETS)
def test_paths_that_are_none_are_refused(kind, types_unchecked):
    net = NETS[kind]
    variables = net.init(KEY, X)

    def apply(**options):
        return net.apply(variables, X, train=True, key=KEY, **options)

    for name in ("taps", "held"):
        with pytest.raises(TypeError, match=f"{name}: got 'head'; give a tuple of"):
            apply(**{name: "head"})
    with pytest.raises(ValueError, match="held: 'hed' (names no module|must begin)"):
        apply(held=("hed",))


def test_a_tap_that_is_kept_within_says_so():
    net = from_linen(_Lifted("scan"))
    with pytest.raises(ValueError, match="tap 'part/inner' names no module whose out"):
        net.apply(net.init(KEY, X), X, taps=("part/inner",))
    net = from_nnx(_Looped)
    with pytest.raises(ValueError, match=r"\('rnn/cell',\): one .* within a loop or a"):
        net.apply(net.init(KEY, X), X, taps=("rnn/cell",))


class _ByField(nn.Module):
    train: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(5, name="stem")(x)
        x = nn.BatchNorm(use_running_average=not self.train, name="norm")(x)
        return nn.Dropout(0.5, deterministic=not self.train)(x)


class _ByArgument(nn.Module):
    @nn.compact
    def __call__(self, x, is_train=False):
        return _ByField(is_train)(x)


class _ByAttribute(nnx.Module):
    training = False

    def __init__(self, rngs):
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)

    def __call__(self, x):
        x = self.norm(x, use_running_average=not self.training)
        return self.drop(x, deterministic=not self.training)


@pytest.mark.parametrize(
    "net",
    [from_linen(_ByField()), from_linen(_ByArgument()), from_nnx(_ByAttribute)],
    ids=["field", "is_train", "attribute"],
)
def test_a_mode_by_another_way_is_told_too(net):
    variables = net.init(KEY, X)
    still, _, same_state = net.apply(variables, X)
    outputs = [
        net.apply(variables, X, train=True, key=k) for k in jax.random.split(KEY)
    ]
    assert not same(outputs[0][0], outputs[1][0])
    assert same(same_state, variables.model_state)
    assert not same(outputs[0][2], variables.model_state)
    held, _, kept = net.apply(variables, X, train=True, key=KEY, held=("",))
    assert same(held, still)
    assert same(kept, variables.model_state)


class _Unknown(nn.Module):
    def __call__(self, x, train_mode=True):
        return x


class _UnknownNNX(nnx.Module):
    def __init__(self, rngs):
        pass

    def __call__(self, x, evaluating=True):
        return x


def test_a_mode_of_an_unknown_name_is_refused():
    with pytest.raises(TypeError, match="_Unknown.__call__: 'train_mode' seems"):
        from_linen(_Unknown())
    with pytest.raises(TypeError, match="_UnknownNNX.__call__: 'evaluating' seems"):
        from_nnx(_UnknownNNX).init(KEY, X)
