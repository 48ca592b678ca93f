"""What every study shares: the command line, the run folder, intervals, tables."""

import argparse
import dataclasses
import datetime
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import rich
import rich.console
import rich.progress
import rich.table
import scipy.stats
import tyro

from jaxtransfer import parallel

Config = TypeVar("Config", bound="StudyConfig")


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """Options that every study has."""

    data_dir: str | None = None
    """Folder of prepared data (several joined by the system's path separator). Default:
    the environment variable JAXTRANSFER_DATA_DIR."""
    run_dir: Path = Path("runs")
    """Where results go: RUN_DIR/STUDY/TIME/."""
    seed: int = 0
    """Root PRNG seed; the same seed prints the same table, on the same kind of machine
    with as many cores."""
    seeds: int = 3
    """Number of repetitions; the interval is over them."""


def command_line(
    main: Callable[[Config], Any],
    presets: Mapping[str, Config],
    *,
    default: str = "cpu",
    args: Sequence[str] | None = None,
) -> Any:
    """Run a study from the command line; memory that it frees is kept.

    Args:
        main: the study, a function of its configuration.
        presets: configuration by name: ``smoke`` (a trial run), ``cpu`` (minutes on two
            cores), ``paper`` (the published set-up, for a GPU).
        default: name of the preset without ``--preset``.
        args: arguments; those of the process if None.

    Returns:
        What ``main`` returns.
    """
    parallel.keep_host_memory()
    given = list(sys.argv[1:] if args is None else args)
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--preset", choices=sorted(presets), default=default)
    chosen, rest = first.parse_known_args(given)
    names = "|".join(presets)
    about = (sys.modules[main.__module__].__doc__ or "").strip()
    config = tyro.cli(
        type(presets[chosen.preset]),
        default=presets[chosen.preset],
        description=f"{about}\n\n--preset {names} (default {default}) chooses the "
        f"defaults below; shown: {chosen.preset}.",
        args=rest,
    )
    return main(config)


_POSITIVE = frozenset(
    """batch beams block class cohort depth drawings every filters images queries rate
    rates report seeds shots size steps tasks temperature tokens updates
    vocabulary width widths workers""".split()
)
"""Last words of the names of options that are greater than 0 in every study."""


_PARTS = frozenset("also labels per_class test_shots".split())
"""Names of options that list what has rows of its own, as all lists of names do."""


def check_options(config: Any, *, within: str = "") -> None:
    """Refuse what can be told from the options alone.

    Raises:
        ValueError: a count or size is below 1, a rate or temperature not above 0 and
            finite, a number not a number, a part listed twice, or the seed not one of
            32 bits.
    """
    for field in dataclasses.fields(config):
        name, given = within + field.name, getattr(config, field.name)
        if dataclasses.is_dataclass(given):
            check_options(given, within=f"{name}.")
            continue
        values = given if isinstance(given, tuple) else (given,)
        for number, value in enumerate(values):
            if isinstance(value, float) and math.isnan(value):
                raise ValueError(f"{name}: must be a number, got {value}")
            part = isinstance(value, str) or field.name in _PARTS
            if part and value in values[:number]:
                raise ValueError(f"{name}: {value!r} is there twice; give each once")
            if field.name.split("_")[-1] not in _POSITIVE:
                continue
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name}: {value} must be 1 or more")
            if isinstance(value, float) and not 0 < value < math.inf:
                raise ValueError(f"{name}: {value} must be greater than 0 and finite")
    if isinstance(config, StudyConfig) and not 0 <= config.seed < 2**32:
        raise ValueError(f"seed: 0 to {2**32 - 1}, got {config.seed}")


def start_run(name: str, config: StudyConfig) -> Path:
    """Make the run folder and write down what the run is: options, versions, device.

    Raises:
        OSError: the folder can't be written (before any work is done).
        ValueError: see :func:`check_options`.
    """
    check_options(config)
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    folder = config.run_dir / name / stamp
    try:
        folder.mkdir(parents=True)
        about = {
            "study": name,
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "config": dataclasses.asdict(config),
            "jax": jax.__version__,
            "python": platform.python_version(),
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "git": _commit(),
        }
        text = json.dumps(about, indent=2, default=str)
        (folder / "config.json").write_text(text + "\n")
    except OSError as error:
        raise OSError(
            f"run_dir: {folder} can't be written ({error.strerror}); "
            "choose another place with --run-dir"
        ) from error
    return folder


