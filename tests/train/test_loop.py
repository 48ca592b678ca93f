"""The host loop: what it records, and how it ends."""

import io
import itertools
import json
import math
import os
import shutil
import signal
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import multihost_utils

from jaxtransfer import parallel, train
from jaxtransfer.train import logging as logging_lib
from jaxtransfer.train import stopping
from jaxtransfer.typing import Mean, Variables
from tests.train.checkpointed_run import batches, initial, objective

ADAM = optax.adam(1e-2)
STEP = parallel.jit_step(train.train_step(objective, ADAM))


def fit(data=None, step=STEP, state=None, **options):
    state = initial(ADAM) if state is None else state
    data = batches() if data is None else data
    return train.fit(step, state, data, **{"steps": 7, "progress": False, **options})


def read(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def test_records_are_exact_means_of_every_step(tmp_path):
    losses, state, data = [], initial(ADAM), batches()
    for _ in range(7):
        state, metrics = STEP(state, next(data))
        losses.append(float(metrics["loss"].total))
    _, history = fit(run_dir=tmp_path, log_every=3)
    steps, values = history.series("loss")
    assert steps == [3, 6, 7]
    expected = [np.mean(losses[:3]), np.mean(losses[3:6]), losses[6]]
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    records = read(tmp_path)
    assert [r["step"] for r in records] == steps
    assert [r["train/loss"] for r in records] == values
    assert all(r["time"] > 1e9 and "train/gradient_norm" in r for r in records)


def test_metrics_of_a_step_are_fetched_after_the_next_is_dispatched(
    tmp_path, monkeypatch
):
    events = []

    def step(state, batch):
        events.append("step")
        return STEP(state, batch)

    write = logging_lib.MetricsWriter.write

    def spy(self, kind, at, values):
        events.append(at)
        write(self, kind, at, values)

    monkeypatch.setattr(logging_lib.MetricsWriter, "write", spy)
    fit(step=step, steps=3, log_every=1, run_dir=tmp_path)
    assert events == ["step", "step", 1, "step", 2, 3]


def test_weighted_metrics_are_merged_as_sum_and_count():
    def step(state, batch):
        total, count = batch
        return state.replace(step=state.step + 1), {"a": Mean(total, count)}

    data = [(jnp.array(t), jnp.array(c)) for t, c in ((1.0, 1.0), (0.0, 3.0))]
    _, history = fit(data, jax.jit(step), steps=2)
    assert history.series("a") == ([2], [0.25])


def test_tensorboard_gets_what_the_file_gets(tmp_path):
    pytest.importorskip("tensorboardX")
    fit(run_dir=tmp_path)
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()


def test_works_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    fit(run_dir=tmp_path)
    assert len(read(tmp_path)) == 1 and not (tmp_path / "tensorboard").exists()


def test_evaluates_at_intervals_and_at_the_end(tmp_path):
    seen = []

    def evaluate(state):
        seen.append(int(state.step))
        return {"step_squared": float(state.step) ** 2, "pair": Mean(1.0, 4.0)}

    _, history = fit(evaluate=evaluate, eval_every=3, run_dir=tmp_path)
    assert seen == [3, 6, 7]
    assert history.series("step_squared", "evaluation") == (
        [3, 6, 7],
        [9.0, 36.0, 49.0],
    )
    assert history.evaluation[0]["pair"] == 0.25
    assert [r["step"] for r in read(tmp_path) if "eval/pair" in r] == [3, 6, 7]
    seen.clear()
    fit(evaluate=evaluate, steps=6, eval_every=3)
    assert seen == [3, 6], "evaluated twice at the end"
    seen.clear()
    fit(evaluate=evaluate)
    assert seen == [7]


def test_steps_count_those_done_before():
    state, _ = fit(steps=3)
    calls = []

    def step(state, batch):
        calls.append(1)
        return STEP(state, batch)

    state, history = fit(state=state, step=step, steps=5)
    assert len(calls) == 2 and int(state.step) == 5
    again, history = fit(state=state, step=step, steps=5)
    assert len(calls) == 2 and again is state and history.train == []


def test_resumes_from_the_latest_checkpoint_bit_by_bit(tmp_path):
    whole, _ = fit(steps=10, run_dir=tmp_path / "whole", log_every=2)
    folder = tmp_path / "parts"
    for steps in (5, 10, 10):
        with train.Checkpointer(tmp_path / "checkpoints", every=2) as checkpointer:
            state, _ = fit(
                steps=steps, checkpointer=checkpointer, run_dir=folder, log_every=2
            )
            assert checkpointer.latest_step == steps
    for name in whole.params:
        np.testing.assert_array_equal(whole.params[name], state.params[name])
    records = {r["step"]: r["train/loss"] for r in read(folder)}
    assert list(records) == [2, 4, 5, 7, 9, 10]
    assert records[2] == read(tmp_path / "whole")[0]["train/loss"]


def test_records_after_the_checkpoint_and_half_lines_are_dropped(tmp_path):
    with train.Checkpointer(tmp_path / "checkpoints", every=4) as checkpointer:
        fit(steps=4, checkpointer=checkpointer, run_dir=tmp_path, log_every=2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "time": 1.0, "train/loss": 0.0}\n{"step": 8, "ti')
    with train.Checkpointer(tmp_path / "checkpoints", every=4) as checkpointer:
        fit(steps=8, checkpointer=checkpointer, run_dir=tmp_path, log_every=2)
    records = read(tmp_path)
    assert [r["step"] for r in records] == [2, 4, 6, 8]
    assert records[2]["train/loss"] > 0


def test_a_fresh_run_moves_the_records_of_another(tmp_path):
    for _ in range(3):
        fit(run_dir=tmp_path, steps=2)
    names = sorted(p.name for p in tmp_path.glob("metrics*"))
    assert names == ["metrics.jsonl", "metrics.jsonl.1", "metrics.jsonl.2"]
    assert len(read(tmp_path)) == 1


def test_checkpoints_of_a_run_with_another_key_are_refused(tmp_path):
    with train.Checkpointer(tmp_path, every=2) as checkpointer:
        fit(steps=2, checkpointer=checkpointer)
        other = initial(ADAM).replace(key=jax.random.key(9))
        with pytest.raises(ValueError, match="another key"):
            fit(state=other, checkpointer=checkpointer)


def test_a_state_behind_the_checkpoints_is_refused_and_one_ahead_goes_on(tmp_path):
    with train.Checkpointer(tmp_path, every=2, keep=9) as checkpointer:
        state, _ = fit(steps=5, checkpointer=checkpointer)
        behind = checkpointer.restore(initial(ADAM), step=2)
        with pytest.raises(ValueError, match="step 5, later than the state.*step 2"):
            fit(state=behind, checkpointer=checkpointer)
        ahead, _ = fit(state=state, steps=7)
        done, _ = fit(state=ahead, steps=8, checkpointer=checkpointer)
        assert int(done.step) == 8 and checkpointer.latest_step == 8


def test_a_state_changed_at_the_step_of_the_checkpoint_is_not_thrown_away(tmp_path):
    with train.Checkpointer(tmp_path, every=2) as checkpointer:
        state, _ = fit(steps=2, checkpointer=checkpointer)
        output = state.params["output"] + 1
        changed = state.replace(params={**state.params, "output": output})
        message = "'params/output' differs .*state of step 0"
        with pytest.raises(ValueError, match=message):
            fit(state=changed, steps=3, checkpointer=checkpointer)
        odd = state.replace(step=state.step + 1, model_state={"a": jnp.array(jnp.nan)})
        checkpointer.save(3, odd, batches(), force=True)
        same, _ = fit(state=odd, steps=3, checkpointer=checkpointer)
        assert int(same.step) == 3, "a NaN is not itself"


def test_fewer_steps_than_the_checkpoint_has_are_refused(tmp_path):
    with train.Checkpointer(tmp_path, every=4) as checkpointer:
        fit(steps=4, checkpointer=checkpointer)
        data = batches()
        with pytest.raises(ValueError, match="steps: 2, but .* step 4 .*at least 4"):
            fit(data, steps=2, checkpointer=checkpointer)
        assert data.get_state() == batches().get_state(), "it was moved"
        again, history = fit(steps=4, checkpointer=checkpointer)
    assert int(again.step) == 4 and not history.train


def test_plain_iterators_resume_with_a_warning(tmp_path):
    data = [next(batches())] * 4
    with train.Checkpointer(tmp_path, every=2) as checkpointer:
        fit(data, steps=2, checkpointer=checkpointer)
        # Those that have a position are refused, with a remedy that a caller can take.
        with pytest.raises(ValueError, match=r"give .*\(batch for batch in data\)"):
            fit(batches(), steps=4, checkpointer=checkpointer)
        data = (batch for batch in batches())
        with pytest.warns(UserWarning, match="data has no set_state: it starts over"):
            fit(data, steps=4, checkpointer=checkpointer)


def test_data_that_ends_is_an_error_after_saving(tmp_path):
    data = itertools.islice(batches(), 3)
    with train.Checkpointer(tmp_path, every=100) as checkpointer:
        with pytest.raises(ValueError, match="ended after 3 batches at step 3 of 7"):
            fit(data, checkpointer=checkpointer)
        assert checkpointer.latest_step == 3


def poisoned(at):
    for number, batch in enumerate(batches(), start=1):
        if number == at:
            batch = {**batch, "labels": np.full_like(batch["labels"], np.nan)}
        yield batch


@pytest.mark.parametrize("log_every", [1, 4, 10_000])
def test_the_first_loss_that_is_not_finite_is_named(tmp_path, log_every):
    with train.Checkpointer(tmp_path, every=2) as checkpointer:
        with pytest.raises(
            train.NonFiniteLossError, match="step 5; the last"
        ) as caught:
            fit(poisoned(5), steps=50, log_every=log_every, checkpointer=checkpointer)
        assert isinstance(caught.value, FloatingPointError)
        assert (caught.value.step, caught.value.checkpoint) == (5, 4)
        assert str(tmp_path / "4") in str(caught.value)
        assert "learning rate" in str(caught.value) and "NaN" in str(caught.value)
        assert checkpointer.latest_step == 4, "a bad state was saved"
        good = checkpointer.restore(initial(ADAM))
        assert all(np.isfinite(x).all() for x in good.params.values())


def test_a_bad_loss_is_found_soon_though_nothing_is_logged_or_saved():
    calls = []

    def step(state, batch):
        calls.append(1)
        return STEP(state, batch)

    with pytest.raises(
        train.NonFiniteLossError, match="step 5; there is no checkpoint"
    ):
        fit(poisoned(5), step, steps=10_000, log_every=10_000)
    assert len(calls) <= 100


def test_a_bad_loss_in_the_last_steps_is_found(tmp_path):
    with train.Checkpointer(tmp_path, every=100) as checkpointer:
        with pytest.raises(train.NonFiniteLossError, match="step 7; no checkpoint was"):
            fit(poisoned(7), steps=7, checkpointer=checkpointer)
        assert checkpointer.latest_step is None


def test_parameters_spoiled_by_a_finite_loss_are_not_saved(tmp_path):
    def root(params, frozen, model_state, batch, key):
        return jnp.sum(jnp.sqrt(params["w"])), (model_state, {})  # infinite slope at 0

    optimizer = optax.sgd(0.1)
    state = train.init_state(
        jax.random.key(0), Variables({"w": jnp.zeros(2)}), optimizer
    )
    step = parallel.jit_step(train.train_step(root, optimizer))
    with train.Checkpointer(tmp_path, every=1) as checkpointer:
        with pytest.raises(train.NonFiniteLossError, match="parameters .* step 1"):
            fit(itertools.repeat({}), step, state, steps=3, checkpointer=checkpointer)
        assert checkpointer.latest_step is None


def test_parameters_spoiled_by_the_last_update_are_not_returned():
    state = initial(ADAM)

    def step(state, batch):
        state, metrics = STEP(state, batch)
        bad = jnp.where(state.step == 3, jnp.nan, 1.0)
        return state.replace(
            params=jax.tree.map(lambda x: x * bad, state.params)
        ), metrics

    with pytest.raises(
        train.NonFiniteLossError, match="parameters .* step 3; there is"
    ):
        fit(step=step, state=state, steps=3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_finish_the_step_save_and_restore_handlers(tmp_path, number):
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    counter = itertools.count(1)

    def step(state, batch):
        if next(counter) == 3:
            os.kill(os.getpid(), number)
        return STEP(state, batch)

    evaluations = []
    with train.Checkpointer(tmp_path, every=100) as checkpointer:
        state, history = fit(
            step=step, checkpointer=checkpointer, evaluate=evaluations.append
        )
        assert checkpointer.latest_step == int(state.step) == 3
    assert history.stopped == number.name and not evaluations
    assert history.series("loss")[0] == [3]
    assert "stopped by" in history.message and str(tmp_path / "3") in history.message
    assert {s: signal.getsignal(s) for s in before} == before


def test_a_signal_in_the_last_update_stops_nothing():
    def step(state, batch):
        if int(state.step) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return STEP(state, batch)

    state, history = fit(step=step, steps=5, evaluate=lambda state: {"a": 1.0})
    assert int(state.step) == 5 and not history.stopped and not history.message
    assert [r["step"] for r in history.evaluation] == [5]


def test_an_evaluation_that_a_stop_left_out_is_made_when_the_run_goes_on(
    tmp_path, monkeypatch
):
    """At steps that are saved as well; an evaluation in the records is not repeated."""
    monkeypatch.setitem(sys.modules, "tensorboardX", None)  # takes a second to close
    seen, ends = [], {}  # at which step the process is asked to end, and how

    def end(number):
        if ends.get("signal") == number:
            os.kill(os.getpid(), signal.SIGTERM)
        if ends.get("killed") == number:
            raise KeyboardInterrupt

    def step(state, batch):
        end(int(state.step) + 1)
        return STEP(state, batch)

    def evaluate(state):
        end(f"evaluation {int(state.step)}")
        seen.append(int(state.step))
        return {"a": 1.0}

    def run(run_dir=tmp_path, **how):
        seen.clear()
        ends.clear()
        ends.update(how)
        with train.Checkpointer(tmp_path / "checkpoints", every=2) as checkpointer:
            options = {"evaluate": evaluate, "eval_every": 2, "run_dir": run_dir}
            return fit(step=step, steps=5, checkpointer=checkpointer, **options)

    assert run(signal=2)[1].stopped == "SIGTERM" and seen == []
    with pytest.raises(KeyboardInterrupt):
        run(killed=3)
    assert seen == [2]
    with pytest.raises(KeyboardInterrupt):
        run(killed="evaluation 4")
    assert seen == [], "step 2 was in the records"
    assert [r["step"] for r in read(tmp_path) if "eval/a" in r] == [2]
    run(run_dir=None)  # nothing says what was evaluated
    assert seen == [4, 5]


def test_a_signal_to_one_of_several_processes_stops_one_run_once(monkeypatch):
    """By a service as JAX's: yes at one number, the largest that was asked and one."""
    last, at = 0, []

    def reached(number):
        nonlocal last
        last = number
        return [number] == at

    def interrupted(update):
        for number, batch in zip(range(7), batches(), strict=False):
            if number == update:
                at[:] = [last + 1]
            yield batch

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", reached)
    monkeypatch.setattr(stopping, "_asked", itertools.count(1))
    at[:] = [last + 1]  # before the first run
    runs = (None, 0, "SIGTERM"), (0, 1, "SIGTERM"), (None, 7, ""), (6, 7, "")
    for update, reaches, stopped in runs:
        state, history = fit(interrupted(update))
        assert (int(state.step), history.stopped) == (reaches, stopped)
    history = fit()[1]  # in the last update of the run before, or after it
    assert history.message == "stopped by SIGTERM at step 0 of 7; nothing was saved"


def test_a_second_interrupt_interrupts_at_once():
    def step(state, batch):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return STEP(state, batch)

    # A test run started in the background inherits an ignored SIGINT.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            fit(step=step)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, inherited)


def test_handlers_are_restored_after_an_error():
    before = signal.getsignal(signal.SIGTERM)

    def step(state, batch):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fit(step=step)
    assert signal.getsignal(signal.SIGTERM) is before


def test_runs_in_a_thread():
    result = []
    thread = threading.Thread(target=lambda: result.append(fit(steps=2)))
    thread.start()
    thread.join()
    assert int(result[0][0].step) == 2


def test_run_folder_that_cannot_be_written_is_an_error_at_the_start(
    tmp_path, monkeypatch
):
    calls = []
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="can't be written to"):
        fit(step=lambda *_: calls.append(1), run_dir=tmp_path / "file" / "run")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**20))
    with pytest.raises(OSError, match="has 1 MiB left, this run needs about 32 MiB"):
        fit(step=lambda *_: calls.append(1), run_dir=tmp_path / "run")
    assert not calls and not list((tmp_path / "run").iterdir())


