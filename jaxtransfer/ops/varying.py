"""What differs between devices, or between the elements of a ``vmap``.

Under ``shard_map`` a value is typed as equal on all devices or as varying along an
axis, and the carry of a ``lax.scan`` must keep its type. Values made inside (zeros, an
optimizer's fresh slots) are equal everywhere and must be cast before they meet
gradients, which are not: :func:`vary`, which does nothing outside of it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp


def varying_axes(tree: Any) -> frozenset[str]:
    """Name the device axes along which any array of a tree differs.

    Args:
        tree: pytree of arrays.

    Returns:
        Names of axes; empty outside ``shard_map``.

    Example:
        >>> import jax.numpy as jnp
        >>> varying_axes({"w": jnp.ones(2)})
        frozenset()
    """
    axes: frozenset[str] = frozenset()
    for leaf in jax.tree.leaves(tree):
        kind = getattr(jax.typeof(leaf), "manual_axis_type", None)
        axes |= getattr(kind, "varying", frozenset())
    return axes


def vary(tree: Any, axes: frozenset[str]) -> Any:
    """Type the arrays of a tree as varying along ``axes``.

    Args:
        tree: pytree of arrays; keys are left alone.
        axes: names of device axes.

    Returns:
        The same values.

    Example:
        >>> import jax.numpy as jnp
        >>> vary(jnp.ones(2), frozenset()).shape
        (2,)
    """

    def cast(leaf: Any) -> Any:
        missing = tuple(sorted(axes - varying_axes(leaf)))
        if not missing or jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf
        return jax.lax.pcast(leaf, missing, to="varying")

    return jax.tree.map(cast, tree) if axes else tree


def mapped_with(values: Any, others: Any) -> Any:
    """The same values, which ``vmap`` maps wherever it maps one of the others.

    For the outputs of a function with a derivative of its own (``jax.custom_vjp``):
    the cotangent of an output that is the same for all elements of a ``vmap`` arrives
    summed over them, and a rule that multiplies it with something of each element
    would count every element's share in all.

    Args:
        values: pytree of arrays.
        others: pytree of arrays and keys, what the rule depends on.

    Returns:
        The values, bit for bit; compiled, nothing is computed for it.

    Example:
        >>> alone = jax.vmap(lambda x: jnp.ones(3), out_axes=None)
        >>> tied = jax.vmap(lambda x: mapped_with(jnp.ones(3), x))
        >>> alone(jnp.arange(2)).shape, tied(jnp.arange(2)).shape
        ((3,), (2, 3))
    """
    marks = [_first(leaf) for leaf in jax.tree.leaves(others) if jnp.size(leaf)]
    odd = functools.reduce(jnp.logical_or, [mark != mark for mark in marks], False)
    return jax.tree.map(lambda leaf: jnp.where(odd, leaf, leaf), values)


def _first(leaf: Any) -> jax.Array:
    """An element of an array, or of a key's numbers."""
    if jax.dtypes.issubdtype(jax.typeof(leaf).dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return jnp.ravel(leaf)[0]
