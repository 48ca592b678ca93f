"""The host loop: batches in, updates out, and nothing lost when it is stopped."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer.processes import together
from jaxtransfer.train import metrics as metrics_lib
from jaxtransfer.train.checkpoint import Checkpointer
from jaxtransfer.train.folders import check_folder
from jaxtransfer.train.logging import Display, MetricsWriter, read_metrics
from jaxtransfer.train.record import checksum, leaves_of
from jaxtransfer.train.state import TrainState
from jaxtransfer.train.stopping import stop_signals, stopping
from jaxtransfer.typing import Mean, Step

_CHECK_EVERY = 100  # the most updates between two looks at the loss


class NonFiniteLossError(FloatingPointError):
    """The loss (or a parameter) became infinite or not a number.

    Attributes:
        step: the first update whose loss was not finite.
        checkpoint: step of the last good checkpoint; ``None`` if there is none.
    """

    def __init__(self, message: str, *, step: int, checkpoint: int | None):
        super().__init__(message)
        self.step, self.checkpoint = step, checkpoint


@dataclasses.dataclass
class History:
    """What a run leaves behind.

    Attributes:
        train: a dict a record: ``step`` and the means of the metrics since the last.
        evaluation: a dict an evaluation: ``step`` and what ``evaluate`` returned.
        stopped: ``""`` if the run is complete, else the signal that stopped it.
        message: how to go on, if it was stopped.
    """

    train: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    evaluation: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    stopped: str = ""
    message: str = ""

    def series(self, name: str, kind: str = "train") -> tuple[list, list]:
        """One metric as ``(steps, values)``, for a figure.

        Example:
            >>> History(train=[{"step": 5, "loss": 0.5}]).series("loss")
            ([5], [0.5])
        """
        records = [r for r in getattr(self, kind) if name in r]
        return [r["step"] for r in records], [r[name] for r in records]


@jax.jit
def _accumulate(sums: Any, metrics: dict[str, Mean]) -> Any:
    """Add a step's metrics and keep which one was the first with a bad loss."""
    total, count, bad = sums or ({}, jnp.int32(0), jnp.int32(-1))
    losses = [
        metrics[name].total
        for name in metrics
        if name == "loss" or name.endswith("/loss")
    ]
    finite = jnp.array(True)
    for loss in losses:
        finite &= jnp.all(jnp.isfinite(loss))
    bad = jnp.where((bad < 0) & ~finite, count, bad)
    return metrics_lib.merge(total, metrics), count + 1, bad


@functools.partial(jax.jit, static_argnames="unwritten")
def _all_finite(arrays: Any, *, unwritten: bool = False) -> jax.Array:
    """Whether all are finite; or minus infinity, as in a memory not yet written."""
    finite = jnp.array(True)
    for leaf in jax.tree.leaves(arrays):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            allowed = (leaf == -jnp.inf) if unwritten else False
            finite &= jnp.all(jnp.isfinite(leaf) | allowed)
    return finite