def keep(folder: Path, file: str, **values: Any) -> None:
    """Add a line of JSON to a file of the run: a study that is stopped loses nothing.

    Args:
        folder: the run folder.
        file: its name, ``"values.jsonl"``.
        values: what is kept.
    """
    with (folder / file).open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(values, ensure_ascii=False) + "\n")


def kept(
    folders: Iterable[Path], file: str, config: StudyConfig, *, free: Iterable[str] = ()
) -> list[dict[str, Any]]:
    """What earlier runs of the same options kept in a file.

    Args:
        folders: their run folders.
        file: as in :func:`keep`.
        config: the options of this run.
        free: names of options that may differ, beside those of the places of files.

    Returns:
        The lines, in the order of the folders; a last one that was cut off is left out.

    Raises:
        FileNotFoundError: a folder is not that of a run.
        ValueError: it had other options, or a file is damaged.
    """
    own = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    free = {"run_dir", "data_dir", "earlier", *free}
    lines = []
    for folder in folders:
        before = options_of(folder)
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"earlier: {folder} has no {file}; give the folder of a run of this "
                "study, RUN_DIR/STUDY/TIME"
            )
        for name in sorted(own.keys() & before.keys() - free):
            if own[name] != before[name]:
                raise ValueError(
                    f"earlier: {folder} was run with {name} = {before[name]}, this run "
                    f"has {own[name]}; give the same options, or leave it out"
                )
        lines += _whole_lines(folder / file)
    return lines


def options_of(folder: Path) -> dict[str, Any]:
    """The options of an earlier run.

    Raises:
        FileNotFoundError: the folder is not that of a run.
        ValueError: what it says of itself is damaged.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"earlier: {folder} has no config.json; give the folder of a run of this "
            "study, RUN_DIR/STUDY/TIME"
        )
    try:
        return dict(json.loads(file.read_text())["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"earlier: {file} is damaged ({error!r}); leave the folder out"
        ) from error


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of :func:`keep`, without a last one that a kill cut off."""
    lines = path.read_bytes().split(b"\n")  # not splitlines: a value may hold U+2028
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError("no object")
            found.append(value)
        except ValueError as error:
            if number == len(lines):  # it lacks its end, or is what follows the end
                break
            raise ValueError(
                f"earlier: line {number} of {path} is damaged ({error}); remove the "
                "line to train that again, or leave the folder out"
            ) from error
    return found


def find(
    option: str,
    name: str,
    config: StudyConfig,
    *,
    under: str = "",
    folder: bool = False,
) -> Path:
    """A file or folder that an option names: a path, or one below --data-dir.

    Args:
        option: name of the option, for the error.
        name: what was given.
        config: the options.
        under: where it lies in a folder of --data-dir.
        folder: whether it is one, not a file.

    Raises:
        FileNotFoundError: it is nowhere.
    """
    given = config.data_dir or os.environ.get("JAXTRANSFER_DATA_DIR", "")
    folders = list(filter(None, given.split(os.pathsep)))
    places = [Path(name), *(Path(part, under, name) for part in folders)]
    for place in places:
        found = place.expanduser()
        if name and (found.is_dir() if folder else found.is_file()):
            return found
    below = f"under {under}/ of" if under else "in"
    raise FileNotFoundError(
        f"{option}: no {'folder' if folder else 'file'} {name!r}, nor {below} "
        f"{folders}; give its path with "
        f"--{option.replace('_', '-')}, or the folder above with --data-dir"
    )


