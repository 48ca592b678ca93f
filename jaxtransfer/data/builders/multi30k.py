"""TFDS builder of Multi30k, from its gzipped lines of text."""

import gzip
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

FILE = "train.en.gz"
LANGUAGES = ("en", "de", "fr", "cs")
COMPLETE = {
    "train": 29_000,
    "validation": 1_014,
    "test_2016_flickr": 1_000,
    "test_2017_flickr": 1_000,
}
_FILES = {"validation": "val"}
_WITHOUT = {("test_2017_flickr", "cs")}


class Multi30k(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Multi30k, task 1: one sentence about a picture in four languages.

    There is no Czech in `test_2017_flickr`: its sentences are empty.
    """

    name = "multi30k"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Put train, val, test_2016_flickr and test_2017_flickr in each of "
        f"{', '.join(LANGUAGES)} (as {FILE}) in the manual folder, from the release of "
        "task 1: one sentence a line, raw."
    )

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features
        return self.dataset_info_from_configs(
            description="Multi30k: descriptions of pictures in four languages.",
            features=features.FeaturesDict(
                {language: features.Text() for language in LANGUAGES}
            ),
            citation=(
                "D. Elliott, S. Frank, K. Sima'an, L. Specia, Multi30K: multilingual "
                "English-German image descriptions, Workshop on Vision and Language, "
                "2016."
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
        splits = {split: read(dl_manager.manual_dir, split) for split in COMPLETE}
        return {
            split: self._generate_examples(lines) for split, lines in splits.items()
        }

    def _generate_examples(
        self, lines: dict[str, list[str]]
    ) -> Iterator[tuple[int, dict[str, str]]]:
        for number, sentences in enumerate(zip(*lines.values(), strict=True)):
            yield number, dict(zip(lines, sentences, strict=True))


def read(folder: Any, split: str) -> dict[str, list[str]]:
    """Read and check a split.

    Args:
        folder: holds the files, such as `train.en.gz`.
        split: a name of `COMPLETE`.

    Returns:
        Sentences by language, as many of each.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is no gzip or no UTF-8, has an empty line, or has another
            number of lines than the English one.
    """
    stem = _FILES.get(split, split)
    lines: dict[str, list[str]] = {}
    for language in LANGUAGES:
        if (split, language) in _WITHOUT:
            lines[language] = [""] * len(lines["en"])
            continue
        path = pathlib.Path(folder) / f"{stem}.{language}.gz"
        lines[language] = _lines(path)
        if len(lines[language]) != len(lines["en"]):
            raise ValueError(
                f"{path} is damaged: it has {len(lines[language])} lines, the English "
                f"file {len(lines['en'])}"
            )
    return lines


def _lines(path: pathlib.Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} doesn't exist")
    try:
        text = gzip.decompress(path.read_bytes()).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    lines = [line.strip() for line in text.removesuffix("\n").split("\n")]
    if "" in lines:
        raise ValueError(f"{path} is damaged: line {lines.index('') + 1} is empty")
    return lines
