"""How much a function writes: a measure of work that needs no run."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def traced_bytes(fn: Callable[..., Any], *arguments: Any) -> int:
    """Bytes of all values that a function computes, from its trace.

    Loops count once, whatever their number of steps; nothing is compiled or run.

    Args:
        fn: a function of arrays.
        *arguments: what it is called with, arrays or tracers.

    Returns:
        Bytes; an upper bound of what is alive at once in one pass.

    Example:
        >>> import jax.numpy as jnp
        >>> traced_bytes(lambda x: jnp.sin(x) + 1.0, jnp.zeros(8))
        64
    """
    shapes = jax.tree.map(
        lambda leaf: (
            jax.ShapeDtypeStruct(np.shape(leaf), jax.numpy.result_type(leaf))
            if not _is_key(leaf)
            else jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype)
        ),
        arguments,
    )
    return _bytes(jax.make_jaxpr(fn)(*shapes).jaxpr)


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(
        leaf.dtype, jax.dtypes.prng_key
    )


def _bytes(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        inner = [
            part
            for value in equation.params.values()
            for part in (value if isinstance(value, tuple | list) else (value,))
            if hasattr(part, "eqns") or hasattr(part, "jaxpr")
        ]
        if inner:
            total += sum(_bytes(getattr(part, "jaxpr", part)) for part in inner)
            continue
        for variable in equation.outvars:
            shape = getattr(variable.aval, "shape", ())
            width = getattr(getattr(variable.aval, "dtype", None), "itemsize", 4)
            total += int(np.prod(shape)) * width
    return total


__all__ = ["traced_bytes"]
