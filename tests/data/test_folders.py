"""Images in folders: what is read, how it is numbered, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from jaxtransfer import data


def put(path, pixels, **options):
    """Write an image and its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)


def grey(value, height=6, width=6):
    return np.full((height, width), value, np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Two dogs, a cat, and things that are no images."""
    put(tmp_path / "dog" / "b.PNG", grey(200))
    put(tmp_path / "dog" / "a.png", grey(100))
    put(tmp_path / "cat" / "c.png", grey(0))
    (tmp_path / "cat" / "notes.txt").write_text("a cat")
    (tmp_path / "cat" / "._c.png").write_bytes(b"of another system")
    (tmp_path / ".hidden").mkdir()
    return tmp_path


def test_classes_are_numbered_by_name_and_may_differ_in_size(folder):
    images = data.image_folder(str(folder))
    assert images["names"] == ["cat", "dog"]
    assert images["labels"].tolist() == [0, 1, 1]
    assert images["labels"].dtype == np.int32
    assert [path.name for path in images["paths"]] == ["c.png", "a.png", "b.PNG"]
    assert images["inputs"].shape == (3, 6, 6, 1)
    assert images["inputs"].dtype == np.float32
    found = images["inputs"].mean(axis=(1, 2, 3))
    np.testing.assert_allclose(found, np.array([0, 100, 200]) / 255, atol=1e-6)
    inverted = data.image_folder(folder, invert=True)["inputs"]
    np.testing.assert_allclose(inverted, 1 - images["inputs"], atol=1e-6)


def test_size_and_channels_are_as_of_as_arrays(tmp_path):
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (2, 9, 9, 3), dtype=np.uint8)
    for number, name in enumerate(("first", "second")):
        put(tmp_path / name / "0.png", pixels[number])
    records = data.records.ArrayRecords({"inputs": pixels})
    source = data.Source("pixels", "all", None, records, data.records.Decoder())
    for options in ({"size": 5, "channels": 1}, {"size": 14}, {"channels": 3}):
        found = data.image_folder(tmp_path, **options)["inputs"]
        np.testing.assert_array_equal(
            found, data.as_arrays(source, **options)["inputs"]
        )


def test_a_second_folder_is_numbered_like_the_first(folder, tmp_path):
    names = ["ant", "cat", "dog"]
    images = data.image_folder(folder, names=names)
    assert images["names"] == names and images["labels"].tolist() == [1, 2, 2]
    (folder / "cat" / "c.png").rename(folder / "dog" / "c.png")
    for file in (folder / "cat").iterdir():
        file.unlink()
    (folder / "cat").rmdir()
    images = data.image_folder(folder, names=names)
    assert images["labels"].tolist() == [2, 2, 2]
    for names in ("catdog", ["cat", "cat", "dog"]):
        with pytest.raises(ValueError, match="must be the classes, each once"):
            data.image_folder(folder, names=names)
    with pytest.raises(ValueError, match=r"'dog' in .* none of .*nearest: 'dogs'"):
        data.image_folder(folder, names=["cats", "dogs"])


def test_images_in_the_folder_itself_have_no_labels(tmp_path):
    put(tmp_path / "b.png", grey(10))
    put(tmp_path / "a.jpeg", grey(20))
    images = data.image_folder(tmp_path, names=["cat", "dog"])
    assert "labels" not in images
    assert [path.name for path in images["paths"]] == ["a.jpeg", "b.png"]
    with pytest.raises(ValueError, match=r"2 images lie in .*'a.jpeg'; move each"):
        data.image_folder(tmp_path)
    put(tmp_path / "cat" / "c.png", grey(30))
    with pytest.raises(ValueError, match="2 images lie in"):
        data.image_folder(tmp_path, names=["cat", "dog"])


def _upright(tmp_path):
    """White above black, stored lying on its side with a tag that says so."""
    pixels = np.concatenate([grey(255, 8, 16), grey(0, 8, 16)])
    image = Image.fromarray(np.rot90(pixels))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to show
    return image, {"exif": exif}


@pytest.mark.parametrize(
    ("image", "wanted"),
    [
        (Image.new("RGBA", (6, 6), (0, 0, 0, 0)), [1, 1, 1]),
        (Image.new("LA", (6, 6), (0, 0)), [1]),
        (Image.new("RGBA", (6, 6), (255, 0, 0, 255)), [1, 0, 0]),
        (Image.new("1", (6, 6), 1), [1]),
        (Image.fromarray(np.full((6, 6), 257 * 51, np.uint16)), [0.2]),
        (Image.new("RGB", (6, 6), (0, 255, 0)).convert("P"), [0, 1, 0]),
    ],
)
def test_kinds_of_png(tmp_path, image, wanted):
    """Transparency is white paper; bits, palettes and 16 bits are what they show."""
    for name in ("a", "b"):
        put(tmp_path / name / "0.png", image)
    found = data.image_folder(tmp_path)["inputs"]
    assert found.shape == (2, 6, 6, len(wanted))
    np.testing.assert_allclose(found[0, 3, 3], wanted, atol=1e-6)


def test_photographs_are_turned_as_they_say(tmp_path):
    image, options = _upright(tmp_path)
    for name in ("a", "b"):
        put(tmp_path / name / "0.jpg", image, **options)
    found = data.image_folder(tmp_path)["inputs"][0, ..., 0]
    assert found.shape == (16, 16)
    assert found[:7].min() > 0.9 and found[9:].max() < 0.1


def test_every_image_that_cannot_be_read_is_named(folder):
    whole = np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8)
    put(folder / "cat" / "cut.png", whole)
    cut = folder / "cat" / "cut.png"
    cut.write_bytes(cut.read_bytes()[:900])
    put(folder / "cat" / "cut.jpg", whole)
    cut = folder / "cat" / "cut.jpg"
    cut.write_bytes(cut.read_bytes()[:900])
    (folder / "dog" / "empty.png").write_bytes(b"")
    (folder / "dog" / "text.jpg").write_text("no image")
    (folder / "dog" / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    put(folder / "dog" / "deep.tiff", Image.new("F", (6, 6), 0.5))
    with pytest.raises(ValueError, match="6 of 9 images in .* can't be read") as error:
        data.image_folder(folder, size=6)
    named = str(error.value)
    for name in ("cut.png", "cut.jpg", "empty.png", "text.jpg", "phone.HEIC"):
        assert str(folder) in named and name in named
    assert "deep.tiff: its pixels have more than 16 bits" in named
    assert "a.png" not in named


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        (None, FileNotFoundError, "no folder .*FOLDER/CLASS/IMAGE"),
        ("file", NotADirectoryError, "is a file"),
        ((), ValueError, r"no images in .*CLASS/IMAGE.*\.png"),
        (("cat/a.txt", "dog/b.txt"), ValueError, "no images in .*CLASS/IMAGE"),
        (("cat/a.png", "dog/b.txt"), ValueError, r"class folders \['dog'\]"),
        (("cat/a.png", "cat/b.png"), ValueError, "only one class, 'cat'"),
    ],
)
def test_folders_that_cannot_be_a_task(tmp_path, files, error, message):
    root = tmp_path / "task"
    if files == "file":
        root.write_text("")
    elif files is not None:
        root.mkdir()
        for file in files:
            path = root / file
            path.parent.mkdir(exist_ok=True)
            if path.suffix == ".png":
                put(path, grey(0))
            else:
                path.write_text("")
    with pytest.raises(error, match=message):
        data.image_folder(root)


def test_unequal_shapes_and_wrong_options(folder):
    put(folder / "dog" / "wide.png", grey(0, 6, 9))
    with pytest.raises(ValueError, match=r"'wide.png' is \(6, 9, 1\); give size="):
        data.image_folder(folder)
    assert data.image_folder(folder, size=6)["inputs"].shape == (4, 6, 6, 1)
    with pytest.raises(ValueError, match="size=0"):
        data.image_folder(folder, size=0)
    with pytest.raises(ValueError, match="channels=2"):
        data.image_folder(folder, channels=2)
