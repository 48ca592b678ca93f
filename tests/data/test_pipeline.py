"""Batches: order, augmentation, resume, shards, evaluation, pairs."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import data

NUMBERS = {"inputs": np.arange(20, dtype=np.float32), "labels": np.arange(20)}


def noisy(example, generator):
    """An augmentation whose draw can be seen."""
    return {**example, "noise": np.float32(generator.random())}


def take(iterator, n, name="labels"):
    """One feature of the next n batches."""
    return [next(iterator)[name].tolist() for _ in range(n)]


def flat(batches):
    """All elements of a list of lists."""
    return [element for batch in batches for element in batch]


@pytest.mark.parametrize("kind", ["arrays", "source"])
@pytest.mark.parametrize("augment", [None, noisy])
def test_same_seed_same_batches_and_other_seed_others(kind, augment):
    """Order and augmentation are functions of the seed."""
    stored = NUMBERS if kind == "arrays" else data.load("digits", "train[:20]")
    name = "labels" if augment is None else "noise"

    def first(seed):
        iterator = data.batches(stored, batch_size=4, seed=seed, augment=augment)
        return take(iterator, 8, name)

    assert first(3) == first(3)
    assert first(3) != first(4)


@pytest.mark.parametrize("augment", [None, noisy])
def test_every_epoch_has_all_examples_in_a_new_order_and_new_noise(augment):
    """Shuffling and augmentation are drawn anew in every epoch."""
    iterator = data.batches(NUMBERS, batch_size=5, seed=0, augment=augment)
    epochs = [[next(iterator) for _ in range(4)] for _ in range(3)]
    orders = [flat(b["labels"].tolist() for b in epoch) for epoch in epochs]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert orders[0] != list(range(20))
    if augment:
        noise = flat(flat(b["noise"].tolist() for b in epoch) for epoch in epochs)
        assert len(set(noise)) == 60


def test_augment_at_the_end_and_whole_batches_agree():
    """The fast path without augmentation gives the batches of the slow one."""
    fast = data.batches(NUMBERS, batch_size=6, seed=5)
    slow = data.batches(NUMBERS, batch_size=6, seed=5, augment=lambda e, _: e)
    assert take(fast, 9) == take(slow, 9)


@pytest.mark.parametrize("threads", [0, 3])
@pytest.mark.parametrize("stop", [1, 4, 7])
def test_exact_resume(threads, stop):
    """A new iterator set to a saved state goes on as the old one would have."""

    def make(seed=7):
        return data.batches(
            data.load("digits", "train[:30]"),
            batch_size=8,
            seed=seed,
            augment=noisy,
            threads=threads,
        )

    first = make()
    take(first, stop)
    state = json.loads(json.dumps(first.get_state()))
    rest = [next(first) for _ in range(6)]
    second = make()
    take(second, 2)
    second.set_state(state)
    for old in rest:
        new = next(second)
        for name in old:
            np.testing.assert_array_equal(old[name], new[name])


def test_shards_partition_every_epoch():
    """Three shards never share an example; the remainder changes."""
    iterators = [
        data.batches(NUMBERS, batch_size=6, seed=1, shard=(i, 3)) for i in range(3)
    ]
    epochs = [flat(next(iterator)["labels"] for iterator in iterators) for _ in "abcd"]
    assert all(len(set(epoch)) == 18 for epoch in epochs)
    assert len({tuple(sorted(epoch)) for epoch in epochs}) > 1


def test_shards_augment_differently():
    """Draws at the same position of two shards are not the same."""
    noise = [
        take(
            data.batches(NUMBERS, batch_size=10, seed=1, shard=(i, 2), augment=noisy),
            1,
            "noise",
        )
        for i in range(2)
    ]
    assert not set(flat(noise[0])) & set(flat(noise[1]))


def test_one_pass_and_remainder():
    """Without repeat an epoch ends; the last batch is dropped or short."""
    options = {"batch_size": 8, "seed": 0, "repeat": False}
    assert [len(b["labels"]) for b in data.batches(NUMBERS, **options)] == [8, 8]
    short = data.batches(NUMBERS, drop_remainder=False, **options)
    assert [len(b["labels"]) for b in short] == [8, 8, 4]


def test_few_examples_fill_a_large_batch():
    """With repeat a batch may be larger than the data."""
    batch = next(data.batches(NUMBERS, batch_size=50, seed=0))
    assert np.bincount(batch["labels"]).max() <= 3


def test_source_batches_are_scaled():
    """Bytes come out in [0, 1], and augmentation sees them as they are."""
    seen = []

    def look(example, generator):
        seen.append(example["inputs"].dtype)
        return example

    source = data.load("digits", "train[:8]")
    batch = next(data.batches(source, batch_size=4, seed=0, augment=look))
    plain = next(data.batches(source, batch_size=4, seed=0))
    assert batch["inputs"].dtype == plain["inputs"].dtype == np.float32
    assert plain["inputs"].shape == (4, 8, 8, 1)
    assert plain["inputs"].max() == 1.0
    assert set(seen) == {np.dtype("uint8")}


@pytest.mark.parametrize("make", [data.batches, data.evaluation_batches])
def test_what_is_scaled(make):
    """Images of uint8 and uint16; rows of bytes, booleans and floats stay."""
    options = {"batch_size": 1} | ({"seed": 0} if make is data.batches else {})
    for kind in (np.uint8, np.uint16):
        white = np.full((1, 2, 2, 1), np.iinfo(kind).max, kind)
        found = next(make({"inputs": white, "teacher_inputs": white}, **options))
        for name in ("inputs", "teacher_inputs"):
            assert found[name].dtype == np.float32 and np.all(found[name] == 1)
    for stays in (
        np.full((1, 3), 7, np.uint8),
        np.ones((1, 2, 2, 1), bool),
        np.full((1, 2, 2, 1), 0.5),
        np.full((1, 2, 2, 1), 7, np.int32),
    ):
        found = next(make({"inputs": stays}, **options))["inputs"]
        assert found.dtype == stays.dtype
        np.testing.assert_array_equal(found, stays)


@pytest.mark.parametrize("kind", ["arrays", "source"])
def test_augment_may_change_its_example(kind):
    """It works on a copy: the data stay, also those that can't be written to."""
    stored = data.load("digits", "train[:2]")
    stored._records.arrays["inputs"].flags.writeable = False
    if kind == "arrays":
        stored = dict(stored._records.arrays)

    def erase(example, generator):
        example["inputs"].fill(0)
        return example

    erased = next(data.batches(stored, batch_size=2, seed=0, augment=erase))
    assert not erased["inputs"].any()
    assert next(data.batches(stored, batch_size=2, seed=0))["inputs"].any()


