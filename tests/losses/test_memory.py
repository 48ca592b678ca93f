"""Memories that are written by every device of a step are those of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from jaxtransfer import losses, parallel
from jaxtransfer.train import fit, init_state, train_step
from jaxtransfer.typing import Variables

KEY = jax.random.key(0)
ROWS, FEATURES, CLASSES = 16, 3, 2


def rows():
    keys = jax.random.split(KEY, 3)
    return {
        "inputs": jax.random.normal(keys[0], (ROWS, FEATURES)),
        "logits": jax.random.normal(keys[1], (ROWS, CLASSES)),
        "labels": jnp.arange(ROWS) % CLASSES,
        "indices": jnp.arange(ROWS)[::-1],
        "negatives": jax.random.randint(keys[2], (ROWS, 4), 0, ROWS),
    }


def memories():
    return {
        "bank": losses.neighbor_bank(CLASSES, FEATURES, ROWS),
        "queue": losses.class_queue(CLASSES, FEATURES, size=4),
        "memory": losses.contrastive_memory(KEY, ROWS, FEATURES),
    }


def written(axis_name):
    def objective(params, frozen, state, batch, key):
        x, on = batch["inputs"], {"axis_name": axis_name}
        state = {
            "bank": losses.update_neighbor_bank(
                x, batch["logits"], batch["indices"], state["bank"], **on
            ),
            "queue": losses.enqueue(x, batch["labels"], state["queue"], **on),
            "memory": losses.update_contrastive_memory(
                x, x, batch["indices"], batch["negatives"], state["memory"], **on
            ),
        }
        return jnp.mean((x - params["w"]) ** 2), (state, {})

    return objective


def begun():
    return init_state(
        KEY, Variables({"w": jnp.zeros(FEATURES)}, memories()), optax.sgd(0.1)
    )


@pytest.mark.parametrize("way", ["pmap", "shard_map"])
def test_every_device_writes_the_rows_of_all(way):
    devices = min(jax.local_device_count(), 8)
    if devices < 2:
        pytest.skip("needs several devices")
    one = train_step(written(None), optax.sgd(0.1))
    expected, _ = parallel.jit_step(one)(begun(), rows())
    each = train_step(written("data"), optax.sgd(0.1), axis_name="data")
    if way == "pmap":
        state, _ = parallel.pmap_step(each)(begun(), rows())
    else:
        mesh = Mesh(np.array(jax.local_devices()[:devices]), ("data",))
        step = parallel.shard_map_step(each, mesh)
        state, _ = step(parallel.replicate(begun(), mesh), rows())
    for name, memory in expected.model_state.items():
        found = state.model_state[name]
        for got, wanted in zip(found, memory, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6, err_msg=name)


def test_a_memory_that_is_not_yet_written_is_no_divergence():
    def objective(params, frozen, state, batch, key):
        return jnp.mean((batch - params["w"]) ** 2), (state, {})

    step = parallel.jit_step(train_step(objective, optax.sgd(0.1)))
    batches = [jnp.ones((4, FEATURES))] * 3
    state, _ = fit(step, begun(), batches, steps=3, progress=False)
    assert int(state.step) == 3


def test_counts_of_a_queue_keep_their_type():
    with jax.enable_x64(True):
        queue = losses.class_queue(CLASSES, FEATURES, size=4)
        after = losses.enqueue(rows()["inputs"], rows()["labels"], queue)
    assert after.counts.dtype == queue.counts.dtype
