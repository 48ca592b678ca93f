"""A teacher that is looked up: the same student bit for bit, and nothing stale."""

import functools
import json
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtransfer import data, losses, nets, parallel
from jaxtransfer.methods import distill
from jaxtransfer.methods.distill import Augmentation, Term, cache, cache_files
from jaxtransfer.model import from_linen
from jaxtransfer.train import init_state, resident, scan_fit, train_step
from jaxtransfer.typing import Variables
from tests.twins import same

pytestmark = pytest.mark.present_code
KEY = jax.random.key(0)
NUMBER, BATCH = 20, 8  # the last batch is not full
IMAGES = np.asarray(jax.random.normal(KEY, (NUMBER, 8, 8, 3)))
LABELS = np.arange(NUMBER) % 5
SMALL, LARGE = (from_linen(nets.ResNet(5, depth=8, filters=n)) for n in (2, 4))
STUDENT = jax.jit(SMALL.init)(jax.random.key(1), IMAGES[:2])


def _given():
    """A teacher whose statistics are not those it begins with."""
    fresh = jax.jit(LARGE.init)(jax.random.key(2), IMAGES[:2])
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: x + np.asarray(0.1 * random.random(x.shape), x.dtype), fresh
    )


TEACHER = _given()
TAP = "layer3_0"


def shift_and_flip(key, image):
    """Up to a pixel either way, and a mirror image half of the time."""
    place, turn = jax.random.split(key)
    padded = jnp.pad(image, ((1, 1), (1, 1), (0, 0)))
    corner = (*jax.random.randint(place, (2,), 0, 3), 0)
    window = jax.lax.dynamic_slice(padded, corner, image.shape)
    return jnp.where(jax.random.bernoulli(turn), window[:, ::-1], window)


AUGMENTATION = Augmentation(shift_and_flip, key=jax.random.key(7), variants=2)


def write(folder, **options):
    given = {"batch_size": BATCH, "augmentation": AUGMENTATION, "taps": (TAP,)}
    return distill.cache_teacher(folder, LARGE, TEACHER, IMAGES, **given | options)


