"""Lengths of arrays, and arrays scaled to length 1."""

import jax
import jax.numpy as jnp

Axes = int | tuple[int, ...]


def unit(values, axis: Axes = -1, *, moderate: bool = False):
    """The values at Euclidean length 1 along some axes; 0 stays 0, without gradient.

    Moderate values, whose squares neither over- nor underflow, are not scaled first.
    """
    values = values if moderate else scaled(values, axis)
    squares = jnp.sum(values**2, axis=axis, keepdims=True)
    return values / jnp.sqrt(jnp.where(squares > 0, squares, 1.0))


def root(squares, floor: float | jax.Array = 0.0):
    """Square roots; 0, without gradient, of what is not above the floor."""
    low = squares <= floor  # not-a-number is kept
    return jnp.where(low, 0.0, jnp.sqrt(jnp.where(low, 1.0, squares)))


def scaled(values, axis: Axes = -1):
    """The values over the largest of them: no square of one over- or underflows.

    The largest is no part of the gradient, for what does not depend on it in the end.
    """
    largest = jnp.max(jnp.abs(values), axis=axis, keepdims=True, initial=0.0)
    some = ~(largest < jnp.finfo(values.dtype).tiny)  # not-a-number is kept
    scale = jax.lax.stop_gradient(jnp.where(some, largest, 1.0))
    return jnp.where(some, values / scale, 0.0)
