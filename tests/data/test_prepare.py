"""The project's builders on tiny releases made here, without TensorFlow."""

import gzip
import io
import os
import socket
import zipfile

import h5py
import numpy as np
import pytest
from PIL import Image

from jaxtransfer import data
from jaxtransfer.data import prepare
from tests.data.zips import break_deflated


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Any connection is an error."""

    def refuse(*arguments):
        raise AssertionError(f"network access: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def write_usps(path, *, bad_label=None, width=256, nan=False):
    """A release of 12 + 5 random digits."""
    generator = np.random.default_rng(0)
    raw = {}
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for split, n in (("train", 12), ("test", 5)):
            images = generator.random((n, width)).astype(np.float32)
            labels = (np.arange(n) % 10).astype(np.int32)
            if nan:
                images[2, 3] = np.nan
            if bad_label is not None:
                labels[1] = bad_label
            group = file.create_group(split)
            group["data"], group["target"] = images, labels
            raw[split] = (images, labels)
    return raw


def write_mnist_m(
    path, *, lines=None, drop=None, damaged=None, size=32, form=zipfile.ZIP_STORED
):
    """A release of 6 + 3 random pictures, in a folder like the public one."""
    generator = np.random.default_rng(1)
    raw = {}
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", form) as archive:
        for split, n in (("train", 6), ("test", 3)):
            stem = f"mnist_m/mnist_m_{split}"
            images = generator.integers(0, 256, (n, size, size, 3), np.uint8)
            labels = (np.arange(n) * 3) % 10
            for i, image in enumerate(images):
                encoded = io.BytesIO()
                Image.fromarray(image).save(encoded, "PNG")
                content = encoded.getvalue()
                if damaged == i:
                    content = content[: len(content) // 2]
                if drop != i:
                    archive.writestr(f"{stem}/{i:08d}.png", content)
            text = [f"{i:08d}.png {label}" for i, label in enumerate(labels)]
            archive.writestr(f"{stem}_labels.txt", "\n".join(lines or text) + "\n")
            raw[split] = (images, labels)
    return raw


def run(name, tmp_path):
    """The command, on folders under `tmp_path`."""
    return prepare.main(
        [name, "--manual-dir", str(tmp_path / "raw"), "--data-dir", str(tmp_path / "d")]
    )


def content(source):
    """Rows of a source as sorted (label, bytes): TFDS shuffles what it stores."""
    return sorted((int(e["labels"]), e["inputs"].tobytes()) for e in source)


@pytest.mark.parametrize("folder", ["raw", "raw/usps"])
def test_usps(tmp_path, capsys, folder):
    """Pixels and labels come back; a parent of the file's folder is enough."""
    raw = write_usps(tmp_path / folder / "usps.h5")
    assert run("usps", tmp_path) == 0
    assert "train 12, test 5" in capsys.readouterr().out
    for split, (images, labels) in raw.items():
        pixels = np.round(images * 255).astype(np.uint8)
        wanted = sorted(
            (int(label), row.tobytes())
            for label, row in zip(labels, pixels, strict=True)
        )
        source = data.load("usps", split, data_dir=tmp_path / "d")
        assert source[0]["inputs"].shape == (16, 16, 1)
        assert content(source) == wanted
        assert source.classes == 10


def test_mnist_m_from_the_second_place(tmp_path):
    """Colours come back; places are searched in order."""
    raw = write_mnist_m(tmp_path / "raw" / "mnist_m.zip")
    assert run("mnist_m", tmp_path) == 0
    places = os.pathsep.join([str(tmp_path / "nothing"), str(tmp_path / "d")])
    for split, (images, labels) in raw.items():
        wanted = sorted(
            (int(label), image.tobytes())
            for label, image in zip(labels, images, strict=True)
        )
        assert content(data.load("mnist_m", split, data_dir=places)) == wanted
    arrays = data.as_arrays(data.load("mnist_m", "train[:4]", data_dir=places))
    assert arrays["inputs"].shape == (4, 32, 32, 3)


def test_preparing_twice_is_said(tmp_path, capsys):
    """The second run does nothing, even without the manual folder."""
    write_usps(tmp_path / "raw" / "usps.h5")
    assert run("usps", tmp_path) == 0
    assert prepare.main(["usps", "--data-dir", str(tmp_path / "d")]) == 0
    assert "was already prepared" in capsys.readouterr().out


def test_a_folder_with_tfds_in_it_is_a_place(tmp_path):
    """`DATA/tfds/usps` is found from DATA."""
    write_usps(tmp_path / "raw" / "usps.h5")
    prepare.prepare(
        "usps", data_dir=tmp_path / "d" / "tfds", manual_dir=tmp_path / "raw"
    )
    assert len(data.load("usps", data_dir=tmp_path / "d")) == 12


