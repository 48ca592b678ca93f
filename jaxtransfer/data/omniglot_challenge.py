"""Lake's one-shot classification challenge on Omniglot: 20 runs of 20-way 1-shot.

Every run has 20 characters of one alphabet that no training split contains, drawn once
by one person (training) and once by another (test). Which training drawing shows the
character of a test drawing? 400 answers; the score is the mean error of the runs.

    runs = data.challenge_runs(size=28)
    similarity = ...  # [runs, test, training], e.g. minus the distance of embeddings
    data.challenge_error(similarity, runs.answers).mean()  # people: 0.045
"""

import io
import os
import pathlib
import zipfile
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped
from PIL import Image

from jaxtransfer.data.arrays import as_arrays, check_finite
from jaxtransfer.data.records import ArrayRecords, Decoder, Source
from jaxtransfer.data.sources import DATA_DIR_VARIABLE, data_places
from jaxtransfer.typing import AnyArray

RUNS = 20
WAYS = 20
_FILE = "all_runs.zip"
_SIDE = 105
_PLACES = ("raw/omniglot_challenge", "omniglot_challenge", ".")


class ChallengeRuns(NamedTuple):
    """The drawings of the challenge; the ink is 1, the paper 0.

    Attributes:
        training: one drawing of each class `[runs, ways, side, side, 1]`.
        test: drawings to be classified `[runs, ways, side, side, 1]`.
        answers: the training drawing of the same character, `[runs, ways]` int32, its
            place in `training[run]`.
    """

    training: np.ndarray
    test: np.ndarray
    answers: np.ndarray


def challenge_runs(
    *, size: int | None = None, data_dir: str | os.PathLike[str] | None = None
) -> ChallengeRuns:
    """Read the 20 runs from the public release.

    Images are made smaller as by `as_arrays(..., size=size, channels=1, invert=True)`,
    so that they go with `load("omniglot")`.

    Args:
        size: height and width in pixels; None keeps 105.
        data_dir: as for `load`; the release is `all_runs.zip` in one of the folders or
            in its `omniglot_challenge` or `raw/omniglot_challenge`.

    Returns:
        The runs.

    Raises:
        FileNotFoundError: no such file; the message says where to put it.
        ValueError: the file is damaged or another one.

    References:
        Lake, Salakhutdinov, Tenenbaum, "Human-level concept learning through
        probabilistic program induction", Science 350, 2015 (one-shot classification);
        the file is part of github.com/brendenlake/omniglot, folder python.
    """
    path = _find(data_dir)
    try:
        with zipfile.ZipFile(path) as archive:
            images, answers = _read(archive)
    except (zipfile.BadZipFile, zlib.error, KeyError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged or not the release of the 20 runs ({error}); get it "
            "again"
        ) from error
    source = Source(
        "omniglot_challenge", "all", None, ArrayRecords({"inputs": images}), Decoder()
    )
    inputs = as_arrays(source, size=size, channels=1, invert=True)["inputs"]
    inputs = inputs.reshape(2, RUNS, WAYS, *inputs.shape[1:])
    return ChallengeRuns(inputs[0], inputs[1], answers)


def challenge_error(
    similarity: Float[AnyArray, "runs ways ways"], answers: Int[AnyArray, "runs ways"]
) -> Float[np.ndarray, "runs"]:
    """Share of wrong answers of each run; their mean is the score of the challenge.

    The answer is the most similar training drawing, the first of several.

    Args:
        similarity: of test drawing (row) and training drawing (column), concrete.
        answers: `answers` of `challenge_runs`.

    Returns:
        Error of each run, 0 … 1.

    Raises:
        ValueError: shapes that don't go together, or a similarity that is not finite.

    Example:
        >>> similarity = np.array([[[3.0, 1.0], [2.0, 0.0]]])
        >>> challenge_error(similarity, np.array([[0, 1]])).tolist()
        [0.5]
    """
    similarity, answers = np.asarray(similarity), np.asarray(answers)
    if similarity.shape[:-1] != answers.shape:
        raise ValueError(
            f"similarity {list(similarity.shape)} must be [runs, test, training] with "
            f"the answers' {list(answers.shape)} in front"
        )
    check_finite(similarity, "similarity")
    return np.mean(similarity.argmax(axis=-1) != answers, axis=-1)


