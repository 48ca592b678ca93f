"""Ramps: pure functions of training progress in [0, 1], for weights of losses."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxtransfer.ops.dtypes import common_dtype


def progress(
    step: int | Int[Array, ""] | Float[Array, ""], total_steps: int
) -> Float[Array, ""]:
    """Fraction of training done, ``step / total_steps`` clipped to [0, 1].

    Args:
        step: Steps taken so far, from 0. May be traced.
        total_steps: Steps after which the fraction is 1; positive.

    Returns:
        Scalar in [0, 1].

    Raises:
        ValueError: If ``total_steps`` is not positive.

    Example:
        >>> float(progress(25, 100))
        0.25
    """
    if total_steps <= 0:
        raise ValueError(f"total_steps must be positive, got {total_steps}.")
    return jnp.clip(_floating(step) / total_steps, 0.0, 1.0)


def dann(
    progress: float | Float[Array, "..."], *, gamma: float = 10.0
) -> Float[Array, "..."]:
    """Ramp of domain-adversarial training (DANN): ``2 / (1 + exp(-gamma p)) - 1``.

    Computed as ``tanh(gamma p / 2)``, its equal, which is exactly 0 at ``p = 0``.

    Args:
        progress: Fraction of training done, p in [0, 1]; clipped to it.
        gamma: Steepness; positive. The paper uses 10.

    Returns:
        Weight in [0, 1), of the shape of ``progress``.

    Example:
        >>> print(f"{float(dann(0.1)):.4f}")
        0.4621

    Reference:
        Ganin et al., "Domain-Adversarial Training of Neural Networks", JMLR 17,
        2016, sec. 5.2.2.
    """
    return jnp.tanh(0.5 * gamma * _clip(progress))


def linear(
    progress: float | Float[Array, "..."], *, start: float = 0.0, end: float = 1.0
) -> Float[Array, "..."]:
    """Straight ramp ``start + (end - start) p``.

    Args:
        progress: Fraction of training done, p in [0, 1]; clipped to it.
        start: Value at p = 0.
        end: Value at p = 1.

    Returns:
        Weight between ``start`` and ``end``, of the shape of ``progress``.

    Example:
        >>> float(linear(0.25, end=2.0))
        0.5
    """
    return start + (end - start) * _clip(progress)


def cosine(
    progress: float | Float[Array, "..."], *, start: float = 0.0, end: float = 1.0
) -> Float[Array, "..."]:
    """Half-cosine ramp ``start + (end - start) (1 - cos(pi p)) / 2``.

    Args:
        progress: Fraction of training done, p in [0, 1]; clipped to it.
        start: Value at p = 0.
        end: Value at p = 1.

    Returns:
        Weight between ``start`` and ``end``, of the shape of ``progress``.

    Example:
        >>> float(cosine(0.5))
        0.5
    """
    return start + (end - start) * 0.5 * (1.0 - jnp.cos(jnp.pi * _clip(progress)))


def _clip(value):
    return jnp.clip(_floating(value), 0.0, 1.0)


def _floating(value):
    """In float32 at least; numbers and integers in the default of JAX."""
    dtype = common_dtype(value, float)
    return jnp.asarray(value, common_dtype(dtype, jnp.float32))
