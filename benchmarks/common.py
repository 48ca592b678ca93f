"""Ratios in one run: candidates interleaved, medians, one JSON record."""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import platform
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax


def interleave(
    candidates: Mapping[str, Callable[[], Any]], *, rounds: int
) -> dict[str, float]:
    """Time candidates in turn, so that a noisy neighbour disturbs all alike.

    In every round they come in another order, and each runs untimed before it is timed,
    once or for a hundredth of a second, those of a tenth of a second and more excepted:
    what the one before left in the caches, and its threads, which spin for milliseconds
    after their work, are no part of its time.

    Args:
        candidates: what to run, by name; each is run once before, to compile.
        rounds: how often each is timed.

    Returns:
        Median seconds by name.
    """

    def seconds(run):
        start = time.perf_counter()
        jax.block_until_ready(run())
        return time.perf_counter() - start

    for run in candidates.values():
        seconds(run)
    quick = {name for name, run in candidates.items() if seconds(run) < 0.1}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    order, shuffled = list(candidates), random.Random(0)
    for _ in range(rounds):
        shuffled.shuffle(order)
        for name in order:
            if name in quick:
                begin = time.perf_counter()
                while True:
                    seconds(candidates[name])
                    if time.perf_counter() - begin > 0.01:
                        break
            times[name].append(seconds(candidates[name]))
    return {name: statistics.median(spent) for name, spent in times.items()}


def shards(count: int) -> int:
    """How many devices share ``count`` examples or tasks evenly, at most one a core."""
    cores = os.cpu_count() or 1
    return max(n for n in range(1, cores + 1) if count % n == 0)


def in_fresh_process(run: Callable[..., Any], *arguments: Any) -> Any:
    """What a call returns in a process of its own, whose memory only it has used.

    Args:
        run: a function of a module; it is imported there.
        *arguments: what it is called with.
    """
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as process:
        return process.submit(run, *arguments).result()


def peak_memory() -> float:
    """Largest resident size of this process so far, in GB."""
    status = Path("/proc/self/status")
    if status.exists():  # `getrusage` starts from what the parent process held
        peak = next(x for x in status.read_text().splitlines() if "VmHWM" in x)
        return int(peak.split()[1]) * 1024 / 1e9
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest * (1 if sys.platform == "darwin" else 1024) / 1e9


def parser_of(about: str | None) -> argparse.ArgumentParser:
    """A parser of what every benchmark takes, to be asked before anything is measured.

    Args:
        about: docstring of the benchmark, of which the first line is shown.
    """
    parser = argparse.ArgumentParser(description=(about or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the record to this file")
    return parser


def report(
    question: str, seconds: Mapping[str, float], *, json_file: Path | None, **facts: Any
) -> None:
    """Print medians and their ratios to the first, and write JSON if asked to.

    Args:
        question: what is asked, one line.
        seconds: medians by candidate; the first is the reference.
        json_file: where to.
        **facts: whatever else was measured or fixed.
    """
    reference = next(iter(seconds))
    record = {
        "question": question,
        "seconds": dict(seconds),
        "speed relative to " + reference: {
            name: seconds[reference] / value for name, value in seconds.items()
        },
        **facts,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "cores": os.cpu_count(),
    }
    print(question)
    for name, value in seconds.items():
        print(f"  {name:<32} {value:9.4f} s   {seconds[reference] / value:6.2f} x")
    for name, value in facts.items():
        print(f"  {name}: {value}")
    if json_file is not None:
        json_file.write_text(json.dumps(record, indent=2) + "\n")