def test_plain_lines_without_a_terminal_and_silence(capsys):
    fit(progress=True, log_every=3)
    out, errors = capsys.readouterr()
    assert out == "" and errors.count("step 3/7  train  loss") == 1
    assert "steps/s" in errors and "s left" in errors
    fit(progress=False)
    assert capsys.readouterr() == ("", "")


def test_progress_bar_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    fit(progress=True, log_every=3)
    shown = screen.getvalue()
    assert "7/7" in shown and "steps/s" in shown and "loss" in shown


def test_values_that_are_not_finite_are_null_in_the_file(tmp_path):
    _, history = fit(run_dir=tmp_path, steps=1, evaluate=lambda _: {"a": math.inf})
    assert history.evaluation[0]["a"] == math.inf
    assert read(tmp_path)[-1]["eval/a"] is None


def test_works_over_a_mesh_and_with_pmap_and_shard_map(tmp_path):
    mesh = parallel.make_mesh()
    per_device = train.train_step(objective, ADAM, axis_name="data")
    for number, step in enumerate(
        (
            parallel.jit_step(train.train_step(objective, ADAM), mesh),
            parallel.pmap_step(per_device),
            parallel.shard_map_step(per_device, mesh),
        )
    ):
        for steps in (2, 4):
            with train.Checkpointer(tmp_path / str(number), every=2) as checkpointer:
                state, history = fit(step=step, steps=steps, checkpointer=checkpointer)
        assert int(state.step) == 4 and history.series("loss")[0] == [4]