@pytest.mark.parametrize("shards", [1, 3])
def test_evaluation_counts_every_example_once(shards):
    """Static shapes, a mask, every example in one shard exactly."""
    seen, lengths = [], set()
    for i in range(shards):
        batches = list(
            data.evaluation_batches(NUMBERS, batch_size=8, shard=(i, shards))
        )
        lengths.add(len(batches))
        for batch in batches:
            assert batch["inputs"].shape == (8,)
            seen += batch["labels"][batch["where"]].tolist()
    assert sorted(seen) == list(range(20))
    assert len(lengths) == 1


def test_evaluation_leaves_out_what_the_data_leave_out():
    """Their own mask and the padding together, by row or by token."""
    own = np.array([True, False, True])
    for where in (own, np.stack([own, ~own], 1)):
        *_, last = data.evaluation_batches(
            {"inputs": np.arange(3), "where": where}, batch_size=4
        )
        np.testing.assert_array_equal(last["where"][:3], where)
        assert not last["where"][3].any()
    with pytest.raises(ValueError, match="must be bool, got float64; use `where > 0`"):
        next(data.evaluation_batches({"where": own.astype(float)}, batch_size=4))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"batch_size": 8}, "batch_size .* with 4, these have 8; give the same"),
        ({"seed": 5}, "seed: the run read batches with 0, these have 5"),
        ({"shuffle": False}, "shuffle: .* with True, these have False"),
        ({"repeat": False}, "repeat: .* with True, these have False"),
        ({"data": {"labels": np.arange(21)}}, "examples: .* with 20, these have 21"),
    ],
)
def test_a_position_in_other_batches_is_refused(other, message):
    given = {"data": NUMBERS, "batch_size": 4, "seed": 0}
    state = data.batches(**given).get_state()
    with pytest.raises(ValueError, match=message):
        data.batches(**{**given, **other}).set_state(state)


