"""The one-shot challenge: what is read, how it is scored, the published baseline."""

import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from jaxtransfer import data
from tests.data.zips import break_deflated


@pytest.fixture(scope="module")
def drawings():
    """Boolean drawings `[part, run, number]`, ink True."""
    return np.random.default_rng(0).random((2, 20, 20, 105, 105)) < 0.02


@pytest.fixture(scope="module")
def permutation():
    generator = np.random.default_rng(1)
    return np.stack([generator.permutation(20) for _ in range(20)])


@pytest.fixture(scope="module")
def release(tmp_path_factory, drawings, permutation):
    """A folder with a file of the release's form."""
    folder = tmp_path_factory.mktemp("data") / "raw" / "omniglot_challenge"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "all_runs.zip", "w") as archive:
        for run in range(20):
            lines = []
            for n in range(20):
                item = f"run{run + 1:02d}/test/item{n + 1:02d}.png"
                label = f"run{run + 1:02d}/training/class{n + 1:02d}.png"
                for part, name in enumerate((label, item)):
                    file = io.BytesIO()
                    Image.fromarray(~drawings[part, run, n]).save(file, "png")
                    archive.writestr(name, file.getvalue())
                right = permutation[run, n] + 1
                lines.append(f"{item} run{run + 1:02d}/training/class{right:02d}.png\n")
            archive.writestr(f"run{run + 1:02d}/class_labels.txt", "".join(lines))
    return folder.parent.parent


def test_runs_are_read_as_they_are(release, drawings, permutation):
    """Every drawing at its place, ink 1; the answers are those of the file."""
    runs = data.challenge_runs(data_dir=release)
    assert runs.training.shape == (20, 20, 105, 105, 1)
    np.testing.assert_array_equal(runs.training[..., 0], drawings[0])
    np.testing.assert_array_equal(runs.test[..., 0], drawings[1])
    np.testing.assert_array_equal(runs.answers, permutation)


def test_error_is_the_share_of_wrong_answers():
    """Ties go to the first; not-a-number is refused."""
    similarity = np.zeros((2, 3, 3))
    similarity[0] = np.eye(3)
    similarity[1, :, 2] = 1
    answers = np.array([[0, 1, 1], [2, 0, 2]])
    error = data.challenge_error(similarity, answers)
    np.testing.assert_allclose(error, [1 / 3, 1 / 3])
    assert data.challenge_error(np.zeros((1, 2, 2)), np.array([[0, 1]])) == 0.5
    similarity[1, 0, 1] = np.nan
    with pytest.raises(ValueError, match=r"similarity\[1, 0, 1\] = nan"):
        data.challenge_error(similarity, answers)


def test_shapes_that_do_not_go_together(types_unchecked):
    with pytest.raises(ValueError, match=r"\[runs, test, training\]"):
        data.challenge_error(np.zeros((2, 2, 3)), np.zeros((2, 3), int))


def test_modified_hausdorff_is_that_of_a_slow_twin():
    """Drawings with different numbers of points, of a kind that are not square."""
    images = np.random.default_rng(2).random((5, 9, 6)) < 0.3
    images[3, 1:], images[3, 0, 0] = False, True

    def twin(first, second):
        a, b = (np.argwhere(x) - np.argwhere(x).mean(0) for x in (first, second))
        lengths = np.linalg.norm(a[:, None] - b[None], axis=-1)
        return max(lengths.min(1).mean(), lengths.min(0).mean())

    found = data.modified_hausdorff(images[:3], images[2:].astype(np.float32))
    wanted = [[twin(a, b) for b in images[2:]] for a in images[:3]]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    assert found[2, 0] == 0
    images[1] = False
    with pytest.raises(ValueError, match=r"first\[1\] has no ink"):
        data.modified_hausdorff(images[:3], images[2:])


def test_a_missing_or_damaged_file_is_told(tmp_path, release):
    """Where to put it; what is wrong with it."""
    with pytest.raises(FileNotFoundError, match="brendenlake/omniglot.*data_dir=DATA"):
        data.challenge_runs(data_dir=tmp_path)
    file = tmp_path / "all_runs.zip"
    whole = (release / "raw/omniglot_challenge/all_runs.zip").read_bytes()
    file.write_bytes(whole[:-30])
    with pytest.raises(ValueError, match="damaged"):
        data.challenge_runs(data_dir=tmp_path)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("run01/class_labels.txt", "")
    with pytest.raises(ValueError, match=r"run01/training/class01\.png"):
        data.challenge_runs(data_dir=tmp_path)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("run01/training/class01.png", "a drawing")
    break_deflated(file, "run01/training/class01.png")
    with pytest.raises(ValueError, match="damaged .*; get it again"):
        data.challenge_runs(data_dir=tmp_path)


@pytest.fixture(scope="module")
def real(data_dir):
    try:
        return data.challenge_runs(data_dir=data_dir)
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.data
def test_modified_hausdorff_reproduces_the_published_error(real):
    """38.8 % (38.75), as released with the runs."""
    similarity = -np.stack(
        [
            data.modified_hausdorff(test[..., 0], training[..., 0])
            for test, training in zip(real.test, real.training, strict=True)
        ]
    )
    error = data.challenge_error(similarity, real.answers)
    assert error.shape == (20,)
    assert round(100 * error.mean(), 2) == 38.75
    assert round(400 * error.mean()) == 155


@pytest.mark.data
def test_real_runs_are_small_drawings_and_permutations(real, data_dir):
    """Each training drawing is asked for once; small images go with load's."""
    assert np.array_equal(np.sort(real.answers), np.tile(np.arange(20), (20, 1)))
    small = data.challenge_runs(size=28, data_dir=data_dir)
    assert small.training.shape == (20, 20, 28, 28, 1)
    assert 0.05 < small.test.mean() < 0.15
    assert small.test.max() <= 1 and small.test.min() >= 0
