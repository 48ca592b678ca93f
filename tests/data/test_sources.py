"""Opening data sets, loading arrays, and the messages when something is missing."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest

from jaxtransfer import data
from jaxtransfer.data import arrays as arrays_module
from jaxtransfer.data import prepare, sources
from jaxtransfer.data import records as records_module


def need(name, places):
    """Skip where one data set isn't prepared."""
    if sources.find_prepared(name, data_dir=places) is None:
        pytest.skip(f"{name} is not prepared in {places}")


def test_digits_splits_are_disjoint_complete_and_fixed():
    """Train and test together are sklearn's 1,797 digits, in a fixed order."""
    from sklearn.datasets import load_digits

    everything = data.load("digits", "train+test")
    assert (len(data.load("digits")), len(data.load("digits", "test"))) == (1297, 500)
    rows = np.stack([example["inputs"].ravel() for example in everything])
    original = np.round(load_digits().data * (255 / 16)).astype(np.uint8)
    assert sorted(map(bytes, rows)) == sorted(map(bytes, original))
    first = [int(data.load("digits")[i]["labels"]) for i in range(8)]
    assert first == FIRST_TRAIN_LABELS


FIRST_TRAIN_LABELS = [2, 8, 2, 6, 6, 7, 1, 9]


@pytest.mark.parametrize(
    ("split", "length"),
    [
        ("train[:100]", 100),
        ("test[-5:]", 5),
        ("train[10%:20%]+test[:1]", 130),
        ("all", 1797),
    ],
)
def test_digits_takes_split_slices(split, length):
    """The split language of TFDS."""
    assert len(data.load("digits", split)) == length


@pytest.mark.parametrize("split", ["validation", "train[:0]", "train[:5"])
def test_digits_refuses_wrong_splits(split):
    """Unknown, empty and malformed splits."""
    with pytest.raises(ValueError, match=r"split|holds no example"):
        data.load("digits", split)


def test_example_and_pickle():
    """Types of one example; a source survives pickling (grain workers)."""
    source = pickle.loads(pickle.dumps(data.load("digits", "test")))
    example = source[np.int64(3)]
    assert example["inputs"].dtype == np.uint8
    assert example["labels"].dtype == np.int32
    assert example["labels"].shape == ()
    assert source.classes == 10


def test_a_source_is_indexed_like_a_sequence():
    """From the end too, and not beyond it, however it is stored."""
    stored = {0: 5, 1: 6, 2: 7}
    source = data.Source(
        "three", "all", None, stored, lambda number: {"labels": np.array(number)}
    )
    assert source[-1]["labels"] == 7
    assert [e["labels"] for e in source.__getitems__([-3, 2])] == [5, 7]
    for index in (3, -4):
        with pytest.raises(IndexError, match=f"{index} is outside of the 3 examples"):
            source[index]


