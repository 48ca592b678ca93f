"""A whole source in memory, as checked arrays of one size."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped
from PIL import Image

from jaxtransfer.data.records import Source, to_int32

_CHUNK = 256
_GREY_WEIGHTS = np.array([0.299, 0.587, 0.114], np.float32)


def as_arrays(
    source: Source,
    *,
    size: int | None = None,
    channels: int | None = None,
    invert: bool = False,
    threads: int = 4,
) -> dict[str, np.ndarray]:
    """Load every example of an image source into memory.

    Pixel values go from 0..255 (uint16: 0..65535) to `[0, 1]`; booleans and floats
    are in it already. `invert` then takes `1 - x`, so that the ink of Omniglot's
    black-on-white characters is 1.

    Args:
        source: images of `load`.
        size: height and width of the result in pixels (antialiased); None keeps them.
        channels: 1 (luma 0.299 R + 0.587 G + 0.114 B) or 3 (grey repeated), of images
            of 1 or 3; None keeps.
        invert: return `1 - x`.
        threads: workers that decode and resize.

    Returns:
        `inputs` `[n, height, width, channels]` float32 in `[0, 1]`, `labels` `[n]`
        int32, and other scalar integer features as `[n]` int32.

    Raises:
        ValueError: size or channels can't be had, images of several sizes without
            `size`, pixel values out of range, labels that are not integers or outside
            the classes of the source, integers that int32 can't hold.

    Example:
        >>> from jaxtransfer.data import load
        >>> arrays = as_arrays(load("digits", "test"), size=16, channels=3)
        >>> arrays["inputs"].shape, arrays["labels"].shape
        ((500, 16, 16, 3), (500,))
    """
    if size is not None and size < 1:
        raise ValueError(f"size={size} must be at least 1 pixel, or None to keep it")
    if channels not in (None, 1, 3):
        raise ValueError(f"channels={channels} must be 1, 3 or None")

    def read(start: int) -> list[dict[str, np.ndarray]]:
        stop = min(start + _CHUNK, len(source))
        examples = source.__getitems__(range(start, stop))
        for offset, example in enumerate(examples):
            image = example.get("inputs")
            if image is None or image.ndim != 3:
                raise ValueError(
                    f"as_arrays takes images [height, width, channels]; example "
                    f"{start + offset} of {source.name!r} has inputs "
                    f"{None if image is None else image.shape}"
                )
            if channels is not None and image.shape[-1] not in (1, 3):
                raise ValueError(
                    f"channels={channels} can't be had: example {start + offset} of "
                    f"{source.name!r} has {image.shape[-1]} channels, not 1 or 3; give "
                    "None to keep them, and convert them yourself"
                )
            place = f"inputs of example {start + offset} of {source.name!r}"
            example["inputs"] = _fit(_pixels(image, place), size, channels)
        return examples

    with ThreadPoolExecutor(threads) as pool:
        chunks = pool.map(read, range(0, len(source), _CHUNK))
        examples = [example for chunk in chunks for example in chunk]
    shapes = {example["inputs"].shape for example in examples}
    if len(shapes) != 1:
        raise ValueError(
            f"images of {source.name!r} have shapes {sorted(shapes)[:4]}; give size="
        )
    inputs: np.ndarray = np.empty((len(examples), *shapes.pop()), np.float32)
    for number, example in enumerate(examples):
        inputs[number] = example["inputs"] / top_of(example["inputs"].dtype)
    if invert:
        np.subtract(1, inputs, out=inputs)
    arrays = {"inputs": inputs}
    for name, value in examples[0].items():
        if value.ndim == 0 and np.issubdtype(value.dtype, np.integer):
            column = np.array([example[name] for example in examples])
            arrays[name] = to_int32(column, f"{name} of {source.name!r}")
        elif name == "labels":
            raise ValueError(
                f"labels of {source.name!r} must be integers, one an example, not "
                f"{value.dtype}{list(value.shape)}; take others from `batches`"
            )
    if "labels" in arrays and source.classes is not None:
        check_labels(arrays["labels"], source.classes)
    return arrays


def top_of(kind: np.dtype) -> np.float32:
    """The pixel value that is white in images of this type."""
    if kind in (np.uint8, np.uint16):
        return np.float32(np.iinfo(kind).max)
    return np.float32(1)


def _pixels(image: np.ndarray, place: str) -> np.ndarray:
    """The image, of a type with a known white and within its range."""
    if image.dtype in (np.uint8, np.uint16, np.bool_):
        return image
    whole = np.issubdtype(image.dtype, np.integer)
    if not whole and not jnp.issubdtype(image.dtype, jnp.floating):
        raise ValueError(f"{place} are {image.dtype}; give uint8, or floats in [0, 1]")
    top = 255 if whole else 1
    if not np.all((image >= 0) & (image <= top)):
        raise ValueError(
            f"{place} are {image.min()}..{image.max()} ({image.dtype}) and must lie in "
            f"0..{top}; give uint8, uint16, or floats in [0, 1]"
        )
    return image.astype(np.uint8 if whole else np.float32)


def _fit(image: np.ndarray, size: int | None, channels: int | None) -> np.ndarray:
    """Change channels, then size; what has another type by that is in `[0, 1]`."""
    stored = image.dtype
    if channels == 1 and image.shape[-1] == 3:
        image = (image.astype(np.float32) @ _GREY_WEIGHTS)[..., None]
    if size is not None and image.shape[:2] != (size, size):
        planes = [
            np.asarray(
                Image.fromarray(plane).resize((size, size), Image.Resampling.LANCZOS)
            )
            for plane in np.moveaxis(image.astype(np.float32), -1, 0)
        ]
        image = np.clip(np.stack(planes, axis=-1), 0, top_of(stored))
    if channels == 3 and image.shape[-1] == 1:
        image = np.repeat(image, 3, axis=-1)
    return image if image.dtype == stored else image / top_of(stored)


def check_labels(labels: Shaped[np.ndarray, "..."], classes: int) -> None:
    """Refuse labels outside `0 .. classes - 1`.

    Args:
        labels: integer labels `[...]`.
        classes: number of classes.

    Raises:
        ValueError: a label is out of range, or labels are not integers; the message has
            the first such value and its index.

    Example:
        >>> check_labels(np.array([0, 3, 1]), classes=3)
        Traceback (most recent call last):
        ...
        ValueError: labels[1] = 3 is outside 0..2 (classes=3); 1 of 3 labels are
    """
    labels = np.asarray(labels)
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be integers, not {labels.dtype}")
    wrong = np.argwhere((labels < 0) | (labels >= classes))
    if len(wrong):
        index = tuple(map(int, wrong[0]))
        place = ", ".join(map(str, index))
        raise ValueError(
            f"labels[{place}] = {labels[index]} is outside 0..{classes - 1} "
            f"(classes={classes}); {len(wrong)} of {labels.size} labels are"
        )


def check_finite(array: Shaped[np.ndarray, "..."], name: str) -> None:
    """Refuse NaN and infinite values.

    Args:
        array: values `[...]`.
        name: what the message calls them.

    Raises:
        ValueError: a value isn't finite; the message has the first one's index.

    Example:
        >>> check_finite(np.array([[0.0, np.nan]]), "inputs")
        Traceback (most recent call last):
        ...
        ValueError: inputs[0, 1] = nan; 1 of 2 values are not finite; repair them
    """
    array = np.asarray(array)
    wrong = np.argwhere(~np.isfinite(array))
    if len(wrong):
        index = tuple(map(int, wrong[0]))
        raise ValueError(
            f"{name}[{', '.join(map(str, index))}] = {array[index]}; {len(wrong)} of "
            f"{array.size} values are not finite; repair them"
        )


def check_arrays(arrays: Mapping[str, np.ndarray]) -> int:
    """Refuse arrays that are empty or of unequal length.

    Args:
        arrays: `[n, ...]` by name.

    Returns:
        The common length n.

    Raises:
        ValueError: no array, no row, lengths that differ, or a value that is no array
            `[n, ...]`.

    Example:
        >>> check_arrays({"inputs": np.zeros((3, 2)), "labels": np.zeros(3)})
        3
    """
    for name, array in arrays.items():
        if np.ndim(array) == 0:
            raise ValueError(
                f"{name} must be an array [n, ...], got {type(array).__name__} without "
                "axes; give one value for each example"
            )
    lengths = {name: len(array) for name, array in arrays.items()}
    if not lengths or not all(lengths.values()) or len(set(lengths.values())) != 1:
        raise ValueError(f"arrays must have one common length >= 1, got {lengths}")
    return next(iter(lengths.values()))
