"""Files of weights as flat dicts of named arrays: safetensors, npz, Flax msgpack."""

import os
import pathlib
import uuid
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import serialization

_SUFFIXES = (".safetensors", ".npz", ".msgpack")
_CONVERT = (
    "A file that PyTorch pickled is converted by "
    "safetensors.torch.save_file(torch.load(file), new_file)"
)


class _UnknownType(ValueError):
    """A sound file holds numbers of a type that can't be read."""


class _Content(NamedTuple):
    entries: dict[str, Any]  # arrays, and whatever else a file holds, in its order
    metadata: dict[str, str] | None = None
    parts: Mapping[str, tuple[str, ...]] = {}  # of names in msgpack, whose keys hold /


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a file of weights as it is, without a network.

    Args:
        path: ``.safetensors`` (needs the package of that name), ``.npz`` or
            ``.msgpack`` (what ``flax.serialization`` writes).

    Returns:
        ``{name: array}`` in the file's order, names and layout. Names of a nested
        file are joined by ``/``. What is no array of numbers, such as a list of
        labels, is there too.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: a safetensors file, without the package.
        ValueError: another ending, a folder, a pickle whatever its ending (none is
            ever opened), a file that can't be read, or numbers of a type that can't,
            such as 8-bit floating point.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "weights.npz")
        ...     np.savez(file, **{"head/kernel": np.ones((2, 3))})
        ...     read(file)["head/kernel"].shape
        (2, 3)
    """
    return read_content(path).entries


def read_content(path: str | os.PathLike[str]) -> _Content:
    """What :func:`read` gives, with a safetensors file's metadata."""
    file = pathlib.Path(path).expanduser()
    if file.is_dir():
        raise ValueError(
            f"path: {str(path)!r} is a folder; give the path of a file in it"
        )
    kind = kind_of(file)
    if not file.is_file():
        raise FileNotFoundError(f"no file {str(file)!r}; give the path of a file there")
    if kind == ".safetensors":
        _safetensors()  # its absence is no fault of the file
    try:
        return _READERS[kind](file)
    except _UnknownType:
        raise
    except Exception as error:  # each format raises kinds of its own
        if _is_pickle(file):
            raise ValueError(
                f"{str(file)!r} is a pickle, whatever its ending; none is opened, for "
                f"it can run code. {_CONVERT}"
            ) from None
        raise ValueError(
            f"{str(file)!r} can't be read as {kind} ({error}); is it whole, and does "
            "its ending say what it is?"
        ) from error


def write_content(path: str | os.PathLike[str], content: _Content) -> None:
    """Write entries in their order, names and layout."""
    file = pathlib.Path(path).expanduser()
    kind = kind_of(file)
    if not file.parent.is_dir():
        raise FileNotFoundError(
            f"no folder {str(file.parent)!r}; make it, or give a path in one that is "
            "there"
        )
    entries: dict[str, Any] = {
        name: np.ascontiguousarray(entry).reshape(entry.shape)
        if isinstance(entry, np.ndarray)
        else entry
        for name, entry in content.entries.items()
    }
    for name, entry in entries.items():
        if kind == ".npz" and _is_foreign(entry):
            raise ValueError(
                f"path: {str(path)!r} can't hold {name!r}, which is {entry.dtype}, no "
                "type of NumPy's; give a path that ends in .safetensors or .msgpack, "
                "or convert it to float32"
            )
    # A whole file or none, though several processes write it.
    part = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        if kind == ".safetensors":
            _safetensors().save_file(entries, part, metadata=content.metadata)
        elif kind == ".npz":
            with part.open("wb") as opened:
                np.savez(opened, **entries)
        else:
            nested = _nested(entries, content.parts)
            part.write_bytes(serialization.msgpack_serialize(nested))
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def kind_of(path: str | os.PathLike[str]) -> str:
    """The ending of a file's name, if it is one that can be read."""
    kind = pathlib.Path(path).suffix.lower()
    if kind not in _SUFFIXES:
        raise ValueError(
            f"path: {str(path)!r} ends in {kind!r}; weights are read from and written "
            f"to {', '.join(_SUFFIXES)}. {_CONVERT}"
        )
    return kind