def test_missing_data_set_says_what_to_run(tmp_path):
    """The message has the command, the places and the nearest name."""
    with pytest.raises(FileNotFoundError) as error:
        data.load("usps", data_dir=tmp_path)
    message = str(error.value)
    assert "python -m jaxtransfer.data.prepare usps --manual-dir" in message
    assert "usps.h5" in message
    assert str(tmp_path) in message
    with pytest.raises(FileNotFoundError, match="Did you mean 'digits'"):
        data.load("digit", data_dir=tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        data.load("mnist", data_dir=tmp_path)
    assert "Did you mean" not in str(error.value)


def test_data_dir_falls_back_to_the_variable(tmp_path, monkeypatch):
    """Argument before variable before home."""
    monkeypatch.setenv(sources.DATA_DIR_VARIABLE, str(tmp_path))
    assert sources.data_places() == [tmp_path, tmp_path / "tfds"]
    assert sources.data_places("x")[0].name == "x"
    monkeypatch.delenv(sources.DATA_DIR_VARIABLE)
    assert sources.data_places()[0].name == "tensorflow_datasets"


def test_as_arrays_sizes_channels_and_inversion():
    """Resizing keeps the mean, colours are repeated, inversion is 1 - x."""
    source = data.load("digits", "test[:20]")
    plain = data.as_arrays(source)
    assert plain["inputs"].dtype == np.float32
    np.testing.assert_array_equal(
        plain["inputs"][3], source[3]["inputs"] / np.float32(255)
    )
    large = data.as_arrays(source, size=32, channels=3)
    assert large["inputs"].shape == (20, 32, 32, 3)
    assert 0 <= large["inputs"].min() <= large["inputs"].max() <= 1
    np.testing.assert_array_equal(large["inputs"][..., 0], large["inputs"][..., 2])
    np.testing.assert_allclose(
        large["inputs"].mean((1, 2, 3)), plain["inputs"].mean((1, 2, 3)), atol=0.02
    )
    inverted = data.as_arrays(source, invert=True)
    np.testing.assert_array_equal(inverted["inputs"], 1 - plain["inputs"])


def test_grey_is_luma():
    """A pure green pixel has grey value 0.587."""
    green = np.zeros((1, 2, 2, 3), np.uint8)
    green[..., 1] = 255
    records = records_module.ArrayRecords({"inputs": green})
    source = records_module.Source(
        "green", "train", None, records, records_module.Decoder()
    )
    grey = data.as_arrays(source, channels=1)["inputs"]
    np.testing.assert_allclose(grey, np.full((1, 2, 2, 1), 0.587), atol=1e-6)


@pytest.mark.parametrize("arguments", [{"size": 0}, {"channels": 2}])
def test_as_arrays_refuses(arguments):
    """Size and channels that can't be had."""
    with pytest.raises(ValueError, match=next(iter(arguments))):
        data.as_arrays(data.load("digits", "test[:2]"), **arguments)


def test_as_arrays_refuses_channels_it_can_not_make():
    """Of transparency it knows nothing: four channels stay or are an error."""
    records = records_module.ArrayRecords({"inputs": np.zeros((2, 2, 2, 4), np.uint8)})
    source = records_module.Source(
        "rgba", "train", None, records, records_module.Decoder()
    )
    assert data.as_arrays(source)["inputs"].shape == (2, 2, 2, 4)
    for channels in (1, 3):
        with pytest.raises(
            ValueError, match=f"channels={channels} .* example 0 of 'rgba' has 4 chan"
        ):
            data.as_arrays(source, channels=channels)


def _source(**arrays):
    records = records_module.ArrayRecords(arrays)
    return records_module.Source("own", "all", None, records, records_module.Decoder())


@pytest.mark.parametrize(
    ("kind", "white"),
    [("uint16", 65535), ("float32", 1), ("float64", 1), ("bool", 1), ("int64", 255)],
)
def test_as_arrays_knows_the_white_of_every_type(kind, white):
    """As of bytes: `[0, 1]`, resized or not."""
    ink = np.random.default_rng(0).random((2, 4, 4, 3)) < 0.5
    images = np.where(ink, white, 0).astype(kind)
    for options in ({}, {"size": 3}, {"size": 6, "channels": 1}):
        wanted = data.as_arrays(_source(inputs=ink.astype(np.uint8) * 255), **options)
        found = data.as_arrays(_source(inputs=images), **options)
        assert found["inputs"].dtype == np.float32
        np.testing.assert_allclose(found["inputs"], wanted["inputs"], atol=1e-6)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"inputs": np.full((1, 2, 2, 1), 255.0)}, r"255\.0.* must lie in 0\.\.1;"),
        ({"inputs": np.full((1, 2, 2, 1), 256)}, r"256.* must lie in 0\.\.255;"),
        ({"inputs": np.full((1, 2, 2, 1), np.nan)}, r"must lie in 0\.\.1;"),
        ({"inputs": np.zeros((1, 2, 2, 1), complex)}, "complex128; give uint8"),
        ({"id": np.array([2**40])}, "id of 'own' has the value 1099511627776"),
        ({"labels": np.array([2**32 + 1])}, "labels has the value 4294967297"),
        ({"labels": np.array([0.5])}, r"labels of 'own' .* not float64\[\]"),
        ({"labels": np.zeros((1, 2), int)}, r"labels of 'own' .* not int32\[2\]"),
    ],
)
def test_as_arrays_refuses_what_it_would_change(arrays, message):
    """Values out of range, and labels that are no numbers of classes."""
    images = {"inputs": np.zeros((1, 2, 2, 1), np.uint8)}
    with pytest.raises(ValueError, match=message):
        data.as_arrays(_source(**(images | arrays)))


