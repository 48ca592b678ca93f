"""NNX modules as pairs of pure functions, under the paths that Linen would give."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxtransfer import prng, tree
from jaxtransfer.model.calls import (
    check_held,
    check_mode,
    lies_under,
    mode_arguments,
    paths,
    positional,
    select_taps,
    set_mode,
)
from jaxtransfer.typing import Inputs, Model, ModelState, Variables


def linen_path(path: tuple[Any, ...]) -> str:
    """``('blocks', 0, 'conv') -> 'blocks_0/conv'``: the path Linen gives."""
    name = ""
    for part in path:
        name += f"_{part}" if isinstance(part, int) else f"/{part}"
    return name.removeprefix("/")


def _named(state: Any) -> dict[str, Any]:
    """Nested dict of arrays under Linen's paths from an NNX state."""
    pure = nnx.traversals.flatten_mapping(nnx.to_pure_dict(state))
    owners: dict[str, Any] = {}
    for path in pure:
        name = linen_path(path)
        if name in owners:
            raise ValueError(
                f"build: {owners[name]} and {path} of the module both have the path "
                f"{name!r}; rename an attribute"
            )
        owners[name] = path
    return tree.unflatten({name: pure[path] for name, path in owners.items()})


@functools.cache
def _calm(kind: type[nnx.Module]) -> type[nnx.Module]:
    """The same module, in evaluation mode whatever its methods are told."""

    def calmed(method: Callable[..., Any], mode: dict[str, Any]) -> Any:
        signature = inspect.signature(method)

        @functools.wraps(method)
        def calm(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
            given = signature.bind_partial(self, *args, **kwargs)
            given.arguments.update(mode)
            return method(*given.args, **given.kwargs)

        return calm

    methods = {
        name: calmed(method, mode)
        for name, method in inspect.getmembers(kind, inspect.isfunction)
        if (name == "__call__" or not name.startswith("__"))
        and (mode := mode_arguments(method, False))
    }
    return type(kind.__name__, (kind,), methods) if methods else kind


def _hold_calls(module: nnx.Module, held: tuple[str, ...]) -> None:
    """Make the modules under ``held`` ignore what their callers tell them."""
    for path, part in nnx.iter_modules(module):
        if lies_under(linen_path(path), held):
            object.__setattr__(part, "__class__", _calm(type(part)))


@functools.cache
def _open(kind: type[nnx.Variable]) -> type[nnx.Variable]:
    """The same variable, by whose updates batch normalisation lets gradients pass."""
    return type(kind.__name__, (kind,), {"_can_update": False})


@functools.cache
def _passing(kind: type[nnx.BatchNorm]) -> type[nnx.BatchNorm]:
    """Batch normalisation whose new statistics have a gradient, as Linen's have.

    Flax stops it where a variable can be updated, and asks for that only to this end.
    """
    method: Any = kind.__call__

    @functools.wraps(method)
    def call(self: nnx.BatchNorm, *args: Any, **kwargs: Any) -> Any:
        statistics = [(part, type(part)) for part in (self.mean, self.var)]
        for part, own in statistics:
            object.__setattr__(part, "__class__", _open(own))
        try:
            return method(self, *args, **kwargs)
        finally:
            for part, own in statistics:
                object.__setattr__(part, "__class__", own)

    return type(kind.__name__, (kind,), {"__call__": call})


def _let_gradients_pass(module: nnx.Module) -> None:
    """Make the statistics that training writes differentiable, for who reads them."""
    for _, part in nnx.iter_modules(module):
        if isinstance(part, nnx.BatchNorm):
            object.__setattr__(part, "__class__", _passing(type(part)))


_RECORD = "last_output_"
"""Attribute of a tapped module, while it is called."""


@functools.cache
def _recording(kind: type[nnx.Module]) -> type[nnx.Module]:
    """The same module, with what its last call returned as a variable."""
    method: Any = kind.__call__

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = method(self, *args, **kwargs)
        getattr(self, _RECORD).set_value((output,))
        return output

    return type(kind.__name__, (kind,), {"__call__": call})


def _record(module: nnx.Module, taps: tuple[str, ...]) -> dict[str, Any]:
    """Make the modules at the taps keep what they return.

    Returns:
        The modules by tap. No other is touched: an ``nnx.Dict`` would have one entry
        more, and a loop's carry another structure.
    """
    parts = {linen_path(path): part for path, part in nnx.iter_modules(module)}
    tapped: dict[str, Any] = {
        path: part for path, part in parts.items() if path in taps and callable(part)
    }
    for part in tapped.values():
        setattr(part, _RECORD, nnx.data(nnx.Intermediate(())))
        object.__setattr__(part, "__class__", _recording(type(part)))
    return tapped


def _recorded(tapped: Mapping[str, Any]) -> dict[str, Any]:
    """What they returned; they are as they were before."""
    found = {}
    for path, part in tapped.items():
        if last := getattr(part, _RECORD).get_value():
            (found[path],) = last
        delattr(part, _RECORD)
        object.__setattr__(part, "__class__", type(part).__base__)
    return found


class _NoKey(nnx.RngStream):
    """A random stream of a call without a key."""

    def __call__(self) -> jax.Array:
        raise ValueError(
            f"key: the network draws random numbers in training (stream {self.tag!r}); "
            "give one, another at each step"
        )


def _forbid_draws(node: Any) -> None:
    """Make the random streams under a node raise when they are drawn from."""
    for _, part in nnx.iter_graph(node):
        if isinstance(part, nnx.RngStream):
            object.__setattr__(part, "__class__", _NoKey)


def _keys(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The key, or as many as a stack of layers has."""
    return jax.random.split(key, shape) if shape else key


def _shape(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _abstract(build: Callable[[nnx.Rngs], nnx.Module]) -> nnx.Module:
    """The module without the numbers of its variables.

    An attribute that is an array and no variable keeps its numbers: NNX would take
    the shape of one, or a tracer, for a fixed attribute.
    """
    found = []

    def look() -> None:
        parts = nnx.iter_graph(build(nnx.Rngs(0)))
        arrays = (isinstance(part, jax.Array | np.ndarray) for _, part in parts)
        found.append(any(arrays))  # not they: a tracer must not leave its trace

    jax.eval_shape(look)
    if not any(found):
        return nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    with jax.ensure_compile_time_eval():
        graph, state = nnx.split(build(nnx.Rngs(0)))
    leaves = [
        (path, _shape(leaf) if isinstance(leaf, nnx.Variable) else leaf)
        for path, leaf in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(leaves))


class _Skeleton:
    """What is fixed about an NNX module: its graph and how its state is named."""

    def __init__(self, build: Callable[[nnx.Rngs], nnx.Module]):
        self.module = _abstract(build)
        check_mode(type(self.module).__call__)
        _, state = nnx.split(self.module)
        types = {type(leaf) for _, leaf in nnx.to_flat_state(state)}
        self.types = sorted(
            (
                t
                for t in types
                if issubclass(t, nnx.Variable)
                and not issubclass(t, (nnx.Param, nnx.RngState))
            ),
            key=lambda t: t.__name__,
        )
        self.modules = sorted(
            linen_path(path)
            for path, part in nnx.iter_modules(self.module)
            if path and callable(part)
        )
        _, self.rngs, self.params, *others, self.arrays = nnx.split(
            self.module, nnx.RngState, nnx.Param, *self.types, ...
        )
        self.others = {
            nnx.variable_name_from_type(kind, allow_register=True): other
            for kind, other in zip(self.types, others, strict=True)
        }

    @functools.lru_cache(maxsize=64)  # noqa: B019 - one skeleton a model
    def graph(self, train: bool, held: tuple[str, ...]) -> Any:
        """Graph definition in training mode, what is under ``held`` in evaluation."""

        def view(module: nnx.Module, train: bool, only: Any) -> nnx.Module:
            viewed = nnx.view(
                module,
                only=only,
                raise_if_not_found=False,
                deterministic=not train,
                use_running_average=not train,
            )
            chosen = nnx.filterlib.to_predicate(only)
            for path, part in nnx.iter_modules(viewed):
                if chosen(path, part):
                    set_mode(part, train)
            return viewed

        module = view(self.module, train, ...)
        if train and held:
            module = view(
                module, False, lambda path, _: lies_under(linen_path(path), held)
            )
        return nnx.split(module, nnx.RngState, nnx.Param, *self.types, ...)[0]

    def fill(self, template: Any, named: Mapping[str, Any]) -> dict[Any, Any]:
        """Pure dict under NNX's paths from arrays under Linen's."""
        leaves = tree.flatten(named)
        paths = nnx.traversals.flatten_mapping(nnx.to_pure_dict(template))
        missing = [linen_path(path) for path in paths if linen_path(path) not in leaves]
        if missing:
            raise ValueError(
                f"variables lack {missing[0]!r}; nearest: "
                f"{tree.nearest(missing[0], leaves)}; "
                "were they made by another model's init?"
            )
        return nnx.traversals.unflatten_mapping(
            {path: leaves[linen_path(path)] for path in paths}
        )

    def keys(self, key: jax.Array) -> dict[Any, Any]:
        """Fresh random state: each stream's key from ``key`` and its path."""
        flat = nnx.traversals.flatten_mapping(nnx.to_pure_dict(self.rngs))
        return nnx.traversals.unflatten_mapping(
            {
                path: _keys(prng.stream(key, linen_path(path)), leaf.shape)
                if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
                else jax.numpy.zeros(leaf.shape, leaf.dtype)
                for path, leaf in flat.items()
            }
        )

    def collections(self, module: nnx.Module) -> ModelState:
        """Model state by collection, under Linen's paths."""
        _, _, _, *others, _ = nnx.split(
            module, nnx.RngState, nnx.Param, *self.types, ...
        )
        return {
            name: _named(other) for name, other in zip(self.others, others, strict=True)
        }


def from_nnx(build: Callable[[nnx.Rngs], nnx.Module]) -> Model:
    """Wrap an NNX module as a :class:`~jaxtransfer.typing.Model`.

    ``apply`` splits and merges under plain JAX transforms; the graph is made once.
    Layers that keep random streams of their own are re-seeded from ``key`` at each
    call. Taps, parameters and model state have the paths that
    :func:`~jaxtransfer.model.from_linen` gives a Linen network of the same attribute
    names (``blocks_0`` of a list; of a dict ``heads/a``, where Linen has ``heads_a``);
    a module under two names has the first. Attributes that are arrays and no variables
    are constants, as they are built with ``nnx.Rngs(0)``. The statistics that batch
    normalisation writes in training have a gradient, as Linen's have and NNX's by
    themselves have not.

    A trained module comes in with ``lambda rngs: nnx.clone(module)`` as ``build``:
    ``init`` returns its weights and statistics.

    Args:
        build: ``nnx.Rngs -> nnx.Module``, no module itself; what it builds is called
            as ``module(inputs)``, or as ``module(*inputs)`` if ``inputs`` is a tuple.
            Training mode reaches it as it does a Linen module: by arguments of its
            ``__call__``, or by attributes of those names of any part that are True or
            False. An argument ``rngs`` is filled in.

    Returns:
        The model. ``apply`` raises ``ValueError`` for a tap or a held module that does
        not exist, and in training without ``key`` if the module draws random numbers;
        ``TypeError`` for a string in place of a tuple of paths. ``init`` raises
        ``ValueError`` where two paths become one, as of ``block[0]`` and ``block_0``.

    Raises:
        TypeError: a module is given, not the function that builds it; or, from
            ``init`` and ``apply``, ``__call__`` seems to have an argument of another
            name for the mode.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> model = from_nnx(lambda rngs: nnx.Linear(3, 2, rngs=rngs))
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 3)))
        >>> sorted(variables.params)
        ['bias', 'kernel']
        >>> model.apply(variables, jnp.ones((5, 3)))[0].shape
        (5, 2)
    """
    if isinstance(build, nnx.Module):
        raise TypeError(
            f"build: got a {type(build).__name__}; give the function that builds it, "
            "nnx.Rngs -> nnx.Module. Of a trained one: lambda rngs: nnx.clone(module)"
        )

    @functools.cache
    def skeleton() -> _Skeleton:
        return _Skeleton(build)

    def init(key: jax.Array, inputs: Inputs) -> Variables:
        del inputs  # NNX modules know their shapes when they are built.
        module = build(
            nnx.Rngs(
                params=prng.stream(key, "params"), default=prng.stream(key, "default")
            )
        )
        return Variables(
            _named(nnx.state(module, nnx.Param)), skeleton().collections(module)
        )

    def run(
        variables: Variables,
        inputs: Inputs,
        train: bool,
        key: jax.Array | None,
        held: tuple[str, ...],
        taps: tuple[str, ...],
    ) -> tuple[Any, nnx.Module, dict[str, Any]]:
        bones = skeleton()
        train = train and "" not in held
        keyless = train and key is None
        key = jax.random.key(0) if key is None else key
        module = nnx.merge(
            bones.graph(train, held if train else ()),
            bones.keys(key),
            bones.fill(bones.params, variables.params),
            *(
                bones.fill(template, variables.model_state[name])
                for name, template in bones.others.items()
            ),
            bones.arrays,
            copy=True,
        )
        if train:
            _let_gradients_pass(module)
            _hold_calls(module, held)
        call = type(module).__call__
        mode: dict[str, Any] = mode_arguments(call, train)
        if "rngs" in inspect.signature(call).parameters:
            mode["rngs"] = nnx.Rngs(prng.stream(key, "rngs"))
        if keyless:
            _forbid_draws((module, mode.get("rngs")))
        tapped = _record(module, taps)
        try:
            output = module(*positional(inputs), **mode)  # pyright: ignore
        except (TypeError, ValueError) as error:
            if _RECORD not in str(error):
                raise
            raise ValueError(
                f"taps {taps}: one of them is called within a loop or a branch "
                "(nnx.scan, nnx.RNN, nnx.cond); tap the module that has the loop"
            ) from error
        return output, module, _recorded(tapped)

    def apply(
        variables: Variables,
        inputs: Inputs,
        *,
        train: bool = False,
        key: jax.Array | None = None,
        taps: tuple[str, ...] = (),
        held: tuple[str, ...] = (),
    ) -> tuple[Any, dict[str, Any], ModelState]:
        taps, held = paths("taps", taps), paths("held", held)
        modules = skeleton().modules
        check_held(held, variables, lambda: modules)
        output, module, found = run(variables, inputs, train, key, held, taps)
        features = select_taps(taps, found, variables, lambda: modules)
        if not train:
            return output, features, variables.model_state
        collections = skeleton().collections(module)
        return output, features, {**variables.model_state, **collections}

    return Model(init, apply)
