"""How large may two sets be, and what does their discrepancy cost?

``python -m benchmarks.mmd [--json FILE]``: value and gradient by both sets of the
maximum mean discrepancy under five Gaussian kernels, by ``losses.mmd`` (which picks
its form by size), by the Gram form and the broadcast form in JAX, and by both in
PyTorch if it is installed (``pip install torch``).
"""

import functools
import importlib.metadata
import importlib.util
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import (
    in_fresh_process,
    interleave,
    parser_of,
    peak_memory,
    report,
)
from jaxtransfer import losses

HAS_TORCH = importlib.util.find_spec("torch") is not None
RATIOS = (0.25, 0.5, 1.0, 2.0, 4.0)
SMALL = ((64, 64, 512), (128, 128, 512), (256, 256, 512), (256, 256, 2048))
LARGE = ((2048, 2048, 256), (4096, 4096, 256), (8192, 8192, 256))
HUGE = (7207, 93070, 79)
BROADCAST_LIMIT = 5e7
"""Elements [pairs, features] up to which the broadcast form is tried."""


def sets(n: int, m: int, features: int) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Two normal sets with shifted means, and their five bandwidths."""
    random = np.random.default_rng(0)
    source = random.standard_normal((n, features), np.float32)
    target = random.standard_normal((m, features), np.float32) + np.float32(0.1)
    return source, target, [2.0 * features * ratio for ratio in RATIOS]


def library(source, target, bandwidths):
    return losses.mmd(source, target, bandwidth=bandwidths)


def gram(source, target, bandwidths, xp=jnp):
    def kernel(a, b):
        norms = (a**2).sum(1)[:, None] + (b**2).sum(1)
        distances = (norms - 2.0 * a @ b.T).clip(0.0)
        return sum(xp.exp(-distances / b) for b in bandwidths).mean()

    within = kernel(source, source) + kernel(target, target)
    return within - 2.0 * kernel(source, target)


def broadcast(source, target, bandwidths, xp=jnp):
    n = len(source)
    rows = xp.concatenate([source, target])
    distances = ((rows[None] - rows[:, None]) ** 2).sum(2)
    kernel = sum(xp.exp(-distances / b) for b in bandwidths)
    within = kernel[:n, :n].mean() + kernel[n:, n:].mean()
    return within - kernel[:n, n:].mean() - kernel[n:, :n].mean()


def compiled(loss, size):
    """Value and gradient of a form in JAX on data of a size, as a call."""
    source, target, bandwidths = sets(*size)
    source, target = jnp.asarray(source), jnp.asarray(target)
    run = jax.jit(
        jax.value_and_grad(lambda s, t: loss(s, t, tuple(bandwidths)), (0, 1))
    )
    return functools.partial(run, source, target)


def by_torch(loss, size):
    """The same in PyTorch."""
    import torch  # here, so that it is no part of the memory of the others

    from benchmarks import pytorch

    device = pytorch.device()
    source, target, bandwidths = sets(*size)
    source, target = (torch.from_numpy(x).to(device) for x in (source, target))
    source.requires_grad_(), target.requires_grad_()

    def run():
        value = loss(source, target, bandwidths, xp=torch)
        return value.detach(), *torch.autograd.grad(value, (source, target))

    return pytorch.waited_for(run)


def peak_of(build, loss, size) -> float:
    """GB of a process that builds and runs it, libraries (about 0.3) included.

    On a GPU: of its memory, beyond what is there before.
    """
    before = on_device()
    jax.block_until_ready(build(loss, size)())
    return peak_memory() if jax.default_backend() == "cpu" else on_device() - before


def on_device() -> float:
    """GB that were held at once on a GPU so far, by JAX or by PyTorch."""
    if jax.default_backend() == "cpu":
        return 0.0
    held = jax.devices()[0].memory_stats()["peak_bytes_in_use"]
    if "torch" in sys.modules:
        held += sys.modules["torch"].cuda.max_memory_allocated()
    return held / 1e9


def candidates(size) -> dict:
    """What can run at a size: (builder, form) by name."""
    n, m, features = size
    found = {"losses.mmd": (compiled, library), "Gram": (compiled, gram)}
    if (n + m) ** 2 * features <= BROADCAST_LIMIT:
        found["broadcast"] = (compiled, broadcast)
    if HAS_TORCH:
        found["Gram, PyTorch"] = (by_torch, gram)
        if "broadcast" in found:
            found["broadcast, PyTorch"] = (by_torch, broadcast)
    return found


def exact(source, target, bandwidths) -> float:
    """The discrepancy in float64, a block of rows at a time."""
    source, target = source.astype(np.float64), target.astype(np.float64)

    def mean(a, b):
        total = 0.0
        for start in range(0, len(a), 1024):
            rows = a[start : start + 1024]
            distances = (rows**2).sum(1)[:, None] + (b**2).sum(1) - 2.0 * rows @ b.T
            total += sum(np.exp(-distances / band).sum() for band in bandwidths)
        return total / len(a) / len(b)

    return mean(source, source) + mean(target, target) - 2.0 * mean(source, target)


def relative_error(loss, size) -> float:
    """Of the value in float32."""
    source, target, bandwidths = sets(*size)
    value = float(jax.jit(lambda s, t: loss(s, t, tuple(bandwidths)))(source, target))
    reference = exact(source, target, bandwidths)
    return abs(value - reference) / reference


def limit(size) -> float:
    """Seconds that the products and exponentials of a size alone would take here.

    2 d FLOP and one exponential a kernel for every pair of rows, those within a set
    counted once for both orders, and twice those products again for the gradient.
    """
    n, m, features = size
    pairs = n * (n + 1) / 2 + m * (m + 1) / 2 + n * m
    flops, exponentials = rates()
    return pairs * (6.0 * features / flops + len(RATIOS) / exponentials)


@functools.cache
def rates() -> tuple[float, float]:
    """FLOP of products in float32 and exponentials, a second."""
    square = jnp.ones((2048, 2048), jnp.float32)
    product = jax.jit(functools.partial(jnp.matmul, precision="highest"))
    flops = 2.0 * 2048**3 / fastest(product, square, square)
    # Several of a number, as in the loss: those of one wait for a GPU's memory.
    numbers = jnp.linspace(-1.0, 0.0, 1 << 26, dtype=jnp.float32)
    kernels = jax.jit(lambda x: sum(jnp.exp(x / ratio) for ratio in RATIOS))
    return flops, len(RATIOS) * numbers.size / fastest(kernels, numbers)


def fastest(run, *arguments) -> float:
    """Least of ten times, in seconds."""
    jax.block_until_ready(run(*arguments))
    times = []
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Measure and report."""
    options = parser_of(__doc__).parse_args()
    if HAS_TORCH:
        from benchmarks import pytorch

        pytorch.set_precision("float32")
    seconds, ratio, best = {}, {}, {}
    for size in SMALL + LARGE:
        name = name_of(size)
        calls = {
            key: make(form, size) for key, (make, form) in candidates(size).items()
        }
        times = interleave(calls, rounds=30 if size in SMALL else 3)
        seconds |= {f"{name}: {key}": value for key, value in times.items()}
        ratio[name] = {key: times["losses.mmd"] / value for key, value in times.items()}
        print(name, ratio[name], flush=True)
        if size in LARGE:
            best[name] = limit(size) / times["losses.mmd"]
    name = name_of(HUGE)
    seconds[f"{name}: losses.mmd"] = fastest_of_one(compiled(library, HUGE))
    best[name] = limit(HUGE) / seconds[f"{name}: losses.mmd"]
    print("timed; memory and errors follow", flush=True)
    memory = {
        name_of(size): {
            key: in_fresh_process(peak_of, *call, size)
            for key, call in candidates(size).items()
        }
        for size in LARGE
    }
    memory[name] = {"losses.mmd": in_fresh_process(peak_of, compiled, library, HUGE)}
    errors = {
        key: relative_error(form, (4096, 4096, 79))
        for key, form in (("losses.mmd", library), ("Gram", gram))
    }
    report(
        "value and gradient of the maximum mean discrepancy, n x m x features",
        seconds,
        seconds_of_losses_mmd_to_those_of=ratio,
        peak_memory_gb=memory,
        fraction_of_the_limit=best,
        relative_error_in_float32=errors,
        torch=importlib.metadata.version("torch") if HAS_TORCH else None,
        json_file=options.json,
    )


def name_of(size: tuple[int, int, int]) -> str:
    return " x ".join(map(str, size))


def fastest_of_one(run) -> float:
    """One time, of the second call: the first compiles."""
    jax.block_until_ready(run())
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
