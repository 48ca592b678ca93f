"""What does every loss cost at training size, beside its peer in PyTorch?

``python -m benchmarks.losses [--only WORDS] [--memory] [--fresh] [--rounds N]
[--precision NAME] [--json FILE] [--table FILE]``: value and gradient, compiled, of
batches of 256 with 1,000 classes, embeddings of 512 and maps of 32 x 32 x 64. Both get
the same numbers and must return the same value. Needs PyTorch (``pip install torch``).
``--memory`` adds what each holds beside its inputs: of the compiled program here, by
the profiler for the peer. Both run with `jaxtransfer.parallel.keep_host_memory`, unless
``--fresh`` is given. On a GPU some rows at a time are compiled, by as many threads as
there are cores, and then timed. The files are written anew after every row, so a run
that is stopped leaves what it has; a row that fails, for want of memory perhaps, is
named at the end, and the others are measured.
"""

import concurrent.futures
import importlib
import itertools
import json
import os
import pkgutil
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

from benchmarks import peers, pytorch
from benchmarks.common import interleave, parser_of
from jaxtransfer import parallel


def rows() -> dict[str, peers.Row]:
    """All comparisons, in the order of the families' names."""
    found: dict[str, peers.Row] = {}
    for module in pkgutil.iter_modules(peers.__path__):
        found |= importlib.import_module(f"{peers.__name__}.{module.name}").ROWS
    return found


def in_jax(row: peers.Row):
    """The library's value and gradient as a call."""
    inputs = jax.tree.map(jax.numpy.asarray, row.inputs)
    run = jax.jit(jax.value_and_grad(row.loss, row.wrt))
    return lambda: run(*inputs)


def in_torch(row: peers.Row):
    """The peer's value and gradient as a call."""

    def tensor(array):
        array = np.moveaxis(array, -1, 1) if np.ndim(array) == 4 else array
        array = np.ascontiguousarray(array)
        # PyTorch indexes by long only.
        integral = np.issubdtype(array.dtype, np.integer)
        array = array.astype(np.int64) if integral else array
        return torch.from_numpy(array).to(pytorch.device())

    inputs = jax.tree.map(tensor, row.inputs)
    wrt = [inputs[i] for i in row.wrt]
    for leaf in jax.tree.leaves(wrt):
        leaf.requires_grad_()

    def run():
        value = row.peer(*inputs)
        return value.detach(), *torch.autograd.grad(value, jax.tree.leaves(wrt))

    return pytorch.waited_for(run)


def compiled_together(chosen: dict[str, peers.Row], name: str) -> dict[str, Any]:
    """The calls of a row and of those that follow it, compiled by many threads."""
    names, cores = list(chosen), os.cpu_count() or 1
    begin = names.index(name)
    calls = {n: in_jax(chosen[n]) for n in names[begin : begin + 2 * cores]}
    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(cores) as threads:
        # What one raises, it raises again when its row is measured.
        concurrent.futures.wait([threads.submit(run) for run in calls.values()])
    print(f"({len(calls)} compiled in {time.perf_counter() - start:.0f} s)", flush=True)
    return calls


def memory_of_jax(row: peers.Row) -> float:
    """MB that the compiled function holds beside its inputs: temporaries, results."""
    inputs = jax.tree.map(jax.numpy.asarray, row.inputs)
    program = jax.jit(jax.value_and_grad(row.loss, row.wrt)).lower(*inputs).compile()
    sizes = program.memory_analysis()
    return (sizes.temp_size_in_bytes + sizes.output_size_in_bytes) / 1e6


def memory_of_torch(run) -> float:
    """MB that a call holds at once beside its inputs, as PyTorch itself counts."""
    if pytorch.device().type != "cpu":
        return pytorch.megabytes_on_gpu(run)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        results = run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    del results
    changes = sorted(
        (event["ts"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]"
    )
    return max(itertools.accumulate(change for _, change in changes)) / 1e6


def measure(name: str, row: peers.Row, ours: Any, rounds: int, memory: bool) -> dict:
    """The entry of a row in the record.

    Raises:
        AssertionError: the two values differ.
    """
    theirs = in_torch(row)
    if row.rtol is not None:
        np.testing.assert_allclose(
            float(ours()[0]), float(theirs()[0]), rtol=row.rtol, err_msg=name
        )
    seconds = interleave({"jax": ours, "torch": theirs}, rounds=rounds)
    entry = {**seconds, "ratio": seconds["jax"] / seconds["torch"], "of": row.of}
    if memory:
        megabytes = memory_of_jax(row), memory_of_torch(theirs)
        entry["megabytes"] = dict(zip(seconds, megabytes, strict=True))
    return entry


def table(record: dict[str, dict]) -> str:
    """The rows of a record in Markdown, as in ``LOSSES.md``."""
    lines = [
        "| loss | ms here | ms PyTorch | ratio | MB here | MB PyTorch | form of |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, entry in record.items():
        milliseconds = [f"{1e3 * entry[key]:.2f}" for key in ("jax", "torch")]
        megabytes = [f"{value:.1f}" for value in entry.get("megabytes", {}).values()]
        cells = [name, *milliseconds, f"{entry['ratio']:.2f}", *(megabytes or ["", ""])]
        lines.append(f"| {' | '.join([*cells, entry['of']])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and report."""
    parser = parser_of(__doc__)
    parser.add_argument("--only", nargs="*", help="rows whose names hold one of these")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--fresh", action="store_true", help="memory is not kept")
    pytorch.add_precision(parser, "float32")
    parser.add_argument("--table", type=Path, help="write the table to this file")
    options = parser.parse_args()
    kept = not options.fresh and parallel.keep_host_memory()
    precision = pytorch.set_precision(options.precision)
    chosen = {
        name: row
        for name, row in rows().items()
        if not options.only or any(word in name for word in options.only)
    }
    if not chosen:
        parser.error(f"--only: no row of that name; there are {sorted(rows())}")
    facts = {
        "jax": jax.__version__,
        "torch": torch.__version__,
        "device": jax.devices()[0].device_kind,
        "precision": precision,
        "cores": os.cpu_count(),
        "memory kept": kept,
    }
    on_cpu = pytorch.device().type == "cpu"
    compiled, record, failed = {}, {}, []
    print(f"{'loss':<40} {'jax ms':>9} {'torch ms':>9} {'ratio':>6}  of")
    for name, row in chosen.items():
        if not on_cpu and name not in compiled:
            compiled = compiled_together(chosen, name)
        # On a CPU one by one: many programs would disturb its caches.
        ours = in_jax(row) if on_cpu else compiled.pop(name)
        try:
            entry = measure(name, row, ours, options.rounds, options.memory)
        except Exception as error:
            failed.append(name)
            print(f"{name}: {error!r}", flush=True)
            continue
        record[name] = entry
        milliseconds = [1e3 * entry[key] for key in ("jax", "torch")]
        print(
            f"{name:<40} {milliseconds[0]:9.2f} {milliseconds[1]:9.2f} "
            f"{entry['ratio']:6.2f}  {entry['of']} {entry.get('megabytes', '')}",
            flush=True,
        )
        if options.table is not None:
            options.table.write_text(table(record))
        if options.json is not None:
            options.json.write_text(json.dumps({**facts, "losses": record}, indent=2))
    slow = [name for name, entry in record.items() if entry["ratio"] > 1.1]
    print(f"{len(record)} losses, {len(slow)} slower than 1.1: {', '.join(slow)}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
