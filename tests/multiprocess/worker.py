"""One process of a run over several: prints nothing, writes what it has learned.

A run that is stopped and goes on from its checkpoints must equal the one that is not.
What several processes must not do is refused in all of them.

``python worker.py PROCESSES PROCESS PORT OUT``; one process takes all eight devices.
"""

import os
import pathlib
import signal
import sys
import time

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

from jaxtransfer import data, nets, tree  # noqa: E402
from jaxtransfer.methods import adapt, distill, finetune, meta  # noqa: E402
from jaxtransfer.methods.distill import cache  # noqa: E402
from jaxtransfer.model import from_linen  # noqa: E402
from jaxtransfer.train import (  # noqa: E402
    Checkpointer,
    DamagedCheckpointError,
    eval_step,
    evaluate_batches,
    fit,
    init_state,
    metrics,
    train_step,
)
from jaxtransfer.typing import Variables  # noqa: E402

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

trained = init_state(key, start, optimizer)
for seed in range(2):
    trained, _ = step(trained, mine(batches(seed)))
measure = eval_step(metrics.classification(finetune.predict(net)))
test = jax.tree.map(lambda *x: np.concatenate(x)[:37], *map(batches, range(3)))


def parts():
    return data.evaluation_batches(
        test, batch_size=ROWS // processes, shard=(process, processes)
    )


measured = evaluate_batches(parallel.jit_step(measure, mesh), trained, parts())
results |= {f"evaluate/{name}": value for name, value in measured.items()}


def refused(error, words, call, *arguments, **named):
    try:
        call(*arguments, **named)
    except error as raised:
        assert words in str(raised), raised
    else:
        raise AssertionError(f"not refused: {words}")


def resumed_in(folder):
    with Checkpointer(folder) as checkpointer:
        return checkpointer.restore(init_state(key, start, optimizer))


def alone():
    """What goes well or wrong in one of several processes, and what all do then."""
    near = pathlib.Path(out).parent
    fresh = init_state(key, start, optimizer)
    for state in fresh, trained:
        words, compiled = "its own rows alone", parallel.jit(measure)
        refused(ValueError, words, evaluate_batches, compiled, state, parts())
    per_device = parallel.pmap_step(train_step(task, optimizer, axis_name="data"))
    rows = jax.tree.map(lambda x: x[: 12 if process else 4], batches(0))
    parallel._PATIENCE, patience = 0.5, parallel._PATIENCE
    refused(ValueError, "as many rows", parallel.shard_batch, rows["inputs"], mesh)
    refused(ValueError, "as many rows", per_device, fresh, rows)
    parallel._PATIENCE = patience
    for other in np.full(2, process), np.zeros((2, 1 + process)):
        refused(ValueError, "differs", parallel.replicate, other, mesh)

    refused(OSError, "not that of process 0", Checkpointer, near / f"own {process}")
    with Checkpointer(near / "local") as checkpointer:
        assert checkpointer.save(0, fresh)
    again = resumed_in(near / "local")
    np.testing.assert_array_equal(again.params["head"]["kernel"], head(fresh))
    if process == 1:
        (near / "local" / "0" / "record" / "process_1.json").unlink()
    refused(DamagedCheckpointError, "process_1.json", resumed_in, near / "local")

    def short(**options):
        fit(step, trained, iter([]), steps=9, progress=False, **options)

    refused(OSError, "can't be written", short, run_dir=__file__)
    refused(ValueError, f"ended in process {process}", short)

    runs, fill = [], cache._fill
    cache._fill = lambda *given: runs.append(given) or fill(*given)
    given = Variables(trained.params, trained.model_state)
    arguments = near / "cache", net, given, test["inputs"]
    taught = distill.cache_teacher(*arguments, batch_size=8)
    assert taught.arrays[""].shape == (1, 37, 3) and len(runs) == 1 - process
    local = [x.is_fully_addressable for run in runs for x in jax.tree.leaves(run[3])]
    assert all(local)  # what one process runs alone


def head(state):
    return np.asarray(state.params["head"]["kernel"])


class Interrupted(Positioned):
    """Ctrl-C in one process while the others begin with the first update."""

    def __next__(self):
        if self.at == 0 and process == 1:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(2.5)  # JAX looks for signals once a second
        return super().__next__()


if processes > 1:
    alone()
    state = init_state(key, start, optimizer)
    for source, last, stopped in (Interrupted(), 1, "SIGTERM"), (Positioned(), 9, ""):
        state, history = fit(step, state, source, steps=9, progress=False)
        assert (int(state.step), history.stopped) == (last, stopped), history
np.savez(out, **{name: np.asarray(value) for name, value in results.items()})