def fit(
    step: Step,
    state: TrainState,
    data: Iterable[Any],
    *,
    steps: int,
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    eval_every: int = 0,
    checkpointer: Checkpointer | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    log_every: int = 50,
    progress: bool = True,
) -> tuple[TrainState, History]:
    """Train until ``state.step`` is ``steps``.

    With a checkpointer the run goes on from its latest checkpoint if there is one,
    data position included, so that the same command starts and resumes a run; the
    result is bit-identical to an uninterrupted run if ``data`` has ``get_state`` and
    ``set_state``, as grain's iterators do. SIGTERM and Ctrl-C finish the current
    update, save, and return; a second Ctrl-C interrupts at once.

    With several processes all call it, with the same arguments beside ``data``, which
    is each one's part (see :func:`~jaxtransfer.parallel.jit_step`), and equally long.
    Process 0 writes the records; checkpoints are written by all. A signal to one stops
    all, in the next call if it comes between two; JAX's service takes note of one
    signal in the life of a process. Data that ends is an error without a last save, for
    that of others may go on.

    Args:
        step: compiled step, of :func:`~jaxtransfer.parallel.jit_step` and the like.
        state: where to start; donated if the step donates.
        data: batches; at least as many as updates to do.
        steps: number of updates at which the run is complete, those before this
            call included; at least those of the latest checkpoint.
        evaluate: ``state -> {name: value}``, called at the end too; see
            :func:`~jaxtransfer.train.evaluate_batches`. Must not keep the state.
        eval_every: updates between two evaluations; 0: at the end only.
        checkpointer: where and how often to save; a checkpoint is written at the end
            too, and only of states whose loss was finite so far.
        run_dir: folder for ``metrics.jsonl`` and TensorBoard's files.
        log_every: updates between two records; each is the mean since the last.
        progress: show a progress bar (plain lines if there is no terminal).

    Returns:
        The state, and the history of this call.

    Raises:
        NonFiniteLossError: a loss was infinite or not a number; found after 100
            updates at the latest, names the first one; or a parameter or the model
            state was, at a save or at the end.
        ValueError: an argument is out of range; the data ended; the checkpoints are
            of another run, later than ``steps``, or of the step of ``state`` and differ
            from it.
        OSError: a folder can't be written to, or its disk is nearly full (raised
            before the first update).

    Example:
        >>> import itertools
        >>> import jax, jax.numpy as jnp, optax
        >>> from jaxtransfer import parallel
        >>> from jaxtransfer.train import init_state, train_step
        >>> from jaxtransfer.typing import Variables
        >>> def objective(params, frozen, model_state, batch, key):
        ...     return jnp.mean((batch - params["w"]) ** 2), (model_state, {})
        >>> optimizer = optax.sgd(0.5)
        >>> step = parallel.jit_step(train_step(objective, optimizer))
        >>> start = Variables({"w": jnp.zeros(())})
        >>> state = init_state(jax.random.key(0), start, optimizer)
        >>> data = itertools.repeat(jnp.array([2.0, 4.0]))
        >>> state, history = fit(step, state, data, steps=3, progress=False)
        >>> int(state.step), float(state.params["w"]), history.train[-1]["step"]
        (3, 3.0, 3)
    """
    for name, value, least in (
        ("steps", steps, 0),
        ("eval_every", eval_every, 0),
        ("log_every", log_every, 1),
    ):
        if value < least:
            raise ValueError(f"{name}: must be at least {least}, got {value}")
    batches, history = iter(data), History()
    chief = jax.process_index() == 0
    with together(OSError):
        folder = check_folder(run_dir) if run_dir is not None and chief else None
    resumed = False
    if checkpointer is not None:
        checkpointer.check_space(state)
        state, resumed = _resume(state, batches, checkpointer, steps)
    start = done = int(state.step)
    writer = (
        None
        if folder is None
        else MetricsWriter(folder, start=start, resumed=resumed or start > 0)
    )
    display = Display(steps=steps, start=start, show=progress and chief)
    if resumed and checkpointer is not None:
        display.say(f"resumed at step {start} from {checkpointer.directory}")
    sums: Any = None  # and no numbers, which each record would bring to the device
    logged = checked = done
    pending: tuple[int, int, Any] | None = None  # (first, last, sums) to be fetched

    def report(kind: str, at: int, values: dict[str, float]) -> None:
        records = history.train if kind == "train" else history.evaluation
        records.append({"step": at, **values})
        if writer is not None:
            writer.write(kind, at, values)
        display.metrics(kind, at, values)

    def check(first: int, sums: Any) -> None:
        if sums is not None and (offset := int(sums[2])) >= 0:
            raise _not_finite(first + offset + 1, checkpointer)

    def fetch() -> None:
        nonlocal pending
        if pending is not None:
            (first, last, found), pending = pending, None
            check(first, found)
            means = _numbers(found[0])
            first_loss = sorted(means, key=lambda name: not name.endswith("loss"))
            report("train", last, {name: means[name] for name in first_loss})

    def save(*, force: bool = False) -> None:
        """Check the state, and save it if there is where to."""
        if not (force or checkpointer and done % checkpointer.every == 0):
            return
        fetch()
        check(logged, sums)
        sound = _all_finite(state.params)
        if not bool(sound & _all_finite(state.model_state, unwritten=True)):
            raise _not_finite(done, checkpointer, what="parameters or model state")
        if checkpointer is not None:
            checkpointer.save(done, state, batches, force=force)

    evaluated = -1
    with contextlib.ExitStack() as stack:
        if writer is not None:
            stack.callback(writer.close)
        stack.callback(display.close)
        received = stack.enter_context(stop_signals())
        if done < steps:  # several processes: a signal came before this call
            history.stopped = stopping(received)
        due = eval_every > 0 and 0 < start < steps and start % eval_every == 0
        due = due and resumed and not history.stopped
        if evaluate is not None and due and not _evaluated(folder, start):
            report("eval", start, _numbers(evaluate(state)))
        while done < steps and not history.stopped:
            try:
                batch = next(batches)
            except StopIteration:
                several = jax.process_count() > 1  # that of others may go on
                where = f" in process {jax.process_index()}" if several else ""
                if not several:
                    save(force=True)
                raise ValueError(
                    f"data: ended{where} after {done - start} batches at step {done} "
                    f"of {steps}; repeat it (grain: .repeat()) or ask for fewer steps"
                ) from None
            state, metrics = step(state, batch)
            sums = _accumulate(sums, metrics)
            done += 1
            fetch()
            if done - logged == log_every or done == steps:
                pending, sums = (logged, done, sums), None
                logged = checked = done
            elif done - checked >= _CHECK_EVERY:
                check(logged, sums)
                checked = done
            display.advance(done)
            save()
            # Asked after every update, for several processes must agree; not after
            # the last, so that a signal in it stops their next run.
            if done < steps and (stopped := stopping(received)):
                history.stopped = stopped
                break
            if evaluate is not None and eval_every and done % eval_every == 0:
                fetch()
                report("eval", done, _numbers(evaluate(state)))
                evaluated = done
        if done > logged:
            pending = (logged, done, sums)
            sums, logged = None, done
        fetch()
        if done > start or history.stopped:
            save(force=True)
        if evaluate is not None and evaluated != done and not history.stopped:
            report("eval", done, _numbers(evaluate(state)))
        if checkpointer is not None:
            checkpointer.wait()
        if history.stopped:
            history.message = _how_to_go_on(history.stopped, done, steps, checkpointer)
            display.say(history.message)
    return state, history


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    found = {
        name: metrics_lib.finalize({name: value})[name]
        if isinstance(value, Mean)
        else value
        for name, value in values.items()
    }
    for name, value in found.items():
        if np.ndim(value):
            raise ValueError(
                f"metrics: {name!r} has shape {np.shape(value)}; a run records numbers"
            )
    return {name: float(value) for name, value in found.items()}