def test_missing_file_and_folder(tmp_path, capsys):
    """The file's name and its place are in the message."""
    assert run("usps", tmp_path) == 1
    assert "is not a folder" in capsys.readouterr().err
    (tmp_path / "raw").mkdir()
    assert run("usps", tmp_path) == 1
    assert "usps.h5 is not in" in capsys.readouterr().err
    assert prepare.main(["usps", "--data-dir", str(tmp_path / "d")]) == 1
    assert "--manual-dir is needed" in capsys.readouterr().err
    write_usps(tmp_path / "raw" / "a" / "usps.h5")
    write_usps(tmp_path / "raw" / "b" / "usps.h5")
    assert run("usps", tmp_path) == 1
    assert "give the folder of one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bad_label": 10}, r"labels[1] = 10"),
        ({"width": 255}, "(12, 255)"),
        ({"nan": True}, "data[2, 3] = nan"),
    ],
)
def test_damaged_usps(tmp_path, capsys, options, message):
    """Wrong content is named and nothing half-made can be loaded."""
    write_usps(tmp_path / "raw" / "usps.h5", **options)
    assert run("usps", tmp_path) == 1
    assert message in capsys.readouterr().err
    with pytest.raises(FileNotFoundError):
        data.load("usps", data_dir=tmp_path / "d")


@pytest.mark.parametrize("name", ["usps", "mnist_m"])
@pytest.mark.parametrize("keep", [0, 100, -64])
def test_truncated_files(tmp_path, capsys, name, keep):
    """A file cut short is damaged, not a traceback."""
    path = tmp_path / "raw" / {"usps": "usps.h5", "mnist_m": "mnist_m.zip"}[name]
    {"usps": write_usps, "mnist_m": write_mnist_m}[name](path)
    path.write_bytes(path.read_bytes()[:keep])
    assert run(name, tmp_path) == 1
    message = capsys.readouterr().err
    assert str(path) in message
    assert "damaged" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lines": ["00000000.png x"]}, "not 'NAME LABEL'"),
        ({"lines": ["00000000.png 12"]}, "labels[0] = 12"),
        ({"drop": 2}, "00000002.png is not in the archive"),
        ({"damaged": 1}, "00000001.png is damaged"),
        ({"size": 28}, "not 32x32"),
    ],
)
def test_damaged_mnist_m(tmp_path, capsys, options, message):
    """Labels without image, images without content."""
    write_mnist_m(tmp_path / "raw" / "mnist_m.zip", **options)
    assert run("mnist_m", tmp_path) == 1
    assert message in capsys.readouterr().err
    with pytest.raises(FileNotFoundError):
        data.load("mnist_m", data_dir=tmp_path / "d")
    assert not list((tmp_path / "d").glob("mnist_m/*incomplete*"))


@pytest.mark.parametrize("member", ["train_labels.txt", "test/00000001.png"])
def test_a_flipped_byte_in_mnist_m(tmp_path, capsys, member):
    """Inside what is compressed, where zlib finds it."""
    path = tmp_path / "raw" / "mnist_m.zip"
    write_mnist_m(path, form=zipfile.ZIP_DEFLATED)
    break_deflated(path, f"mnist_m/mnist_m_{member}")
    assert run("mnist_m", tmp_path) == 1
    message = capsys.readouterr().err
    assert str(path) in message
    assert "damaged" in message


def test_unwritable_data_dir(tmp_path, capsys):
    """A file where the folder should be."""
    write_usps(tmp_path / "raw" / "usps.h5")
    (tmp_path / "d").write_text("")
    assert run("usps", tmp_path) == 1
    assert "can't write" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["", os.pathsep.join(("one", "two"))])
