"""How a module is called and tapped: what the adapters have in common."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from jaxtransfer import tree
from jaxtransfer.typing import Inputs

_ON_IN_TRAINING = ("train", "training", "is_training")
_OFF_IN_TRAINING = ("deterministic", "use_running_average")


def mode_arguments(function: Callable[..., Any], train: bool) -> dict[str, Any]:
    """Keyword arguments that put ``function`` into training or evaluation mode."""
    known = inspect.signature(function).parameters
    return {
        **{name: train for name in _ON_IN_TRAINING if name in known},
        **{name: not train for name in _OFF_IN_TRAINING if name in known},
    }


def positional(inputs: Inputs) -> tuple[Any, ...]:
    """Positional arguments of a call: several where the inputs are a tuple."""
    return inputs if type(inputs) is tuple else (inputs,)


def lies_under(path: str, held: tuple[str, ...]) -> bool:
    """Whether a path is one of ``held`` or lies below one."""
    return any(path == top or path.startswith(f"{top}/") for top in held)


def select_taps(
    taps: tuple[str, ...], found: Mapping[str, Any], every: Callable[[], list[str]]
) -> dict[str, Any]:
    """What was found at the taps.

    Args:
        taps: paths of modules.
        found: outputs by path.
        every: all paths that there are, for the error.

    Returns:
        Outputs by tap.

    Raises:
        ValueError: a tap names no module.
    """
    missing = [tap for tap in taps if tap not in found]
    if missing:
        paths = every()
        raise ValueError(
            f"tap {missing[0]!r} names no module; "
            f"nearest: {tree.nearest(missing[0], paths)}; "
            f"all: {', '.join(paths)}"
        )
    return {tap: found[tap] for tap in taps}


def outputs_by_path(intermediates: Mapping[str, Any]) -> dict[str, Any]:
    """``{module path: last output}`` of captured ``__call__`` outputs."""
    return {
        path.rpartition("/")[0]: outputs[-1]
        for path, outputs in tree.flatten(intermediates).items()
        if path.rpartition("/")[2] == "__call__"
    }
