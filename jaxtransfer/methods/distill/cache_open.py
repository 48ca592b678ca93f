"""Opening a teacher cache, and refusing one of something else."""

import hashlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxtransfer import tree
from jaxtransfer.methods.distill.augmentation import Augmentation
from jaxtransfer.methods.distill.cache_files import (
    check_checksums,
    difference,
    map_arrays,
    read_manifest,
)
from jaxtransfer.methods.distill.taught import TeacherCache
from jaxtransfer.typing import Inputs, Variables

_HASHED = 4096  # rows at once, so that examples may be larger than the memory


def open_cache(
    folder: str | os.PathLike[str],
    *,
    variables: Variables,
    examples: Inputs | int,
    augmentation: Augmentation | None = None,
    verify: bool = True,
) -> TeacherCache:
    """Open a complete cache of this teacher, these examples and this augmentation.

    Args:
        folder: of :func:`cache_teacher`.
        variables: of the teacher.
        examples: as they were given there; or their number alone, which is quicker and
            does not see that they or the augmentation's function changed.
        augmentation: as it was given there.
        verify: read everything once to see that no value changed on the disk.

    Returns:
        The cache.

    Raises:
        FileNotFoundError: there is no cache.
        ValueError: it is of another teacher, data set or augmentation, not complete, or
            of another version of this library; the message says which.
        DamagedCacheError: a file is truncated or was changed.
    """
    augmentation = augmentation or Augmentation()
    path = pathlib.Path(folder).expanduser().absolute()
    manifest = read_manifest(path)
    check_same(path, manifest, identity(variables, examples, augmentation))
    if "checksums" not in manifest:
        total = manifest["augmentation"]["variants"] * count_batches(manifest)
        raise ValueError(
            f"the cache in {str(path)!r} is not complete ({manifest['done']} of "
            f"{total} batches); call distill.cache_teacher with the same arguments to "
            "go on"
        )
    return opened(path, manifest, augmentation, verify)


def opened(
    path: pathlib.Path,
    manifest: Mapping[str, Any],
    augmentation: Augmentation,
    verify: bool,
) -> TeacherCache:
    """The cache of a complete manifest.

    Raises:
        DamagedCacheError: a file is truncated, or was changed and ``verify``.
    """
    arrays = map_arrays(path, manifest["arrays"])
    if verify:
        check_checksums(path, manifest)
    return TeacherCache(path, arrays, augmentation, manifest)


def count_examples(examples: Inputs) -> int:
    """Examples of a data set.

    Raises:
        ValueError: there are none, or not as many in all arrays.
    """
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(examples)}
    if len(sizes) != 1 or sizes & {(), (0,)}:
        raise ValueError(
            "examples: all arrays must have the same number of examples in front, at "
            f"least one, got shapes {[np.shape(x) for x in jax.tree.leaves(examples)]}"
        )
    return sizes.pop()[0]


def count_batches(manifest: Mapping[str, Any]) -> int:
    """Batches of one variant."""
    return -(-manifest["examples"]["number"] // manifest["content"]["batch_size"])


def identity(
    variables: Variables, examples: Inputs | int, augmentation: Augmentation
) -> dict[str, Any]:
    """What a cache is of."""
    if isinstance(examples, int | np.integer):
        return {
            "teacher": tree.fingerprint(variables),
            "examples": {"number": int(examples)},
            "augmentation": augmentation.describe(),
        }
    number, digest = count_examples(examples), hashlib.sha256()
    for start in range(0, number, _HASHED):
        rows = jax.tree.map(lambda x, n=start: x[n : n + _HASHED], examples)
        digest.update(tree.fingerprint(rows).encode())
    return {
        "teacher": tree.fingerprint(variables),
        "examples": {"number": number, "fingerprint": digest.hexdigest()},
        "augmentation": augmentation.describe(examples),
    }


def check_same(
    path: pathlib.Path, manifest: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
    """Refuse a cache of something else.

    Raises:
        ValueError: it is; the message says of what.
    """
    if other := difference(manifest, wanted):
        raise ValueError(
            f"the cache in {str(path)!r} is of another {other.kind}: its {other.name} "
            f"is {other.found}, that given {other.wanted}; write one for it into "
            "another folder with distill.cache_teacher, or remove this one if it is "
            "out of date"
        )


__all__ = [
    "check_same",
    "count_batches",
    "count_examples",
    "identity",
    "open_cache",
    "opened",
]
