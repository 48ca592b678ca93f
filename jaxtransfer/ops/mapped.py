"""Values that ``vmap`` maps together with others, for derivatives of one's own."""

import functools
from typing import Any

import jax
import jax.numpy as jnp


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
