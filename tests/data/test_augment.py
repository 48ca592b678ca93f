"""Affine changes of images on the device: exact maps, ranges, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from jaxtransfer import data

IMAGES = jax.random.uniform(jax.random.key(5), (6, 9, 9, 2))
NO_SHIFT = jnp.zeros((6, 2))


def repeated(matrix):
    return jnp.broadcast_to(jnp.array(matrix, jnp.float32), (6, 2, 2))


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_quarter_turns_are_those_of_rot90(turns):
    """Counter-clockwise, exact up to rounding; none is the identity, bit for bit."""
    angle = turns * np.pi / 2
    cos, sin = np.round(np.cos(angle)), np.round(np.sin(angle))
    moved = data.affine(IMAGES, repeated([[cos, -sin], [sin, cos]]), NO_SHIFT)
    wanted = jnp.rot90(IMAGES, turns, (1, 2))
    np.testing.assert_allclose(moved, wanted, atol=0 if turns == 0 else 1e-6)


def test_whole_shifts_move_pixels_and_bring_in_zeros():
    """Down 2, left 1."""
    moved = data.affine(
        IMAGES, repeated(np.eye(2)), jnp.tile(jnp.array([2.0, -1]), (6, 1))
    )
    wanted = np.zeros(IMAGES.shape, np.float32)
    wanted[:, 2:, :-1] = IMAGES[:, :-2, 1:]
    np.testing.assert_allclose(moved, wanted, atol=1e-6)


def test_agrees_with_scipy_on_images_that_are_not_square(key):
    """A general map, each image by its own."""
    images = IMAGES[:, :, :7]
    matrices = jnp.eye(2) + 0.3 * jax.random.normal(key, (6, 2, 2))
    shifts = jax.random.normal(jax.random.key(1), (6, 2))
    moved = data.affine(images, matrices, shifts)
    centre = np.array([4.0, 3.0])
    for image, matrix, shift, found in zip(
        images, matrices, shifts, moved, strict=True
    ):
        inverse = np.linalg.inv(matrix)
        offset = centre - inverse @ (centre + np.asarray(shift))
        for channel in range(2):
            plane = np.asarray(image[..., channel])
            wanted = scipy.ndimage.affine_transform(
                plane, inverse, offset, order=1, mode="grid-constant"
            )
            np.testing.assert_allclose(found[..., channel], wanted, atol=1e-5)


def test_random_maps_stay_in_their_ranges(key):
    """Each option moves a blob as it says; without any nothing changes."""
    none = {"rotation": 0.0, "shear": 0.0, "scale": 1.0, "shift": 0.0}
    place = jnp.arange(25.0) - 12
    blob = jnp.exp(-(place[:, None] ** 2 + (place - 5) ** 2) / 6)
    blobs = jnp.broadcast_to(blob[..., None], (400, 25, 25, 1))

    def centres(**options):
        moved = data.random_affine(key, blobs, **(none | options))[..., 0]
        mass = moved.sum((1, 2))
        rows, columns = moved.sum(2) @ place, moved.sum(1) @ place
        return np.asarray(rows / mass), np.asarray(columns / mass)

    def spans(values, least, most, tolerance=0.1):
        assert abs(values.min() - least) < tolerance, (values.min(), least)
        assert abs(values.max() - most) < tolerance, (values.max(), most)

    np.testing.assert_array_equal(data.random_affine(key, blobs, **none), blobs)
    row, column = centres(shift=0.08)
    spans(row, -2, 2)
    spans(column, 3, 7)
    assert abs(np.corrcoef(row, column)[0, 1]) < 0.2
    row, column = centres(scale=1.25)
    spans(row, 0, 0)
    spans(column, 5 / 1.25, 5 * 1.25)
    row, column = centres(rotation=30.0)
    spans(np.rad2deg(np.arctan2(row, column)), -30, 30, tolerance=1.5)
    spans(np.hypot(row, column), 5, 5)
    row, column = centres(shear=0.4)
    spans(row, -2, 2)
    spans(column, 5, 5)


def test_some_images_are_left_alone(key):
    """A share of them; the key decides; jit changes nothing that matters."""
    images = jax.random.uniform(jax.random.key(2), (200, 6, 6, 1))
    draw = jax.jit(lambda key: data.random_affine(key, images, probability=0.25))
    moved = draw(key)
    changed = np.asarray((moved != images).any((1, 2, 3)))
    assert 30 < changed.sum() < 70
    eager = data.random_affine(key, images, probability=0.25)
    np.testing.assert_allclose(moved, eager, atol=1e-5)
    assert not np.array_equal(moved, draw(jax.random.key(1)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rotation": -1.0}, "rotation=-1.0"),
        ({"shift": -0.1}, "shift=-0.1"),
        ({"scale": 0.8}, "scale=0.8 must be at least 1; 1.25 is the same"),
        ({"probability": 1.5}, "probability=1.5"),
    ],
)
def test_refusals(key, options, message):
    with pytest.raises(ValueError, match=message):
        data.random_affine(key, IMAGES, **options)
