"""Random changes of single images, for the `augment` argument of `batches`."""

from collections.abc import Callable

import numpy as np

from jaxtransfer.data.records import Example

Augment = Callable[[Example, np.random.Generator], Example]


def random_crop(*, pad: int) -> Augment:
    """Shift images by up to `pad` pixels.

    The image is padded on every side and a window of the old size is cut at a uniformly
    drawn place; padding repeats the mirrored border.

    Args:
        pad: pixels on every side, 0 or more and less than the sides of the images.

    Returns:
        A function `(example, generator) -> example` that changes `inputs` `[height,
        width, channels]`.

    Raises:
        ValueError: negative `pad`.

    Example:
        >>> crop = random_crop(pad=2)
        >>> example = {"inputs": np.zeros((8, 8, 1)), "labels": np.int32(3)}
        >>> crop(example, np.random.default_rng(0))["inputs"].shape
        (8, 8, 1)
    """
    if pad < 0:
        raise ValueError(f"pad={pad} must be at least 0")

    def augment(example: Example, generator: np.random.Generator) -> Example:
        image = example["inputs"]
        height, width = image.shape[:2]
        padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="reflect")
        top, left = generator.integers(0, 2 * pad + 1, size=2)
        window = padded[top : top + height, left : left + width]
        return {**example, "inputs": window}

    return augment


def horizontal_flip(*, probability: float = 0.5) -> Augment:
    """Mirror images left to right.

    Args:
        probability: of mirroring, in `[0, 1]`.

    Returns:
        A function `(example, generator) -> example` that changes `inputs` `[height,
        width, channels]`.

    Raises:
        ValueError: `probability` outside `[0, 1]`.

    Example:
        >>> flip = horizontal_flip(probability=1.0)
        >>> example = {"inputs": np.arange(3)[None, :, None]}
        >>> flip(example, np.random.default_rng(0))["inputs"].ravel().tolist()
        [2, 1, 0]
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability={probability} must lie in [0, 1]")

    def augment(example: Example, generator: np.random.Generator) -> Example:
        if generator.random() >= probability:
            return example
        return {**example, "inputs": example["inputs"][:, ::-1]}

    return augment


def compose(*augments: Augment) -> Augment:
    """Apply augmentations one after the other.

    Args:
        *augments: functions `(example, generator) -> example`.

    Returns:
        One such function.

    Example:
        >>> both = compose(random_crop(pad=4), horizontal_flip())
        >>> example = {"inputs": np.ones((8, 8, 3))}
        >>> both(example, np.random.default_rng(0))["inputs"].shape
        (8, 8, 3)
    """

    def augment(example: Example, generator: np.random.Generator) -> Example:
        for change in augments:
            example = change(example, generator)
        return example

    return augment
