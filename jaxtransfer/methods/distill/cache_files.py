"""The files of a teacher cache: arrays that are mapped, and a manifest beside them."""

import json
import os
import pathlib
import re
import uuid
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

MANIFEST = "manifest.json"
VERSION = 2
KINDS = {
    "teacher": "teacher",
    "examples": "data set",
    "augmentation": "augmentation",
    "content": "content",
}
"""What a cache is of: parts of its manifest, in words."""
_BLOCK = 2**24
_REMOVE = "remove the folder and write the cache again with distill.cache_teacher"


class Difference(NamedTuple):
    """What two caches differ in: of which kind, its name and both values in short."""

    kind: str
    name: str
    found: str
    wanted: str


def difference(
    found: Mapping[str, Any], wanted: Mapping[str, Any]
) -> Difference | None:
    """The first thing that a cache is of and was not wanted; what is not said fits."""
    for part, kind in KINDS.items():
        if part not in wanted:
            continue
        asked, there = wanted[part], found[part]
        if isinstance(asked, str):
            asked, there = {"fingerprint": asked}, {"fingerprint": there}
        for name, value in asked.items():
            if not _equal(name, value, there[name]):
                return Difference(kind, name, _short(there[name]), _short(value))
    return None


def _equal(name: str, one: Any, other: Any) -> bool:
    if name != "probe":
        return one == other
    return len(one) == len(other) and np.allclose(one, other, rtol=1e-3, atol=1e-3)


def _short(value: Any) -> str:
    text = f"{value}"
    return text if len(text) <= 60 else f"{text[:57]}..."


class DamagedCacheError(RuntimeError):
    """A teacher cache can't be read as it was written; nothing was changed."""


def _checksum(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def write_manifest(folder: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Write the manifest under another name and rename it, so that it is whole."""
    text = json.dumps({**content, "checksum": _checksum(content)}, indent=1)
    part = folder / f"{MANIFEST}.{uuid.uuid4().hex[:8]}.part"
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, folder / MANIFEST)
    finally:
        part.unlink(missing_ok=True)


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    """Read the manifest.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is of another version.
        DamagedCacheError: it is truncated or was changed.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"no teacher cache in {str(folder)!r} (no {MANIFEST}); write one with "
            "distill.cache_teacher"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        crc, version = content.pop("checksum"), content["version"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCacheError(
            f"{path} is damaged ({error or type(error).__name__}); {_REMOVE}"
        ) from error
    if version != VERSION:
        raise ValueError(
            f"{path} is of version {version}, this library reads version {VERSION}; "
            f"{_REMOVE}"
        )
    if crc != _checksum(content):
        raise DamagedCacheError(
            f"{path} is damaged or was edited: its checksum is not that of its "
            f"content; {_REMOVE}"
        )
    return content


def file_names(paths: Any) -> dict[str, str]:
    """A file for each path: numbered, and named after it."""
    return {
        path: f"{number}_{re.sub(r'[^A-Za-z0-9_]+', '.', path) or 'outputs'}.npy"
        for number, path in enumerate(paths)
    }


def bytes_of(arrays: Mapping[str, Any]) -> int:
    """How many bytes the values of all arrays of a manifest take."""
    return sum(
        int(np.prod(array["shape"], dtype=np.int64)) * np.dtype(array["dtype"]).itemsize
        for array in arrays.values()
    )


def make_arrays(folder: pathlib.Path, arrays: Mapping[str, Any]) -> None:
    """Make the files, of their full size, filled with zeros."""
    for array in arrays.values():
        made = np.lib.format.open_memmap(
            folder / array["file"],
            mode="w+",
            dtype=np.dtype(array["dtype"]),
            shape=tuple(array["shape"]),
        )
        made.flush()
        del made


def map_arrays(folder: pathlib.Path, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Map the arrays into memory, to be read only.

    Raises:
        DamagedCacheError: a file is missing, shorter than its array, or another one.
    """
    found = {}
    for path, array in arrays.items():
        file = folder / array["file"]
        try:
            mapped = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DamagedCacheError(
                f"{file}, what the teacher says at {path!r}, is missing or truncated "
                f"({error}); {_REMOVE}"
            ) from error
        is_it = list(mapped.shape), str(mapped.dtype)
        if is_it != (array["shape"], array["dtype"]):
            raise DamagedCacheError(
                f"{file} is {is_it[1]}{is_it[0]}, the manifest says "
                f"{array['dtype']}{array['shape']}; {_REMOVE}"
            )
        found[path] = mapped
    return found


def file_checksum(file: pathlib.Path) -> int:
    """CRC-32 of a whole file."""
    crc = 0
    with file.open("rb") as opened:
        while block := opened.read(_BLOCK):
            crc = zlib.crc32(block, crc)
    return crc


def check_checksums(folder: pathlib.Path, manifest: Mapping[str, Any]) -> None:
    """Read all files and compare them with what was written.

    Raises:
        DamagedCacheError: a file was changed.
    """
    for path, crc in manifest["checksums"].items():
        file = folder / manifest["arrays"][path]["file"]
        if file_checksum(file) != crc:
            raise DamagedCacheError(
                f"{file}, what the teacher says at {path!r}, is damaged: its values "
                f"are not those written; {_REMOVE}"
            )


class Writer:
    """Rows of the arrays, written with ordinary writes.

    A full disk is an ``OSError`` then; through a mapping it would end the process.
    """

    def __init__(self, folder: pathlib.Path, arrays: Mapping[str, Any]):
        map_arrays(folder, arrays)  # refuses what is truncated
        self._arrays = arrays
        self._files = {
            path: (folder / array["file"]).open("r+b") for path, array in arrays.items()
        }
        size = {path: os.fstat(file.fileno()).st_size for path, file in self._opened()}
        self._starts = {
            path: size[path] - bytes_of({path: array}) for path, array in arrays.items()
        }

    def _opened(self) -> Any:
        return self._files.items()

    def write(self, variant: int, start: int, rows: Mapping[str, np.ndarray]) -> None:
        """Put rows of a variant in their place, from example ``start`` on."""
        for path, file in self._opened():
            _, number, *shape = self._arrays[path]["shape"]
            row = int(np.prod(shape, dtype=np.int64)) * rows[path].dtype.itemsize
            file.seek(self._starts[path] + (variant * number + start) * row)
            file.write(np.ascontiguousarray(rows[path]).tobytes())

    def flush(self) -> None:
        """Return when everything lies on the disk."""
        for _, file in self._opened():
            file.flush()
            os.fsync(file.fileno())

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: Any) -> None:
        for _, file in self._opened():
            file.close()


__all__ = [
    "MANIFEST",
    "VERSION",
    "DamagedCacheError",
    "Writer",
    "bytes_of",
    "check_checksums",
    "file_checksum",
    "file_names",
    "make_arrays",
    "map_arrays",
    "read_manifest",
    "write_manifest",
]
