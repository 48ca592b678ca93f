"""How long does a step of meta-learning by MAML take, beside peers in PyTorch?

``python -m benchmarks.maml [--only WORDS] [--rounds N] [--variants WORDS]
[--precision NAME] [--json FILE]``: a whole meta-step (Adam outside, gradient descent
inside, second order) on the shapes of Omniglot: 16 tasks of 5 ways, 1 shot and 15
queries a class, images of 28 x 28, four convolutions of 64 filters with the batch
statistics of the examples at hand. All forms get the same weights and episodes and must
return the same loss and gradient.

Ours: the defaults of ``meta.objective(meta.maml(...))`` and ``nets.Conv4``, on one
device and with the tasks divided over one device a core. Needs PyTorch; of ``higher``
and ``torchopt`` what is installed. ``lax.conv`` under ``vmap`` takes some ten seconds a
step on a CPU and is measured in the first setting only. Memory: what the compiled
program holds beside its inputs and results; for PyTorch the growth of a fresh process,
on a GPU the most that is allocated at once.

A setting's products, as `lax.conv` for one task after the other does them, over those
of the largest matrix product that fits, say how far from the limit a form is.
"""

import functools
import importlib.util
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from jax.sharding import PartitionSpec as P

from benchmarks import pytorch
from benchmarks.common import (
    in_fresh_process,
    interleave,
    parser_of,
    peak_memory,
    report,
    shards,
)
from benchmarks.peers import maml as peers
from jaxtransfer import nets, parallel, train, tree
from jaxtransfer.methods import meta
from jaxtransfer.model import from_linen

SHOTS, QUERIES, SIZE = 1, 15, 28
SETTINGS = {
    "strided, 1 step": peers.Setting(strided=True, steps=1),
    "strided, 5 steps": peers.Setting(strided=True, steps=5),
    "max pool, 1 step": peers.Setting(strided=False, steps=1),
    "max pool, 5 steps": peers.Setting(strided=False, steps=5),
    "20 ways, 1 step": peers.Setting(strided=True, steps=1, ways=20),
    "20 ways, 1 step, 128 tasks": peers.Setting(
        strided=True, steps=1, ways=20, tasks=128
    ),
}
USUAL = ("strided", "max pool, 1")
"""The others take minutes on a CPU and are left out unless asked for."""
WITH_PLAIN = "strided, 1 step"
VARIANTS = {
    "stored": {"backward": "stored"},
    "remat": {"backward": "remat"},
    "lax.conv": {"conv": nn.Conv},
}
"""What could be chosen instead of the defaults, by what is different."""
TOLERANCE = {"float32": 1e-2, "tf32": 0.5}
"""Of the outer gradient, relative to its norm; TF32 keeps 10 bits of a factor."""


def episodes(setting: peers.Setting) -> dict[str, dict[str, np.ndarray]]:
    """Normal images, and labels."""
    random = np.random.default_rng(0)
    tasks, ways = setting.tasks, setting.ways
    return {
        part: {
            "inputs": random.standard_normal((tasks, rows, SIZE, SIZE, 1), np.float32),
            "labels": np.tile(np.arange(rows, dtype=np.int32) % ways, (tasks, 1)),
        }
        for part, rows in (("support", ways * SHOTS), ("query", ways * QUERIES))
    }


def network(setting: peers.Setting, **options: Any):
    """The network of a setting."""
    return from_linen(
        nets.Conv4(setting.ways, setting.filters, strided=setting.strided, **options)
    )


# --- here -----------------------------------------------------------------------------


class InJax:
    """A meta-step in JAX: ``run``, ``compile_seconds`` and ``megabytes``."""

    def __init__(
        self, setting, start, *, devices=1, chunk: Any = "auto", backward=None, **net
    ):
        learner = meta.maml(
            meta.task(network(setting, **net), statistics="transductive"),
            optax.sgd(setting.rate),
            steps=setting.steps,
            **({} if backward is None else {"backward": backward}),
        )
        optimizer = optax.adam(peers.OUTER_RATE)
        objective = meta.objective(learner, chunk=chunk)
        state = train.init_state(jax.random.key(0), start, optimizer)
        batch = jax.tree.map(jnp.asarray, episodes(setting))
        if devices == 1:
            self.step = parallel.jit_step(
                train.train_step(objective, optimizer), donate=False
            )
            lower = self.step.lower  # pyright: ignore[reportFunctionMemberAccess]
        else:
            mesh = parallel.make_mesh(devices=jax.devices()[:devices])
            state = parallel.replicate(state, mesh)
            batch = parallel.shard_batch(batch, mesh)
            step = train.train_step(objective, optimizer, axis_name="data")
            self.step = parallel.shard_map_step(step, mesh)
            specs = {"in_specs": (P(), P("data")), "out_specs": (P(), P())}
            lower = jax.jit(jax.shard_map(step, mesh=mesh, **specs)).lower
        begin = time.perf_counter()
        program = lower(state, batch).compile()
        self.compile_seconds = time.perf_counter() - begin
        self.megabytes = devices * program.memory_analysis().temp_size_in_bytes / 1e6
        self.run = functools.partial(self.step, state, batch)

    def result(self) -> tuple[float, dict[str, np.ndarray]]:
        """The outer loss and its gradient, by path."""
        state, measured = self.run()
        # Adam's mean of gradients after one step, of decay 0.9.
        gradient = jax.tree.map(lambda m: 10 * m, optax.tree.get(state.opt_state, "mu"))
        loss = train.metrics.finalize(measured)["loss"]
        return float(loss), jax.device_get(tree.flatten(gradient))


