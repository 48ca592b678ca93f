"""NNX modules as pairs of pure functions, under the paths that Linen would give."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from jaxtransfer import prng, tree
from jaxtransfer.model.calls import (
    lies_under,
    mode_arguments,
    outputs_by_path,
    positional,
    select_taps,
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
    return tree.unflatten({linen_path(path): leaf for path, leaf in pure.items()})


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
            module = view(
                module, False, lambda path, _: lies_under(linen_path(path), held)
            )
        return nnx.split(module, nnx.RngState, nnx.Param, *self.types)[0]

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
                path: prng.stream(key, linen_path(path))
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
    names.

    A trained module comes in with ``lambda rngs: nnx.clone(module)`` as ``build``:
    ``init`` returns its weights and statistics.

    Args:
        build: ``nnx.Rngs -> nnx.Module``, no module itself; what it builds is called
            as ``module(inputs)``, or as ``module(*inputs)`` if ``inputs`` is a tuple.
            Arguments ``train``, ``training``, ``is_training``, ``deterministic``,
            ``use_running_average`` and ``rngs`` of its ``__call__`` are filled in.

    Returns:
        The model. ``apply`` raises ``ValueError`` for a tap that does not exist, and
        in training without ``key`` if the module draws random numbers.

    Raises:
        TypeError: a module is given, not the function that builds it.

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
        capture: bool,
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
            copy=True,
        )
        if train and held:
            _hold_calls(module, held)
        call = type(module).__call__
        mode: dict[str, Any] = mode_arguments(call, train)
        if "rngs" in inspect.signature(call).parameters:
            mode["rngs"] = nnx.Rngs(prng.stream(key, "rngs"))
        if keyless:
            _forbid_draws((module, mode.get("rngs")))
        if not capture:
            return module(*positional(inputs), **mode), module, {}  # pyright: ignore
        forward = nnx.capture(module, nnx.Intermediate, method_outputs=nnx.Intermediate)
        output, captured = forward(*positional(inputs), **mode)
        return output, module, outputs_by_path(_named(captured))

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
        features = select_taps(tuple(taps), found, lambda: sorted(set(found) - {""}))
        if not train:
            return output, features, variables.model_state
        collections = skeleton().collections(module)
        return output, features, {**variables.model_state, **collections}

    return Model(init, apply)
