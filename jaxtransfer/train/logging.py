"""Where the figures of a run go: metrics.jsonl, TensorBoard, the screen."""

import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read a ``metrics.jsonl``; a last line cut short by a kill is left out.

    Args:
        path: the file, or the run folder that holds it.

    Returns:
        A dict a line: ``step``, ``time`` (seconds since 1970) and values by name;
        ``None`` stands for a value that is not finite.
    """
    path = pathlib.Path(path)
    path = path / "metrics.jsonl" if path.is_dir() else path
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def describe(values: Mapping[str, float]) -> str:
    """Write metrics on one line.

    Example:
        >>> describe({"loss": 0.123456, "accuracy": 0.9})
        'loss 0.1235  accuracy 0.9'
    """
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


class MetricsWriter:
    """Append records to ``metrics.jsonl`` and, when installed, to TensorBoard.

    A run that goes on drops the records after the step it goes on from: it is going
    to write them again. A fresh run in a folder with records of another moves these
    to ``metrics.jsonl.1`` (``.2``, …).

    Args:
        folder: the run folder; exists.
        start: number of updates done.
        resumed: whether this run goes on from a checkpoint.
    """

    def __init__(self, folder: pathlib.Path, *, start: int, resumed: bool):
        path = folder / "metrics.jsonl"
        records = read_metrics(path) if path.exists() else []
        if resumed and records:
            kept = [record for record in records if record["step"] <= start]
            partial = path.with_suffix(".jsonl.partial")
            partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
            os.replace(partial, path)
        elif any(record["step"] > start for record in records):
            number = 1
            while (moved := path.with_suffix(f".jsonl.{number}")).exists():
                number += 1
            os.replace(path, moved)
        self._file = path.open("a")
        self._board = None
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            return
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Write one record; names become ``kind/name``."""
        named = {f"{kind}/{name}": value for name, value in values.items()}
        finite = {
            name: value if math.isfinite(value) else None
            for name, value in named.items()
        }
        record = {"step": step, "time": time.time(), **finite}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in named.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


class _Rate(ProgressColumn):
    def __init__(self, start: int):
        super().__init__()
        self._start = start

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if speed is None and task.elapsed:  # a run of fewer than two of its samples
            speed = (task.completed - self._start) / task.elapsed
        return Text("" if speed is None else f"{speed:,.1f} steps/s", "cyan")


class Display:
    """A progress bar on a terminal, plain lines elsewhere, nothing when off.

    Args:
        steps: where the run ends.
        start: where it starts.
        show: whether to show anything.
    """

    def __init__(self, *, steps: int, start: int, show: bool):
        self._show, self._steps, self._start = show, steps, start
        self._began = self._drawn = time.monotonic()
        self._texts: dict[str, str] = {}
        self._bar = None
        console = Console(file=sys.stderr)
        if show and console.is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                _Rate(start),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=console,
                transient=False,
            )
            self._task = self._bar.add_task("", total=steps, completed=start)
            self._bar.start()

    def advance(self, step: int) -> None:
        """Move the bar, at most ten times a second."""
        if self._bar is None:
            return
        now = time.monotonic()
        if now - self._drawn > 0.1 or step == self._steps:
            self._drawn = now
            self._bar.update(self._task, completed=step)

    def metrics(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Show the last metrics."""
        self._texts[kind] = describe(values)
        if self._bar is not None:
            self._bar.update(self._task, description="  ".join(self._texts.values()))
        elif self._show:
            rate = (step - self._start) / max(time.monotonic() - self._began, 1e-9)
            left = (self._steps - step) / max(rate, 1e-9)
            print(
                f"step {step}/{self._steps}  {kind}  {describe(values)}  "
                f"({rate:,.1f} steps/s, {left:,.0f} s left)",
                file=sys.stderr,
                flush=True,
            )

    def say(self, message: str) -> None:
        """Print a line for the person at the screen."""
        if self._bar is not None:
            self._bar.console.print(message, highlight=False, markup=False)
        elif self._show:
            print(message, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()


__all__ = ["Display", "MetricsWriter", "describe", "read_metrics"]
