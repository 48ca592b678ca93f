"""TFDS builder of USPS, from `usps.h5`."""

import io
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jaxtransfer.data.arrays import check_finite, check_labels

FILE = "usps.h5"
COMPLETE = {"train": 7291, "test": 2007}
_SIDE = 16


class Usps(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """USPS: 16x16 grey scans of handwritten digits from envelopes, ink is bright.

    Intensities in `[0, 1]` are stored as `round(255 x)`.
    """

    name = "usps"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"Put {FILE} in the manual folder: HDF5 with the groups train (7,291 digits) "
        "and test (2,007), each with data [n, 256] in 0..1 and target [n] in 0..9."
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="USPS handwritten digits, 16x16 grey.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(_SIDE, _SIDE, 1)),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            citation=(
                "J. J. Hull, A database for handwritten text recognition research, "
                "IEEE Transactions on Pattern Analysis and Machine Intelligence 16(5), "
                "550-554, 1994."
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
        path = pathlib.Path(dl_manager.manual_dir) / FILE
        splits = read(path)
        return {name: self._generate_examples(*splits[name]) for name in splits}

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        from PIL import Image

        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            encoded = io.BytesIO()
            Image.fromarray(image).save(encoded, "PNG")
            yield index, {"image": encoded.getvalue(), "label": int(label)}


def read(path: pathlib.Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Read and check the file.

    Args:
        path: `usps.h5`.

    Returns:
        For `"train"` and `"test"`: images uint8 `[n, 16, 16]` and labels `[n]`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not HDF5, a group or array missing, wrong shapes or values.
    """
    import h5py

    if not path.is_file():
        raise FileNotFoundError(f"{path} doesn't exist")
    try:
        with h5py.File(path, "r") as file:
            raw = {
                split: (
                    np.asarray(file[f"{split}/data"]),
                    np.asarray(file[f"{split}/target"]),
                )
                for split in ("train", "test")
            }
    except (OSError, KeyError) as error:
        raise ValueError(f"{path} is damaged or isn't USPS: {error}") from error
    splits = {}
    for split, (data, target) in raw.items():
        where = f"{path}, group {split}"
        if data.ndim != 2 or data.shape[1] != _SIDE**2 or len(data) != len(target):
            raise ValueError(
                f"{where}: data {data.shape} and target {target.shape} should be "
                f"[n, {_SIDE**2}] and [n]"
            )
        try:
            check_finite(data, "data")
            check_labels(target, 10)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if data.size and (data.min() < 0 or data.max() > 1):
            raise ValueError(f"{where}: data {data.min()}..{data.max()} is not in 0..1")
        images = np.round(data * 255).astype(np.uint8).reshape(-1, _SIDE, _SIDE)
        splits[split] = (images, target)
    return splits