def is_weight(entry: Any) -> bool:
    """Whether an entry is an array of numbers."""
    return isinstance(entry, np.ndarray) and (
        jax.dtypes.issubdtype(entry.dtype, np.number) or entry.dtype == np.bool_
    )


def _is_foreign(entry: Any) -> bool:
    """Whether NumPy writes an array, such as bfloat16, as bytes of no type."""
    return (
        isinstance(entry, np.ndarray)
        and entry.dtype.kind == "V"
        and not issubclass(entry.dtype.type, np.void)
    )


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "files that end in .safetensors need the package safetensors; run: "
            "python -m pip install safetensors"
        ) from error
    return safetensors.numpy


def _is_pickle(file: pathlib.Path) -> bool:
    """Whether a file is a pickle, or a zip of PyTorch's with one."""
    try:
        with file.open("rb") as opened:
            head = opened.read(3)
        # Third is an operation, "(" or above; safetensors begins with its header's
        # length, which may be 0x280, but is no millions.
        if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
            return head[2:] >= b"("
        if not zipfile.is_zipfile(file):
            return False
        with zipfile.ZipFile(file) as opened:
            return any(name.endswith("data.pkl") for name in opened.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def _read_safetensors(file: pathlib.Path) -> _Content:
    from safetensors import safe_open

    entries: dict[str, Any] = {}
    with safe_open(file, framework="np") as opened:
        for name in opened.keys():  # noqa: SIM118
            try:
                entries[name] = opened.get_tensor(name)
            except Exception as error:  # the header is sound, so it is the type
                kind = opened.get_slice(name).get_dtype()
                raise _UnknownType(
                    f"{str(file)!r} holds {name!r} as {kind}, a type that can't be "
                    "read; convert it to float32, float16 or bfloat16"
                ) from error
        return _Content(entries, opened.metadata())


def _read_npz(file: pathlib.Path) -> _Content:
    # NumPy's own errors advise to open pickles, and it reads PyTorch's zips as bytes.
    if _is_pickle(file) or not zipfile.is_zipfile(file):
        raise ValueError("it is no zip of arrays")
    entries: dict[str, Any] = {}
    with np.load(file, allow_pickle=False) as opened:
        for name in opened.files:
            try:
                entries[name] = opened[name]
            except ValueError as error:
                if "allow_pickle" not in str(error):
                    raise
                raise ValueError(
                    f"{name!r} holds pickled objects, which are not opened; save "
                    "arrays of numbers or text"
                ) from None
    return _Content(entries)


def _read_msgpack(file: pathlib.Path) -> _Content:
    entries: dict[str, Any] = {}
    parts: dict[str, tuple[str, ...]] = {}

    def visit(node: Any, path: tuple[str, ...]) -> None:
        if isinstance(node, Mapping) and (node or not path):
            for name, below in node.items():
                visit(below, (*path, str(name)))
        else:
            name = "/".join(path)
            if name in entries:
                raise ValueError(f"{name!r} is the name of two of its arrays")
            entries[name], parts[name] = node, path

    visit(serialization.msgpack_restore(file.read_bytes()), ())
    return _Content(entries, parts=parts)


def _nested(
    entries: Mapping[str, Any], parts: Mapping[str, tuple[str, ...]]
) -> dict[str, Any]:
    """Rebuild a nested dict in the order of the entries."""
    nested: dict[str, Any] = {}
    for path, entry in entries.items():
        *parents, name = parts.get(path) or path.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = entry
    return nested


_READERS = {
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
    ".msgpack": _read_msgpack,
}

__all__ = ["read"]
