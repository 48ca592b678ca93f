"""How a module is called and tapped: what the adapters have in common."""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxtransfer import tree
from jaxtransfer.typing import Inputs, Variables

_ON_IN_TRAINING = ("train", "training", "is_train", "is_training", "update_stats")
_OFF_IN_TRAINING = ("deterministic", "use_running_average", "inference")
MODE_NAMES = (*_ON_IN_TRAINING, *_OFF_IN_TRAINING)
"""Arguments and fields by which modules are told whether they train."""

_MODE = re.compile(r"(^|_)(train(ing)?|eval(uat\w+)?|infer(ence)?|determin\w+)(_|$)")


def mode_arguments(function: Callable[..., Any], train: bool) -> dict[str, Any]:
    """Keyword arguments that put ``function`` into training or evaluation mode."""
    known = inspect.signature(function).parameters
    return {
        **{name: train for name in _ON_IN_TRAINING if name in known},
        **{name: not train for name in _OFF_IN_TRAINING if name in known},
    }


def set_mode(module: Any, train: bool) -> None:
    """Set the attributes of a module, True or False, that say whether it trains."""
    for names, value in (_ON_IN_TRAINING, train), (_OFF_IN_TRAINING, not train):
        for name in names:
            computed = isinstance(getattr(type(module), name, None), property)
            if not computed and isinstance(getattr(module, name, None), bool):
                setattr(module, name, value)


def check_mode(call: Callable[..., Any]) -> None:
    """Refuse a call that seems to be told whether it trains by a name of its own.

    Raises:
        TypeError: it has such an argument, and none of :data:`MODE_NAMES`.
    """
    names = inspect.signature(call).parameters
    own = [name for name in names if _MODE.search(name)]
    if own and not mode_arguments(call, True):
        raise TypeError(
            f"{call.__qualname__}: {own[0]!r} seems to say whether it trains and would "
            f"never be given; name it as one of {', '.join(MODE_NAMES)}, in a subclass "
            "perhaps"
        )


def positional(inputs: Inputs) -> tuple[Any, ...]:
    """Positional arguments of a call: several where the inputs are a tuple."""
    return inputs if type(inputs) is tuple else (inputs,)


def lies_under(path: str, held: tuple[str, ...]) -> bool:
    """Whether a path is one of ``held`` or lies below one."""
    return any(path == top or path.startswith(f"{top}/") for top in held)


def paths(name: str, given: tuple[str, ...]) -> tuple[str, ...]:
    """The paths that an argument gives.

    Raises:
        TypeError: it is one string, whose letters would be paths.
    """
    if isinstance(given, str):
        raise TypeError(f"{name}: got {given!r}; give a tuple of paths, ({given!r},)")
    return tuple(given)


def check_held(
    held: tuple[str, ...], variables: Variables, every: Callable[[], list[str]]
) -> None:
    """Refuse paths to hold that no module has.

    Args:
        held: paths of modules.
        variables: of the network.
        every: paths of all modules, for those without variables.

    Raises:
        ValueError: a path names no module.
    """
    unknown = sorted({*held} - _owners(variables) - {""}) if held else []
    if unknown and (unknown := [path for path in unknown if path not in every()]):
        known = sorted({*every(), *_owners(variables)})
        raise ValueError(
            f"held: {unknown[0]!r} names no module; "
            f"nearest: {tree.nearest(unknown[0], known)}"
        )


def _owners(variables: Variables) -> set[str]:
    """Paths of the modules that have variables, or modules with some, below them."""
    owners = set()
    for part in (variables.params, *variables.model_state.values()):
        for path in tree.flatten(part) if isinstance(part, Mapping) else ():
            names = path.split("/")
            owners |= {"/".join(names[:depth]) for depth in range(1, len(names))}
    return owners


def select_taps(
    taps: tuple[str, ...],
    found: Mapping[str, Any],
    variables: Variables,
    every: Callable[[], list[str]],
) -> dict[str, Any]:
    """What was found at the taps.

    Args:
        taps: paths of modules.
        found: outputs by path.
        variables: of the network.
        every: all paths that can be tapped, for the error.

    Returns:
        Outputs by tap.

    Raises:
        ValueError: a tap names no module, or one whose output is not seen.
    """
    missing = [tap for tap in taps if tap not in found]
    if missing:
        known = every()
        if missing[0] in {*known, *_owners(variables)}:
            raise ValueError(
                f"tap {missing[0]!r} names no module whose output is seen: it is not "
                "called, or by another method than __call__, or within nn.scan or "
                "nn.vmap without 'intermediates' in variable_axes"
            )
        raise ValueError(
            f"tap {missing[0]!r} names no module; "
            f"nearest: {tree.nearest(missing[0], known)}; "
            f"all: {', '.join(known)}"
        )
    return {tap: found[tap] for tap in taps}


def outputs_by_path(intermediates: Mapping[str, Any]) -> dict[str, Any]:
    """``{module path: last output}`` of captured ``__call__`` outputs."""
    return {
        path.rpartition("/")[0]: outputs[-1]
        for path, outputs in tree.flatten(intermediates).items()
        if path.rpartition("/")[2] == "__call__"
    }
