"""What is written of a state, and what is written down about it."""

import json
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxtransfer import tree
from jaxtransfer.train.state import TrainState

RECORD = "record"
"""Folder of the record inside that of a checkpoint."""


_SAVED = ("step", "params", "model_state", "opt_state", "key")


def leaves_of(state: TrainState) -> dict[str, jax.Array]:
    """What is saved of a state, by path: everything but what is frozen."""
    saved = {name: getattr(state, name) for name in _SAVED}
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(saved)
    }


def with_leaves(state: TrainState, leaves: Mapping[str, jax.Array]) -> TrainState:
    """Put leaves by path in the place of those of :func:`leaves_of`."""
    structure = jax.tree.structure({name: getattr(state, name) for name in _SAVED})
    ordered = [leaves[path] for path in leaves_of(state)]
    return state.replace(**jax.tree.unflatten(structure, ordered))


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def describe(leaf: Any) -> str:
    """Type and shape of an array, e.g. ``float32[3,4]``."""
    return f"{leaf.dtype}[{','.join(map(str, np.shape(leaf)))}]"


def checksum(leaf: Any) -> int | None:
    """CRC-32 of the values; ``None`` if this process doesn't hold them all."""
    if _is_key(leaf):
        leaf = jax.random.key_data(leaf)
    if isinstance(leaf, jax.Array) and not (
        leaf.is_fully_addressable or leaf.is_fully_replicated
    ):
        return None
    array = np.ascontiguousarray(np.asarray(leaf))
    return zlib.crc32(array.reshape(-1).view(np.uint8).data)


def bytes_of(leaf: Any) -> int:
    """How many bytes the values of an array take."""
    leaf = jax.random.key_data(leaf) if _is_key(leaf) else leaf
    return int(np.prod(np.shape(leaf), dtype=np.int64)) * np.dtype(leaf.dtype).itemsize


class Record:
    """What is known of a checkpoint beside its arrays; one file a process."""

    def __init__(self, content: Mapping[str, Any]):
        self._text = json.dumps(content)

    async def save(self, directory: Any) -> Any:
        """Write in the background, as orbax asks for."""

        async def write() -> None:
            folder = pathlib.Path(await directory.await_creation())
            crc = zlib.crc32(self._text.encode())
            (folder / _record_name(jax.process_index())).write_text(
                f"{crc}\n{self._text}"
            )

        return write()

    async def load(self, directory: Any) -> Any:
        """Read back in the background; as `read_record`, which needs no orbax."""

        async def read() -> None:
            name = _record_name(jax.process_index())
            self._text = _written(pathlib.Path(directory) / name)

        return read()


def _record_name(process: int | str) -> str:
    return f"process_{process}.json"


def read_record(folder: pathlib.Path) -> dict[str, Any]:
    """Read the record of a checkpoint that this process wrote.

    A process that the run did not have reads that of the first one. ``"processes"`` is
    how many there were; records that lack it are counted.

    Raises:
        FileNotFoundError: the record is gone.
        ValueError: it is damaged.
        OSError: it can't be read now; it may be sound.
    """
    folder, process = folder / RECORD, jax.process_index()

    def read(number: int) -> dict[str, Any]:
        record = json.loads(_written(folder / _record_name(number)))
        record.setdefault("processes", len([*folder.glob(_record_name("*"))]))
        return record

    try:
        return read(process)
    except FileNotFoundError:
        record = read(0)
        if process < record["processes"]:
            raise
        return record


def _written(file: pathlib.Path) -> str:
    """The text that was written to a file."""
    crc, text = file.read_text().split("\n", 1)
    if int(crc) != zlib.crc32(text.encode()):
        raise ValueError("its record has another checksum than it was written with")
    return text


def position_of(data: Any) -> Any:
    """The position of a data iterator as JSON; ``None`` if it has none."""
    if not hasattr(data, "get_state"):
        return None
    state = data.get_state()
    if isinstance(state, bytes):
        return {"bytes": state.decode("latin-1")}
    return {"json": state}


def set_position(data: Any, position: Mapping[str, Any]) -> None:
    """Set a data iterator to what :func:`position_of` returned."""
    if "bytes" in position:
        data.set_state(position["bytes"].encode("latin-1"))
    else:
        data.set_state(position["json"])


def fingerprints(state: TrainState) -> dict[str, str]:
    """Fingerprint of what is frozen, by role."""
    frozen = state.frozen or {}
    return {role: tree.fingerprint(value) for role, value in frozen.items()}


__all__ = [
    "RECORD",
    "Record",
    "bytes_of",
    "checksum",
    "describe",
    "fingerprints",
    "leaves_of",
    "position_of",
    "read_record",
    "set_position",
    "with_leaves",
]
