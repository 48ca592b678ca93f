"""Prepare a data set for `load`: `python -m jaxtransfer.data.prepare NAME ...`.

The project's own builders (`usps`, `mnist_m`, `movielens_100k`, `multi30k`) need no
TensorFlow. Every other name is handed to the TFDS catalogue, whose generators do.
"""

import argparse
import difflib
import importlib
import importlib.util
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from jaxtransfer.data import sources

OWN = {
    "usps": ("jaxtransfer.data.builders.usps", "Usps"),
    "mnist_m": ("jaxtransfer.data.builders.mnist_m", "MnistM"),
    "movielens_100k": ("jaxtransfer.data.builders.movielens_100k", "Movielens100k"),
    "multi30k": ("jaxtransfer.data.builders.multi30k", "Multi30k"),
}


class PrepareError(Exception):
    """What stops a preparation, worded for the person who ran it."""


def prepare(
    name: str,
    *,
    data_dir: str | os.PathLike[str],
    manual_dir: str | os.PathLike[str] | None = None,
) -> pathlib.Path:
    """Prepare a data set as array_record under `data_dir`, unless it already is.

    Args:
        name: `"usps"`, `"mnist_m"`, `"movielens_100k"`, `"multi30k"`, or a data set of
            the TFDS catalogue.
        data_dir: TFDS root to write to.
        manual_dir: folder with the file of the public release, or a parent of it.

    Returns:
        The folder that now holds the data set.

    Raises:
        PrepareError: unknown name, no folder or several, missing or damaged file,
            TensorFlow missing for a catalogue set, a folder that can't be written.
    """
    if not os.fspath(data_dir) or os.pathsep in os.fspath(data_dir):
        raise PrepareError(
            f"--data-dir {os.fspath(data_dir)!r}: give one folder, to write to"
        )
    present = sources.find_prepared(name, data_dir=data_dir)
    if present is not None:
        return present
    if name in OWN:
        return _prepare_own(name, pathlib.Path(data_dir).expanduser(), manual_dir)
    return _prepare_catalogue(name, pathlib.Path(data_dir).expanduser(), manual_dir)


def _prepare_own(
    name: str, data_dir: pathlib.Path, manual_dir: str | os.PathLike[str] | None
) -> pathlib.Path:
    module_name, class_name = OWN[name]
    module = importlib.import_module(module_name)
    builder_class = getattr(module, class_name)
    instructions = builder_class.MANUAL_DOWNLOAD_INSTRUCTIONS
    if manual_dir is None:
        raise PrepareError(f"--manual-dir is needed for {name}. {instructions}")
    file = _find_file(pathlib.Path(manual_dir).expanduser(), module.FILE, instructions)
    _generate(builder_class, data_dir, file.parent)
    return sources.find_prepared(name, data_dir=data_dir) or data_dir / name


def _find_file(folder: pathlib.Path, file: str, instructions: str) -> pathlib.Path:
    """The file in `folder`, or the only one of that name one or two levels below."""
    if not folder.is_dir():
        raise PrepareError(f"--manual-dir {folder} is not a folder. {instructions}")
    for pattern in (file, f"*/{file}", f"*/*/{file}"):
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            listed = ", ".join(map(str, found))
            raise PrepareError(f"{folder} holds {listed}; give the folder of one")
        if found:
            return found[0]
    raise PrepareError(f"{file} is not in {folder} or below. {instructions}")


def _generate(builder_class: Any, data_dir: pathlib.Path, folder: pathlib.Path) -> None:
    import tensorflow_datasets as tfds

    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        builder = builder_class(data_dir=data_dir, file_format="array_record")
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(
                manual_dir=folder, try_download_gcs=False
            )
        )
    except FileNotFoundError as error:  # of the release: one of its other files
        raise PrepareError(
            f"{error}. {builder_class.MANUAL_DOWNLOAD_INSTRUCTIONS}"
        ) from error
    except OSError as error:
        raise PrepareError(f"can't write to {data_dir}: {error}") from error
    except ValueError as error:
        raise PrepareError(f"{error}; get the file again") from error


def _prepare_catalogue(
    name: str, data_dir: pathlib.Path, manual_dir: str | os.PathLike[str] | None
) -> pathlib.Path:
    import tensorflow_datasets as tfds

    base = name.partition(":")[0].partition("/")[0]
    catalogue = tfds.list_builders(with_community_datasets=False)
    if base not in catalogue:
        near = difflib.get_close_matches(base, [*OWN, *catalogue], n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise PrepareError(
            f"data set {name!r} is neither one of {', '.join(OWN)} nor in the TFDS "
            f"catalogue.{hint}"
        )
    if importlib.util.find_spec("tensorflow") is None:
        raise PrepareError(
            f"the TFDS catalogue's generator of {name!r} needs TensorFlow; run: pip "
            "install 'jaxtransfer[prepare]'"
        )
    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=manual_dir)
    )
    return pathlib.Path(builder.data_dir)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of `prepare`.

    Args:
        arguments: without the program's name; None takes those of the process.

    Returns:
        Exit status: 0, or 1 after an error, which is printed.
    """
    parser = argparse.ArgumentParser(
        prog="python -m jaxtransfer.data.prepare",
        description="Prepare a data set for jaxtransfer.data.load (array_record).",
    )
    parser.add_argument("name", help=f"{', '.join(OWN)}, or a TFDS catalogue name")
    parser.add_argument(
        "--manual-dir",
        metavar="DIR",
        help="folder with the file of the public release, or a parent of it",
    )
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        default=os.environ.get(sources.DATA_DIR_VARIABLE, "").split(os.pathsep)[0]
        or "~/tensorflow_datasets",
        help="TFDS root to write to (default: the first of JAXTRANSFER_DATA_DIR, or "
        "~/tensorflow_datasets)",
    )
    options = parser.parse_args(arguments)
    present = sources.find_prepared(options.name, data_dir=options.data_dir)
    if options.name == "digits":
        print("digits is embedded: there is nothing to prepare")
        return 0
    try:
        folder = prepare(
            options.name, data_dir=options.data_dir, manual_dir=options.manual_dir
        )
    except PrepareError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    state = "was already prepared" if present else "is prepared"
    print(f"{options.name} {state} in {folder}: {_counts(folder)}")
    return 0


def _counts(folder: pathlib.Path) -> str:
    import tensorflow_datasets as tfds

    splits = tfds.builder_from_directory(folder).info.splits
    return ", ".join(f"{name} {splits[name].num_examples:,}" for name in splits)


if __name__ == "__main__":
    sys.exit(main())
