"""A small run in a process of its own: python checkpointed_run.py FOLDER [options].

Trains an MLP with ``fit``, grain data and a checkpoint every three updates, and
writes the final parameters to FOLDER/final.npz. The tests kill it.
"""

import argparse
import pathlib
import time

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtransfer import parallel, train
from jaxtransfer.typing import Variables


def objective(params, frozen, model_state, batch, key):
    hidden = jax.nn.relu(batch["inputs"] @ params["hidden"])
    hidden *= jax.random.bernoulli(key, 0.9, hidden.shape) / 0.9
    error = hidden @ params["output"] - batch["labels"][:, None]
    return jnp.mean(error**2), (model_state, {"size": jnp.mean(jnp.abs(error))})


def initial(optimizer, *, width=16):
    first, second = jax.random.split(jax.random.key(1))
    params = {
        "hidden": jax.random.normal(first, (8, width)) / 3,
        "output": jax.random.normal(second, (width, 1)) / 4,
    }
    return train.init_state(jax.random.key(0), Variables(params), optimizer)


def batches(batch_size=8):
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(40, 8)).astype(np.float32)
    rows = [{"inputs": x, "labels": np.float32(x.sum())} for x in inputs]
    dataset = grain.MapDataset.source(rows).seed(3).shuffle().repeat()
    # Threads would read 500 batches ahead, of which a test sees seven.
    alone = grain.ReadOptions(num_threads=0)
    return iter(dataset.batch(batch_size).to_iter_dataset(alone))


def final(state):
    """What two runs are compared by."""
    leaves = {**state.params, "step": state.step}
    moments = jax.tree.leaves(state.opt_state)
    return leaves | {f"opt_state/{n}": leaf for n, leaf in enumerate(moments)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--keep", type=int, default=2)
    options = parser.parse_args()
    optimizer = optax.adam(1e-2)
    compiled = parallel.jit_step(train.train_step(objective, optimizer))

    def step(state, batch):
        time.sleep(options.pause)
        print(f"step {int(state.step)}", flush=True)
        return compiled(state, batch)

    folder = options.folder / "checkpoints"
    with train.Checkpointer(folder, every=3, keep=options.keep) as checkpointer:
        state, history = train.fit(
            step,
            initial(optimizer),
            batches(),
            steps=options.steps,
            checkpointer=checkpointer,
            run_dir=options.folder,
            log_every=5,
        )
    print("stopped", history.stopped or "complete", flush=True)
    if not history.stopped:
        np.savez(options.folder / "final.npz", **final(state))
