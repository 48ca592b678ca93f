"""One process of a run over several: prints nothing, writes what it has learned.

A run that is stopped and goes on from its checkpoints must equal the one that is not.

``python worker.py PROCESSES PROCESS PORT OUT``; one process takes all eight devices.
"""

import os
import pathlib
import sys

processes, process, port, out = *map(int, sys.argv[1:4]), sys.argv[4]
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8 // processes)

from jaxtransfer import parallel  # noqa: E402

if processes > 1:
    parallel.initialize_distributed(
        f"127.0.0.1:{port}", processes=processes, process=process
    )

import numpy as np  # noqa: E402
import optax  # noqa: E402

from jaxtransfer import nets, tree  # noqa: E402
from jaxtransfer.methods import adapt, finetune, meta  # noqa: E402
from jaxtransfer.model import from_linen  # noqa: E402
from jaxtransfer.train import (  # noqa: E402
    Checkpointer,
    fit,
    init_state,
    metrics,
    train_step,
)

ROWS = 16


def mine(batch):
    """This process's part of the global batch: the rows of its own devices."""
    share = ROWS // processes
    return jax.tree.map(lambda x: x[process * share : (process + 1) * share], batch)


def batches(seed, *shape):
    random = np.random.default_rng(seed)
    return {
        "inputs": random.normal(size=(ROWS, *shape, 6)).astype(np.float32),
        "labels": random.integers(0, 3, (ROWS, *shape)).astype(np.int32),
    }


assert jax.device_count() == 8 and jax.process_count() == processes
assert len(jax.local_devices()) == 8 // processes
mesh = parallel.make_mesh()
net = from_linen(nets.MLP(3, widths=(8,), dropout=0.5))
key = jax.random.key(0)
start = jax.jit(net.init)(key, np.ones((2, 6), np.float32))
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.05))
task = finetune.objective(net)
few_shot = meta.task(net, statistics="transductive")
runs = {
    "finetune": (task, start, lambda seed: batches(seed)),
    "adapt": (
        adapt.objective(net, adapt.align(tap="features")),
        adapt.init(key, net, start, np.ones((2, 6), np.float32)),
        lambda seed: {"source": batches(seed), "target": batches(seed + 100)},
    ),
    "maml": (
        meta.objective(meta.maml(few_shot, optax.sgd(0.1), steps=2)),
        start,
        lambda seed: {"support": batches(seed, 4), "query": batches(seed + 100, 4)},
    ),
}
results = {}
for name, (objective, variables, draw) in runs.items():
    state = init_state(key, variables, optimizer)
    step = parallel.jit_step(train_step(objective, optimizer), mesh)
    for seed in range(3):
        state, measured = step(state, mine(draw(seed)))
    assert int(state.step) == 3
    results |= {f"{name}/{p}": v for p, v in tree.flatten(state.params).items()}
    results[f"{name}/loss"] = metrics.finalize(measured)["loss"]
    results[f"{name}/key"] = jax.random.key_data(state.key)


class Positioned:
    """Batches that know where they are."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.at += 1
        return mine(batches(self.at))

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = int(state["at"])


step = parallel.jit_step(train_step(task, optimizer), mesh)


def fitted(steps, **options):
    """The parameters after so many updates, and where they began."""
    state = init_state(key, start, optimizer)
    state, history = fit(
        step, state, Positioned(), steps=steps, log_every=1, progress=False, **options
    )
    return tree.flatten(state.params), history.train[0]["step"]


whole, _ = fitted(6)
folder = pathlib.Path(out).parent / f"run of {processes}"
with Checkpointer(folder, every=2) as checkpointer:
    fitted(3, checkpointer=checkpointer)
with Checkpointer(folder, every=2) as checkpointer:
    resumed, first = fitted(6, checkpointer=checkpointer)
assert first == 4, first
for path, value in resumed.items():
    np.testing.assert_array_equal(np.asarray(value), np.asarray(whole[path]), path)
results |= {f"fit/{path}": value for path, value in whole.items()}
np.savez(out, **{name: np.asarray(value) for name, value in results.items()})
