"""The seam to networks: Linen and NNX modules as pairs of pure functions.

Both adapters give the same paths for the same network: parameters, model state and
taps are named by the modules' attribute names joined by ``/``, items of a list by
``name_0, name_1, …``.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import nnx

from jaxtransfer import prng, tree
from jaxtransfer.typing import Inputs, Model, ModelState, Variables

_ON_IN_TRAINING = ("train", "training", "is_training")
_OFF_IN_TRAINING = ("deterministic", "use_running_average")


def _mode(function: Callable[..., Any], train: bool) -> dict[str, Any]:
    """Keyword arguments that put ``function`` into training or evaluation mode."""
    known = inspect.signature(function).parameters
    return {
        **{name: train for name in _ON_IN_TRAINING if name in known},
        **{name: not train for name in _OFF_IN_TRAINING if name in known},
    }


def _arguments(inputs: Inputs) -> tuple[Any, ...]:
    return inputs if type(inputs) is tuple else (inputs,)


def _under(path: str, held: tuple[str, ...]) -> bool:
    return any(path == top or path.startswith(f"{top}/") for top in held)


def _select_taps(
    taps: tuple[str, ...], found: Mapping[str, Any], every: Callable[[], list[str]]
) -> dict[str, Any]:
    missing = [tap for tap in taps if tap not in found]
    if missing:
        paths = every()
        raise ValueError(
            f"tap {missing[0]!r} names no module; "
            f"nearest: {tree.nearest(missing[0], paths)}; "
            f"all: {', '.join(paths)}"
        )
    return {tap: found[tap] for tap in taps}


# --- Linen ---------------------------------------------------------------------------


@contextlib.contextmanager
def _attributes(module: nn.Module, values: Mapping[str, Any]) -> Iterator[None]:
    """Set fields of a bound module for the length of one call."""
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        object.__setattr__(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            object.__setattr__(module, name, value)


def _hold(held: tuple[str, ...]) -> Callable[..., Any]:
    """Interceptor that runs the modules under ``held`` in evaluation mode."""

    def interceptor(
        following: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        module = context.module
        if context.method_name != "__call__" or not _under("/".join(module.path), held):
            return following(*args, **kwargs)
        call = type(module).__call__
        fields = {
            name: value
            for name, value in _mode(type(module), False).items()
            if getattr(module, name, None) is not None
        }
        given = inspect.signature(call).bind_partial(module, *args, **kwargs)
        for name, value in _mode(call, False).items():
            if name not in fields:
                given.arguments[name] = value
        with _attributes(module, fields):
            return following(*given.args[1:], **given.kwargs)

    return interceptor


def _outputs_by_path(intermediates: Mapping[str, Any]) -> dict[str, Any]:
    """``{module path: last output}`` of captured ``__call__`` outputs."""
    return {
        path.rpartition("/")[0]: outputs[-1]
        for path, outputs in tree.flatten(intermediates).items()
        if path.rpartition("/")[2] == "__call__"
    }


def from_linen(
    module: nn.Module, *, key_streams: tuple[str, ...] = ("dropout",)
) -> Model:
    """Wrap a Linen module as a :class:`~jaxtransfer.typing.Model`.

    Training mode reaches the module through whichever of the arguments ``train``,
    ``training``, ``is_training``, ``deterministic`` and ``use_running_average`` its
    ``__call__`` has. Taps are module paths (``"block1/conv"``); a module that is
    called several times is tapped at its last call. Under ``jit`` what lies behind
    the last value that is used is not computed.

    Args:
        module: unbound Linen module; called as ``module(inputs)``, or as
            ``module(*inputs)`` if ``inputs`` is a tuple.
        key_streams: names of the random streams the module draws from.

    Returns:
        The model. ``apply`` raises ``ValueError`` for a tap that does not exist.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> model = from_linen(nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)]))
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 3)))
        >>> logits, features, _ = model.apply(
        ...     variables, jnp.ones((5, 3)), taps=("layers_0",))
        >>> logits.shape, features["layers_0"].shape
        ((5, 2), (5, 4))
    """

    def init(key: jax.Array, inputs: Inputs) -> Variables:
        rngs = {name: prng.stream(key, name) for name in ("params", *key_streams)}
        collections = module.init(
            rngs, *_arguments(inputs), **_mode(type(module).__call__, False)
        )
        collections = dict(nn.meta.unbox(collections))
        collections.pop("intermediates", None)
        params = collections.pop("params", {})
        return Variables(params, collections)

    def run(
        variables: Variables,
        inputs: Inputs,
        train: bool,
        key: jax.Array | None,
        held: tuple[str, ...],
        capture: Callable[[nn.Module, str], bool] | bool,
    ) -> tuple[Any, dict[str, Any]]:
        train = train and "" not in held
        mutable = [*(variables.model_state if train else ())]
        output = module.apply(
            {"params": variables.params, **variables.model_state},
            *_arguments(inputs),
            **_mode(type(module).__call__, train),
            rngs={}
            if key is None
            else {name: prng.stream(key, name) for name in key_streams},
            mutable=[*mutable, "intermediates"] if capture else mutable,
            capture_intermediates=capture,
        )
        # Linen returns a pair whenever `mutable` is a list, an empty one included.
        return output  # pyright: ignore[reportReturnType]

    def apply(
        variables: Variables,
        inputs: Inputs,
        *,
        train: bool = False,
        key: jax.Array | None = None,
        taps: tuple[str, ...] = (),
        held: tuple[str, ...] = (),
    ) -> tuple[Any, dict[str, Any], ModelState]:
        taps = tuple(taps)

        def wanted(tapped: nn.Module, method: str) -> bool:
            return method == "__call__" and "/".join(tapped.path) in taps

        holding = (
            nn.intercept_methods(_hold(held))
            if train and held
            else contextlib.nullcontext()
        )
        with holding:
            output, updates = run(
                variables, inputs, train, key, held, wanted if taps else False
            )
        updates = dict(updates)
        found = _outputs_by_path(updates.pop("intermediates", {}))

        def every() -> list[str]:
            _, all_of_it = jax.eval_shape(
                lambda: run(variables, inputs, False, None, (), True)
            )
            return sorted({*_outputs_by_path(all_of_it["intermediates"])} - {""})

        features = _select_taps(taps, found, every)
        return output, features, {**variables.model_state, **updates}

    return Model(init, apply)


# --- NNX -----------------------------------------------------------------------------


def _name(path: tuple[Any, ...]) -> str:
    """``('blocks', 0, 'conv') -> 'blocks_0/conv'``: the path Linen gives."""
    name = ""
    for part in path:
        name += f"_{part}" if isinstance(part, int) else f"/{part}"
    return name.removeprefix("/")


def _named(state: Any) -> dict[str, Any]:
    """Nested dict of arrays under Linen's paths from an NNX state."""
    pure = nnx.traversals.flatten_mapping(nnx.to_pure_dict(state))
    return tree.unflatten({_name(path): leaf for path, leaf in pure.items()})


