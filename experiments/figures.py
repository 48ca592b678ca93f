"""Figures: learning curves with intervals, and features of two domains in the plane."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import threadpoolctl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.manifold import TSNE

from experiments.common import interval

BASELINE = "#8a8a8a"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


class Result(NamedTuple):
    """One method: test accuracy in per cent, at the end and on the way.

    Attributes:
        task: what is solved.
        method: how.
        accuracy: ``[seeds]``.
        baseline: method to compare with.
        steps: where the curve was measured, ``[records]``.
        curve: ``[seeds, records]``.
        params: what was learned, with a leading axis of seeds.
    """

    task: str
    method: str
    accuracy: np.ndarray
    baseline: str | None = None
    steps: np.ndarray | None = None
    curve: np.ndarray | None = None
    params: Any = None


def curves(axes: Axes, title: str, results: Sequence[Result], xlabel: str) -> None:
    """Mean over seeds with its 95 % interval; baselines are grey and dashed."""
    colours = iter(COLOURS)
    lowest, last = 100.0, 0
    for result in results:
        if result.curve is None or result.steps is None:
            continue
        mean, width = np.transpose([interval(column) for column in result.curve.T])
        low, high = mean - np.nan_to_num(width), mean + np.nan_to_num(width)
        honest = result.baseline is None
        colour = BASELINE if honest else next(colours)
        dash = (0, (4, 2)) if honest else "-"
        axes.plot(result.steps, mean, color=colour, linestyle=dash, label=result.method)
        axes.fill_between(result.steps, low, high, color=colour, alpha=0.15, lw=0)
        lowest = min(lowest, low[len(low) // 5 :].min() - 8)
        last = result.steps[-1]
    axes.set(title=title, xlabel=xlabel, ylabel="test accuracy %")
    axes.set_ylim(max(lowest, 0), 100.5)
    axes.set_xlim(0, last)
    axes.legend(loc="lower right")


def bars(axes: Axes, title: str, values: Mapping[str, np.ndarray]) -> None:
    """One bar a method, the first in grey, with intervals and every seed as a dot."""
    for place, (label, accuracy) in enumerate(values.items()):
        mean, width = interval(accuracy)
        colour = COLOURS[place - 1] if place else BASELINE
        axes.bar(place, mean, 0.6, color=colour, alpha=0.35, label=label)
        axes.errorbar(place, mean, np.nan_to_num(width), color=colour, capsize=5)
        spread = np.linspace(-0.15, 0.15, len(accuracy))
        axes.plot(place + spread, accuracy, "o", ms=3.5, color=colour)
    lowest = min(np.min(accuracy) for accuracy in values.values())
    axes.set(title=title, ylabel="test accuracy %", ylim=(max(lowest - 8, 0), 100.5))
    axes.set_xticks(range(len(values)), values)
    axes.grid(False, axis="x")


def plane(
    axes: Axes,
    title: str,
    source: np.ndarray,
    source_labels: np.ndarray,
    target: np.ndarray,
    target_labels: np.ndarray,
) -> None:
    """Features ``[n, features]`` of two domains, t-SNE of both together."""
    both = np.concatenate([source, target])
    both = (both - both.mean(0)) / (both.std(0) + 1e-6)
    with threadpoolctl.threadpool_limits(1):  # many threads stall on a busy machine
        few = min(30.0, len(both) / 4)
        places = TSNE(2, perplexity=few, init="pca", random_state=0).fit_transform(both)
    first, second = places[: len(source)], places[len(source) :]
    colours = matplotlib.colormaps["tab10"]
    axes.scatter(
        *first.T, s=16, facecolors="none", edgecolors=colours(source_labels), lw=0.8
    )
    for digit in range(10):
        rows = target_labels == digit
        axes.scatter(
            *second[rows].T,
            s=34,
            marker=f"${digit}$",
            color=colours(digit),
            lw=0,
        )
    axes.set(title=title, xticks=[], yticks=[])
    axes.set_xlabel("○ source        1 2 3 target (colour and digit: true class)")
    axes.grid(False)


@contextlib.contextmanager
def panels(path: Path) -> Iterator[dict[str, Axes]]:
    """Four axes above three, ``a … g``; writes the PNG at the end."""
    with matplotlib.rc_context(STYLE):
        canvas = Figure(figsize=(15, 8.4), layout="constrained")
        yield canvas.subplot_mosaic("aaabbbcccddd;eeeeffffgggg")
        canvas.savefig(path, dpi=120)
