"""Checkpoints of a run; the only file that imports orbax."""

import os
import pathlib
import uuid
from collections.abc import Mapping
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from jaxtransfer import parallel, processes
from jaxtransfer.train.folders import check_folder
from jaxtransfer.train.record import (
    RECORD,
    Record,
    bytes_of,
    checksum,
    describe,
    fingerprints,
    leaves_of,
    position_of,
    read_record,
    set_position,
    with_leaves,
)
from jaxtransfer.train.state import TrainState

_STATE = "state"


def _with_values(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves without those of size 0, which orbax refuses to write."""
    return {path: leaf for path, leaf in leaves.items() if leaf.size}


def _check_readable(folder: pathlib.Path) -> None:
    """Raise ``PermissionError`` if files may not be read: they may well be sound."""

    def refuse(error: OSError) -> None:
        if isinstance(error, PermissionError):
            raise error

    for place, _, names in os.walk(folder, onerror=refuse):
        for name in names:
            open(os.path.join(place, name), "rb").close()


def _check_shared(folder: pathlib.Path) -> None:
    """Refuse folders that each process has of its own.

    Raises:
        OSError: one doesn't see what process 0 has written.
    """
    if jax.process_count() == 1:
        return
    token = folder / f".shared-{uuid.uuid4().hex}"
    token.touch()
    try:
        first = processes.exchange(token.name)[0]
        with processes.together(OSError):
            if not (folder / first).exists():
                raise OSError(
                    f"folder {str(folder)!r} is not that of process 0: what that wrote "
                    "is not there; give a folder that all processes share"
                )
    finally:
        token.unlink()


def _everywhere(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves, with those that each process has of its own as such of all."""
    own = {path: leaf for path, leaf in leaves.items() if processes.is_own(leaf)}
    if jax.process_count() == 1 or not own:
        return dict(leaves)
    return {**leaves, **parallel.replicate(own, parallel.make_mesh())}


class DamagedCheckpointError(RuntimeError):
    """A checkpoint can't be read back as it was written; nothing was changed."""


class Checkpointer:
    """Asynchronous checkpoints with retention, in one folder for one run.

    Saved are ``step``, ``params``, ``model_state``, ``opt_state``, ``key`` and the
    position of the data iterator. What is frozen is not saved but fingerprinted by
    role: a run that is resumed must be given the same. A step is written under a
    temporary name and renamed when it is complete, so a process that is killed in
    the middle of a save leaves no partial checkpoint behind.

    With several processes all make one, of a folder that they share, and all save and
    restore at the same steps; each writes its part. What keeps one process from
    restoring is raised in all.

    Args:
        directory: folder of the checkpoints of one run; made if it doesn't exist.
        every: updates between two checkpoints, ≥ 1.
        keep: how many of the latest are kept, ≥ 1.
        teacher: where the frozen weights come from (a path or a name); kept in the
            checkpoints to name it when another is given.

    Raises:
        ValueError: ``every`` or ``keep`` is less than 1.
        OSError: the folder can't be written to, or is not shared by all processes.

    Example:
        >>> import tempfile
        >>> import jax, jax.numpy as jnp, optax
        >>> from jaxtransfer.train import init_state
        >>> from jaxtransfer.typing import Variables
        >>> start = Variables({"w": jnp.arange(3.0)})
        >>> state = init_state(jax.random.key(0), start, optax.sgd(0.1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with Checkpointer(folder, every=10) as checkpointer:
        ...         saved = checkpointer.save(10, state)
        ...         checkpointer.wait()
        ...         latest = checkpointer.latest_step
        ...         restored = checkpointer.restore(state)
        >>> saved, latest, restored.params["w"].tolist()
        (True, 10, [0.0, 1.0, 2.0])
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        every: int = 1000,
        keep: int = 3,
        teacher: str | None = None,
    ):
        for name, value in (("every", every), ("keep", keep)):
            if value < 1:
                raise ValueError(f"{name}: must be at least 1, got {value}")
        with processes.together(OSError):
            self.directory = check_folder(directory)
        _check_shared(self.directory)
        self.every, self.keep, self.teacher = every, keep, teacher
        self._fingerprints: dict[str, str] | None = None
        self._written: int | None = None  # latest step this run saved or restored
        policies = ocp.training.preservation_policies
        self._orbax = ocp.training.Checkpointer(
            str(self.directory),
            preservation_policy=policies.LatestN(keep),  # pyright: ignore[reportArgumentType]
            cleanup_tmp_directories=True,
        )

    @property
    def latest_step(self) -> int | None:
        """Step of the latest complete checkpoint; ``None`` if there is none."""
        latest = self._orbax.latest
        return None if latest is None else int(latest.step)

    def folder(self, step: int) -> pathlib.Path:
        """Folder of the checkpoint of a step."""
        return self.directory / str(step)

    def check_space(self, state: TrainState) -> None:
        """Raise ``OSError`` if the disk can't hold the checkpoints of a run.

        Args:
            state: a state of the run; ``keep`` checkpoints and the one being written
                are counted, less those that are there already.
        """
        size = sum(map(bytes_of, leaves_of(state).values()))
        missing = self.keep + 1 - min(len(self._orbax.checkpoints), self.keep)
        check_folder(self.directory, needed=size * missing)

    def save(
        self, step: int, state: TrainState, data: Any = None, force: bool = False
    ) -> bool:
        """Start to save a checkpoint, if one is due.

        Args:
            step: number of updates done.
            state: the state; may be donated to the next step as soon as this returns.
            data: the data iterator; its position is saved if it has ``get_state``.
            force: save although ``step`` is no multiple of ``every``.

        Returns:
            Whether a checkpoint is written (in the background; see :meth:`wait`).

        Raises:
            FileExistsError: there is a checkpoint of this step that this run did not
                write.
            RuntimeError: it, or the checkpoint before, could not be written.
            ValueError: each process has a state of its own, and they differ.
        """
        if step == self._written or not (force or step % self.every == 0):
            return False
        if any(known.step == step for known in self._orbax.checkpoints):
            raise FileExistsError(
                f"{self.folder(step)} exists and is not of this run; give the run "
                "another directory, or remove the folder"
            )
        leaves = _everywhere(leaves_of(state))
        if self._fingerprints is None:
            self._fingerprints = fingerprints(state)
        record = {
            "step": step,
            "processes": jax.process_count(),
            "arrays": {path: describe(leaf) for path, leaf in leaves.items()},
            "checksums": {path: checksum(leaf) for path, leaf in leaves.items()},
            "frozen": self._fingerprints,
            "teacher": self.teacher,
            "data": position_of(data),
        }
        self.wait()  # for the one before: its failure is not this one's
        self._guarded(
            step,
            self._orbax.save_checkpointables_async,
            step,
            {_STATE: _with_values(leaves), RECORD: Record(record)},
            force=True,
        )
        self._written = step
        return True

    def restore(
        self, state: TrainState, data: Any = None, *, step: int | None = None
    ) -> TrainState:
        """Read a checkpoint back.

        Args:
            state: a state of the same run, such as a fresh one: gives the structure,
                the placement on devices, and what is frozen.
            data: the data iterator; set to the position that was saved.
            step: which checkpoint; the latest if ``None``.

        Returns:
            The state as it was saved, with the frozen part of ``state``.

        Raises:
            FileNotFoundError: there is no checkpoint (of that step).
            ValueError: the checkpoint is of another network, optimizer or teacher, or
                was saved without the position that ``data`` needs, or by another number
                of processes; or it comes back in another type, such as float64 where
                the process has none.
            DamagedCheckpointError: the checkpoint is truncated or changed.
            OSError: it can't be read, such as for want of permission.
        """
        self.wait()
        kinds = DamagedCheckpointError, FileNotFoundError, OSError, ValueError
        with processes.together(*kinds):
            step, known, record = self._checked(state, step)
        folder, wanted = self.folder(step), leaves_of(state)
        abstract = {
            path: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None)
            )
            for path, leaf in _with_values(wanted).items()
        }
        with processes.together(*kinds):
            loaded = self._load(step, known, abstract)
            empty = {path: leaf for path, leaf in wanted.items() if not leaf.size}
            loaded = {**loaded, **empty}
            self._check_loaded(step, known, record, loaded)
            if data is not None and hasattr(data, "set_state"):
                self._check_position(folder, record)
                set_position(data, record["data"])
        self._written = step
        return with_leaves(state, loaded)

    def _checked(
        self, state: TrainState, step: int | None
    ) -> tuple[int, list[int], dict[str, Any]]:
        """Which step is read, those there are, and the record: all that fits."""
        known = [int(checkpoint.step) for checkpoint in self._orbax.checkpoints]
        if not known or (step is not None and step not in known):
            raise FileNotFoundError(
                f"no checkpoint{'' if step is None else f' of step {step}'} in "
                f"{str(self.directory)!r}; there are those of steps {known}"
            )
        step = known[-1] if step is None else step
        folder = self.folder(step)
        if not (folder / RECORD).is_dir():
            raise ValueError(
                f"{folder} was not written by jaxtransfer (or lost its folder "
                f"{RECORD!r}); choose another directory"
            )
        try:
            record = read_record(folder)
        except (FileNotFoundError, ValueError) as error:
            raise self._damaged(step, known, error) from error
        self._check_same(folder, record, state, leaves_of(state))
        return step, known, record

    def _load(
        self, step: int, known: list[int], abstract: Mapping[str, Any]
    ) -> dict[str, Any]:
        try:
            return self._orbax.load_checkpointables(step, {_STATE: abstract})[_STATE]
        except Exception as error:  # orbax raises many kinds, of no permission too
            _check_readable(self.folder(step) / _STATE)
            raise self._damaged(step, known, error) from error

    def _check_loaded(
        self,
        step: int,
        known: list[int],
        record: Mapping[str, Any],
        loaded: Mapping[str, Any],
    ) -> None:
        for path, leaf in loaded.items():
            if describe(leaf) != record["arrays"][path]:
                raise ValueError(
                    f"{self.folder(step)}: {path!r} came back as {describe(leaf)}, not "
                    f"{record['arrays'][path]}; float64 is read if the whole process "
                    'has it: jax.config.update("jax_enable_x64", True)'
                )
        for path, crc in record["checksums"].items():
            found = checksum(loaded[path])
            if None not in (crc, found) and found != crc:
                error = ValueError(f"the values of {path!r} are not those written")
                raise self._damaged(step, known, error)

    def wait(self) -> None:
        """Wait until what is being saved is written.

        Raises:
            RuntimeError: it could not be written; earlier checkpoints are untouched.
        """
        self._guarded(self._written, self._orbax.wait)

    def close(self) -> None:
        """Wait, then let go of the folder."""
        self._guarded(self._written, self._orbax.close)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _guarded(
        self, step: int | None, function: Any, *args: Any, **kwargs: Any
    ) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            raise RuntimeError(
                f"the checkpoint of step {step} could not be written to "
                f"{str(self.directory)!r} ({type(error).__name__}: {error}); earlier "
                "checkpoints are untouched"
            ) from error

    def _damaged(
        self, step: int, known: list[int], error: Exception
    ) -> DamagedCheckpointError:
        earlier = [other for other in known if other < step]
        remedy = (
            f"remove that folder to go on from step {earlier[-1]}, or call "
            f"restore(..., step={earlier[-1]})"
            if earlier
            else "there is no earlier one: remove that folder to start over"
        )
        reason = str(error).strip().split("\n")[0][:200]
        return DamagedCheckpointError(
            f"checkpoint {self.folder(step)} is damaged ({type(error).__name__}: "
            f"{reason}); {remedy}. Nothing was changed."
        )

    def _check_position(self, folder: pathlib.Path, record: Mapping[str, Any]) -> None:
        over = (
            "to start the data over, give batches that have no position, such as "
            "(batch for batch in data), or call restore(..., data=None)"
        )
        if record["data"] is None:
            raise ValueError(
                f"data: can be set to a position, but {folder} holds none (the run was "
                f"over data without get_state); {over}"
            )
        if (there := record["processes"]) != (here := jax.process_count()):
            raise ValueError(
                f"data: {folder} holds positions of a run of {there} process(es), this "
                f"one has {here}; go on with {there}, or {over}"
            )

    def _check_same(
        self,
        folder: pathlib.Path,
        record: Mapping[str, Any],
        state: TrainState,
        wanted: Mapping[str, Any],
    ) -> None:
        saved = record["arrays"]
        given = {path: describe(leaf) for path, leaf in wanted.items()}
        paths = {**given, **saved}
        for path in sorted(paths, key=lambda path: not path.startswith("params/")):
            if saved.get(path) != given.get(path):
                raise ValueError(
                    f"{folder} is of another run: {path!r} is "
                    f"{saved.get(path, 'missing')} there and "
                    f"{given.get(path, 'missing')} here; give the same network and "
                    "optimizer, or another directory"
                )
        self._fingerprints = fingerprints(state)
        for role in sorted({*record["frozen"], *self._fingerprints}):
            there, here = record["frozen"].get(role), self._fingerprints.get(role)
            if there != here:
                named = f" ({record['teacher']})" if record["teacher"] else ""
                raise ValueError(
                    f"{folder} was trained with another frozen {role!r}{named}: "
                    f"fingerprint {(there or 'missing')[:12]} there, "
                    f"{(here or 'missing')[:12]} here; load the same weights into "
                    f"frozen[{role!r}], or start a new run in another directory"
                )


__all__ = ["Checkpointer", "DamagedCheckpointError"]