def open_(folder, **options):
    given = {"examples": IMAGES, "augmentation": AUGMENTATION, "variables": TEACHER}
    return distill.open_cache(folder, **given | options)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A cache that no test changes."""
    folder = tmp_path_factory.mktemp("cache")
    write(folder)
    return folder


@pytest.fixture
def copied(written, tmp_path):
    """One that a test may change."""
    return shutil.copytree(written, tmp_path / "copied")


def test_images_as_stored_are_refused(tmp_path):
    stored = np.zeros(np.shape(IMAGES), np.uint8)
    with pytest.raises(ValueError, match="examples: got uint8 .* divide by 255"):
        distill.cache_teacher(tmp_path, LARGE, TEACHER, stored, batch_size=BATCH)


def by_hand(places, variant=0):
    """What the teacher says, without the cache."""

    @jax.jit
    def look(teacher, images):
        seen = AUGMENTATION(images, places, variant)
        outputs, features, _ = LARGE.apply(teacher, seen, taps=(TAP,))
        return {"": outputs, **features}

    return look(TEACHER, IMAGES[places])


# --- equal to a teacher that is run ---------------------------------------------------

TERMS = {
    "logits": Term(loss=losses.knowledge_distillation, weight=0.9),
    "maps": Term(
        loss=losses.attention_transfer, student=TAP, teacher=TAP, weight=100.0
    ),
    "hint": Term(
        loss=losses.hint, student=TAP, teacher=TAP, bridge=distill.match(), weight=0.1
    ),
}
OPTIMIZER = optax.sgd(0.05, momentum=0.9)


@functools.cache
def begin():
    begun = distill.start(
        jax.random.key(3),
        SMALL,
        LARGE,
        TERMS,
        student_variables=STUDENT,
        teacher_variables=TEACHER,
        inputs=IMAGES[:2],
    )
    return begun, train_step(distill.objective(SMALL, LARGE, terms=TERMS), OPTIMIZER)


def three_epochs(taught=None, batch_size=BATCH, **frozen):
    """Shuffled and augmented; the last, incomplete batch of an epoch is left out."""
    begun, step = begin()
    state = init_state(KEY, begun, OPTIMIZER, frozen=frozen)

    def update(state, given):
        images, labels, places, variant = given[:4]
        batch = {"inputs": AUGMENTATION(images, places, variant), "labels": labels}
        if len(given) == 5:
            batch["teacher"] = given[4]
        return step(state, batch)

    update, found = parallel.jit_step(update), []
    for epoch in range(3):
        order = np.random.default_rng(epoch).permutation(NUMBER)
        variant = np.int32(AUGMENTATION.variant(epoch))
        for start in range(0, NUMBER - batch_size + 1, batch_size):
            places = order[start : start + batch_size]
            given = IMAGES[places], LABELS[places], places, variant
            if taught is not None:
                given = *given, taught.lookup(places, variant)
            state, measured = update(state, given)
            found.append(float(measured["loss"].total))
    return state, found


@functools.cache
def online():
    return three_epochs(teacher=TEACHER)


def test_three_epochs_are_those_of_the_teacher_bit_for_bit(written):
    taught = open_(written)
    assert taught.batch_size == BATCH and taught.examples == NUMBER
    expected, steps = online()
    found, same_steps = three_epochs(taught)
    assert len(set(steps)) == 6 and steps == same_steps
    assert same(
        (found.params, found.model_state, found.opt_state),
        (expected.params, expected.model_state, expected.opt_state),
    )


def test_another_batch_size_differs_in_the_last_bits_only(tmp_path):
    """Which is why it is the caller who says how large the batches are."""
    taught = write(tmp_path, batch_size=1)
    _, steps = online()
    _, found = three_epochs(taught)
    np.testing.assert_allclose(found, steps, rtol=1e-4)
    expected = by_hand(np.arange(BATCH))[""]
    assert np.any(taught.lookup(np.arange(BATCH))[""] != expected)


def test_a_row_depends_neither_on_its_place_nor_on_the_others(written):
    taught = open_(written)
    for seed in range(3):
        places = np.random.default_rng(seed).permutation(NUMBER)[:BATCH]
        variant = np.arange(BATCH) % 2
        assert same(by_hand(places, variant), taught.lookup(places, variant))


def test_on_the_device_in_a_scan_as_on_the_host(written):
    taught = open_(written)
    arrays = {"inputs": IMAGES, "labels": LABELS, "index": np.arange(NUMBER)}
    begun, step = begin()

    @jax.jit
    def train(on_device, arrays):
        state = init_state(KEY, begun, OPTIMIZER)
        draw = resident(arrays, BATCH)

        def sample(key, number):
            batch = draw(key, number)
            variant = AUGMENTATION.variant(number // (NUMBER // BATCH))
            inputs = AUGMENTATION(batch["inputs"], batch["index"], variant)
            said = on_device.lookup(batch["index"], variant)
            return {**batch, "inputs": inputs, "teacher": said, "variant": variant}

        state, _ = scan_fit(step, state, sample, steps=6)
        return state.params, sample(KEY, 2)

    params, batch = train(taught.on_device(), jax.tree.map(jnp.asarray, arrays))
    assert batch["variant"] == 1
    assert same(batch["teacher"], taught.lookup(batch["index"], batch["variant"]))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_the_teacher_is_in_evaluation_mode_and_left_alone(written):
    before = jax.tree.map(np.array, TEACHER)
    taught = open_(written)
    said = LARGE.apply(TEACHER, AUGMENTATION(IMAGES, np.arange(NUMBER)))[0]
    np.testing.assert_allclose(taught.arrays[""][0], said, rtol=1e-4, atol=1e-5)
    assert same(before, TEACHER)


# --- augmentation ---------------------------------------------------------------------


def test_a_variant_is_the_same_in_every_batch():
    places = np.array([3, 0, 11])
    first = AUGMENTATION(IMAGES[places], places, np.array([0, 1, 1]))
    again = AUGMENTATION(IMAGES[places[::-1]], places[::-1], np.array([1, 1, 0]))
    assert same(first, again[::-1])
    key = distill.variant_key(AUGMENTATION.key, 11, 1)
    assert same(first[2], shift_and_flip(key, IMAGES[11]))
    other = AUGMENTATION(IMAGES, np.arange(NUMBER), 0)
    assert not same(other, AUGMENTATION(IMAGES, np.arange(NUMBER), 1))
    assert [AUGMENTATION.variant(epoch) for epoch in range(4)] == [0, 1, 0, 1]


def test_no_augmentation_gives_the_inputs_back():
    assert Augmentation()(IMAGES, np.arange(NUMBER)) is IMAGES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variants": 0}, "variants: got 0"),
        ({"variants": 3}, "without an augment"),
        ({"augment": shift_and_flip}, "typed key"),
        ({"augment": shift_and_flip, "key": jnp.zeros(2, jnp.uint32)}, "typed key"),
    ],
)
def test_augmentations_that_can_not_be(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Augmentation(**options)


# --- what is kept ---------------------------------------------------------------------


def test_all_classes_are_the_full_loss(tmp_path, written):
    places, own = np.arange(BATCH), jax.random.normal(KEY, (BATCH, 5))
    logits = open_(written).lookup(places, 1)[""]
    for k in (2, 5):
        taught = write(tmp_path / str(k), top_k=k, temperature=3.0)
        assert taught.temperature == 3.0 and "" not in taught.arrays
        said = taught.lookup(places, 1)
        given = own, *(said[path] for path in distill.TOP_K)
        found = losses.cached_knowledge_distillation(
            *given, temperature=3.0, tail="bucket"
        )
        expected = losses.top_k_knowledge_distillation(
            own, logits, k=k, temperature=3.0, tail="bucket"
        )
        np.testing.assert_allclose(found, expected, rtol=1e-4)
        assert taught.arrays[distill.TOP_K[1]].dtype == np.uint8
        on_device = taught.on_device().lookup(places, 1)
        assert same(said, jax.device_get(on_device))
    full = losses.knowledge_distillation(own, logits, temperature=3.0)
    np.testing.assert_allclose(found, full, rtol=1e-5)


def test_the_likeliest_classes_fit_a_term(tmp_path):
    taught = write(tmp_path, top_k=3, taps=())
    term = taught.term(weight=2.0)
    assert (term.weight, term.options["temperature"]) == (2.0, 4.0)
    task = distill.objective(SMALL, LARGE, terms={"logits": term}, task_weight=0.0)
    begun, places = distill.init(STUDENT), np.arange(BATCH)
    batch = {"inputs": IMAGES[:BATCH], "teacher": taught.lookup(places)}
    loss, _ = jax.jit(task)(begun.params, {}, begun.model_state, batch, KEY)
    own = SMALL.apply(STUDENT, IMAGES[:BATCH], train=True)[0]
    expected = losses.top_k_knowledge_distillation(
        own, by_hand(places)[""], k=3, temperature=4.0, tail="bucket"
    )
    np.testing.assert_allclose(loss, 2.0 * expected.mean(), rtol=1e-4)


def test_the_likeliest_of_other_classes_are_refused(tmp_path, written):
    taught = write(tmp_path, top_k=2, taps=())
    model = from_linen(nets.ResNet(taught.classes + 2, depth=8, filters=2))
    task = distill.objective(model, LARGE, terms={"logits": taught.term()})
    begun = distill.init(model.init(KEY, IMAGES[:1]))
    batch = {
        "inputs": IMAGES[:BATCH],
        "labels": LABELS[:BATCH],
        "teacher": taught.lookup(np.arange(BATCH)),
    }
    message = f"the student has {taught.classes + 2} classes.*teacher {taught.classes}"
    with pytest.raises(ValueError, match=message):
        jax.jit(task)(begun.params, {}, begun.model_state, batch, KEY)
    with pytest.raises(ValueError, match="keeps all logits.*top_k="):
        open_(written).term()


def test_half_the_precision_half_the_bytes(tmp_path, written):
    half, full = write(tmp_path, dtype=np.float16), open_(written)
    assert half.arrays[TAP].nbytes * 2 == full.arrays[TAP].nbytes
    places = np.array([4, 4, 19])
    for path in ("", TAP):
        rounded = full.lookup(places)[path].astype(np.float16).astype(np.float32)
        for found in (half.lookup(places), half.on_device().lookup(places)):
            assert found[path].dtype == np.float32
            np.testing.assert_array_equal(found[path], rounded)


def test_several_teachers(written):
    taught, begun = open_(written), distill.init(STUDENT)
    terms = {name: Term(loss=losses.knowledge_distillation, of=name) for name in "ab"}
    task = distill.objective(SMALL, {"a": LARGE, "b": LARGE}, terms=terms)
    said = [taught.lookup(np.arange(BATCH), variant) for variant in (0, 1)]
    batch = {"inputs": IMAGES[:BATCH], "teacher": dict(zip("ab", said, strict=True))}
    _, (_, measured) = jax.jit(task)(begun.params, {}, begun.model_state, batch, KEY)
    assert measured["a"] != measured["b"]


class Broken(nn.Module):
    """Logits of a size that is given."""

    size: float

    @nn.compact
    def __call__(self, x):
        return nn.Dense(5)(x.reshape(len(x), -1)) + self.size


@pytest.mark.parametrize(
    ("size", "dtype"), [(np.nan, np.float32), (np.inf, np.float32), (1e6, np.float16)]
)
def test_what_is_no_number_is_not_kept(tmp_path, size, dtype):
    net = from_linen(Broken(size))
    variables = net.init(KEY, IMAGES[:2])
    given = {"batch_size": BATCH, "dtype": dtype}
    with pytest.raises(FloatingPointError, match="teacher says at '' is not finite"):
        distill.cache_teacher(tmp_path, net, variables, IMAGES, **given)


def test_a_class_that_can_not_be_is_kept(tmp_path):
    net = from_linen(Broken(-np.inf))
    variables = net.init(KEY, IMAGES[:2])
    taught = distill.cache_teacher(tmp_path, net, variables, IMAGES, batch_size=BATCH)
    assert np.all(taught.arrays[""] == -np.inf)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"temperature": 0.0}, "temperature: got 0.0"),
        ({"dtype": np.int32}, "dtype: got int32; choose"),
        ({"top_k": 6}, "top_k: got 6, the teacher has 5 classes"),
        ({"top_k": 0}, "top_k: got 0"),
    ],
)
def test_arguments_out_of_range(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda x: {"a": x}, "its output is a dict"),
        (lambda x: x.mean(), r"its output is \(\) of 8"),
    ],
)
def test_a_teacher_without_a_row_an_example(tmp_path, output, message):
    net = LARGE._replace(
        apply=lambda variables, inputs, **options: (output(inputs), {}, {})
    )
    with pytest.raises(ValueError, match=message):
        distill.cache_teacher(tmp_path, net, TEACHER, IMAGES, batch_size=BATCH)


def test_examples_of_unequal_number(tmp_path):
    with pytest.raises(ValueError, match="same number of examples in front"):
        distill.cache_teacher(
            tmp_path,
            LARGE,
            TEACHER,
            {"a": IMAGES, "b": LABELS[:3]},
            batch_size=BATCH,
        )


# --- looked up ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("indices", "variant", "message"),
    [
        ([0, NUMBER], 0, r"indices: got \[20\], but the cache has 0 … 19"),
        ([-1, 0], 0, r"indices: got \[-1\]"),
        ([0, 1], 2, r"variant: got \[2\], but the cache has 0 … 1"),
        ([0, 1], np.array([0, -1]), r"variant: got \[-1\]"),
    ],
)
def test_out_of_range(written, indices, variant, message):
    taught, indices = open_(written), np.array(indices)
    with pytest.raises(ValueError, match=message):
        taught.lookup(indices, variant)
    said = taught.on_device().lookup(indices, variant)[""]
    bad = (indices < 0) | (indices >= NUMBER) | (np.asarray(variant) == 2)
    bad |= np.asarray(variant) < 0
    assert np.array_equal(np.isnan(said).all(axis=1), bad)


def test_a_class_out_of_range_is_no_class(tmp_path):
    taught = write(tmp_path, top_k=2, taps=()).on_device()
    said = taught.lookup(np.array([0, NUMBER]))
    assert said[distill.TOP_K[1]][1].tolist() == [-1, -1]


def test_batches_bring_what_the_teacher_says(written):
    taught = open_(written)
    columns = {"inputs": IMAGES, "labels": LABELS, "index": np.arange(NUMBER)}
    read = taught.batches(data.batches(columns, batch_size=BATCH, seed=0))
    seen = []
    for _ in range(6):
        batch = next(read)
        index, variant = batch["index"], batch["variant"]
        seen += zip(variant.tolist(), index.tolist(), strict=True)
        assert same(batch["teacher"], taught.lookup(index, variant))
        assert same(batch["inputs"], AUGMENTATION(IMAGES[index], index, variant))
    # Two epochs of 20, one of each variant, and 8 of the third.
    assert len(set(seen[:40])) == 40
    assert [v for v, _ in seen] == [0] * 20 + [1] * 20 + [0] * 8


def test_batches_without_places(written):
    read = open_(written).batches([{"inputs": IMAGES, "labels": LABELS}])
    with pytest.raises(ValueError, match=r"\['inputs', 'labels'\], but no 'index'"):
        next(read)
    with pytest.raises(ValueError, match="no get_state and set_state"):
        read.set_state(read.get_state())
    with pytest.raises(ValueError, match="data: .* batches without a teacher cache"):
        read.set_state({"batches": {}, "of": {}})


SECOND = jax.tree.map(lambda x: x * np.asarray(0.9, x.dtype), TEACHER)


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    """The cache of another teacher, of the same augmentation."""
    folder = tmp_path_factory.mktemp("second")
    given = {"batch_size": BATCH, "augmentation": AUGMENTATION}
    return distill.cache_teacher(folder, LARGE, SECOND, IMAGES, **given)


def columns():
    return {"inputs": IMAGES, "labels": LABELS, "index": np.arange(NUMBER)}


def test_batches_of_several_caches(written, second):
    """What both say, under their names, of inputs that are augmented once."""
    taught = open_(written)
    read = taught.batches(data.batches(columns(), batch_size=BATCH, seed=0), name="a")
    alone = taught.batches(data.batches(columns(), batch_size=BATCH, seed=0))
    skipped = next(read), next(alone)  # The first cache may have been read before.
    assert same(skipped[0]["teacher"], {"a": skipped[1]["teacher"]})
    read = second.batches(read, name="b")
    for _ in range(4):
        batch, expected = next(read), next(alone)
        index, variant = batch["index"], batch["variant"]
        assert same(
            batch.pop("teacher"),
            {"a": expected.pop("teacher"), "b": second.lookup(index, variant)},
        )
        assert same(batch, expected)
    assert 1 in variant  # of the second epoch


def test_several_caches_are_gone_on_with(written, second):
    def begin():
        read = data.batches(columns(), batch_size=BATCH, seed=0)
        return second.batches(open_(written).batches(read, name="a"), name="b")

    read, again = begin(), begin()
    for _ in range(2):
        next(read)
    again.set_state(json.loads(json.dumps(read.get_state())))
    for _ in range(3):
        assert same(next(again), next(read))
    swapped = data.batches(columns(), batch_size=BATCH, seed=0)
    swapped = open_(written).batches(second.batches(swapped, name="b"), name="a")
    with pytest.raises(ValueError, match="cache of another teacher: its fingerprint"):
        swapped.set_state(read.get_state())
    renamed = data.batches(columns(), batch_size=BATCH, seed=0)
    renamed = second.batches(open_(written).batches(renamed, name="a"), name="c")
    with pytest.raises(ValueError, match="name: the run read this cache as 'b', not"):
        renamed.set_state(read.get_state())


def test_a_student_of_several_caches_needs_no_teacher(written, second):
    begun, names = distill.init(STUDENT), {"a": TEACHER, "b": SECOND}
    terms = {n: Term(loss=losses.knowledge_distillation, of=n) for n in names}
    task = jax.jit(distill.objective(SMALL, dict.fromkeys(names, LARGE), terms=terms))
    read = data.batches(columns(), batch_size=BATCH, seed=0)
    batch = next(second.batches(open_(written).batches(read, name="a"), name="b"))
    found, _ = task(begun.params, {}, begun.model_state, batch, KEY)
    batch.pop("teacher")
    run, _ = task(begun.params, {"teacher": names}, begun.model_state, batch, KEY)
    np.testing.assert_allclose(found, run, rtol=1e-4)


def test_what_other_caches_say_is_not_lost(written, second, tmp_path):
    taught, batches = open_(written), [columns()]
    for names in ((None, None), ("a", None), (None, "b"), ("a", "a")):
        first = taught.batches(batches, name=names[0])
        with pytest.raises(ValueError, match="each teacher a name of its own"):
            second.batches(first, name=names[1])
    first = taught.batches(batches, name="a")
    with pytest.raises(ValueError, match="examples: got 5 for batches of another"):
        second.batches(first, name="b", examples=5)
    between = taught.batches(iter([next(first)]), name="b")
    with pytest.raises(ValueError, match="the batch has 'teacher' already; leave it"):
        next(between)
    plain = write(tmp_path, augmentation=None, taps=())
    message = "of another augmentation: its name is shift_and_flip, .* none; the inp"
    with pytest.raises(ValueError, match=message):
        plain.batches(taught.batches(batches, name="a"), name="b")


# --- resumed --------------------------------------------------------------------------


class Killed(BaseException):
    """As if the process had ended."""


def bytes_in(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("call", range(9))
def test_stopped_at_any_time_and_resumed_is_uninterrupted(
    call, written, tmp_path, monkeypatch
):
    """Stops in the call-th write, with rows half written; then goes on."""
    monkeypatch.setattr(cache, "_EVERY", 2)
    calls, through = [], cache_files.Writer.write
    rename, checksum = cache_files.os.replace, cache.file_checksum

    def step(kind):
        calls.append(kind)
        if len(calls) == call + 1:
            raise Killed

    def stop(writer, variant, start, rows):
        torn = {path: np.full_like(values, 77) for path, values in rows.items()}
        through(writer, variant, start, torn)
        step("write")
        through(writer, variant, start, rows)

    def stop_rename(source, target):
        step("rename")
        rename(source, target)

    def stop_checksum(file):
        step("checksum")
        return checksum(file)

    with monkeypatch.context() as patched:
        patched.setattr(cache_files.Writer, "write", stop)
        patched.setattr(cache_files.os, "replace", stop_rename)
        patched.setattr(cache, "file_checksum", stop_checksum)
        with pytest.raises(Killed):
            write(tmp_path)
    if call:
        with pytest.raises(ValueError, match="is not complete .* of 6 batches"):
            open_(tmp_path)
    looks = []
    counting = cache._look

    def counted(*given):
        look = counting(*given)

        def again(*given):
            looks.append(given[0] is TEACHER)
            return look(*given)

        return again

    monkeypatch.setattr(cache, "_look", counted)
    write(tmp_path)
    # 1 rename, then writes with a rename every 2 of them, at last the checksums.
    kept = {0: 0, 1: 0, 2: 0, 3: 0, 4: 2, 5: 2, 6: 2, 7: 4, 8: 4}[call]
    assert sum(looks) == 6 - kept
    assert bytes_in(tmp_path) == bytes_in(written)


def test_processes_write_manifests_under_names_of_their_own(tmp_path, monkeypatch):
    parts, rename = [], cache_files.os.replace

    def second(source, target):
        """As if another process wrote the same one in the middle of it."""
        parts.append(source.name)
        if len(parts) == 1:
            cache_files.write_manifest(tmp_path, {"version": cache_files.VERSION})
        rename(source, target)

    monkeypatch.setattr(cache_files.os, "replace", second)
    cache_files.write_manifest(tmp_path, {"version": cache_files.VERSION, "done": 1})
    assert cache_files.read_manifest(tmp_path)["done"] == 1
    assert [*bytes_in(tmp_path)] == [cache_files.MANIFEST]


def test_stopped_before_the_checksums(written, tmp_path, monkeypatch):
    def stop(file):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(cache, "file_checksum", stop)
        with pytest.raises(Killed):
            write(tmp_path)
    write(tmp_path)
    assert bytes_in(tmp_path) == bytes_in(written)


def test_a_complete_cache_does_not_run_the_teacher(copied, monkeypatch):
    def refuse(*_):
        raise AssertionError("the teacher ran")

    before = bytes_in(copied)
    monkeypatch.setattr(cache, "_fill", refuse)
    assert same(write(copied).lookup(np.arange(5)), open_(copied).lookup(np.arange(5)))
    assert bytes_in(copied) == before


# --- refused --------------------------------------------------------------------------


def changed(tree, path):
    """One number of a tree another one."""
    leaves, structure = jax.tree.flatten(tree)
    leaves[path] = np.array(leaves[path])
    leaves[path].flat[0] += 1e-3
    return structure.unflatten(leaves)


def mirror_only(key, image):
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


mirror_only.__name__ = shift_and_flip.__name__


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"variables": Variables(changed(TEACHER.params, 0), TEACHER.model_state)},
            "another teacher: its fingerprint",
        ),
        (
            {"variables": Variables(TEACHER.params, changed(TEACHER.model_state, 0))},
            "another teacher: its fingerprint",
        ),
        ({"examples": changed(IMAGES, 0)}, "another data set: its fingerprint"),
        ({"examples": IMAGES[:-1]}, "another data set: its number is 20, that given"),
        ({"examples": IMAGES[::-1]}, "another data set: its fingerprint"),
        ({"examples": 21}, "another data set: its number is 20, that given 21"),
        ({"augmentation": None}, "augmentation: its name is shift_and_flip, .* none"),
        (
            {"augmentation": Augmentation(shift_and_flip, key=KEY, variants=2)},
            "another augmentation: its key",
        ),
        (
            {"augmentation": Augmentation(shift_and_flip, key=jax.random.key(7))},
            "another augmentation: its variants is 2, that given 1",
        ),
        (
            {
                "augmentation": Augmentation(
                    shift_and_flip, key=jax.random.key(7, impl="rbg"), variants=2
                )
            },
            "another augmentation: its key",
        ),
        (
            {
                "augmentation": Augmentation(
                    mirror_only, key=jax.random.key(7), variants=2
                )
            },
            "another augmentation: its probe",
        ),
    ],
)
def test_a_cache_of_something_else(written, options, message):
    with pytest.raises(ValueError, match=message) as refused:
        open_(written, **options)
    assert "into another folder with distill.cache_teacher" in str(refused.value)


def test_the_number_of_examples_is_enough(written):
    assert open_(written, examples=NUMBER).examples == NUMBER


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"taps": ()}, "its taps is"),
        ({"top_k": 2}, "its top_k is None, that given 2"),
        ({"dtype": np.float16}, "its dtype is float32, that given float16"),
        ({"batch_size": 4}, "its batch_size is 8, that given 4"),
    ],
)
def test_a_folder_with_other_content(copied, options, message):
    before = bytes_in(copied)
    with pytest.raises(ValueError, match=message):
        write(copied, **options)
    assert bytes_in(copied) == before


def test_no_cache(tmp_path):
    with pytest.raises(FileNotFoundError, match="no teacher cache in"):
        open_(tmp_path)


def test_another_version(copied):
    manifest = cache_files.read_manifest(copied)
    cache_files.write_manifest(copied, {**manifest, "version": 1})
    with pytest.raises(ValueError, match="version 1, this library reads version 2"):
        open_(copied)


def _truncate(folder):
    file = folder / "1_layer3_0.npy"
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 1)


def _flip(folder):
    file = folder / "0_outputs.npy"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def _edit(folder):
    file = folder / "manifest.json"
    content = json.loads(file.read_text())
    content["teacher"] = "0" * 64
    file.write_text(json.dumps(content))


def _cut(folder):
    file = folder / "manifest.json"
    file.write_text(file.read_text()[:-20])


def _exchange(folder):
    np.save(folder / "0_outputs.npy", np.zeros((2, NUMBER, 4), np.float32))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "1_layer3_0.npy, .* at 'layer3_0', is missing or truncated"),
        (lambda f: (f / "0_outputs.npy").unlink(), "is missing or truncated"),
        (lambda f: (f / "0_outputs.npy").write_bytes(b""), "is missing or truncated"),
        (_exchange, r"is float32\[2, 20, 4\], the manifest says float32\[2, 20, 5\]"),
        (_flip, "0_outputs.npy, .* is damaged: its values"),
        (_edit, "manifest.json is damaged or was edited"),
        (_cut, "manifest.json is damaged"),
        (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json is damaged"),
    ],
)
def test_damaged_files(copied, damage, message):
    damage(copied)
    for call in (open_, write):
        with pytest.raises(distill.DamagedCacheError, match=message) as refused:
            call(copied)
        assert "remove the folder" in str(refused.value)


def test_values_may_be_left_unread(copied):
    _flip(copied)
    assert open_(copied, verify=False).examples == NUMBER


def test_a_truncated_file_is_not_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_EVERY", 2)

    def stop(*_):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(cache, "file_checksum", stop)
        with pytest.raises(Killed):
            write(tmp_path)
    _truncate(tmp_path)
    with pytest.raises(distill.DamagedCacheError, match="missing or truncated"):
        write(tmp_path)