@functools.cache
def _calm(kind: type[nnx.Module]) -> type[nnx.Module]:
    """The same module, in evaluation mode whatever its call is told."""
    call = kind.__call__  # pyright: ignore[reportAttributeAccessIssue]
    mode = _mode(call, False)
    if not mode:
        return kind
    signature = inspect.signature(call)

    @functools.wraps(call)
    def calm(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind_partial(self, *args, **kwargs)
        given.arguments.update(mode)
        return call(*given.args, **given.kwargs)

    return type(kind.__name__, (kind,), {"__call__": calm})


def _hold_calls(module: nnx.Module, held: tuple[str, ...]) -> None:
    """Make the modules under ``held`` ignore what their callers tell them."""
    for path, part in nnx.iter_modules(module):
        if _under(_name(path), held) and callable(part):
            object.__setattr__(part, "__class__", _calm(type(part)))


class _Skeleton:
    """What is fixed about an NNX module: its graph and how its state is named."""

    def __init__(self, build: Callable[[nnx.Rngs], nnx.Module]):
        self.module = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
        _, state = nnx.split(self.module)
        types = {type(leaf) for _, leaf in nnx.to_flat_state(state)}
        self.types = sorted(
            (t for t in types if not issubclass(t, (nnx.Param, nnx.RngState))),
            key=lambda t: t.__name__,
        )
        _, self.rngs, self.params, *others = nnx.split(
            self.module, nnx.RngState, nnx.Param, *self.types
        )
        self.others = {
            nnx.variable_name_from_type(kind, allow_register=True): other
            for kind, other in zip(self.types, others, strict=True)
        }

    @functools.lru_cache(maxsize=64)  # noqa: B019 - one skeleton a model
    def graph(self, train: bool, held: tuple[str, ...]) -> Any:
        """Graph definition in training mode, what is under ``held`` in evaluation."""

        def view(module: nnx.Module, train: bool, only: Any) -> nnx.Module:
            return nnx.view(
                module,
                only=only,
                raise_if_not_found=False,
                deterministic=not train,
                use_running_average=not train,
            )

        module = view(self.module, train, ...)
        if train and held:
            module = view(module, False, lambda path, _: _under(_name(path), held))
        return nnx.split(module, nnx.RngState, nnx.Param, *self.types)[0]

    def fill(self, template: Any, named: Mapping[str, Any]) -> dict[Any, Any]:
        """Pure dict under NNX's paths from arrays under Linen's."""
        leaves = tree.flatten(named)
        paths = nnx.traversals.flatten_mapping(nnx.to_pure_dict(template))
        missing = [_name(path) for path in paths if _name(path) not in leaves]
        if missing:
            raise ValueError(
                f"variables lack {missing[0]!r}; nearest: "
                f"{tree.nearest(missing[0], leaves)}; "
                "were they made by another model's init?"
            )
        return nnx.traversals.unflatten_mapping(
            {path: leaves[_name(path)] for path in paths}
        )

    def keys(self, key: jax.Array) -> dict[Any, Any]:
        """Fresh random state: each stream's key from ``key`` and its path."""
        flat = nnx.traversals.flatten_mapping(nnx.to_pure_dict(self.rngs))
        return nnx.traversals.unflatten_mapping(
            {
                path: prng.stream(key, _name(path))
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
    call. Taps, parameters and model state have the paths that :func:`from_linen`
    gives a Linen network of the same attribute names.

    Args:
        build: ``nnx.Rngs -> nnx.Module``; called as ``module(inputs)``, or as
            ``module(*inputs)`` if ``inputs`` is a tuple. Arguments ``train``,
            ``training``, ``is_training``, ``deterministic``, ``use_running_average``
            and ``rngs`` of its ``__call__`` are filled in.

    Returns:
        The model. ``apply`` raises ``ValueError`` for a tap that does not exist.

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
        capture: bool,
    ) -> tuple[Any, nnx.Module, dict[str, Any]]:
        bones = skeleton()
        train = train and "" not in held
        key = jax.random.key(0) if key is None else key
        module = nnx.merge(
            bones.graph(train, held if train else ()),
            bones.keys(key),
            bones.fill(bones.params, variables.params),
            *(
                bones.fill(template, variables.model_state[name])
                for name, template in bones.others.items()
            ),
            copy=True,
        )
        if train and held:
            _hold_calls(module, held)
        call = type(module).__call__
        mode: dict[str, Any] = _mode(call, train)
        if "rngs" in inspect.signature(call).parameters:
            mode["rngs"] = nnx.Rngs(prng.stream(key, "rngs"))
        if not capture:
            return module(*_arguments(inputs), **mode), module, {}  # pyright: ignore
        forward = nnx.capture(module, nnx.Intermediate, method_outputs=nnx.Intermediate)
        output, captured = forward(*_arguments(inputs), **mode)
        return output, module, _outputs_by_path(_named(captured))

    def apply(
        variables: Variables,
        inputs: Inputs,
        *,
        train: bool = False,
        key: jax.Array | None = None,
        taps: tuple[str, ...] = (),
        held: tuple[str, ...] = (),
    ) -> tuple[Any, dict[str, Any], ModelState]:
        output, module, found = run(
            variables, inputs, train, key, tuple(held), bool(taps)
        )
        features = _select_taps(tuple(taps), found, lambda: sorted(set(found) - {""}))
        if not train:
            return output, features, variables.model_state
        collections = skeleton().collections(module)
        return output, features, {**variables.model_state, **collections}

    return Model(init, apply)


# --- heads ---------------------------------------------------------------------------


def _below(paths: tuple[str, ...], part: str) -> tuple[str, ...]:
    return tuple(
        path.removeprefix(part).removeprefix("/")
        for path in paths
        if path == part or path.startswith(f"{part}/") or path == ""
    )


def with_head(backbone: Model, head: Model, *, tap: str | None = None) -> Model:
    """Put a new head on a network: ``head(backbone(inputs))``.

    Args:
        backbone: the source network.
        head: the new task model; its inputs are what is tapped.
        tap: module of the backbone to tap; its output if ``None``.

    Returns:
        A model whose parameters and state are ``{"backbone": …, "head": …}``, and
        whose tap paths begin with ``backbone/`` and ``head/``.

    Raises:
        ValueError: (in ``init`` and ``apply``) a tap does not exist.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> model = with_head(from_linen(nn.Dense(4)), from_linen(nn.Dense(2)))
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 3)))
        >>> sorted(variables.params), model.apply(variables, jnp.ones((5, 3)))[0].shape
        (['backbone', 'head'], (5, 2))
    """
    own_taps = () if tap is None else (tap,)

    def source(output: Any, features: Mapping[str, Any]) -> Any:
        return output if tap is None else features[tap]

    def init(key: jax.Array, inputs: Inputs) -> Variables:
        backbone_key, head_key = prng.streams(key, "backbone", "head")
        below = backbone.init(backbone_key, inputs)
        output, features, _ = backbone.apply(below, inputs, taps=own_taps)
        above = head.init(head_key, source(output, features))
        return Variables(
            {"backbone": below.params, "head": above.params},
            {"backbone": below.model_state, "head": above.model_state},
        )

    def apply(
        variables: Variables,
        inputs: Inputs,
        *,
        train: bool = False,
        key: jax.Array | None = None,
        taps: tuple[str, ...] = (),
        held: tuple[str, ...] = (),
    ) -> tuple[Any, dict[str, Any], ModelState]:
        params, state = variables
        astray = [tap for tap in taps if not _under(tap, ("backbone", "head"))]
        if astray:
            raise ValueError(
                f"tap {astray[0]!r} must begin with 'backbone/' or 'head/'"
            )
        keys = {"backbone": None, "head": None}
        if key is not None:
            keys = {part: prng.stream(key, part) for part in keys}
        lower = _below(tuple(tap for tap in taps if tap), "backbone")
        output, features, backbone_state = backbone.apply(
            Variables(params["backbone"], state["backbone"]),
            inputs,
            train=train,
            key=keys["backbone"],
            taps=tuple({*own_taps, *lower} - {""}),
            held=_below(tuple(held), "backbone"),
        )
        features = {**features, "": output}
        result, head_features, head_state = head.apply(
            Variables(params["head"], state["head"]),
            source(output, features),
            train=train,
            key=keys["head"],
            taps=tuple(set(_below(taps, "head")) - {""}),
            held=_below(tuple(held), "head"),
        )
        head_features = {**head_features, "": result}
        found = {
            **{f"backbone/{p}".removesuffix("/"): f for p, f in features.items()},
            **{f"head/{p}".removesuffix("/"): f for p, f in head_features.items()},
        }
        return (
            result,
            {tap: found[tap] for tap in taps},
            {"backbone": backbone_state, "head": head_state},
        )

    return Model(init, apply)


__all__ = ["from_linen", "from_nnx", "with_head"]