def modified_hausdorff(
    first: Shaped[AnyArray, "a height width"],
    second: Shaped[AnyArray, "b height width"],
) -> Float[np.ndarray, "a b"]:
    r"""Modified Hausdorff distance between drawings: the challenge's first baseline.

    .. math:: d(A, B) = \max\Bigl(\frac1{|A|} \sum_{p \in A} \min_{q \in B} \|p - q\|,
              \ \frac1{|B|} \sum_{q \in B} \min_{p \in A} \|p - q\|\Bigr)

    over the places of the ink, each drawing's moved to have its mean at the origin.

    Args:
        first: drawings; ink where the value is above 0.5.
        second: drawings.

    Returns:
        Distances in pixels, float64.

    Raises:
        ValueError: a drawing without ink.

    Example:
        >>> dot = np.zeros((5, 5)); dot[1, 1] = 1
        >>> bar = np.zeros((5, 5)); bar[2, 1:4] = 1
        >>> round(float(modified_hausdorff(dot[None], bar[None])[0, 0]), 3)
        0.667

    References:
        Dubuisson, Jain, "A modified Hausdorff distance for object matching", ICPR
        1994.
    """
    clouds = {
        name: [_cloud(image, name, number) for number, image in enumerate(images)]
        for name, images in (("first", first), ("second", second))
    }
    there = _mean_nearest(clouds["first"], clouds["second"])
    back = _mean_nearest(clouds["second"], clouds["first"])
    return np.maximum(there, back.T)


def _mean_nearest(
    clouds: Sequence[np.ndarray], others: Sequence[np.ndarray]
) -> np.ndarray:
    """Mean distance of a cloud's points to the nearest of another, `[a, b]`."""
    from scipy.spatial import KDTree

    sizes = np.array([len(cloud) for cloud in clouds])
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    points = np.concatenate(clouds)
    nearest = [KDTree(other).query(points, workers=-1)[0] for other in others]
    return np.stack([np.add.reduceat(to, starts) / sizes for to in nearest], axis=1)


def _cloud(image: AnyArray, name: str, number: int) -> np.ndarray:
    """Places of the ink `[points, 2]` about their mean."""
    points = np.argwhere(np.asarray(image) > 0.5).astype(np.float64)
    if not len(points):
        raise ValueError(f"{name}[{number}] has no ink: no value is above 0.5")
    return points - points.mean(axis=0)


def _find(data_dir: str | os.PathLike[str] | None) -> pathlib.Path:
    places = [
        folder / place / _FILE for folder in data_places(data_dir) for place in _PLACES
    ]
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(
        f"the runs of the Omniglot challenge ({_FILE}) are in none of "
        f"{', '.join(map(str, places))}; get the file from "
        "github.com/brendenlake/omniglot (folder python/one-shot-classification), put "
        f"it in DATA/omniglot_challenge, and give data_dir=DATA or set "
        f"{DATA_DIR_VARIABLE}=DATA"
    )


def _read(archive: zipfile.ZipFile) -> tuple[np.ndarray, np.ndarray]:
    """Training and then test images `[2 * runs * ways, side, side, 1]`, and answers."""
    images = np.empty((2, RUNS, WAYS, _SIDE, _SIDE, 1), np.uint8)
    answers = np.empty((RUNS, WAYS), np.int32)
    for run in range(RUNS):
        folder = f"run{run + 1:02d}"
        training = [f"{folder}/training/class{n + 1:02d}.png" for n in range(WAYS)]
        test = [f"{folder}/test/item{n + 1:02d}.png" for n in range(WAYS)]
        for part, names in enumerate((training, test)):
            for number, name in enumerate(names):
                images[part, run, number] = _image(archive.read(name), name)
        lines = archive.read(f"{folder}/class_labels.txt").decode().split()
        pairs = dict(zip(lines[::2], lines[1::2], strict=True))
        answers[run] = [training.index(pairs[name]) for name in test]
    return images.reshape(-1, _SIDE, _SIDE, 1), answers


def _image(encoded: bytes, name: str) -> np.ndarray:
    array = np.asarray(Image.open(io.BytesIO(encoded)).convert("L"))
    if array.shape != (_SIDE, _SIDE):
        raise ValueError(f"{name} has {array.shape} pixels")
    return array[..., None]