def test_as_arrays_refuses_labels_outside_the_classes():
    """A damaged label names itself."""
    records = records_module.ArrayRecords(
        {"inputs": np.zeros((2, 2, 2, 1), np.uint8), "labels": np.array([0, 5])}
    )
    source = records_module.Source(
        "broken", "train", 5, records, records_module.Decoder()
    )
    with pytest.raises(ValueError, match=r"labels\[1\] = 5 is outside 0\.\.4"):
        data.as_arrays(source)


def test_check_labels_and_finite_name_the_first_place():
    """Negative labels, floats as labels, NaN, infinity; good input passes."""
    data.check_labels(np.array([0, 9]), 10)
    data.check_finite(np.zeros(3), "x")
    with pytest.raises(ValueError, match=r"labels\[0, 1\] = -1"):
        data.check_labels(np.array([[0, -1]]), 10)
    with pytest.raises(ValueError, match="integers"):
        data.check_labels(np.zeros(2), 10)
    with pytest.raises(ValueError, match=r"inputs\[2\] = inf"):
        data.check_finite(np.array([0, 1, np.inf]), "inputs")


def test_check_arrays():
    """Unequal, empty and absent arrays."""
    for wrong in ({}, {"a": np.zeros(0)}, {"a": np.zeros(2), "b": np.zeros(3)}):
        with pytest.raises(ValueError, match="one common length"):
            arrays_module.check_arrays(wrong)


def test_import_takes_neither_tensorflow_nor_a_device():
    """`jaxtransfer.data` loads no TensorFlow, no plotting, starts no backend."""
    code = (
        "import sys, json, jaxtransfer.data\n"
        "from jax._src import xla_bridge\n"
        "print(json.dumps([m for m in ('tensorflow', 'matplotlib') "
        "if m in sys.modules] + list(xla_bridge._backends)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == []


def test_catalogue_names_need_tensorflow_or_are_unknown(tmp_path, monkeypatch, capsys):
    """The thin way through to the TFDS catalogue fails clearly."""
    arguments = ["--data-dir", str(tmp_path)]
    assert prepare.main(["mnits", *arguments]) == 1
    assert "Did you mean mnist" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert prepare.main(["mnist", *arguments]) == 1
    assert "jaxtransfer[prepare]" in capsys.readouterr().err
    assert prepare.main(["digits", *arguments]) == 0


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("mnist", (60000, 10000)),
        ("usps", (7291, 2007)),
        ("omniglot", (19280, 13180)),
    ],
)
@pytest.mark.data
def test_real_counts(data_dir, name, counts):
    """The public releases have the numbers of examples they are known for."""
    need(name, data_dir)
    lengths = tuple(
        len(data.load(name, split, data_dir=data_dir)) for split in ("train", "test")
    )
    assert lengths == counts


@pytest.mark.data
def test_real_omniglot_ink_is_one(data_dir):
    """28x28 grey, background 0, alphabets kept, 20 drawings a character."""
    need("omniglot", data_dir)
    source = data.load("omniglot", "train[:200]", data_dir=data_dir)
    assert source[0]["inputs"].shape == (105, 105, 3)
    arrays = data.as_arrays(source, size=28, channels=1, invert=True)
    assert arrays["inputs"].shape == (200, 28, 28, 1)
    assert np.median(arrays["inputs"]) == 0
    assert 0.03 < arrays["inputs"].mean() < 0.15
    assert {"alphabet", "alphabet_char_id"} <= set(arrays)


@pytest.mark.data
def test_real_missing_shard_and_split(data_dir, tmp_path):
    """A folder without its record file is named; an unknown split is refused."""
    need("mnist", data_dir)
    folder = sources.find_prepared("mnist", data_dir=data_dir)
    copy = tmp_path / "mnist" / folder.name
    copy.mkdir(parents=True)
    for file in folder.glob("*.json"):
        (copy / file.name).write_bytes(file.read_bytes())
    with pytest.raises(FileNotFoundError, match="mnist-train.array_record"):
        data.load("mnist", data_dir=tmp_path)
    with pytest.raises(ValueError, match="validation"):
        data.load("mnist", "validation", data_dir=data_dir)