def test_a_position_in_batches_of_another_kind_is_refused():
    plain = data.batches(NUMBERS, batch_size=4, seed=0)
    both = data.pairs(plain, plain)
    once = data.evaluation_batches(NUMBERS, batch_size=4)
    with pytest.raises(ValueError, match="has \\['batches', 'of'\\], that of these"):
        both.set_state(plain.get_state())
    with pytest.raises(ValueError, match="has \\['source', 'target'\\], that of these"):
        plain.set_state(both.get_state())
    with pytest.raises(ValueError, match="seed: .* with 0, these have None"):
        once.set_state(plain.get_state())


def test_a_position_in_shards_of_as_many_in_all_means_the_same(types_unchecked):
    """Numbers may be NumPy's: a position is saved as JSON."""
    plain = data.batches(NUMBERS, batch_size=4, seed=0)
    halves = data.batches(NUMBERS, batch_size=2, seed=np.int64(0), shard=(1, 2))
    halves.set_state(json.loads(json.dumps(plain.get_state())))
    plain.set_state(json.loads(json.dumps(halves.get_state())))


def test_pairs_resume_and_end():
    """Both positions are restored; the shorter domain ends the pair."""

    def make():
        source = data.batches(NUMBERS, batch_size=4, seed=0)
        target = data.batches({"inputs": np.arange(7)}, batch_size=3, seed=1)
        return data.pairs(source, target)

    first = make()
    for _ in range(5):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    wanted = [next(first) for _ in range(4)]
    second = make()
    second.set_state(state)
    for old in wanted:
        new = next(second)
        assert old["source"]["labels"].tolist() == new["source"]["labels"].tolist()
        assert old["target"]["inputs"].tolist() == new["target"]["inputs"].tolist()
        assert "labels" not in new["target"]
    once = data.batches(NUMBERS, batch_size=10, seed=0, repeat=False)
    assert len(list(data.pairs(once, data.batches(NUMBERS, batch_size=3, seed=0)))) == 2


def test_orbax_saves_pairs(tmp_path):
    """Checkpoints can hold the iterator itself."""
    from orbax.checkpoint import v1 as ocp

    def make():
        return data.pairs(
            data.batches(NUMBERS, batch_size=4, seed=0),
            data.batches(NUMBERS, batch_size=4, seed=1),
        )

    first = make()
    next(first)
    ocp.save_checkpointables(tmp_path / "step", {"data": first})
    second = make()
    ocp.load_checkpointables(tmp_path / "step", {"data": second})
    assert next(second)["target"]["labels"].tolist() == (
        next(first)["target"]["labels"].tolist()
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"shard": (2, 2)}, r"shard=\(2, 2\)"),
        ({"shard": (0, 40)}, "40 shards"),
        ({"batch_size": 21, "repeat": False}, "batch_size=21"),
    ],
)
def test_refusals(options, message):
    """Arguments out of range are named."""
    with pytest.raises(ValueError, match=message):
        data.batches(NUMBERS, **{"batch_size": 4, "seed": 0, **options})


def test_nan_and_unequal_lengths_are_refused():
    """The first place of a NaN is named, before any step."""
    broken = np.zeros((6, 2))
    broken[4, 1] = np.nan
    with pytest.raises(ValueError, match=r"inputs\[4, 1\] = nan"):
        data.batches({"inputs": broken}, batch_size=2, seed=0)
    with pytest.raises(ValueError, match="one common length"):
        data.evaluation_batches({"a": np.zeros(2), "b": np.zeros(3)}, batch_size=2)


@pytest.mark.parametrize("kind", [jnp.bfloat16, np.complex64])
def test_nan_of_other_kinds_of_numbers(kind):
    with pytest.raises(ValueError, match=r"inputs\[1\] = \(?nan"):
        data.batches({"inputs": np.array([0, np.nan], kind)}, batch_size=2, seed=0)


def test_values_that_are_no_rows_are_refused():
    for name, wrong, message in (
        ("names", ["a"] * 10, "names can't go into batches, for .* leave it out"),
        ("pair", (np.ones(10),) * 2, r"pair must be one array .*, got a tuple; give"),
    ):
        with pytest.raises(ValueError, match=message):
            data.batches({**NUMBERS, name: wrong}, batch_size=2, seed=0)
    with pytest.raises(ValueError, match=r"scale must be an array \[n, \.\.\.\], got"):
        data.batches({**NUMBERS, "scale": np.array(2.0)}, batch_size=2, seed=0)


