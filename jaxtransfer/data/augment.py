"""Random changes of images: one at a time for `batches`, or many on the device."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jaxtransfer import prng
from jaxtransfer.data.records import Example
from jaxtransfer.typing import AnyArray

Augment = Callable[[Example, np.random.Generator], Example]


_OF_PIXELS = ("labels", "where")
"""Fields that belong to the image's pixels if they are as large."""


def _named(fields: Sequence[str]) -> tuple[str, ...]:
    """Names of fields, one at least."""
    if isinstance(fields, str) or not fields:
        raise ValueError(f"fields={fields!r} must be names, as ('inputs', 'labels')")
    return tuple(fields)


def _moved(
    example: Example, fields: Sequence[str], move: Callable[[np.ndarray], np.ndarray]
) -> Example:
    """The example with fields of the same pixels moved, and none of them forgotten."""
    if absent := [name for name in fields if name not in example]:
        raise ValueError(f"fields: the example has no {absent}, but {sorted(example)}")
    sizes = {name: np.shape(example[name])[:2] for name in fields}
    size = sizes[fields[0]]
    if len(size) < 2 or set(sizes.values()) != {size}:
        raise ValueError(
            f"fields: height and width of {sizes} differ; bring them to one size"
        )
    for name in _OF_PIXELS:
        if name not in fields and np.shape(example.get(name, ()))[:2] == size:
            raise ValueError(
                f"{name!r} is of {size[0]} x {size[1]} pixels as {fields[0]!r} is, "
                f"and would not be moved with it; give fields={(*fields, name)}"
            )
    return {**example, **{name: move(example[name]) for name in fields}}


def random_crop(*, pad: int, fields: Sequence[str] = ("inputs",)) -> Augment:
    """Shift images by up to `pad` pixels.

    The image is padded on every side and a window of the old size is cut at a uniformly
    drawn place; padding repeats the mirrored border.

    Args:
        pad: pixels on every side, 0 or more and less than the sides of the images.
        fields: what is moved, all in the same way: images, and labels or masks of their
            pixels `("inputs", "labels")`, as large.

    Returns:
        A function `(example, generator) -> example` that changes the fields, each
        `[height, width, ...]`.

    Raises:
        ValueError: negative `pad` or no `fields`; when called, an example without one
            of them, fields of several sizes, or `labels` or `where` of the same pixels
            that are not among them.

    Example:
        >>> crop = random_crop(pad=2)
        >>> example = {"inputs": np.zeros((8, 8, 1)), "labels": np.int32(3)}
        >>> crop(example, np.random.default_rng(0))["inputs"].shape
        (8, 8, 1)
    """
    if pad < 0:
        raise ValueError(f"pad={pad} must be at least 0")
    fields = _named(fields)

    def augment(example: Example, generator: np.random.Generator) -> Example:
        top, left = generator.integers(0, 2 * pad + 1, size=2)

        def move(image: np.ndarray) -> np.ndarray:
            height, width = image.shape[:2]
            edges = [(pad, pad)] * 2 + [(0, 0)] * (image.ndim - 2)
            padded = np.pad(image, edges, mode="reflect")
            return padded[top : top + height, left : left + width]

        return _moved(example, fields, move)

    return augment


