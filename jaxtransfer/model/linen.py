"""Linen modules as pairs of pure functions."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax

from jaxtransfer import prng
from jaxtransfer.model.calls import (
    check_held,
    check_mode,
    lies_under,
    mode_arguments,
    outputs_by_path,
    paths,
    positional,
    select_taps,
)
from jaxtransfer.typing import Inputs, Model, ModelState, Variables


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
        is_held = lies_under("/".join(module.path), held)
        # A lifted call has the name of a function; the method within it comes after.
        call = getattr(type(module), context.method_name, None)
        if not is_held or call is None or context.method_name == "setup":
            return following(*args, **kwargs)
        fields = {
            name: value
            for name, value in mode_arguments(type(module), False).items()
            if getattr(module, name, None) is not None
        }
        given = inspect.signature(call).bind_partial(module, *args, **kwargs)
        for name, value in mode_arguments(call, False).items():
            if name not in fields:
                given.arguments[name] = value
        with _attributes(module, fields):
            return following(*given.args[1:], **given.kwargs)

    return interceptor


def _in_mode(module: nn.Module, train: bool) -> tuple[nn.Module, dict[str, Any]]:
    """The module in training or evaluation mode, and what its call is told of it."""
    told = mode_arguments(type(module).__call__, train)
    fields = mode_arguments(type(module), train).items()
    fields = {name: value for name, value in fields if name not in told}
    return module.clone(**fields) if fields else module, told


def _sown(
    module: nn.Module,
    collections: Mapping[str, Any],
    inputs: Inputs,
    rngs: Mapping[str, jax.Array],
) -> list[str]:
    """The collections that grow with each call, as those that `sow` appends to do."""

    def has_tuples(values: Any) -> bool:
        parts = values.values() if isinstance(values, Mapping) else ()
        return type(values) is tuple or any(map(has_tuples, parts))

    likely = [name for name, values in collections.items() if has_tuples(values)]
    if not likely:
        return []
    module, mode = _in_mode(module, False)
    _, after = jax.eval_shape(
        lambda given: module.apply(
            given, *positional(inputs), **mode, mutable=likely, rngs=dict(rngs)
        ),
        dict(collections),
    )
    structure = jax.tree.structure
    return [n for n in likely if structure(after[n]) != structure(collections[n])]


def from_linen(
    module: nn.Module, *, key_streams: tuple[str, ...] = ("dropout",)
) -> Model:
    """Wrap a Linen module as a :class:`~jaxtransfer.typing.Model`.

    Training mode reaches the module through whichever of ``train``, ``training``,
    ``is_train``, ``is_training``, ``update_stats``, ``deterministic``,
    ``use_running_average`` and ``inference`` are arguments of its ``__call__``, or else
    its fields; not through a ``**kwargs``. Taps are module paths
    (``"block1/conv"``); a module that is called several times is tapped at its last
    call. Under ``jit`` what lies behind the last value that is used is not computed.
    What a module sows is an output, not state, and is not kept.

    Args:
        module: unbound Linen module; called as ``module(inputs)``, or as
            ``module(*inputs)`` if ``inputs`` is a tuple.
        key_streams: names of the random streams the module draws from.

    Returns:
        The model. ``apply`` raises ``ValueError`` for a tap or a held module that does
        not exist, ``TypeError`` for a string in place of a tuple of them.

    Raises:
        TypeError: ``__call__`` seems to have an argument of another name for the mode.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> model = from_linen(nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)]))
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 3)))
        >>> logits, features, _ = model.apply(
        ...     variables, jnp.ones((5, 3)), taps=("layers_0",))
        >>> logits.shape, features["layers_0"].shape
        ((5, 2), (5, 4))
    """
    check_mode(type(module).__call__)

    def init(key: jax.Array, inputs: Inputs) -> Variables:
        rngs = {name: prng.stream(key, name) for name in ("params", *key_streams)}
        calm, mode = _in_mode(module, False)
        collections = calm.init(rngs, *positional(inputs), **mode)
        collections = dict(nn.meta.unbox(collections))
        collections.pop("intermediates", None)
        params = collections.pop("params", {})
        for name in _sown(module, {"params": params, **collections}, inputs, rngs):
            del collections[name]
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
        called, mode = _in_mode(module, train)
        output = called.apply(
            {"params": variables.params, **variables.model_state},
            *positional(inputs),
            **mode,
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
        taps, held = paths("taps", taps), paths("held", held)

        def wanted(tapped: nn.Module, method: str) -> bool:
            return method == "__call__" and "/".join(tapped.path) in taps

        def every() -> list[str]:
            any_key = jax.random.key(0)
            _, all_of_it = jax.eval_shape(
                lambda: run(variables, inputs, False, any_key, (), True)
            )
            return sorted({*outputs_by_path(all_of_it["intermediates"])} - {""})

        check_held(held, variables, every)
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
        found = outputs_by_path(updates.pop("intermediates", {}))

        features = select_taps(taps, found, variables, every)
        return output, features, {**variables.model_state, **updates}

    return Model(init, apply)
