"""Few-shot tasks: what is drawn, that it never overlaps, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import data

# Example i belongs to class LABELS[i]; sizes 5..9, class values with gaps, shuffled.
LABELS = np.random.default_rng(0).permutation(
    np.repeat(np.array([3, 4, 8, 15, 16]), [5, 6, 7, 8, 9])
)
POOL = jnp.arange(len(LABELS), dtype=jnp.float32)[:, None]
INDEX = data.class_index(LABELS)
draw = jax.jit(
    functools.partial(data.sample, tasks=64, ways=3, shots=2, queries=3),
    static_argnames="rotations",
)


def test_index_lists_the_members_of_every_class():
    """Members, counts and padding."""
    assert INDEX.counts.tolist() == [5, 6, 7, 8, 9]
    for members, count, label in zip(
        np.asarray(INDEX.members), INDEX.counts, [3, 4, 8, 15, 16], strict=True
    ):
        wanted = np.flatnonzero(LABELS == label).tolist()
        assert members[: int(count)].tolist() == wanted
        assert set(members[int(count) :].tolist()) <= {wanted[0]}


def test_episode_is_consistent(key):
    """Distinct classes, right labels, no example twice in a task."""
    episodes = draw(key, POOL, INDEX)
    support, query = episodes["support"], episodes["query"]
    assert support["inputs"].shape == (64, 6, 1)
    assert query["labels"].shape == (64, 9)
    assert support["labels"].dtype == jnp.int32
    for task in range(64):
        rows = np.concatenate(
            [support["inputs"][task, :, 0], query["inputs"][task, :, 0]]
        ).astype(int)
        ways = np.concatenate([support["labels"][task], query["labels"][task]])
        assert len(set(rows.tolist())) == 15
        classes = [set(LABELS[rows[ways == way]].tolist()) for way in range(3)]
        assert all(len(c) == 1 for c in classes)
        assert len(set.union(*classes)) == 3


def test_draws_are_uniform(key):
    """Every class, and every example of a class, comes equally often."""
    rows = np.concatenate(
        [
            np.asarray(draw(k, POOL, INDEX)["support"]["inputs"]).ravel()
            for k in jax.random.split(key, 40)
        ]
    ).astype(int)
    count = np.bincount(rows, minlength=len(LABELS))
    tasks = 64 * 40
    for label in np.unique(LABELS):
        members = count[LABELS == label]
        assert abs(members.sum() / 2 - tasks * 3 / 5) < 5 * np.sqrt(tasks * 0.24)
        expected = members.sum() / len(members)
        assert np.all(np.abs(members - expected) < 5 * np.sqrt(expected))


def test_key_decides(key):
    """Same key, same tasks; another key, other tasks; jit changes nothing."""
    first, second = draw(key, POOL, INDEX), draw(key, POOL, INDEX)
    other = draw(jax.random.key(1), POOL, INDEX)
    eager = data.sample(key, POOL, INDEX, tasks=64, ways=3, shots=2, queries=3)
    for tree in (second, eager):
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(tree), strict=True):
            np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first["query"]["inputs"], other["query"]["inputs"])


def test_rotations_are_quarter_turns_shared_by_a_class(key):
    """Each class of a task is turned as a whole, by all four angles in the end."""
    images = jax.random.uniform(jax.random.key(3), (len(LABELS), 3, 3, 2))
    plain = draw(key, images, INDEX)
    turned = draw(key, images, INDEX, rotations=True)
    seen = set()
    for task in range(64):
        for way in range(3):
            turns = []
            for part in ("support", "query"):
                mask = np.asarray(plain[part]["labels"][task]) == way
                before = np.asarray(plain[part]["inputs"][task])[mask]
                after = np.asarray(turned[part]["inputs"][task])[mask]
                turns += [
                    next(k for k in range(4) if np.array_equal(np.rot90(x, k), y))
                    for x, y in zip(before, after, strict=True)
                ]
            assert len(set(turns)) == 1
            seen.add(turns[0])
    assert seen == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": 6}, "ways=6 is more than the 5 classes"),
        ({"shots": 3, "queries": 3}, r"3 \+ 3 is more than the 5 examples"),
        ({"tasks": 0}, "tasks=0"),
        ({"rotations": True}, "square"),
    ],
)
def test_refusals(key, options, message):
    """Also under jit, where the pool is traced."""
    arguments = {"tasks": 2, "ways": 2, "shots": 1, "queries": 1, **options}
    with pytest.raises(ValueError, match=message):
        jax.jit(functools.partial(data.sample, **arguments))(key, POOL, INDEX)


def test_an_index_of_another_pool_is_refused(key):
    """JAX would take the last example for those beyond; also while traced."""
    sample = functools.partial(data.sample, tasks=2, ways=2, shots=1, queries=1)
    for pool in (POOL[:20], jnp.concatenate([POOL, POOL])):
        with pytest.raises(ValueError, match=f"of 35 examples, .* has {len(pool)} ro"):
            jax.eval_shape(sample, key, pool, INDEX)
    for row in (-1, 35):
        part = {"rows": jnp.array([[0, row]]), "labels": jnp.array([[0, 1]])}
        with pytest.raises(ValueError, match=f"row {row}, but inputs has 35 rows"):
            data.gather(POOL, {"support": part, "query": part})


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(0, np.int32), "empty"),
        (np.zeros(3), "integers"),
        (np.zeros((3, 1), np.int32), "integers"),
    ],
)
def test_pools_that_are_refused(labels, message):
    """No example, or labels of a wrong kind."""
    with pytest.raises(ValueError, match=message):
        data.class_index(labels)


def test_sinusoids_follow_the_paper(key):
    """Ranges of x and amplitude; three points determine A and the phase."""
    tasks = data.sinusoid(key, tasks=2000, shots=5, queries=3)
    inputs = np.concatenate([tasks[p]["inputs"] for p in ("support", "query")], 1)
    labels = np.concatenate([tasks[p]["labels"] for p in ("support", "query")], 1)
    assert inputs.shape == (2000, 8, 1)
    assert -5 <= inputs.min() < -4.9 < 4.9 < inputs.max() <= 5
    amplitudes, phases = [], []
    for x, y in zip(inputs[..., 0], labels[..., 0], strict=True):
        basis = np.stack([np.sin(x), -np.cos(x)], 1)
        (a, b), *_ = np.linalg.lstsq(basis, y, rcond=None)
        np.testing.assert_allclose(basis @ [a, b], y, atol=1e-4)
        amplitudes.append(np.hypot(a, b))
        phases.append(np.arctan2(b, a))
    assert 0.09 < min(amplitudes) < 0.2
    assert 4.9 < max(amplitudes) < 5.01
    assert abs(np.mean(amplitudes) - 2.55) < 0.15
    assert -1e-3 < min(phases) < 0.05
    assert np.pi - 0.05 < max(phases) < np.pi + 1e-3


def test_omniglot_split_parts_characters(key):
    """Disjoint characters, complete, numbered anew; the key decides."""
    labels = np.arange(60) % 20 + 100
    arrays = {"inputs": np.stack([np.arange(60), labels], 1), "labels": labels}
    parts = data.omniglot_split(arrays, key, sizes=(12, 3, 5))
    classes = {name: set(part["inputs"][:, 1]) for name, part in parts.items()}
    assert [len(c) for c in classes.values()] == [12, 3, 5]
    assert set.union(*classes.values()) == set(range(100, 120))
    for part in parts.values():
        assert np.array_equal(
            np.unique(part["labels"]), np.arange(part["labels"].max() + 1)
        )
        pairs = set(zip(part["labels"], part["inputs"][:, 1], strict=True))
        assert len(pairs) == len(np.unique(part["labels"]))
        assert np.all(np.bincount(part["labels"]) == 3)
    other = data.omniglot_split(arrays, jax.random.key(1), sizes=(12, 3, 5))
    assert set(other["test"]["inputs"][:, 1]) != classes["test"]
    with pytest.raises(ValueError, match="sizes"):
        data.omniglot_split(arrays, key)
    for count in (59, 61):
        fewer = {"inputs": np.zeros((count, 1)), "labels": labels}
        with pytest.raises(ValueError, match=f"one common length.*{count}"):
            data.omniglot_split(fewer, key, sizes=(12, 3, 5))


@pytest.mark.data
def test_real_omniglot_has_1623_characters(data_dir, key):
    """1,100 / 100 / 423 characters, 20 drawings each."""
    try:
        source = data.load("omniglot", "train+test", data_dir=data_dir)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    labels = np.array([int(record["label"]) for record in source._records])
    parts = data.omniglot_split(
        {"inputs": np.zeros((len(labels), 1), bool), "labels": labels}, key
    )
    counts = [np.bincount(part["labels"]) for part in parts.values()]
    assert [len(count) for count in counts] == [1100, 100, 423]
    assert all(np.all(count == 20) for count in counts)
