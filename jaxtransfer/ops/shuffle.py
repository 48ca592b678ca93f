"""Places in a random permutation, without drawing the permutation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

_ROUNDS = 6


def shuffled(
    key: Key[Array, ""], positions: Int[Array, " k"], size: int
) -> Int[Array, " k"]:
    """Look up places ``positions`` of a pseudorandom permutation of ``0 … size - 1``.

    A Feistel network over the next power of two, keyed by ``key``; values outside the
    range are sent through again until they fall inside. Each key gives a bijection;
    the work is that of the positions asked for, not of ``size``.

    Args:
        key: typed key; names the permutation.
        positions: ``[k]``, each in ``0 … size - 1``.
        size: length of the permutation, ``1 … 2**30``.

    Returns:
        What stands at those places, int32 ``[k]``.

    Raises:
        ValueError: ``size`` is out of range.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> places = shuffled(jax.random.key(0), jnp.arange(5), 5)
        >>> sorted(places.tolist())
        [0, 1, 2, 3, 4]

    Reference:
        Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002
        (cycle walking). The round function is a multiplicative hash: good for
        shuffling, no cipher.
    """
    if not 1 <= size <= 2**30:
        raise ValueError(f"size must be 1 … 2**30, got {size}")
    bits = max(2, (size - 1).bit_length())
    low = bits // 2
    masks = (1 << low) - 1, (1 << (bits - low)) - 1
    secrets = jax.random.bits(key, (_ROUNDS,), jnp.uint32)

    def scramble(value: jax.Array, secret: jax.Array) -> jax.Array:
        value = (value ^ secret) * jnp.uint32(0x9E3779B1)
        value = (value ^ (value >> 15)) * jnp.uint32(0x85EBCA77)
        return value ^ (value >> 13)

    def permute(index: jax.Array) -> jax.Array:
        left, right = index >> low, index & jnp.uint32(masks[0])
        for number in range(0, _ROUNDS, 2):
            left ^= scramble(right, secrets[number]) & jnp.uint32(masks[1])
            right ^= scramble(left, secrets[number + 1]) & jnp.uint32(masks[0])
        return (left << low) | right

    def walk(index: jax.Array) -> jax.Array:
        return jnp.where(index < size, index, permute(index))

    start = permute(positions.astype(jnp.uint32))
    inside = jax.lax.while_loop(lambda index: jnp.any(index >= size), walk, start)
    return inside.astype(jnp.int32)