def test_one_folder_is_written_to(tmp_path, capsys, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    assert prepare.main(["usps", "--manual-dir", ".", "--data-dir", given]) == 1
    assert "give one folder, to write to" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_record_file_cut_short_is_damaged(tmp_path):
    """Said when the data set is opened, with the folder to delete."""
    write_usps(tmp_path / "raw" / "usps.h5")
    assert run("usps", tmp_path) == 0
    (path,) = (tmp_path / "d").glob("usps/*/usps-train.array_record*")
    path.write_bytes(path.read_bytes()[:10_000])
    with pytest.raises(ValueError, match="is damaged"):
        data.load("usps", data_dir=tmp_path / "d")


FILM = "|".join(["", "http://x", *"0000100010000000000"])


def write_movielens(folder, **changed):
    """A release of three users and two films; `changed` replaces whole files."""
    files = {
        "u.user": "1|24|M|technician|85711\n2|7|F|student|T8H1N\n3|73|F|none|00000\n",
        "u.item": f"1|Café (1990)|01-Jan-1990|{FILM}\n2|unknown||{FILM}\n",
        "u.data": "2\t2\t3\t881250949\n1\t1\t5\t881250950\n1\t2\t1\t881250951\n",
    } | {name.replace("_", "."): text for name, text in changed.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_bytes(text.encode("latin-1"))


def test_movielens(tmp_path, capsys):
    """One example a user, with the fields of its films; numbers count from 0."""
    write_movielens(tmp_path / "raw" / "ml-100k")
    assert run("movielens_100k", tmp_path) == 0
    assert "train 3" in capsys.readouterr().out
    source = data.load("movielens_100k", data_dir=tmp_path / "d")
    first, second, third = sorted(source, key=lambda example: int(example["user"]))
    assert first["items"].tolist() == [0, 1]
    assert first["ratings"].tolist() == [5, 1]
    assert first["years"].tolist() == [1990, 0]
    assert first["genres"].shape == (2, 19)
    assert np.flatnonzero(first["genres"][0]).tolist() == [4, 8]
    assert first["titles"][0].decode() == "Café (1990)"
    assert (int(first["gender"]), int(second["gender"])) == (1, 0)
    assert bytes(second["zip_code"]).decode() == "T8H1N"
    assert third["items"].shape == (0,) and third["genres"].shape == (0, 19)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"u_data": "1\t1\t6\t0\n"}, "u.data is damaged: line 1: rating '6'"),
        ({"u_data": "1\t3\t5\t0\n"}, "item '3' is not in 1..2"),
        ({"u_data": "1\t1\t5\t0\n1\t2\t4"}, "line 2 has 3 columns, not 4"),
        ({"u_data": "1\t1\t5\t0\n1\t1\t4\t0\n"}, "a user rates an item twice"),
        ({"u_data": ""}, "u.data is damaged: it is empty"),
        ({"u_user": "2|24|M|technician|85711\n"}, "line 1 is of number '2'"),
        ({"u_user": "1|24|M|wizard|85711\n"}, "occupation 'wizard' is none of"),
        ({"u_item": f"1|x|01-Jan-90|{FILM}\n"}, "year of release '90'"),
    ],
)
def test_damaged_movielens(tmp_path, capsys, changed, message):
    """File and line are named, and nothing half-made can be loaded."""
    write_movielens(tmp_path / "raw", **changed)
    assert run("movielens_100k", tmp_path) == 1
    assert message in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="put u.data, u.user and u.item in"):
        data.load("movielens_100k", data_dir=tmp_path / "d")


def test_movielens_needs_all_three_files(tmp_path, capsys):
    write_movielens(tmp_path / "raw")
    (tmp_path / "raw" / "u.item").unlink()
    assert run("movielens_100k", tmp_path) == 1
    message = capsys.readouterr().err
    assert "u.item doesn't exist. Put u.data, u.user and u.item" in message
    assert "can't write" not in message


def write_multi30k(folder, **changed):
    """A release of two sentences a split; `changed` replaces whole files."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val", "test_2016_flickr", "test_2017_flickr"):
        for language in ("en", "de", "fr", "cs"):
            lines = f"{split} eins {language}\nžluťoučký {language} \n".encode()
            lines = changed.get(f"{split}_{language}", lines)
            (folder / f"{split}.{language}.gz").write_bytes(gzip.compress(lines))


def test_multi30k(tmp_path, capsys):
    """Sentences of all languages are one example; one test set has no Czech."""
    write_multi30k(tmp_path / "raw" / "multi30k")
    assert run("multi30k", tmp_path) == 0
    assert "train 2" in capsys.readouterr().out
    for split, czech in (("train", "cs"), ("test_2017_flickr", "")):
        source = data.load("multi30k", split, data_dir=tmp_path / "d")
        found = [{k: v.item().decode() for k, v in one.items()} for one in source]
        assert len(found) == 2
        for one in found:
            assert one["de"] == one["en"].removesuffix("en") + "de"
            assert one["cs"].endswith(czech) and bool(one["cs"]) == bool(czech)
    assert {one["en"] for one in found} == {"test_2017_flickr eins en", "žluťoučký en"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"val_fr": b"une\n"}, "val.fr.gz is damaged: it has 1 lines, the English"),
        ({"train_de": b"eins\n\n"}, "train.de.gz is damaged: line 2 is empty"),
        ({"train_cs": b"\xff\xfe\n2\n"}, "train.cs.gz is damaged"),
    ],
)
def test_damaged_multi30k(tmp_path, capsys, changed, message):
    write_multi30k(tmp_path / "raw", **changed)
    assert run("multi30k", tmp_path) == 1
    assert message in capsys.readouterr().err


def test_multi30k_that_is_cut_off(tmp_path, capsys):
    write_multi30k(tmp_path / "raw")
    file = tmp_path / "raw" / "train.fr.gz"
    file.write_bytes(file.read_bytes()[:-6])
    assert run("multi30k", tmp_path) == 1
    assert "train.fr.gz is damaged" in capsys.readouterr().err
    file.unlink()
    assert run("multi30k", tmp_path) == 1
    assert "train.fr.gz doesn't exist" in capsys.readouterr().err