def check_finite(row: str, losses: Any, updates: int) -> None:
    """Stop a study whose network diverged.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    if not np.isfinite(losses).all():
        raise FloatingPointError(
            f"{row}: the loss is not finite after {updates} updates; take a smaller "
            "--learning-rate, or weights and temperatures nearer to their defaults"
        )


def _commit() -> str | None:
    try:
        return subprocess.run(
            ["git", "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parent,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def interval(values: Any) -> tuple[float, float]:
    """Mean and half-width of the 95 % interval (Student's t) over repetitions.

    Example:
        >>> [round(x, 3) for x in interval([1.0, 2.0, 3.0])]
        [2.0, 2.484]
    """
    values = np.asarray(values, np.float64)
    if values.size < 2:
        return float(values.mean()), float("nan")
    width = scipy.stats.t.ppf(0.975, values.size - 1) * scipy.stats.sem(values)
    return float(values.mean()), float(width)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a results table.

    Attributes:
        task: what is solved (``"MNIST → USPS"``).
        method: how.
        values: the measure for each seed, last epoch.
        baseline: method whose row (same task) is the honest comparison; or several.
    """

    task: str
    method: str
    values: Sequence[float]
    baseline: str | tuple[str, ...] | None = None

    @property
    def baselines(self) -> tuple[str, ...]:
        """None, one or several."""
        if self.baseline is None:
            return ()
        return (self.baseline,) if isinstance(self.baseline, str) else self.baseline


def differences(
    row: Row, rows: Iterable[Row], *, lower_is_better: bool = False
) -> dict[str, tuple[float, float]]:
    """Mean and 95 % half-width of row's gains over its baselines there, paired.

    A gain is row minus baseline, or of an error baseline minus row.
    """
    there = {other.method: other for other in rows if other.task == row.task}

    def gain(baseline: Row) -> tuple[float, float]:
        better, worse = (baseline, row) if lower_is_better else (row, baseline)
        return interval(np.subtract(better.values, worse.values))

    return {name: gain(there[name]) for name in row.baselines if name in there}


def show(
    title: str,
    rows: Sequence[Row],
    folder: Path,
    *,
    unit: str = "accuracy %",
    digits: int = 2,
    lower_is_better: bool = False,
    started: float | None = None,
) -> None:
    """Print the table, write it as Markdown and JSON, and print the summary line.

    Args:
        title: heading.
        rows: the lines.
        folder: the run folder; ``table.md`` and ``results.json`` go there.
        unit: name of the measured column.
        digits: decimals.
        lower_is_better: what is measured is an error: a gain is what it is less by.
        started: ``time.perf_counter()`` at the start, for the minutes spent.
    """

    def pm(pair: tuple[float, float]) -> str:
        """Of one seed there is no interval."""
        middle, width = (f"{number:.{digits}f}" for number in pair)
        return middle if np.isnan(pair[1]) else f"{middle} ± {width}"

    heads = ["task", "method", f"{unit}: mean ± 95 %", "baseline", "gain over it"]
    lines = []
    for row in rows:
        gains = differences(row, rows, lower_is_better=lower_is_better)
        cells = (
            pm(interval(row.values)),
            "; ".join(gains),
            "; ".join(map(pm, gains.values())),
        )
        lines.append([row.task, row.method, *cells])
    table = rich.table.Table(*heads, title=title)
    for line in lines:
        table.add_row(*line)
    console = rich.console.Console(width=None if sys.stdout.isatty() else 110)
    console.print(table)
    markdown = [heads, ["---"] * len(heads), *lines]
    (folder / "table.md").write_text(
        "\n".join("| " + " | ".join(line) + " |" for line in markdown) + "\n"
    )
    minutes = None if started is None else (time.perf_counter() - started) / 60
    record = {
        "title": title,
        "unit": unit,
        "minutes": minutes,
        "rows": [
            dataclasses.asdict(row) | {"values": [float(v) for v in row.values]}
            for row in rows
        ],
    }
    (folder / "results.json").write_text(json.dumps(record, indent=2) + "\n")
    spent = "" if minutes is None else f" in {minutes:.1f} min"
    print(f"{title}: {len(rows)} rows{spent}; results in {folder}")


def progress() -> rich.progress.Progress:
    """A progress display with the remaining time, on standard error."""
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TimeRemainingColumn(),
        console=rich.console.Console(stderr=True),
    )
