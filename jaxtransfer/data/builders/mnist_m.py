"""TFDS builder of MNIST-M, from `mnist_m.zip`."""

import pathlib
import posixpath
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jaxtransfer.data.arrays import check_labels

FILE = "mnist_m.zip"
COMPLETE = {"train": 59001, "test": 9001}
_SIDE = 32
_PNG = b"\x89PNG\r\n\x1a\n"


class MnistM(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """MNIST-M: MNIST digits blended with patches of colour photographs, 32x32 RGB."""

    name = "mnist_m"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"Put {FILE} in the manual folder: mnist_m_train/*.png (59,001 in the complete "
        "release), mnist_m_test/*.png (9,001), mnist_m_train_labels.txt and "
        "mnist_m_test_labels.txt with lines 'NAME LABEL'."
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="MNIST-M, 32x32 RGB.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(_SIDE, _SIDE, 3)),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            citation=(
                "Y. Ganin et al., Domain-adversarial training of neural networks, "
                "Journal of Machine Learning Research 17(59), 1-35, 2016."
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
        path = pathlib.Path(dl_manager.manual_dir) / FILE
        index = read_index(path)
        return {name: self._generate_examples(path, index[name]) for name in index}

    def _generate_examples(
        self, path: pathlib.Path, members: list[tuple[str, int]]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        with zipfile.ZipFile(path) as archive:
            for member, label in members:
                encoded = read_image(archive, member)
                key = posixpath.basename(member)
                yield key, {"image": encoded, "label": label}


def read_index(path: pathlib.Path) -> dict[str, list[tuple[str, int]]]:
    """Read the labels and check that every labelled image is in the archive.

    Args:
        path: `mnist_m.zip`.

    Returns:
        For `"train"` and `"test"`: pairs of member name and label.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a zip, a label file or image missing, or a line that's wrong.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} doesn't exist")
    try:
        with zipfile.ZipFile(path) as archive:
            members = set(archive.namelist())
            return {
                split: _read_labels(archive, members, f"mnist_m_{split}")
                for split in ("train", "test")
            }
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        raise ValueError(f"{path} is damaged or isn't MNIST-M: {error}") from error


def _read_labels(
    archive: zipfile.ZipFile, members: set[str], stem: str
) -> list[tuple[str, int]]:
    listing = next((m for m in members if _named(m, f"{stem}_labels.txt")), None)
    if listing is None:
        raise ValueError(f"{stem}_labels.txt is not in the archive")
    folder = posixpath.join(posixpath.dirname(listing), stem)
    pairs = []
    lines = archive.read(listing).decode("ascii", "replace").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ")
        if not name or not label.isdecimal():
            raise ValueError(f"{listing} line {number} is {line!r}, not 'NAME LABEL'")
        member = posixpath.join(folder, name)
        if member not in members:
            raise ValueError(f"{listing} line {number}: {member} is not in the archive")
        pairs.append((member, int(label)))
    try:
        check_labels(np.array([label for _, label in pairs], np.int64), 10)
    except ValueError as error:
        raise ValueError(f"{listing}: {error}") from error
    return pairs


def _named(member: str, name: str) -> bool:
    return posixpath.basename(member) == name and "__MACOSX" not in member


def read_image(archive: zipfile.ZipFile, member: str) -> bytes:
    """Read one PNG of the archive and check that it decodes to 32x32.

    Args:
        archive: the open zip.
        member: name of the image in it.

    Returns:
        The encoded PNG.

    Raises:
        ValueError: damaged member, no PNG, or another size.
    """
    import io

    from PIL import Image

    try:
        encoded = archive.read(member)
        image = Image.open(io.BytesIO(encoded))
        image.load()
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError) as error:
        raise ValueError(f"{archive.filename}: {member} is damaged: {error}") from error
    if image.size != (_SIDE, _SIDE):
        raise ValueError(f"{archive.filename}: {member} is {image.size}, not 32x32")
    if image.mode == "RGB" and encoded.startswith(_PNG):
        return encoded
    converted = io.BytesIO()
    image.convert("RGB").save(converted, "PNG")
    return converted.getvalue()
