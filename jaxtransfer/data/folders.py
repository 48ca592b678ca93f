"""Labelled images in a folder: one subfolder a class, one file an image."""

import difflib
import os
import pathlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from jaxtransfer.data.arrays import as_arrays
from jaxtransfer.data.records import ArrayRecords, Decoder, Source

# Also those that Pillow may lack: they are then named as unreadable, not passed over.
_SUFFIXES = frozenset(
    ".png .jpg .jpeg .bmp .gif .tif .tiff .webp .ppm .pgm .avif .heic .heif".split()
)
_THREADS = 4


def image_folder(
    path: str | os.PathLike[str],
    *,
    size: int | None = None,
    channels: int | None = None,
    invert: bool = False,
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Load the images `path/CLASS/IMAGE` into memory.

    Classes are numbered in the order of their names. A class is a subfolder, and its
    images lie directly in it; hidden files and files that are no images are passed
    over. Photographs are turned as their orientation tag says, transparency is laid on
    white, 16 bits become 8. Sizes and channels are then as of `as_arrays`: an image is
    squeezed to a square, its aspect is not kept.

    Args:
        path: the folder.
        size: height and width of the result in pixels; None keeps them.
        channels: 1 (luma) or 3 (grey repeated); None keeps.
        invert: return `1 - x`, so that the ink of black-on-white drawings is 1.
        names: the classes in the order of their labels, to read a second folder like a
            first. A class may then be missing, and images may lie in `path` itself:
            they get no labels.

    Returns:
        `inputs` `[n, height, width, channels]` float32 in `[0, 1]`; `labels` `[n]`
        int32, unless the images lie in `path` itself; `names`, the classes as a list;
        `paths` of the images as a list.

    Raises:
        FileNotFoundError: there is no such folder.
        NotADirectoryError: it is a file.
        ValueError: no images, a class without images, fewer than two classes, a class
            that is not in `names`, `names` that are not a list of different names, or
            images that can't be read (all are named); shapes that differ without `size`
            and `channels`; as `as_arrays`.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("cat", "dog", "dog"):
        ...         inside = pathlib.Path(folder, name)
        ...         inside.mkdir(exist_ok=True)
        ...         number = len(list(inside.iterdir()))
        ...         Image.new("L", (40, 30)).save(inside / f"{number}.png")
        ...     images = image_folder(folder, size=14)
        >>> images["inputs"].shape, images["labels"].tolist(), images["names"]
        ((3, 14, 14, 1), [0, 1, 1], ['cat', 'dog'])
    """
    if names is not None and (isinstance(names, str) or len(set(names)) != len(names)):
        raise ValueError(
            f"names={names!r} must be the classes, each once; give a list of them"
        )
    folder = pathlib.Path(path).expanduser()
    by_class = _by_class(folder, names)
    paths = [image for images in by_class.values() for image in images]

    def read(image: pathlib.Path) -> np.ndarray | Exception:
        try:
            pixels = _decode(image)
        except Exception as error:  # Pillow raises many kinds
            return error
        records = ArrayRecords({"inputs": pixels[None]})
        one = Source(str(image), "all", None, records, Decoder())
        fitted = as_arrays(one, size=size, channels=channels, invert=invert, threads=1)
        return fitted["inputs"][0]

    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(read, paths))
    failed = [
        f"{image}: {str(error).strip() or type(error).__name__}"
        for image, error in zip(paths, found, strict=True)
        if isinstance(error, Exception)
    ]
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(paths)} images in {str(folder)!r} can't be read; "
            "save them again as PNG or JPEG, or remove them:\n  " + "\n  ".join(failed)
        )
    arrays = [array for array in found if isinstance(array, np.ndarray)]
    _check_shapes(folder, paths, arrays)
    images: dict[str, Any] = {"inputs": np.stack(arrays)}
    numbered = list(by_class if names is None else names)
    if "" not in by_class:
        images["labels"] = np.repeat(
            np.array([numbered.index(name) for name in by_class], np.int32),
            [len(members) for members in by_class.values()],
        )
    return images | {"names": numbered, "paths": paths}


def _by_class(
    folder: pathlib.Path, names: Sequence[str] | None
) -> dict[str, list[pathlib.Path]]:
    """Images by class; those without a class under `""`."""
    if not folder.exists():
        raise FileNotFoundError(
            f"no folder {str(folder)!r}; images are read from FOLDER/CLASS/IMAGE"
        )
    if not folder.is_dir():
        raise NotADirectoryError(
            f"{str(folder)!r} is a file; give the folder that holds the images"
        )
    loose = _images(folder)
    by_class = {place.name: _images(place) for place in _visible(folder, "is_dir")}
    if not loose and not any(by_class.values()):
        raise ValueError(
            f"no images in {str(folder)!r}; put them there as CLASS/IMAGE, with one of "
            f"the endings {' '.join(sorted(_SUFFIXES))}"
        )
    if loose and (by_class or names is None):
        raise ValueError(
            f"{len(loose)} images lie in {str(folder)!r} itself, such as "
            f"{loose[0].name!r}; move each into the subfolder of its class"
        )
    if loose:
        return {"": loose}
    empty = [name for name, images in by_class.items() if not images]
    if empty:
        raise ValueError(
            f"no images in the class folders {empty} of {str(folder)!r}; add some "
            "directly inside, or remove these folders"
        )
    if names is None:
        if len(by_class) < 2:
            raise ValueError(
                f"only one class, {next(iter(by_class))!r}, in {str(folder)!r}; add a "
                "subfolder for each class that it is to be told from"
            )
        return by_class
    for name in by_class:
        if name not in names:
            near = difflib.get_close_matches(name, list(names), n=1)
            raise ValueError(
                f"class {name!r} in {str(folder)!r} is none of {list(names)}; rename "
                f"or remove it{f' (nearest: {near[0]!r})' if near else ''}"
            )
    return by_class


def _visible(folder: pathlib.Path, kind: str) -> list[pathlib.Path]:
    return sorted(
        place
        for place in folder.iterdir()
        if getattr(place, kind)() and not place.name.startswith(".")
    )


def _images(folder: pathlib.Path) -> list[pathlib.Path]:
    files = _visible(folder, "is_file")
    return [file for file in files if file.suffix.lower() in _SUFFIXES]


def _decode(path: pathlib.Path) -> np.ndarray:
    """Pixels `[height, width, 1 or 3]` uint8."""
    from PIL import Image, ImageOps

    with Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode == "F" or image.mode.startswith("I"):
            values = np.asarray(image)
            if image.mode == "F" or values.min() < 0 or values.max() > 65535:
                raise ValueError("its pixels have more than 16 bits")
            return (values // 257).astype(np.uint8)[..., None]
        mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
        if image.mode[-1] in "Aa" or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        pixels = np.asarray(image.convert(mode))
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _check_shapes(
    folder: pathlib.Path, paths: list[pathlib.Path], arrays: list[np.ndarray]
) -> None:
    for path, array in zip(paths, arrays, strict=True):
        if array.shape != arrays[0].shape:
            raise ValueError(
                f"images in {str(folder)!r} differ in shape: {paths[0].name!r} is "
                f"{arrays[0].shape}, {path.name!r} is {array.shape}; give size= and "
                "channels="
            )
