"""Order of numbers, in ways that XLA is quick at on CPUs."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num


def argsort(values: Float[Array, "*batch n"]) -> Int[Array, "*batch n"]:
    """Where the numbers are in ascending order, along the last axis.

    Equal ones stay in their order. ``jnp.take_along_axis(values, argsort(values), -1)``
    are the sorted numbers, with their gradient.

    Args:
        values: [..., n].

    Returns:
        Places [..., n], that of the least number first.

    Example:
        >>> import jax.numpy as jnp
        >>> argsort(jnp.array([3.0, 0.5, 3.0, 1.0])).tolist()
        [1, 3, 0, 2]
    """
    n = values.shape[-1]
    if n**2 > jnp.iinfo(jnp.int32).max:
        return jnp.argsort(values)
    keys = _integers(jax.lax.stop_gradient(values)).reshape(-1, n)
    # The place of the first equal one: with the own place behind it, no two are equal.
    first = jax.vmap(jnp.searchsorted)(jnp.sort(keys), keys)
    places = jnp.sort(first * n + jnp.arange(n, dtype=jnp.int32)[None]) % n
    return places.reshape(values.shape)


def argmax(values: Num[Array, "*batch n"]) -> Int[Array, "*batch"]:
    """Where the largest number is, along the last axis: the first of equal ones.

    As ``jnp.argmax``, in two passes that CPUs do many numbers at a time in; the first
    not-a-number, if there is one, counts as the largest.

    Args:
        values: [..., n], n at least 1.

    Returns:
        Places [...] in [0, n).

    Example:
        >>> import jax.numpy as jnp
        >>> int(argmax(jnp.array([1.0, 3.0, 3.0])))
        1
    """
    values = jax.lax.stop_gradient(values)
    largest = jnp.max(values, axis=-1, keepdims=True)
    n = values.shape[-1]
    found = (values == largest) | (values != values)
    return jnp.min(jnp.where(found, jnp.arange(n), n), axis=-1)


def kth_smallest(
    values: Num[Array, "*batch n"], k: Int[Array, ""] | int
) -> Num[Array, "*batch"]:
    """The number that would be at place k if they were sorted, along the last axis.

    Found bit by bit, in as many passes as a number has bits and without sorting.

    Args:
        values: Floats or signed integers [..., n], no not-a-number among the floats.
        k: Place in [0, n), the same for all.

    Returns:
        [...], a constant of the gradient.

    Example:
        >>> import jax.numpy as jnp
        >>> float(kth_smallest(jnp.array([3.0, -jnp.inf, 0.5]), 1))
        0.5
    """
    values, k = jax.lax.stop_gradient(values), jnp.asarray(k)
    keys = _integers(values)
    width = 8 * keys.dtype.itemsize
    least = jnp.iinfo(keys.dtype).min

    def narrow(i, found):
        # Adding a bit to the least integer, whose bits but the sign are 0, sets it;
        # the sign bit, first, is flipped: negative integers are the smaller ones.
        bit = jnp.left_shift(jnp.ones((), keys.dtype), width - 1 - i)
        raised = jnp.where(i == 0, jnp.zeros((), keys.dtype), found + bit)
        below = jnp.sum(keys < raised[..., None], axis=-1, dtype=k.dtype)
        return jnp.where(below <= k, raised, found)

    found = jnp.full(values.shape[:-1], least, keys.dtype)
    found = jax.lax.fori_loop(0, width, narrow, found)
    if not jnp.issubdtype(values.dtype, jnp.floating):
        return found
    return jax.lax.bitcast_convert_type(_flipped(found), values.dtype)


def _integers(values):
    """Integers of the same width that are in the same order."""
    if not jnp.issubdtype(values.dtype, jnp.floating):
        return values
    width = jnp.dtype(f"int{8 * values.dtype.itemsize}")
    return _flipped(jax.lax.bitcast_convert_type(values, width))


def _flipped(bits):
    """Negative floats have their magnitude in ascending order; its own inverse."""
    return jnp.where(bits < 0, bits ^ jnp.iinfo(bits.dtype).max, bits)