@pytest.mark.parametrize(
    ("option", "value"), [("steps", -1), ("eval_every", -1), ("log_every", 0)]
)
def test_options_out_of_range(option, value):
    with pytest.raises(ValueError, match=f"{option}: must be at least"):
        fit(**{option: value})


def test_evaluate_batches_merges_uneven_batches_exactly():
    values = np.random.default_rng(0).normal(size=1003).astype(np.float32) + 1e3
    parts = [values[at : at + 100] for at in range(0, 1003, 100)]
    measure = jax.jit(lambda state, batch: {"mean": train.metrics.mean(batch)})
    found = train.evaluate_batches(measure, None, parts)["mean"]
    np.testing.assert_allclose(found, values.astype(np.float64).mean(), rtol=1e-7)
    padded = jax.jit(
        lambda state, batch: {
            "mean": train.metrics.mean(batch["x"], where=batch["where"])
        }
    )
    rows = [
        {"x": jnp.array([1.0, 2.0]), "where": jnp.array([True, True])},
        {"x": jnp.array([6.0, 9.0]), "where": jnp.array([True, False])},
    ]
    assert train.evaluate_batches(padded, None, rows) == {"mean": 3.0}
    with pytest.raises(ValueError, match="none to evaluate"):
        train.evaluate_batches(measure, None, [])


def test_totals_of_one_process_alone_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    def measure(state, batch):
        return {"mean": train.metrics.mean(batch)}

    with pytest.raises(ValueError, match=r"own rows alone; .*parallel\.jit_step"):
        train.evaluate_batches(measure, None, [jnp.ones(3)])
    measure.axis_name = "data"  # as of `pmap_step`: summed over all devices
    assert train.evaluate_batches(measure, None, [jnp.ones(3)]) == {"mean": 1.0}
