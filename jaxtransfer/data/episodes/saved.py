"""Tasks on disk: which examples were drawn, and of which pool."""

import hashlib
import os
import zipfile
import zlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from jaxtransfer.data.episodes.drawing import Drawn
from jaxtransfer.data.episodes.sampling import check_rows
from jaxtransfer.typing import AnyArray

_POOL = "pool"


def fingerprint(inputs: Shaped[AnyArray, "n ..."]) -> str:
    """Name a pool by its content: shape, kind of numbers, and a hash of all values.

    Args:
        inputs: the pool `[n, ...]`, concrete.

    Returns:
        E.g. `"float32[19280, 28, 28, 1] 5d0c…"`, with 32 hexadecimal digits of SHA-256
        over the values in order.

    Example:
        >>> fingerprint(np.zeros((2, 1), np.uint8))
        'uint8[2, 1] 96a296d224f285c67bee93c30f8a3091'
    """
    values = np.ascontiguousarray(inputs)
    bytes_of = values.reshape(-1).view(np.uint8)  # a buffer holds no bfloat16
    digest = hashlib.sha256(bytes_of.data).hexdigest()[:32]
    return f"{values.dtype}{list(values.shape)} {digest}"


def save_episodes(
    path: str | os.PathLike[str], drawn: Drawn, inputs: Shaped[AnyArray, "n ..."]
) -> None:
    """Write tasks to an `.npz`: indices and labels, no examples.

    Args:
        path: the file; what was there is replaced.
        drawn: from `draw`.
        inputs: the pool `[n, ...]` they were drawn of, whose `fingerprint` is kept.

    Raises:
        ValueError: the tasks point outside the pool.

    Example:
        >>> import tempfile, jax
        >>> from jaxtransfer.data.episodes import class_index, draw, gather
        >>> pool = jnp.arange(12.0)[:, None]
        >>> drawn = draw(jax.random.key(0), class_index(np.arange(12) % 4), tasks=600,
        ...              ways=3, shots=1, queries=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_episodes(f"{folder}/test.npz", drawn, pool)
        ...     tasks = gather(pool, load_episodes(f"{folder}/test.npz", pool))
        >>> tasks["support"]["inputs"].shape
        (600, 3, 1)
    """
    arrays: dict[str, Any] = {
        f"{part}.{name}": np.asarray(values)
        for part, fields in drawn.items()
        for name, values in fields.items()
    }
    check_rows(drawn, len(inputs))
    with open(path, "wb") as file:
        np.savez_compressed(file, **{_POOL: np.array(fingerprint(inputs)), **arrays})


def load_episodes(
    path: str | os.PathLike[str], inputs: Shaped[AnyArray, "n ..."]
) -> Drawn:
    """Read tasks that `save_episodes` wrote, for `gather`.

    Args:
        path: the file.
        inputs: the pool `[n, ...]`; must be the one they were drawn of.

    Returns:
        The tasks, bit for bit.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file of tasks, or the pool is another.

    Example:
        See `save_episodes`.
    """
    try:
        with zipfile.ZipFile(path) as archive, np.load(path) as stored:
            archive.getinfo(f"{_POOL}.npy")
            arrays = {name: stored[name] for name in stored.files}
        drawn_of = str(arrays.pop(_POOL))
    except (KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path} is not a file of tasks written by save_episodes, or it is damaged"
        ) from error
    given = fingerprint(inputs)
    if given != drawn_of:
        raise ValueError(
            f"{path} was drawn of the pool {drawn_of}, but inputs is {given}; load the "
            "same data set, split, size and order as when it was saved"
        )
    drawn: Drawn = {}
    for name, values in arrays.items():
        part, _, field = name.partition(".")
        drawn.setdefault(part, {})[field] = jnp.asarray(values)
    return drawn