def horizontal_flip(
    *, probability: float = 0.5, fields: Sequence[str] = ("inputs",)
) -> Augment:
    """Mirror images left to right.

    Args:
        probability: of mirroring, in `[0, 1]`.
        fields: what is mirrored together, as in `random_crop`.

    Returns:
        A function `(example, generator) -> example` that changes the fields, each
        `[height, width, ...]`.

    Raises:
        ValueError: `probability` outside `[0, 1]`; as `random_crop`.

    Example:
        >>> flip = horizontal_flip(probability=1.0)
        >>> example = {"inputs": np.arange(3)[None, :, None]}
        >>> flip(example, np.random.default_rng(0))["inputs"].ravel().tolist()
        [2, 1, 0]
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability={probability} must lie in [0, 1]")
    fields = _named(fields)

    def augment(example: Example, generator: np.random.Generator) -> Example:
        mirrored = generator.random() < probability
        return _moved(example, fields, lambda x: x[:, ::-1] if mirrored else x)

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


def affine(
    images: Float[AnyArray, "n height width channels"],
    matrices: Float[AnyArray, "n 2 2"],
    shifts: Float[AnyArray, "n 2"],
) -> Float[Array, "n height width channels"]:
    r"""Move what images show by an affine map about their centres.

    .. math:: y(p) = x(c + A^{-1} (p - c - t))

    with bilinear interpolation between pixels and 0 outside, so that a map that is the
    identity changes nothing. Pure, jit-able and differentiable.

    Args:
        images: :math:`x`.
        matrices: :math:`A` in (row, column) coordinates, invertible.
        shifts: :math:`t` in pixels, down and to the right.

    Returns:
        :math:`y`, of the same shape.

    Example:
        >>> image = jnp.zeros((1, 3, 3, 1)).at[0, 0, 1].set(1.0)
        >>> quarter_turn = jnp.array([[[0.0, -1.0], [1.0, 0.0]]])
        >>> affine(image, quarter_turn, jnp.zeros((1, 2)))[0, ..., 0].tolist()
        [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """
    images = jnp.asarray(images)
    height, width = images.shape[1:3]
    centre = jnp.array([(height - 1) / 2, (width - 1) / 2])[:, None, None]
    grid = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij"))
    away = grid - centre - jnp.asarray(shifts)[:, :, None, None]
    places = jnp.einsum("nij,njhw->nihw", jnp.linalg.inv(matrices), away) + centre

    def look_up(image: Array, places: Array) -> Array:
        rows, columns = places
        return jax.vmap(
            lambda plane: jax.scipy.ndimage.map_coordinates(
                plane, [rows, columns], order=1
            ),
            in_axes=-1,
            out_axes=-1,
        )(image)

    return jax.vmap(look_up)(images, places)


def random_affine(
    key: Key[Array, ""],
    images: Float[AnyArray, "n height width channels"],
    *,
    rotation: float = 10.0,
    shear: float = 0.2,
    scale: float = 1.2,
    shift: float = 0.07,
    probability: float = 1.0,
) -> Float[Array, "n height width channels"]:
    r"""Turn, shear, scale and shift images at random, each by a map of its own.

    The map is :math:`A = R(\phi) \begin{pmatrix} 1 & h \\ 0 & 1 \end{pmatrix}
    \operatorname{diag}(s_1, s_2)` with every part drawn uniformly (the scales on a
    logarithmic axis). Pure and jit-able.

    Args:
        key: typed key.
        images: with a background of 0.
        rotation: most degrees either way.
        shear: most :math:`|h|`.
        scale: most :math:`s_1, s_2`, at least 1; the least is its inverse.
        shift: most shift either way, a fraction of the height and width.
        probability: of changing an image at all, in `[0, 1]`.

    Returns:
        Images of the same shape.

    Raises:
        ValueError: a negative range, `scale` below 1, `probability` outside `[0, 1]`.

    Example:
        >>> images = jnp.ones((4, 8, 8, 1))
        >>> random_affine(jax.random.key(0), images).shape
        (4, 8, 8, 1)

    References:
        Koch, Zemel, Salakhutdinov, "Siamese Neural Networks for One-shot Image
        Recognition", 2015, section 4.2 (affine distortions of drawn characters).
    """
    ranges = {"rotation": rotation, "shear": shear, "shift": shift}
    for name, value in ranges.items():
        if value < 0:
            raise ValueError(f"{name}={value} must be at least 0")
    if scale < 1:
        raise ValueError(f"scale={scale} must be at least 1; {1 / scale:g} is the same")
    if not 0 <= probability <= 1:
        raise ValueError(f"probability={probability} must lie in [0, 1]")
    images = jnp.asarray(images)
    count, height, width = images.shape[:3]

    def uniform(name: str, most: float, *shape: int) -> Array:
        return jax.random.uniform(
            prng.stream(key, name), (count, *shape), minval=-most, maxval=most
        )

    angle = jnp.deg2rad(uniform("rotation", rotation))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    one, zero, slant = jnp.ones(count), jnp.zeros(count), uniform("shear", shear)
    turn = jnp.array([[cos, -sin], [sin, cos]])
    lean = jnp.array([[one, slant], [zero, one]])
    sizes = jnp.exp(uniform("scale", float(np.log(scale)), 2))
    matrices = jnp.einsum("ijn,jkn,nk->nik", turn, lean, sizes)
    shifts = uniform("shift", shift, 2) * jnp.array([height, width])
    moved = affine(images, matrices, shifts)
    if probability == 1:
        return moved
    changes = jax.random.bernoulli(prng.stream(key, "whether"), probability, (count,))
    return jnp.where(changes[:, None, None, None], moved, images)
