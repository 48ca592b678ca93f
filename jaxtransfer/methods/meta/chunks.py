"""Many tasks as chunks: side by side within one, one after the other."""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from jaxtransfer.ops.chunked import chunked_mean
from jaxtransfer.ops.footprint import traced_bytes
from jaxtransfer.typing import Batch, Scalar

Chunk = int | Literal["auto"] | None
"""Tasks that run side by side. ``"auto"``: on a CPU as many as stay in its caches, on
an accelerator as many as fit in 4 GB; over a mesh, so many on every device. None:
all."""

_ROOM = {"cpu": 4e6}
_ACCELERATOR_ROOM = 4e9


def _number_of_tasks(batch: Batch) -> int:
    sizes = {len(leaf) for leaf in jax.tree.leaves(dict(batch))}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            "episodes: every array needs the same, non-empty leading axis of tasks; "
            f"got {sorted(sizes)}"
        )
    return sizes.pop()


def _chunk(chunk: Chunk, tasks: int, one: Callable[..., Any], *arguments: Any) -> int:
    """How many tasks run side by side."""
    if chunk is None:
        return tasks
    if isinstance(chunk, int | np.integer):
        return min(int(chunk), tasks)
    if chunk != "auto":
        raise ValueError(f'chunk: got {chunk!r}; choose a number, "auto" or None')
    platform = jax.default_backend()
    room = _ROOM.get(platform, _ACCELERATOR_ROOM)
    fit = max(1, int(room // max(traced_bytes(one, *arguments), 1)))
    devices = _devices(arguments)
    whole = [size for size in range(devices, tasks + 1, devices) if tasks % size == 0]
    return max((size for size in whole if size <= fit * devices), default=tasks)


def _devices(arguments: Any) -> int:
    """Devices of the mesh that ``jit`` lays arrays over; 1 within ``shard_map``."""

    def of(leaf: Any) -> int:
        sharding = getattr(jax.typeof(leaf), "sharding", None)
        mesh = getattr(sharding, "mesh", None)
        if mesh is None:
            return 1
        axes = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
        return math.prod(size for size, kind in axes if kind != AxisType.Manual)

    return max(map(of, jax.tree.leaves(arguments)), default=1)


def mean_over_tasks(
    one: Callable[..., tuple[Scalar, Any]], chunk: Chunk
) -> Callable[..., tuple[Scalar, Any]]:
    """``(params, frozen, model_state, keys, tasks) -> (mean, aux of each task)``."""

    def some(params, frozen, model_state, keys_and_tasks):
        values, aux = jax.vmap(one, in_axes=(None, None, None, 0))(
            params, frozen, model_state, keys_and_tasks
        )
        return jnp.mean(values), aux

    def run(params, frozen, model_state, batch, key):
        tasks = _number_of_tasks(batch)
        work = jax.random.split(key, tasks), dict(batch)
        first = jax.tree.map(lambda leaf: leaf[0], work)
        size = _chunk(chunk, tasks, one, params, frozen, model_state, first)
        if size == tasks:
            return some(params, frozen, model_state, work)
        value, aux = chunked_mean(some, size, aux="stack")(
            params, frozen, model_state, work
        )
        # Chunk k of n holds the tasks k, k + n, ...
        return value, jax.tree.map(
            lambda leaf: leaf.swapaxes(0, 1).reshape(tasks, *leaf.shape[2:]), aux
        )

    return run


__all__ = ["Chunk", "mean_over_tasks"]
