"""Named key streams: adding one never shifts another.

One typed root key lives in the training state and is never advanced. Whatever needs
randomness derives its key from (root, step, name).
"""

import zlib

import jax


def stream(key: jax.Array, name: str) -> jax.Array:
    """Derive the sub-key called ``name``.

    ``stream(k, name) = fold_in(k, crc32(name))``

    Args:
        key: typed key, ``[]``.
        name: name of the stream, e.g. ``"dropout"``.

    Returns:
        A typed key that depends on ``key`` and ``name`` alone.

    Example:
        >>> import jax
        >>> root = jax.random.key(0)
        >>> bool(stream(root, "dropout") == stream(root, "dropout"))
        True
        >>> bool(stream(root, "dropout") == stream(root, "episodes"))
        False
    """
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def streams(key: jax.Array, *names: str) -> tuple[jax.Array, ...]:
    """Derive several named sub-keys at once.

    Args:
        key: typed key, ``[]``.
        *names: names of the streams.

    Returns:
        One key a name, in the order given.

    Example:
        >>> import jax
        >>> init_key, data_key = streams(jax.random.key(0), "init", "data")
    """
    return tuple(stream(key, name) for name in names)


def step_key(key: jax.Array, step: jax.Array | int) -> jax.Array:
    """Derive the key of one training step; the root is not advanced.

    Args:
        key: typed root key, ``[]``.
        step: number of the step, ``[]``.

    Returns:
        ``fold_in(key, step)``.

    Example:
        >>> import jax
        >>> root = jax.random.key(0)
        >>> bool(step_key(root, 3) == step_key(root, 3))
        True
    """
    return jax.random.fold_in(key, step)
