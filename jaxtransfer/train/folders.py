"""Folders that a run writes to: found unusable at the start, not after an hour."""

import errno
import os
import pathlib
import shutil
import tempfile

RESERVE = 32 * 2**20
"""Bytes that must stay free beside what is going to be written."""


def check_folder(folder: str | os.PathLike[str], *, needed: int = 0) -> pathlib.Path:
    """Make a folder and see that files can be written there.

    Args:
        folder: the folder; made with its parents if it doesn't exist.
        needed: how many bytes are going to be written.

    Returns:
        Its absolute path.

    Raises:
        OSError: it can't be made or written to (the subclass that the system gives,
            e.g. ``PermissionError``), or the disk has less than ``needed`` bytes and
            a small reserve left.
    """
    path = pathlib.Path(folder).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path, prefix=".probe-") as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise OSError(
            error.errno or errno.EIO,
            f"folder {str(path)!r} can't be written to ({error.strerror or error}); "
            "choose another one or free space there",
        ) from error
    free = shutil.disk_usage(path).free
    if free < needed + RESERVE:
        raise OSError(
            errno.ENOSPC,
            f"the disk of {str(path)!r} has {free / 2**20:,.0f} MiB left, this run "
            f"needs about {(needed + RESERVE) / 2**20:,.0f} MiB; free space, keep "
            "fewer checkpoints or choose another folder",
        )
    return path


__all__ = ["RESERVE", "check_folder"]
