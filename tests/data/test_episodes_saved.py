"""Tasks on disk: bit for bit again, and of no other pool."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import data
from jaxtransfer.data import episodes
from tests.data.zips import break_deflated

LABELS = np.arange(40) % 5
POOL = np.random.default_rng(0).random((40, 4, 4, 1)).astype(np.float32)
DRAWN = data.draw(
    jax.random.key(0),
    data.class_index(LABELS),
    tasks=6,
    ways=(2, 4),
    shots=1,
    queries=2,
    rotations="classes",
)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "tasks"  # without a suffix: the name stays as it is
    data.save_episodes(path, DRAWN, POOL)
    return path


def test_tasks_come_back_bit_for_bit(file):
    """Indices, and the episodes made of them; no image is in the file."""
    found = data.load_episodes(file, jnp.asarray(POOL))
    assert {part: sorted(fields) for part, fields in found.items()} == {
        part: sorted(fields) for part, fields in DRAWN.items()
    }
    for part, fields in DRAWN.items():
        for name, values in fields.items():
            assert found[part][name].dtype == values.dtype
            np.testing.assert_array_equal(found[part][name], values)
    first, second = data.gather(POOL, DRAWN), data.gather(POOL, found)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    with np.load(file) as stored:
        assert not any("inputs" in name for name in stored.files)


@pytest.mark.parametrize(
    "other",
    [POOL[::-1], POOL + np.float32(1e-6), POOL[:39], POOL[:, :3], POOL.astype(float)],
    ids=["order", "values", "length", "shape", "dtype"],
)
def test_another_pool_is_refused(file, other):
    """The message has both pools and says what to load."""
    with pytest.raises(
        ValueError, match=r"float32\[40, 4, 4, 1\] .* load the same data"
    ):
        data.load_episodes(file, other)


def test_a_pool_of_bfloat16_has_a_fingerprint():
    """A buffer holds no such numbers; that of others is as it was."""
    pool = jnp.asarray([[0.5, 1.0]], jnp.bfloat16)
    assert (
        episodes.fingerprint(pool) == "bfloat16[1, 2] c5695835ae92c894f5f71a45a148a843"
    )
    assert episodes.fingerprint(POOL[:, ::2]) == (
        "float32[40, 2, 4, 1] e1931506fc26786387525343ed6bf802"
    )


def test_what_is_no_file_of_tasks_is_refused(tmp_path, file):
    """Text, an array, a file cut short or altered, tasks that leave the pool."""
    wrong = tmp_path / "wrong.npz"
    wrong.write_text("no tasks")
    with pytest.raises(ValueError, match="save_episodes, or it is damaged"):
        data.load_episodes(wrong, POOL)
    np.savez(wrong, labels=LABELS)
    with pytest.raises(ValueError, match="save_episodes, or it is damaged"):
        data.load_episodes(wrong, POOL)
    with open(wrong, "wb") as array:
        np.save(array, LABELS)
    with pytest.raises(ValueError, match="save_episodes, or it is damaged"):
        data.load_episodes(wrong, POOL)
    wrong.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match="save_episodes, or it is damaged"):
        data.load_episodes(wrong, POOL)
    break_deflated(file, "pool.npy")
    with pytest.raises(ValueError, match="save_episodes, or it is damaged"):
        data.load_episodes(file, POOL)
    with pytest.raises(ValueError, match="inputs has 10 rows; give the pool"):
        data.save_episodes(wrong, DRAWN, POOL[:10])
    with pytest.raises(FileNotFoundError):
        data.load_episodes(tmp_path / "none", POOL)
