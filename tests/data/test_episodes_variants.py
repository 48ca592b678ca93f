"""Tasks within a group, rotations as classes, tasks of different size."""

import functools
import zlib

import jax
import numpy as np
import pytest

from jaxtransfer import data

# 11 classes of 6 to 8 examples in groups of 2, 4 and 5 classes, in no order.
SIZES = np.array([6, 7, 8, 6, 7, 8, 6, 7, 8, 6, 7])
GROUP_OF = np.array([5, 9, 9, 2, 5, 9, 2, 9, 9, 2, 2])
LABELS = np.random.default_rng(0).permutation(np.repeat(10 * np.arange(11), SIZES))
GROUPS = GROUP_OF[LABELS // 10]
INDEX, BY_GROUP = data.class_index(LABELS), data.group_index(LABELS, GROUPS)
TASKS = 600
draw = jax.jit(
    data.draw,
    static_argnames=("tasks", "ways", "shots", "queries", "rotations", "equal_shots"),
)
plain = functools.partial(draw, tasks=TASKS, ways=3, shots=1, queries=2)


def classes_of(drawn):
    """Class of each row of the support, and of the query, by task."""
    return [
        LABELS[np.asarray(drawn[part]["rows"])] // 10 for part in ("support", "query")
    ]


def check_rows(drawn):
    """Labels are classes, and no example comes twice in a task, among real rows."""
    for task in range(TASKS):
        rows, ways, turns = [], [], []
        for name in ("support", "query"):
            part = drawn[name]
            where = np.asarray(part.get("where", np.ones_like(part["rows"], bool)))[
                task
            ]
            rows.append(np.asarray(part["rows"])[task][where])
            ways.append(np.asarray(part["labels"])[task][where])
            turn = part.get("turns", np.zeros_like(part["rows"]))
            turns.append(np.asarray(turn)[task][where])
        rows, ways, turns = map(np.concatenate, (rows, ways, turns))
        kinds = {(w, LABELS[r], t) for w, r, t in zip(ways, rows, turns, strict=True)}
        assert len(kinds) == len(set(ways.tolist()))
        assert len({kind[1:] for kind in kinds}) == len(kinds)
        both = set(zip(rows.tolist(), turns.tolist(), strict=True))
        assert len(both) == len(rows)


def test_group_index_lists_classes_by_group():
    """Rows of the class index, padded with the first."""
    assert BY_GROUP.sizes == (4, 2, 5)
    assert BY_GROUP.members.tolist() == [
        [3, 6, 9, 10, 3],
        [0, 4, 0, 0, 0],
        [1, 2, 5, 7, 8],
    ]


def test_the_same_key_draws_the_same_600_tasks_for_ever(key):
    """Bit for bit: compiled or not, and as when this was written."""
    fixed = {"tasks": 600, "ways": 3, "shots": 2, "queries": 3}
    varied = {**fixed, "ways": (2, 4), "shots": (1, 3), "rotations": "classes"}
    for options, groups, wanted in (
        ({**fixed, "rotations": True}, None, 1616342469),
        (fixed, BY_GROUP, 2586181213),
        (varied, BY_GROUP, 3044886332),
    ):
        found = draw(key, INDEX, groups=groups, **options)
        eager = data.draw(key, INDEX, groups=groups, **options)
        jax.tree.map(np.testing.assert_array_equal, found, eager)
        sums = [
            zlib.crc32(np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(found)
        ]
        assert zlib.crc32(repr(sums).encode()) == wanted


def test_classes_of_a_task_are_of_one_group(key):
    """Groups that are too small are left out; the others come equally often."""
    drawn = plain(key, INDEX, groups=BY_GROUP)
    check_rows(drawn)
    groups = GROUP_OF[np.concatenate(classes_of(drawn), axis=1)]
    assert np.all(groups == groups[:, :1])
    counts = {g: int((groups[:, 0] == g).sum()) for g in (2, 5, 9)}
    assert counts[5] == 0 and abs(counts[2] - TASKS / 2) < 5 * np.sqrt(TASKS / 4)
    support = classes_of(drawn)[0]
    for group, size in ((2, 4), (9, 5)):  # classes within a group: uniformly
        chosen = support[groups[:, 0] == group]
        share = np.bincount(chosen.ravel(), minlength=11)[GROUP_OF == group]
        wanted = len(chosen) * 3 / size
        assert np.all(np.abs(share - wanted) < 5 * np.sqrt(wanted))


def test_rotated_classes_are_classes_of_their_own(key):
    """Two rotations of a class may meet; a task may hold more than its group has."""
    drawn = plain(key, INDEX, rotations="classes")
    check_rows(drawn)
    support = classes_of(drawn)[0]
    turns = np.asarray(drawn["support"]["turns"])
    meets = sum(len(set(task)) < 3 for task in support.tolist())
    assert abs(meets / TASKS - 3 * 3 / 43) < 5 * np.sqrt(0.2 * 0.8 / TASKS)
    pairs = np.bincount((4 * support + turns).ravel(), minlength=44)
    assert np.all(np.abs(pairs - 3 * TASKS / 44) < 5 * np.sqrt(3 * TASKS / 44))
    within = draw(
        key,
        INDEX,
        tasks=TASKS,
        ways=8,
        shots=1,
        queries=1,
        groups=BY_GROUP,
        rotations="classes",
    )
    check_rows(within)
    groups = GROUP_OF[classes_of(within)[0]]
    assert np.all(groups == groups[:, :1]) and set(groups[:, 0]) == {2, 5, 9}


def test_whole_tasks_are_turned(key):
    """One angle a task, and otherwise the tasks without rotations."""
    drawn, upright = plain(key, INDEX, rotations="tasks"), plain(key, INDEX)
    turns = np.concatenate([drawn[part]["turns"] for part in drawn], axis=1)
    assert np.all(turns == turns[:, :1])
    assert np.all(np.abs(np.bincount(turns[:, 0]) - 150) < 5 * np.sqrt(150))
    for part in drawn:
        np.testing.assert_array_equal(drawn[part]["rows"], upright[part]["rows"])


def test_rotations_may_be_a_bool_of_numpy(key, types_unchecked):
    options = {"tasks": 1, "ways": 2, "shots": 1, "queries": 1}
    for given in (True, False):
        drawn = functools.partial(data.draw, **options, rotations=np.bool_(given))
        assert ("turns" in jax.eval_shape(drawn, key, INDEX)["query"]) == given


def test_gathered_images_are_turned_as_drawn(key):
    images = jax.random.uniform(key, (len(LABELS), 3, 3, 2))
    drawn = plain(key, INDEX, rotations="classes")
    episodes = data.gather(images, drawn)
    for part in ("support", "query"):
        for name in ("rows", "turns"):
            assert name not in episodes[part]
        for task in range(20):
            for row, turn, image in zip(
                drawn[part]["rows"][task],
                drawn[part]["turns"][task],
                episodes[part]["inputs"][task],
                strict=True,
            ):
                np.testing.assert_array_equal(np.rot90(images[row], turn), image)


def test_ways_are_drawn_up_to_the_size_of_the_group(key):
    """Alphabet first, then 2 ... its size; padding repeats real rows of the task."""
    drawn = draw(
        key, INDEX, tasks=TASKS, ways=(2, 5), shots=2, queries=3, groups=BY_GROUP
    )
    check_rows(drawn)
    support = drawn["support"]
    assert support["rows"].shape == (TASKS, 10) and support["classes"].shape == (
        TASKS,
        5,
    )
    ways = np.asarray(support["classes"].sum(1))
    group = GROUP_OF[classes_of(drawn)[0][:, 0]]
    for value, most in ((2, 4), (5, 2), (9, 5)):
        assert abs((group == value).sum() - 200) < 5 * np.sqrt(200 * 2 / 3)
        times = np.bincount(ways[group == value], minlength=6)[2:]
        share = (group == value).sum() / (most - 1)
        assert np.all(np.abs(times[: most - 1] - share) < 5 * np.sqrt(share))
        assert not times[most - 1 :].any()
    for part, count in (("support", 2), ("query", 3)):
        labels, rows = (
            np.asarray(drawn[part]["labels"]),
            np.asarray(drawn[part]["rows"]),
        )
        padded = np.arange(5)[None] % ways[:, None]
        np.testing.assert_array_equal(labels, np.repeat(padded, count, axis=1))
        where = np.repeat(np.arange(5)[None] < ways[:, None], count, axis=1)
        np.testing.assert_array_equal(drawn[part]["where"], where)
        np.testing.assert_array_equal(drawn[part]["classes"], support["classes"])
        for task in range(TASKS):
            own = set(rows[task][where[task]].tolist())
            assert set(rows[task].tolist()) == own


@pytest.mark.parametrize("equal", [True, False])
def test_shots_are_drawn_up_to_what_a_class_has(key, equal):
    """1 ... 6 shots of classes that have 6 to 8 examples, with 2 queries."""
    drawn = draw(
        key, INDEX, tasks=TASKS, ways=3, shots=(1, 6), queries=2, equal_shots=equal
    )
    check_rows(drawn)
    assert "where" not in drawn["query"] and "classes" not in drawn["support"]
    where = np.asarray(drawn["support"]["where"]).reshape(TASKS, 3, 6)
    shots = where.sum(-1)
    assert np.all(where == (np.arange(6) < shots[..., None]))
    room = SIZES[classes_of(drawn)[0].reshape(TASKS, 3, 6)[..., 0]] - 2
    if equal:
        assert np.all(shots == shots[:, :1])
        room = np.broadcast_to(room.min(1, keepdims=True), room.shape)
    else:
        assert (shots.min(1) < shots.max(1)).mean() > 0.7
    for most in np.unique(room):
        times = np.bincount(shots[room == most], minlength=7)[1:]
        share = times.sum() / most
        spread = 5 * np.sqrt((3 if equal else 1) * share)
        assert np.all(np.abs(times[:most] - share) < spread)
        assert not times[most:].any()
    rows = np.asarray(drawn["support"]["rows"]).reshape(TASKS, 3, 6)
    repeated = np.take_along_axis(rows, np.arange(6) % shots[..., None], -1)
    np.testing.assert_array_equal(rows, repeated)


def test_ways_and_shots_vary_together(key):
    """With unequal shots and turned classes; every real row is counted once."""
    drawn = draw(
        key,
        INDEX,
        tasks=TASKS,
        ways=(2, 6),
        shots=(1, 3),
        queries=2,
        rotations="classes",
        equal_shots=False,
    )
    check_rows(drawn)
    where = np.asarray(drawn["support"]["where"]).reshape(TASKS, 6, 3)
    np.testing.assert_array_equal(where.any(-1), drawn["support"]["classes"])
    query = np.asarray(drawn["query"]["where"]).reshape(TASKS, 6, 2)
    np.testing.assert_array_equal(query, np.repeat(where.any(-1)[..., None], 2, -1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"ways": 6},
            "ways=6 is more than the 5 classes of the largest group.*groups=",
        ),
        ({"ways": 12, "groups": None}, "more than the 11 classes of the pool; lower"),
        ({"ways": 45, "groups": None, "rotations": "classes"}, "the 44 classes"),
        ({"ways": (4, 2)}, r"ways=\(4, 2\) must be \(least, most\)"),
        ({"shots": (0, 2)}, r"shots=\(0, 2\) must be at least 1"),
        ({"shots": 1.0}, "shots=1.0 must be a whole number, or"),
        ({"shots": (5, 6)}, r"5 \+ 2 is more than the 6 examples of the smallest"),
        ({"shots": (1.0, 2.0)}, r"shots=\(1.0, 2.0\) must be a whole number, or"),
        ({"ways": (2, 3, 4)}, r"ways=\(2, 3, 4\) must be a whole number, or"),
        ({"tasks": 2.0}, "tasks=2.0 must be a whole number"),
        ({"rotations": "class"}, "rotations='class' must be False, True, 'classes'"),
        ({"rotations": 1}, "rotations=1 must be"),
        (
            {"groups": data.group_index(np.arange(4), np.arange(4) // 2)},
            "groups has 4 classes, but class_index 11; make both of the same labels",
        ),
        ({"queries": 0}, "queries=0"),
        ({"queries": (1, 2)}, r"queries=\(1, 2\) must be one number; .*`where`"),
    ],
)
def test_refusals(key, options, message, types_unchecked):
    """Also under jit."""
    arguments = {"tasks": 2, "ways": 2, "shots": 1, "queries": 2, "groups": BY_GROUP}
    with pytest.raises(ValueError, match=message):
        draw(key, INDEX, **(arguments | options))


@pytest.mark.parametrize(
    ("labels", "groups", "message"),
    [
        (
            np.array([1, 1, 2]),
            np.array([0, 3, 3]),
            r"label 1 occurs in the groups \[0, 3",
        ),
        (np.array([1, 1, 2]), np.array([0, 3]), r"groups \[2\] must have a value"),
        (np.array([1, 1]), np.array([0.0, 0.0]), "integers"),
        (np.zeros(0, int), np.zeros(0, int), "empty"),
    ],
)
def test_groups_that_are_refused(labels, groups, message):
    with pytest.raises(ValueError, match=message):
        data.group_index(labels, groups)


def test_a_pool_of_one_class_says_what_to_do(key):
    index = data.class_index(np.zeros(9, int))
    with pytest.raises(
        ValueError, match="ways=2 is more than the 1 classes.*pool with"
    ):
        data.draw(key, index, tasks=1, ways=2, shots=1, queries=1)


@pytest.mark.data
def test_real_omniglot_keeps_its_alphabets(data_dir, key):
    """30 of them in the background set, 5 in each small one; tasks stay within."""
    try:
        source = data.load("omniglot", "small1", data_dir=data_dir)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    arrays = data.as_arrays(source, size=8, channels=1)
    index = data.class_index(arrays["labels"])
    groups = data.group_index(arrays["labels"], arrays["alphabet"])
    assert len(groups.sizes) == 5 and sum(groups.sizes) == len(index.counts) == 136
    drawn = data.draw(key, index, tasks=20, ways=20, shots=1, queries=19, groups=groups)
    alphabets = arrays["alphabet"][np.asarray(drawn["query"]["rows"])]
    assert np.all(alphabets == alphabets[:, :1])
