"""What networks cost and how good they are: one table, one figure."""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.extend.core import Jaxpr, jaxpr_as_fun, jaxprs_in_params

from jaxtransfer import tree
from jaxtransfer.typing import Inputs, Model, Output, Variables


@dataclasses.dataclass(frozen=True)
class Measured:
    """One network, measured.

    Attributes:
        name: what it is called.
        parameters: numbers in ``params``; scales of an integer network among them.
        nonzero: those that are not zero.
        flops: operations of one forward pass of one example, as XLA counts them in the
            program before it is optimised, the same on every device. Operations of
            integers count alike, and zeros are not left out. Those of a loop count for
            every trip of a ``jax.lax.scan``, once of a ``jax.lax.while_loop``, whose
            trips are not known.
        bytes: of ``params`` and ``model_state`` as they are, in their types.
        packed_bytes: the same with zeros left out: an array takes a bit for each number
            and the numbers that are not zero, or all of them where that is less.
        milliseconds: of a forward pass of the batch given, the median.
        score: accuracy or what was asked for, None if nothing was.
    """

    name: str
    parameters: int
    nonzero: int
    flops: float
    bytes: int
    packed_bytes: int
    milliseconds: float
    score: float | None = None


def measure(
    name: str,
    model: Model,
    variables: Variables,
    inputs: Inputs,
    *,
    score: float | Callable[[Callable[[Inputs], Output]], float] | None = None,
    repeats: int = 30,
    warmup: int = 3,
) -> Measured:
    """Measure a network on this device, in evaluation mode.

    Args:
        name: what it is called.
        model: the network; :attr:`~jaxtransfer.compress.Quantized.integer` for one of
            integers.
        variables: its variables.
        inputs: a batch, of the size whose latency is wanted; zeros for
            ``jax.ShapeDtypeStruct``.
        score: how good it is, or a function that finds out from the compiled network,
            ``(inputs -> outputs) -> number``.
        repeats: timed passes.
        warmup: passes before them.

    Returns:
        The numbers.

    Raises:
        ValueError: ``repeats`` is below 1, or ``warmup`` below 0.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from jaxtransfer.model import from_linen
        >>> net, x = from_linen(nn.Dense(4, use_bias=False)), jnp.ones((8, 5))
        >>> found = measure("dense", net, net.init(jax.random.key(0), x), x, score=0.5)
        >>> found.parameters, found.flops, found.bytes
        (20, 40.0, 80)
    """
    if repeats < 1:
        raise ValueError(f"repeats: got {repeats}; at least one pass is timed")
    if warmup < 0:
        raise ValueError(f"warmup: got {warmup}; it must be 0 or more")

    @jax.jit
    def run(variables: Variables, inputs: Inputs) -> Output:
        return model.apply(variables, inputs)[0]

    variables = jax.tree.map(jax.numpy.asarray, variables)
    inputs = jax.tree.map(_array, inputs)
    traced = run.trace(variables, jax.tree.map(lambda x: x[:1], inputs))
    arrays = [_numbers(leaf) for leaf in jax.tree.leaves(variables)]
    params = [_numbers(leaf) for leaf in jax.tree.leaves(variables.params)]
    times = []
    for _ in range(warmup + repeats):
        started = time.perf_counter()
        jax.block_until_ready(run(variables, inputs))
        times.append(time.perf_counter() - started)
    return Measured(
        name=name,
        parameters=tree.size(params),
        nonzero=sum(int(np.count_nonzero(array)) for array in params),
        flops=_counted(traced.lower()) + _repeated(traced.jaxpr.jaxpr),
        bytes=sum(array.nbytes for array in arrays),
        packed_bytes=sum(map(_packed, arrays)),
        milliseconds=1e3 * statistics.median(times[warmup:]),
        score=score(lambda x: run(variables, x)) if callable(score) else score,
    )


def _array(given: Any) -> jax.Array:
    if isinstance(given, jax.ShapeDtypeStruct):
        return jax.numpy.zeros(given.shape, given.dtype)
    return jax.numpy.asarray(given)


def _numbers(leaf: jax.Array) -> np.ndarray:
    """An array's, or those that a random key is made of."""
    if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def _counted(lowered: Any) -> float:
    return float(lowered.cost_analysis().get("flops", 0.0))


def _repeated(jaxpr: Jaxpr) -> float:
    """Operations of the trips of scans that XLA leaves out: it counts a body once."""
    more = 0.0
    for equation in jaxpr.eqns:
        given = equation.params
        if equation.primitive.name == "scan":
            body, length = given["jaxpr"], given["length"]
            unroll = given["unroll"] or max(length, 1)  # 0 is all
            loops, rest = divmod(length, unroll)
            bodies = rest + (unroll if loops else 0)  # as many as the program has
            once = _counted(jax.jit(jaxpr_as_fun(body)).lower(*body.in_avals))
            more += (length - bodies) * once + length * _repeated(body.jaxpr)
        else:
            parts = [_repeated(inner) for inner in jaxprs_in_params(given)]
            # Of the branches of a condition XLA counts the largest.
            choose = max if equation.primitive.name == "cond" else sum
            more += choose(parts) if parts else 0.0
    return more