def _evaluated(folder: pathlib.Path | None, step: int) -> bool:
    """Whether the records have an evaluation of a step; all processes say the same."""
    path = None if folder is None else folder / "metrics.jsonl"
    found = path is not None and any(
        record["step"] == step and any(name.startswith("eval/") for name in record)
        for record in read_metrics(path)
    )
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        found = bool(multihost_utils.broadcast_one_to_all(np.array(found)))
    return found


def _resume(
    state: TrainState, batches: Any, checkpointer: Checkpointer, steps: int
) -> tuple[TrainState, bool]:
    """Go on from the latest checkpoint, unless the state is ahead of it."""
    latest, given = checkpointer.latest_step, int(state.step)
    if latest is None or given > latest:
        return state, False
    if 0 < given < latest:
        raise ValueError(
            f"{str(checkpointer.directory)!r} has a checkpoint of step {latest}, later "
            f"than the state given (step {given}); go on in another directory, or "
            f"remove the later checkpoints"
        )
    if steps < latest:
        raise ValueError(
            f"steps: {steps}, but {str(checkpointer.directory)!r} has a checkpoint of "
            f"step {latest} already; ask for at least {latest}, or give another "
            "directory"
        )
    position = batches if hasattr(batches, "set_state") else None
    restored = checkpointer.restore(state, position)
    if not bool(jnp.all(restored.key == state.key)):
        raise ValueError(
            f"{str(checkpointer.directory)!r} has checkpoints of a run with another "
            "key; give the same key (seed) to go on, or another directory"
        )
    if given > 0:
        mine, there = leaves_of(state), leaves_of(restored)
        for path in mine:
            if checksum(mine[path]) != checksum(there[path]):
                raise ValueError(
                    f"state: {path!r} differs from that in "
                    f"{checkpointer.folder(latest)}, of the same step {latest}; give "
                    "the state of step 0 to go on from the checkpoint, or another "
                    "directory to go on from the state"
                )
    if position is None and latest > 0:
        warnings.warn(
            f"resumed at step {latest}, but data has no set_state: it starts over, so "
            "the result differs from that of an uninterrupted run",
            stacklevel=3,
        )
    return restored, True


def _not_finite(
    step: int, checkpointer: Checkpointer | None, *, what: str = "loss"
) -> NonFiniteLossError:
    latest = None
    kept = "there is no checkpoint"
    if checkpointer is not None:
        checkpointer.wait()
        latest = checkpointer.latest_step
        kept = (
            f"no checkpoint was saved in {checkpointer.directory} before it"
            if latest is None
            else f"the last good checkpoint is {checkpointer.folder(latest)}"
        )
    return NonFiniteLossError(
        f"{what} not finite at step {step}; {kept}. Likely remedies: a lower learning "
        "rate or a warm-up, clipping of the gradient (optax.clip_by_global_norm), or "
        "a look for NaN and infinities in the data of that step",
        step=step,
        checkpoint=latest,
    )


def _how_to_go_on(
    stopped: str, done: int, steps: int, checkpointer: Checkpointer | None
) -> str:
    if checkpointer is None:
        return f"stopped by {stopped} at step {done} of {steps}; nothing was saved"
    return (
        f"stopped by {stopped} at step {done} of {steps}; saved in "
        f"{checkpointer.folder(done)}; run the same command again to go on"
    )


__all__ = ["History", "NonFiniteLossError", "fit"]
