"""Few-shot tasks that differ by an angle: a task's images are all turned alike."""

import jax
import jax.numpy as jnp

from jaxtransfer.data import ClassIndex
from jaxtransfer.typing import Batch


def turn(image: jax.Array, angle: jax.Array) -> jax.Array:
    """Turn an image ``[side, side, 1]`` by an angle in radians, bilinear."""
    half = (len(image) - 1) / 2
    y, x = jnp.mgrid[-half : half + 1, -half : half + 1]
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    places = [cosine * y - sine * x + half, sine * y + cosine * x + half]
    return jax.scipy.ndimage.map_coordinates(image[..., 0], places, order=1)[..., None]


def tasks(
    key: jax.Array,
    inputs: jax.Array,
    index: ClassIndex,
    *,
    tasks: int,
    shots: int,
    queries: int,
) -> Batch:
    """Draw tasks: every class, turned by one angle, any of the full circle.

    Args:
        key: typed key; the same key draws the same tasks.
        inputs: images ``[n, side, side, 1]``.
        index: which of them belong to which class.
        tasks: number of tasks.
        shots: support examples of each class.
        queries: query examples of each class, others than the support's.

    Returns:
        Episodes ``{"support", "query"}`` with a leading axis of tasks.
    """

    def one(key: jax.Array) -> Batch:
        angle_key, row_key = jax.random.split(key)
        angle = jax.random.uniform(angle_key, maxval=2 * jnp.pi)
        score = jax.random.uniform(row_key, index.members.shape)
        present = jnp.arange(score.shape[1]) < index.counts[:, None]
        _, drawn = jax.lax.top_k(jnp.where(present, score, -1.0), shots + queries)
        rows = jnp.take_along_axis(index.members, drawn, axis=1)

        def part(rows: jax.Array) -> Batch:
            labels, rows = jnp.indices(rows.shape)[0].ravel(), rows.ravel()
            images = jax.vmap(turn, (0, None))(inputs[rows], angle)
            return {"inputs": images, "labels": labels}

        return {"support": part(rows[:, :shots]), "query": part(rows[:, shots:])}

    return jax.vmap(one)(jax.random.split(key, tasks))
