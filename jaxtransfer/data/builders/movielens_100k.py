"""TFDS builder of MovieLens 100k, from `u.data`, `u.user` and `u.item`."""

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

FILE = "u.data"
USERS, ITEMS = "u.user", "u.item"
COMPLETE = {"train": 943}
GENDERS = ("F", "M")
OCCUPATIONS = (
    *("administrator", "artist", "doctor", "educator", "engineer", "entertainment"),
    *("executive", "healthcare", "homemaker", "lawyer", "librarian", "marketing"),
    *("none", "other", "programmer", "retired", "salesman", "scientist", "student"),
    *("technician", "writer"),
)
GENRES = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime"),
    *("Documentary", "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery"),
    *("Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
UNKNOWN_YEAR = 0


class Movielens100k(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """MovieLens 100k: ratings of films, one example a user with all of its ratings.

    With each rating come the fields of the film, the year of release among them, which
    the TFDS catalogue's `movielens` lacks. Users and items count from 0: the numbers of
    the release less 1. A film without a date has year 0. The release has no directors
    and no actors.
    """

    name = "movielens_100k"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"Put {FILE}, {USERS} and {ITEMS} of the release ml-100k (GroupLens) in the "
        "manual folder. They may not be redistributed."
    )

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features
        return self.dataset_info_from_configs(
            description="MovieLens 100k: 100,000 ratings, 943 users, 1,682 films.",
            features=features.FeaturesDict(
                {
                    "user": np.int32,
                    "age": np.int32,
                    "gender": features.ClassLabel(names=list(GENDERS)),
                    "occupation": features.ClassLabel(names=list(OCCUPATIONS)),
                    "zip_code": features.Text(),
                    "items": features.Tensor(shape=(None,), dtype=np.int32),
                    "ratings": features.Tensor(shape=(None,), dtype=np.int32),
                    "timestamps": features.Tensor(shape=(None,), dtype=np.int64),
                    "titles": features.Sequence(features.Text()),
                    "years": features.Tensor(shape=(None,), dtype=np.int32),
                    "genres": features.Tensor(
                        shape=(None, len(GENRES)), dtype=np.uint8
                    ),
                }
            ),
            citation=(
                "F. M. Harper, J. A. Konstan, The MovieLens datasets: history and "
                "context, ACM Transactions on Interactive Intelligent Systems 5(4), "
                "19, 2015."
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
        return {"train": self._generate_examples(*read(dl_manager.manual_dir))}

    def _generate_examples(
        self,
        ratings: np.ndarray,
        users: list[dict[str, Any]],
        items: list[dict[str, Any]],
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for user, fields in enumerate(users):
            own = ratings[ratings[:, 0] == user]
            films = [items[item] for item in own[:, 1]]
            genres = np.array([film["genres"] for film in films], np.uint8)
            yield (
                user,
                {
                    "user": user,
                    **fields,
                    "items": own[:, 1].astype(np.int32),
                    "ratings": own[:, 2].astype(np.int32),
                    "timestamps": own[:, 3],
                    "titles": [film["title"] for film in films],
                    "years": np.array([film["year"] for film in films], np.int32),
                    "genres": genres.reshape(-1, len(GENRES)),
                },
            )


def read(
    folder: Any,
) -> tuple[np.ndarray, list[dict[str, Any]], list[dict[str, Any]]]:
    """Read and check the release.

    Args:
        folder: holds `u.data`, `u.user` and `u.item`.

    Returns:
        Ratings int64 `[n, 4]` (user, item, 1..5, seconds since 1970), users and items
        counted from 0, and the fields of every user and of every item.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a line, a value or a number that is wrong.
    """
    folder = pathlib.Path(folder)
    users = [_user(*line) for line in _lines(folder / USERS, "|", 5)]
    items = [_item(*line) for line in _lines(folder / ITEMS, "|", 5 + len(GENRES))]
    ratings = np.array(
        [
            _rating(*line, len(users), len(items))
            for line in _lines(folder / FILE, "\t", 4)
        ]
    )
    pairs = ratings[:, :2]
    if len(np.unique(pairs, axis=0)) != len(pairs):
        raise ValueError(f"{folder / FILE} is damaged: a user rates an item twice")
    return ratings, users, items


def _lines(
    path: pathlib.Path, separator: str, columns: int
) -> Iterator[tuple[str, list[str]]]:
    """Columns of every line, and where it stands; the first column counts from 1."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} doesn't exist")
    lines = path.read_text(encoding="latin-1").splitlines()
    if not lines:
        raise ValueError(f"{path} is damaged: it is empty")
    for number, line in enumerate(lines, 1):
        parts = line.split(separator)
        where = f"{path} is damaged: line {number}"
        if len(parts) != columns:
            raise ValueError(
                f"{where} has {len(parts)} columns, not {columns}: {line!r}"
            )
        if path.name != FILE and parts[0] != str(number):
            raise ValueError(f"{where} is of number {parts[0]!r}")
        yield where, parts


def _number(where: str, name: str, text: str, least: int, most: int) -> int:
    if not text.isdecimal() or not least <= int(text) <= most:
        raise ValueError(f"{where}: {name} {text!r} is not in {least}..{most}")
    return int(text)


def _choice(where: str, name: str, text: str, names: tuple[str, ...]) -> str:
    if text not in names:
        raise ValueError(f"{where}: {name} {text!r} is none of {', '.join(names)}")
    return text


def _user(where: str, parts: list[str]) -> dict[str, Any]:
    _, age, gender, occupation, zip_code = parts
    return {
        "age": _number(where, "age", age, 0, 150),
        "gender": _choice(where, "gender", gender, GENDERS),
        "occupation": _choice(where, "occupation", occupation, OCCUPATIONS),
        "zip_code": zip_code,
    }


def _item(where: str, parts: list[str]) -> dict[str, Any]:
    _, title, date, _, _, *genres = parts
    year = UNKNOWN_YEAR
    if date:
        year = _number(where, "year of release", date.rpartition("-")[2], 1800, 2100)
    marks = [_number(where, "genre", mark, 0, 1) for mark in genres]
    return {"title": title, "year": year, "genres": np.array(marks, np.uint8)}


def _rating(
    where: str, parts: list[str], users: int, items: int
) -> tuple[int, int, int, int]:
    user, item, rating, timestamp = parts
    return (
        _number(where, "user", user, 1, users) - 1,
        _number(where, "item", item, 1, items) - 1,
        _number(where, "rating", rating, 1, 5),
        _number(where, "timestamp", timestamp, 0, 2**40),
    )