def _packed(array: np.ndarray) -> int:
    marks = -(-array.size // 8)
    return min(array.nbytes, marks + int(np.count_nonzero(array)) * array.itemsize)


def table(rows: Sequence[Measured], *, score: str = "accuracy %") -> str:
    """Networks side by side, in Markdown.

    Args:
        rows: one line each, the first the one to compare with (the teacher).
        score: name of the score.

    Returns:
        The table. ``packed`` and ``smaller`` are the bytes with zeros left out, and how
        many times those of the first are more.

    Raises:
        ValueError: there is none.

    Example:
        >>> large = Measured("teacher", 2000, 2000, 4e6, 8192, 8192, 3.0, 91.7)
        >>> small = Measured("student", 500, 250, 1e6, 2048, 1024, 1.0, 90.0)
        >>> print(table([large, small]))
        | network | parameters | nonzero | MFLOPs | KiB | packed | smaller |   ms | accuracy % |
        | ------- | ---------: | ------: | -----: | --: | -----: | ------: | ---: | ---------: |
        | teacher |      2,000 |   2,000 |   4.00 | 8.0 |    8.0 |    1.0x | 3.00 |      91.70 |
        | student |        500 |     250 |   1.00 | 2.0 |    1.0 |    8.0x | 1.00 |      90.00 |
    """  # noqa: E501
    if not rows:
        raise ValueError("rows: there is nothing to show")
    scored = any(row.score is not None for row in rows)
    heads = ["network", "parameters", "nonzero", "MFLOPs", "KiB", "packed", "smaller"]
    lines = [[*heads, "ms", *([_cell(score)] if scored else [])]]
    for row in rows:
        lines.append(
            [
                _cell(row.name),
                f"{row.parameters:,}",
                f"{row.nonzero:,}",
                f"{row.flops / 1e6:.2f}",
                f"{row.bytes / 1024:.1f}",
                f"{row.packed_bytes / 1024:.1f}",
                f"{rows[0].packed_bytes / max(row.packed_bytes, 1):.1f}x",
                f"{row.milliseconds:.2f}",
            ]
        )
        if scored:
            lines[-1].append("" if row.score is None else f"{row.score:.2f}")
    wide = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    dashes = ["-" * wide[0], *("-" * (width - 1) + ":" for width in wide[1:])]
    lines.insert(1, dashes)
    return "\n".join(
        "| "
        + " | ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, wide, strict=True))
        )
        + " |"
        for line in lines
    )


def _cell(name: str) -> str:
    """A name that neither ends a cell nor a line of Markdown."""
    return " ".join(name.splitlines()).replace("|", r"\|")


Cost = Literal["packed_bytes", "bytes", "flops", "milliseconds", "parameters"]
_AXES: dict[str, tuple[str, float]] = {
    "packed_bytes": ("KiB, zeros left out", 1024),
    "bytes": ("KiB", 1024),
    "flops": ("MFLOPs of an example", 1e6),
    "milliseconds": ("ms of a batch", 1),
    "parameters": ("parameters", 1),
}


def figure(
    rows: Sequence[Measured],
    path: str | os.PathLike[str],
    *,
    against: Cost = "packed_bytes",
    score: str = "accuracy %",
) -> None:
    """Draw score against cost, a point for each network.

    Args:
        rows: networks that have a score.
        path: file to write; its ending says which kind.
        against: what is on the other axis, logarithmic.
        score: name of the score.

    Raises:
        ImportError: matplotlib is not there.
        ValueError: an unknown cost, no networks, or one without a score or with a cost
            that is not positive.

    Example:
        >>> import pathlib, tempfile
        >>> point = Measured("student", 500, 250, 1e6, 2048, 1024, 1.0, 90.0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "report.png")
        ...     figure([point], file)
        ...     file.stat().st_size > 0
        True
    """
    if against not in _AXES:
        raise ValueError(f"against: got {against!r}; choose among {sorted(_AXES)}")
    if not rows:
        raise ValueError("rows: there is nothing to draw")
    without = [row.name for row in rows if row.score is None]
    if without:
        raise ValueError(f"rows: no score of {without}; measure(..., score=) gives it")
    free = [row.name for row in rows if not getattr(row, against) > 0]
    if free:
        raise ValueError(
            f"rows: {against} of {free} is not positive and has no place on a "
            "logarithmic axis; leave them out or choose another against"
        )
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
    except ImportError as error:
        raise ImportError(
            "compress.figure needs the package matplotlib; run: python -m pip install "
            "'jaxtransfer[experiments]'"
        ) from error
    label, unit = _AXES[against]
    canvas = Figure(figsize=(7, 4.2), layout="constrained")
    axes = canvas.subplots()
    points = [
        axes.plot(
            getattr(row, against) / unit,
            row.score or 0.0,
            "o",
            ms=8,
            color=f"C{number % 10}",
            label=row.name,
        )[0]
        for number, row in enumerate(rows)
    ]
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel=label, ylabel=score)
    axes.grid(color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    legend = canvas.legend(
        points,
        ["name"] * len(rows),
        loc="outside right upper",
        frameon=False,
        fontsize=8,
    )
    # Written afterwards: a label that begins with "_" is left out, and "$" is TeX.
    for text, row in zip(legend.get_texts(), rows, strict=True):
        text.set(text=row.name, parse_math=False)
    canvas.savefig(path, dpi=120)


__all__ = ["Cost", "Measured", "figure", "measure", "table"]