def test_augment_that_returns_nothing_is_refused(types_unchecked):
    """Not passed over until one returns something."""
    options = {"batch_size": 2, "seed": 0, "augment": lambda example, _: None}
    with pytest.raises(ValueError, match="augment returned NoneType; return the exam"):
        next(data.batches(NUMBERS, **options))


def test_images_of_several_sizes_say_what_to_do():
    images = [np.zeros((2, side, 2, 1), np.uint8) for side in (2, 3)]
    source = data.Source("uneven", "all", None, images, lambda x: {"inputs": x})
    with pytest.raises(ValueError, match="inputs of 'uneven' have shapes .* size="):
        next(data.batches(source, batch_size=2, seed=0, threads=0))


def test_pairs_take_batches(types_unchecked):
    with pytest.raises(TypeError, match="target: got list_iterator, give what `batch"):
        data.pairs(data.batches(NUMBERS, batch_size=2, seed=0), iter([1]))


def test_random_crop_moves_and_flip_mirrors():
    """A crop is a window of the padded image; a fair flip does both."""
    image = np.arange(36).reshape(6, 6, 1)
    crop = data.random_crop(pad=1)
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="reflect")
    windows = {
        padded[i : i + 6, j : j + 6].tobytes() for i in range(3) for j in range(3)
    }
    generator = np.random.default_rng(0)
    drawn = {crop({"inputs": image}, generator)["inputs"].tobytes() for _ in range(200)}
    assert drawn == windows
    flip = data.horizontal_flip()
    flips = [
        np.array_equal(flip({"inputs": image}, generator)["inputs"], image[:, ::-1])
        for _ in range(200)
    ]
    assert 70 < sum(flips) < 130


CHANGES = {"crop": data.random_crop(pad=2), "flip": data.horizontal_flip()}


def test_labels_of_pixels_move_with_the_image():
    """Every pixel keeps its label, and so does a mask."""
    fields = ("inputs", "labels", "where")
    change = data.compose(
        data.random_crop(pad=2, fields=fields), data.horizontal_flip(fields=fields)
    )
    labels = np.arange(30).reshape(5, 6)
    example = {
        "inputs": np.stack([labels, 2 * labels], -1),
        "labels": labels,
        "where": labels % 3 > 0,
    }
    generator = np.random.default_rng(0)
    for _ in range(5):
        moved = change(example, generator)
        assert not np.array_equal(moved["labels"], labels)
        np.testing.assert_array_equal(moved["inputs"][..., 1], 2 * moved["labels"])
        np.testing.assert_array_equal(moved["where"], moved["labels"] % 3 > 0)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_labels_of_pixels_are_not_left_behind(change):
    generator = np.random.default_rng(0)
    example = {"inputs": np.zeros((5, 6, 1)), "labels": np.zeros((5, 6))}
    for _ in range(3):
        with pytest.raises(ValueError, match=r"fields=\('inputs', 'labels'\)"):
            change(example, generator)
    with pytest.raises(ValueError, match="fields: the example has no"):
        change({"image": example["inputs"]}, generator)
    view = {"inputs": np.zeros((5, 6, 1)), "view": np.zeros((5, 6, 1))}
    assert change(view, generator)["view"] is view["view"]


def test_fields_are_names_of_what_is_as_large():
    example = {"inputs": np.zeros((8, 8, 1)), "labels": np.zeros((4, 4))}
    change = data.random_crop(pad=1, fields=("inputs", "labels"))
    with pytest.raises(ValueError, match="'labels': .4, 4.. differ; bring them to one"):
        change(example, np.random.default_rng(0))
    for fields in ("inputs", ()):
        with pytest.raises(ValueError, match="must be names, as"):
            data.horizontal_flip(fields=fields)


@pytest.mark.parametrize("kind", ["crop", "flip"])
def test_augmentations_refuse(kind):
    """Negative padding, a probability above one."""
    with pytest.raises(ValueError, match="-1" if kind == "crop" else "1.5"):
        if kind == "crop":
            data.random_crop(pad=-1)
        else:
            data.horizontal_flip(probability=1.5)
