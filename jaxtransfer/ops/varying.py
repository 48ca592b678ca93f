"""What differs between devices: casts for loops under ``shard_map``.

Under ``shard_map`` a value is typed as equal on all devices or as varying along an
axis, and the carry of a ``lax.scan`` must keep its type. Values made inside (zeros, an
optimizer's fresh slots) are equal everywhere and must be cast before they meet
gradients, which are not. Outside ``shard_map`` everything here does nothing.
"""

from typing import Any

import jax


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
