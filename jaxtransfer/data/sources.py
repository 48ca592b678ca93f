"""Where examples come from: embedded digits and prepared TFDS data sets.

Nothing here opens a network connection or imports TensorFlow. A data set that is
not on disk is an error that says which command makes it.
"""

import difflib
import os
import pathlib
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from jaxtransfer.data.records import ArrayRecords, Decoder, Source

DATA_DIR_VARIABLE = "JAXTRANSFER_DATA_DIR"
_DIGITS_SPLIT_SIZES = {"train": 1297, "test": 500}
_NAMES = {"image": "inputs", "label": "labels"}
_OWN_BUILDERS = {
    "usps": "usps.h5",
    "mnist_m": "mnist_m.zip",
    "movielens_100k": "u.data, u.user and u.item",
    "multi30k": "train.en.gz and the others",
}


def data_places(data_dir: str | os.PathLike[str] | None = None) -> list[pathlib.Path]:
    """Folders searched for prepared data sets, in order.

    Args:
        data_dir: one folder or several joined by `os.pathsep`; None stands for the
            environment variable `JAXTRANSFER_DATA_DIR`, then `~/tensorflow_datasets`.

    Returns:
        Every folder, each followed by its `tfds` subfolder.

    Example:
        >>> [place.name for place in data_places("a" + os.pathsep + "b")]
        ['a', 'tfds', 'b', 'tfds']
    """
    text = os.fspath(data_dir) if data_dir is not None else ""
    text = text or os.environ.get(DATA_DIR_VARIABLE, "") or "~/tensorflow_datasets"
    places = []
    for part in filter(None, text.split(os.pathsep)):
        folder = pathlib.Path(part).expanduser()
        places += [folder, folder / "tfds"]
    return places


def load(
    name: str,
    split: str = "train",
    *,
    data_dir: str | os.PathLike[str] | None = None,
) -> Source:
    """Open one split of a data set for random access, without TensorFlow.

    Args:
        name: `"digits"` (embedded) or a prepared TFDS data set, as `"mnist"`, `"usps"`,
            `"name/config"` or `"name:1.2.3"`.
        split: a TFDS split: `"train"`, `"test[:100]"`, `"train[10%:]"`, `"train+test"`.
        data_dir: where prepared data sets lie: a TFDS root or a folder with `tfds/` in
            it; several joined by `os.pathsep`. Default: `JAXTRANSFER_DATA_DIR`, then
            `~/tensorflow_datasets`.

    Returns:
        A `Source` of the split.

    Raises:
        FileNotFoundError: the data set isn't in any of the places; the message says
            what to run.
        ValueError: unknown split, or a data set in a format that needs TensorFlow.

    Example:
        >>> source = load("digits", "test[:3]")
        >>> len(source), source[0]["inputs"].shape, source[0]["inputs"].dtype
        (3, (8, 8, 1), dtype('uint8'))
    """
    if name == "digits":
        return _load_digits(split)
    folder = find_prepared(name, data_dir=data_dir)
    if folder is None:
        raise FileNotFoundError(_how_to_get(name, data_places(data_dir)))
    return _load_prepared(name, split, folder)


def find_prepared(
    name: str, *, data_dir: str | os.PathLike[str] | None = None
) -> pathlib.Path | None:
    """Folder of the newest prepared version of a TFDS data set, or None.

    Args:
        name: `"name"`, `"name/config"`, with `":version"` where one is wanted.
        data_dir: as in `load`.

    Returns:
        The folder that holds `dataset_info.json`, or None.

    Example:
        >>> find_prepared("mnist", data_dir="/nowhere") is None
        True
    """
    path, _, version = name.partition(":")
    for place in data_places(data_dir):
        infos = list((place / path).glob(f"{version or '*'}/dataset_info.json"))
        if infos:
            return max((info.parent for info in infos), key=_version_of)
    return None


def _version_of(folder: pathlib.Path) -> tuple[int, ...]:
    parts = folder.name.split(".")
    return tuple(int(part) if part.isdigit() else -1 for part in parts)