# --- in PyTorch -----------------------------------------------------------------------


def to_torch(params: dict[str, Any], setting: peers.Setting) -> dict[str, np.ndarray]:
    """Parameters or their gradient by path, in PyTorch's names and layout.

    With steps of 2 PyTorch pads an even size before it, "SAME" after it; with kernels
    and images turned by 180 degrees that is the same network.
    """
    found = {}
    for path, leaf in params.items():
        name = path.replace("/", ".")
        array = np.asarray(leaf)
        if array.ndim == 4:
            array = array[::-1, ::-1] if setting.strided else array
            array = array.transpose(3, 2, 0, 1)
        elif array.ndim == 2:
            array = array.T
        name = name.replace("kernel", "weight").replace("scale", "weight")
        found[name] = np.ascontiguousarray(array)
    return found


def for_torch(setting: peers.Setting) -> dict[str, np.ndarray]:
    """The episodes in PyTorch's layout."""
    found = {}
    for part, arrays in episodes(setting).items():
        images = np.moveaxis(arrays["inputs"], -1, 2)
        images = images[..., ::-1, ::-1] if setting.strided else images
        found[f"{part} inputs"] = np.ascontiguousarray(images)
        found[f"{part} labels"] = arrays["labels"].astype(np.int64)
    return found


def resident() -> float:
    """Resident size of this process now, in GB."""
    status = Path("/proc/self/status")
    if not status.exists():
        return peak_memory()
    now = next(x for x in status.read_text().splitlines() if "VmRSS" in x)
    return int(now.split()[1]) * 1024 / 1e9


def growth(form: str, setting: peers.Setting, weights: dict[str, np.ndarray]) -> float:
    """MB that two steps add to a process, beyond the network and the episodes."""
    step = peers.FORMS[form](setting, weights, for_torch(setting))
    before = resident()
    step.run(), step.run()
    return 1e3 * (peak_memory() - before)


def installed(setting: peers.Setting) -> list[str]:
    """The peers that can run; says what is missing for the others.

    Loops over very many tasks take too long.
    """
    found = []
    for form in peers.FORMS:
        if setting.tasks > 16 and form != peers.AT_ONCE:
            continue
        module = peers.NEEDS.get(form, "torch")
        if importlib.util.find_spec(module) is not None:
            found.append(form)
        else:
            print(f"{form}: left out (pip install {module})")
    return found


# --- all ------------------------------------------------------------------------------


def check(
    results: dict[str, tuple[float, dict[str, np.ndarray]]], tolerance: float
) -> dict[str, float]:
    """Relative difference of each form's gradient to that of the first peer.

    Raises:
        AssertionError: a loss or a gradient is another.
    """
    loss, gradient = next(iter(results.values()))
    size = np.sqrt(sum(np.sum(leaf**2) for leaf in gradient.values()))
    differences = {}
    for form, (other, leaves) in results.items():
        assert leaves.keys() == gradient.keys(), form
        total = sum(np.sum((leaves[k] - gradient[k]) ** 2) for k in gradient)
        differences[form] = float(np.sqrt(total) / size)
        np.testing.assert_allclose(other, loss, rtol=tolerance / 10, err_msg=form)
        assert differences[form] < tolerance, f"{form}: {differences[form]}"
    return differences


def once(run: Callable[[], Any]) -> float:
    """Seconds of a call; it has run before."""
    begin = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - begin


