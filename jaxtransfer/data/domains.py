"""Pairs of domains: two data sets of one size, or one set and a shifted form of it."""

import os
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float

from jaxtransfer.data.arrays import as_arrays
from jaxtransfer.data.sources import load

Kind = Literal["rotation", "noise", "inversion", "blending"]
Domains = dict[str, dict[str, dict[str, np.ndarray]]]


def pair(
    source_name: str,
    target_name: str,
    *,
    size: int | None = None,
    channels: int | None = None,
    source_splits: tuple[str, str] = ("train", "test"),
    target_splits: tuple[str, str] = ("train", "test"),
    target_labels: bool = False,
    data_dir: str | os.PathLike[str] | None = None,
) -> Domains:
    """Load two data sets as domains with common size and channels.

    Args:
        source_name: data set of the source domain, as `load` takes it.
        target_name: data set of the target domain.
        size: common height and width in pixels; None takes the larger of the two.
        channels: common number of channels, 1 or 3; None takes the larger of the two.
        source_splits: TFDS splits for training and test of the source.
        target_splits: TFDS splits for training and test of the target.
        target_labels: keep the labels of the target's training split, for the bound
            that supervised training on the target gives.
        data_dir: as in `load`.

    Returns:
        `{"source": {"train", "test"}, "target": {"train", "test"}}`, each with `inputs`
        `[n, size, size, channels]` float32 in `[0, 1]` and `labels` `[n]` int32; target
        `train` has no labels unless `target_labels`.

    Raises:
        FileNotFoundError: a data set isn't prepared.
        ValueError: the two don't have the same number of classes, or as `as_arrays`.

    Example:
        >>> domains = pair("digits", "digits", source_splits=("train[:90%]", "test"))
        >>> sorted(domains["source"]["train"]), sorted(domains["target"]["train"])
        (['inputs', 'labels'], ['inputs'])
    """
    names = {"source": source_name, "target": target_name}
    splits = {"source": source_splits, "target": target_splits}
    sources = {
        domain: {
            part: load(names[domain], split, data_dir=data_dir)
            for part, split in zip(("train", "test"), splits[domain], strict=True)
        }
        for domain in names
    }
    classes = {name: sources[name]["train"].classes for name in sources}
    if classes["source"] != classes["target"]:
        raise ValueError(
            f"{source_name!r} has {classes['source']} classes and {target_name!r} "
            f"{classes['target']}; a pair of domains shares its classes"
        )
    shapes = [sources[name]["train"][0]["inputs"].shape for name in sources]
    if size is None:
        size = max(max(shape[:2]) for shape in shapes)
    if channels is None:
        channels = max(shape[2] for shape in shapes)
    domains: Domains = {}
    for domain, parts in sources.items():
        domains[domain] = {}
        for part, source in parts.items():
            arrays = as_arrays(source, size=size, channels=channels)
            keep: tuple[str, ...] = ("inputs", "labels")
            if (domain, part) == ("target", "train") and not target_labels:
                keep = ("inputs",)
            domains[domain][part] = {name: arrays[name] for name in keep}
    return domains


def shift(
    images: Float[np.ndarray, "n height width channels"],
    *,
    kind: Kind,
    seed: int,
    strength: float = 1.0,
) -> Float[np.ndarray, "n height width channels"]:
    """Make a shifted domain out of images.

    With the strength s in `[0, 1]`, image x and background b:

    - `"rotation"`: every image is turned by an angle of its own, uniform in
      `[0, 60 s]` degrees counter-clockwise, bilinear.
    - `"noise"`: `max(x, s b)` with b uniform in `[0, 1]` at every pixel.
    - `"inversion"`: `(1 - s) x + s (1 - x)`.
    - `"blending"`: `|x - s b|` with b a smooth random texture in `[0, 1]`, another for
      every image and channel, as MNIST-M blends digits with photographs.

    Args:
        images: `[n, height, width, channels]` in `[0, 1]`.
        kind: which shift.
        seed: the same seed gives the same domain.
        strength: s, in `[0, 1]`; 0 leaves the images as they are.

    Returns:
        New images `[n, height, width, channels]`, float32 in `[0, 1]`.

    Raises:
        ValueError: unknown kind, strength outside `[0, 1]`, images of another rank or
            outside `[0, 1]`.

    Example:
        >>> images = np.full((2, 8, 8, 1), 0.25, np.float32)
        >>> float(shift(images, kind="inversion", seed=0).max())
        0.75

    Reference:
        Blending: Ganin et al., "Domain-Adversarial Training of Neural Networks", 2016,
        section 5.2.4 (MNIST-M); there b is cut from BSDS500 photographs.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind={kind!r} must be one of {', '.join(get_args(Kind))}")
    if not 0 <= strength <= 1:
        raise ValueError(f"strength={strength} must lie in [0, 1]")
    images = np.asarray(images, np.float32)
    if images.ndim != 4:
        raise ValueError(
            f"images must be [n, height, width, channels], got {list(images.shape)}"
        )
    if images.size and not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(
            f"images must lie in [0, 1], got {images.min()}..{images.max()}"
        )
    generator = np.random.default_rng(seed)
    s = np.float32(strength)
    if kind == "rotation":
        shifted = _rotate(images, generator.uniform(0, 60 * strength, len(images)))
    elif kind == "noise":
        noise = generator.random(images.shape, np.float32)
        shifted = np.maximum(images, s * noise)
    elif kind == "inversion":
        shifted = (1 - s) * images + s * (1 - images)
    else:
        shifted = np.abs(images - s * _textures(images.shape, generator))
    return np.clip(shifted, 0, 1).astype(np.float32)


def _rotate(images: np.ndarray, degrees: np.ndarray) -> np.ndarray:
    from scipy import ndimage

    def turn(image: np.ndarray, angle: float) -> np.ndarray:
        return ndimage.rotate(image, angle, axes=(1, 0), reshape=False, order=1)

    turned = [turn(*each) for each in zip(images, degrees, strict=True)]
    return np.stack(turned) if turned else images


def _textures(shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Coarse noise of 4x4 knots, bilinearly enlarged, in `[0, 1]`."""
    n, height, width, channels = shape
    knots = generator.random((n, 4, 4, channels), np.float32)
    rows = _interpolation(height, 4)
    columns = _interpolation(width, 4)
    texture: Any = np.einsum("hk,nklc,wl->nhwc", rows, knots, columns, optimize=True)
    return texture


def _interpolation(points: int, knots: int) -> np.ndarray:
    """Weights `[points, knots]` of linear interpolation."""
    place = np.linspace(0, knots - 1, points)[:, None]
    weights = np.maximum(0, 1 - np.abs(place - np.arange(knots)))
    return weights.astype(np.float32)