def _how_to_get(name: str, places: Sequence[pathlib.Path]) -> str:
    import tensorflow_datasets as tfds

    base = name.partition(":")[0].partition("/")[0]
    searched = ", ".join(str(place) for place in places)
    if base in _OWN_BUILDERS:
        manual = (
            f"put {_OWN_BUILDERS[base]} in a folder FOLDER and run: python -m "
            f"jaxtransfer.data.prepare {base} --manual-dir FOLDER --data-dir DATA"
        )
    else:
        manual = (
            f"run: python -m jaxtransfer.data.prepare {base} --data-dir DATA "
            "(needs the extra 'prepare'), or copy a folder that TFDS prepared as "
            f"array_record to DATA/{base}/VERSION"
        )
    there = {
        folder.name
        for place in places
        if place.is_dir()
        for folder in place.iterdir()
        if any(folder.glob("*/dataset_info.json"))
    } | {"digits"}
    near = difflib.get_close_matches(base, sorted(there | set(_OWN_BUILDERS)), n=1)
    known = {*there, *_OWN_BUILDERS, *tfds.list_builders(with_community_datasets=False)}
    hint = f" Did you mean {near[0]!r}?" if near and base not in known else ""
    return (
        f"data set {name!r} is not prepared (searched {searched}). To get it, {manual};"
        f" then give data_dir=DATA or set {DATA_DIR_VARIABLE}=DATA."
        f" Prepared here: {', '.join(sorted(there))}.{hint}"
    )


def _load_prepared(name: str, split: str, folder: pathlib.Path) -> Source:
    import tensorflow_datasets as tfds

    builder: Any
    try:
        builder = tfds.builder_from_directory(folder)
    except Exception as error:
        raise ValueError(
            f"data set {name!r} in {folder} can't be read ({error}); delete the folder"
            " and prepare it again"
        ) from error
    info = builder.info
    file_format = info.file_format
    if file_format is not None and file_format.value != "array_record":
        raise ValueError(
            f"data set {name!r} in {folder} is stored as {file_format.value}, which "
            "needs TensorFlow; prepare it again with file_format='array_record'"
        )
    _require_files(name, split, folder, info)
    images = {
        key: cast(Any, feature).shape[-1]
        for key, feature in info.features.items()
        if type(feature) is tfds.features.Image and feature.np_dtype == np.uint8
    }
    skip = {key: tfds.decode.SkipDecoding() for key in images}
    records: Any = builder.as_data_source(split=split, decoders=skip)
    try:
        for end in (0, len(records) - 1):
            records[end]
    except Exception as error:
        raise ValueError(
            f"data set {name!r} in {folder} is damaged ({error}); delete it and "
            "prepare it again"
        ) from error
    names = dict(_NAMES)
    if info.supervised_keys and len(info.supervised_keys) == 2:
        names = dict(zip(info.supervised_keys, ("inputs", "labels"), strict=True))
    label = next((old for old, new in names.items() if new == "labels"), None)
    feature = info.features[label] if label in info.features else None
    classes = getattr(feature, "num_classes", None)
    return Source(name, split, classes, records, Decoder(names, images))


def _require_files(name: str, split: str, folder: pathlib.Path, info: Any) -> None:
    """Check the split and its files before TFDS opens them."""
    import tensorflow_datasets as tfds

    wanted = tfds.core.ReadInstruction.from_spec(split).to_absolute(info.splits)
    count = 0
    for part in wanted:
        known = info.splits[part.splitname]
        count += (known.num_examples if part.to is None else part.to) - (
            part.from_ or 0
        )
        for path in map(str, known.filepaths):
            if not os.path.exists(path):
                raise FileNotFoundError(
                    f"{path} of data set {name!r} is missing; copy it there or delete "
                    f"{folder} and prepare the data set again"
                )
    if count <= 0:
        raise ValueError(f"split={split!r} of data set {name!r} holds no example")


def _load_digits(split: str) -> Source:
    """The 1,797 8x8 digits that scikit-learn carries (test set of UCI optdigits).

    A permutation fixed once (`RandomState(0)`, whose stream NumPy keeps) makes the
    first 1,297 the split `train` and the other 500 the split `test`. Intensities
    0..16 become 0..255.
    """
    from sklearn.datasets import load_digits
    from tensorflow_datasets.core import ReadInstruction, splits

    infos = [
        splits.SplitInfo(name=name, shard_lengths=[size], num_bytes=0)
        for name, size in _DIGITS_SPLIT_SIZES.items()
    ]
    parts = ReadInstruction.from_spec(split).to_absolute(splits.SplitDict(infos))
    images, labels = load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(labels))
    rows = dict(zip(_DIGITS_SPLIT_SIZES, np.split(order, [1297]), strict=True))
    chosen = np.concatenate([rows[p.splitname][p.from_ : p.to] for p in parts])
    if not len(chosen):
        raise ValueError(f"split={split!r} of data set 'digits' holds no example")
    pixels = np.round(images[chosen].reshape(-1, 8, 8, 1) * (255 / 16))
    arrays = {
        "inputs": pixels.astype(np.uint8),
        "labels": labels[chosen].astype(np.int32),
    }
    return Source("digits", split, 10, ArrayRecords(arrays), Decoder())