def gigaflop(setting: peers.Setting) -> float:
    """Of the convolutions of a meta-step.

    A gradient takes three times the forward pass, and that of an inner step, followed
    backwards, nine times.
    """
    channels, size, forward = 1, SIZE, 0
    for _ in range(4):
        out = -(-size // 2) if setting.strided else size
        forward += 2 * 9 * channels * setting.filters * out**2
        channels, size = setting.filters, out if setting.strided else size // 2
    images = 3 * QUERIES + 9 * setting.steps * SHOTS
    return setting.tasks * setting.ways * images * forward / 1e9


def largest_rate() -> float:
    """GFLOP/s of a large matrix product on the device."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    square = jax.random.normal(jax.random.key(0), (size, size))
    multiply = functools.partial(jax.jit(jnp.matmul), square, square)
    seconds = interleave({"": multiply}, rounds=5)[""]
    return 2 * size**3 / seconds / 1e9


def measure(
    name: str, rounds: int, tolerance: float, variants: Sequence[str] = ()
) -> dict[str, dict[str, float]]:
    """All forms in one setting: quantity by form."""
    setting = SETTINGS[name]
    example = episodes(setting)["support"]["inputs"][0]
    start = jax.jit(network(setting).init)(jax.random.key(1), example)
    weights = to_torch(tree.flatten(start.params), setting)
    ours = {"jaxtransfer, one device": InJax(setting, start)}
    # As many as `main` has asked for on a CPU; of accelerators those that are there.
    if (count := min(shards(setting.tasks), jax.device_count())) > 1:
        ours[f"jaxtransfer, {count} devices"] = InJax(setting, start, devices=count)
    for change in variants:
        ours[f"jaxtransfer, {change}"] = InJax(setting, start, **VARIANTS[change])
    slow = {}
    if name == WITH_PLAIN:
        slow["JAX, lax.conv under vmap"] = InJax(
            setting, start, conv=nn.Conv, chunk=None, backward="stored"
        )
    theirs = {
        form: peers.FORMS[form](setting, weights, for_torch(setting))
        for form in installed(setting)
    }
    results = {}
    for form, step in theirs.items():
        results[form] = float(step.run()), step.gradient()
    for form, step in (ours | slow).items():
        loss, gradient = step.result()
        results[form] = loss, to_torch(gradient, setting)
    differences = check(results, tolerance)
    quick = {form: step.run for form, step in (ours | theirs).items()}
    seconds = interleave(quick, rounds=rounds)
    seconds |= {form: once(step.run) for form, step in slow.items()}
    fastest = min(seconds[form] for form in theirs)
    on_cpu = pytorch.device().type == "cpu"
    peak = {
        form: in_fresh_process(growth, form, setting, weights)
        if on_cpu
        else pytorch.megabytes_on_gpu(step.run)
        for form, step in theirs.items()
    }
    rate, work = largest_rate(), gigaflop(setting)
    return {
        "seconds": seconds,
        "speed relative to the fastest peer": {
            form: fastest / spent for form, spent in seconds.items()
        },
        "fraction of the limit": {
            form: work / spent / rate for form, spent in seconds.items()
        },
        "tasks a second": {
            form: setting.tasks / spent for form, spent in seconds.items()
        },
        "megabytes": {form: step.megabytes for form, step in (ours | slow).items()}
        | peak,
        "compile seconds": {
            form: step.compile_seconds for form, step in (ours | slow).items()
        },
        "difference of the gradient": differences,
    }


def main() -> None:
    """Measure and report."""
    parser = parser_of(__doc__)
    parser.add_argument(
        "--only",
        nargs="+",
        default=USUAL,
        help="settings whose names hold one of these",
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--variants",
        nargs="+",
        default=(),
        choices=VARIANTS,
        help="other choices than the defaults too",
    )
    pytorch.add_precision(parser, "tf32")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", shards(16))
    if not any(word in name for word in options.only for name in SETTINGS):
        parser.error(f"--only: no setting of that name; there are {list(SETTINGS)}")
    precision = pytorch.set_precision(options.precision)
    tolerance = TOLERANCE[precision]
    seconds, facts = {}, {}
    for name in SETTINGS:
        if not any(word in name for word in options.only):
            continue
        found = measure(name, options.rounds, tolerance, options.variants)
        print(name)
        for form, spent in found["seconds"].items():
            print(
                f"  {form:<28} {spent:9.3f} s"
                f" {found['speed relative to the fastest peer'][form]:7.2f} x"
                f" {found['megabytes'][form]:8.0f} MB"
                f" {100 * found['fraction of the limit'][form]:6.1f} %"
                f" {found['tasks a second'][form]:9.1f} tasks/s",
                flush=True,
            )
        seconds |= {f"{name}: {form}": x for form, x in found.pop("seconds").items()}
        facts[name] = found
    report(
        "a meta-step of MAML, second order",
        seconds,
        settings=facts,
        rounds=options.rounds,
        precision=precision,
        torch=torch.__version__,
        json_file=options.json,
    )


if __name__ == "__main__":
    main()
