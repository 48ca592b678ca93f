"""Nothing is lost: killed runs, damaged files, other people's checkpoints."""

import asyncio
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtransfer import parallel, train
from jaxtransfer.train import checkpoint, folders, record
from jaxtransfer.typing import Variables
from tests.train.checkpointed_run import batches, final, initial, objective

SCRIPT = pathlib.Path(__file__).with_name("checkpointed_run.py")
ADAM = optax.adam(1e-2)
STEP = parallel.jit_step(train.train_step(objective, ADAM))


def launch(folder, *options):
    root = str(SCRIPT.parent.parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(folder), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


def wait_for(process, step):
    for line in process.stdout:
        if line.strip() == f"step {step}":
            return
    pytest.fail(f"ended before step {step}: {process.stderr.read()}")


def finish(process):
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return out, errors


def assert_same_as_uninterrupted(folder, *, steps):
    """Compare with a run in this process, bit by bit."""
    state, _ = train.fit(STEP, initial(ADAM), batches(), steps=steps, progress=False)
    expected, found = final(state), np.load(folder / "final.npz")
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def assert_equal(first, second):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_killed_in_the_middle_of_saves_and_restarted_equals_uninterrupted(tmp_path):
    moments, partial = random.Random(0), 0
    for at in (3, 16):  # a save has just begun when this step is announced
        process = launch(tmp_path, "--keep", "1")
        wait_for(process, at)
        time.sleep(moments.uniform(0.0, 0.03))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (tmp_path / "final.npz").exists()
        partial += any("tmp" in p.name for p in (tmp_path / "checkpoints").iterdir())
    finish(launch(tmp_path, "--keep", "1"))
    assert_same_as_uninterrupted(tmp_path, steps=30)
    assert partial > 0, "no kill hit a save in flight: the test shows nothing"
    steps = [record["step"] for record in train.read_metrics(tmp_path)]
    assert steps == sorted(set(steps)) and steps[-1] == 30


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(tmp_path):
    process = launch(tmp_path, "--pause", "0.1")
    wait_for(process, 4)
    process.send_signal(signal.SIGTERM)
    out, errors = finish(process)
    assert "stopped SIGTERM" in out
    at = re.search(
        r"stopped by SIGTERM at step (\d+) of 30; saved in (.*); run", errors
    )
    assert 5 <= int(at[1]) < 15
    assert pathlib.Path(at[2]) == tmp_path / "checkpoints" / at[1]
    assert pathlib.Path(at[2]).is_dir()
    finish(launch(tmp_path))
    assert_same_as_uninterrupted(tmp_path, steps=30)


def test_saved_is_the_state_at_that_step_though_it_is_donated(tmp_path):
    # Large enough that writing takes longer than the next updates.
    optimizer = optax.adam(1e-2)
    state = initial(optimizer, width=20_000)
    data, kept = batches(), {}
    with train.Checkpointer(tmp_path, every=2, keep=3) as checkpointer:
        for number in range(1, 7):
            state, _ = STEP(state, next(data))
            if checkpointer.save(number, state):
                kept[number] = jax.tree.map(np.array, (state.params, state.opt_state))
        checkpointer.wait()
        for number, values in kept.items():
            restored = checkpointer.restore(
                initial(optimizer, width=20_000), step=number
            )
            assert_equal(
                jax.tree.map(np.array, (restored.params, restored.opt_state)), values
            )
    assert sorted(kept) == [2, 4, 6]


def test_restores_everything_and_the_position_in_the_data(tmp_path):
    state, data = initial(ADAM), batches()
    for _ in range(4):
        state, _ = STEP(state, next(data))
    with train.Checkpointer(tmp_path, every=1) as checkpointer:
        assert checkpointer.latest_step is None
        assert checkpointer.save(4, state, data)
        following = next(data)
        other = batches()
        restored = checkpointer.restore(initial(ADAM), other)
    assert_equal(restored, state)
    np.testing.assert_array_equal(next(other)["inputs"], following["inputs"])


def test_leaves_without_values_are_restored_as_they_were(tmp_path):
    state = initial(ADAM).replace(model_state={"empty": jnp.zeros((0, 3))})
    with train.Checkpointer(tmp_path, every=1) as checkpointer:
        checkpointer.check_space(state)
        checkpointer.save(1, state)
        assert_equal(checkpointer.restore(state), state)
        other = state.replace(model_state={"empty": jnp.zeros((0, 4))})
        with pytest.raises(ValueError, match=r"float32\[0,3\] there"):
            checkpointer.restore(other)


def test_float64_that_is_read_as_float32_is_not_called_damaged(tmp_path):
    """Orbax reads in a thread, which does not know of this one's setting."""
    with jax.enable_x64(True):
        variables = Variables({"w": jnp.array([0.1, 0.2], jnp.float64)})
        state = train.init_state(jax.random.key(0), variables, optax.sgd(0.1))
        with train.Checkpointer(tmp_path, every=1) as checkpointer:
            checkpointer.save(1, state, force=True)
            with pytest.raises(
                ValueError, match="'params/w' came back as float32"
            ) as e:
                checkpointer.restore(state)
    assert not isinstance(e.value, train.DamagedCheckpointError)


def test_no_leaf_gives_way_to_other_dtypes_as_the_disk_does_not_know():
    weak = optax.GradientTransformation(lambda _: jnp.asarray(0.1), lambda *_: _)
    variables = Variables({"w": jnp.ones(2)}, {"count": 3})
    state = train.init_state(jax.random.key(0), variables, weak)
    leaves = jax.tree.leaves((state.params, state.model_state, state.opt_state))
    assert len(leaves) == 3 and not any(leaf.weak_type for leaf in leaves)


def test_a_save_that_fails_names_its_step(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    with train.Checkpointer(tmp_path, every=1) as checkpointer:
        checkpointer.save(1, initial(ADAM))
        monkeypatch.setattr(checkpointer._orbax, "save_checkpointables_async", refuse)
        with pytest.raises(RuntimeError, match="checkpoint of step 2 could not"):
            checkpointer.save(2, initial(ADAM))


def test_interval_and_retention(tmp_path):
    state = initial(ADAM)
    with train.Checkpointer(tmp_path, every=5, keep=2) as checkpointer:
        assert [checkpointer.save(n, state) for n in range(1, 21)].count(True) == 4
        assert checkpointer.save(21, state, force=True)
        assert not checkpointer.save(21, state, force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["20", "21"]


def with_teacher(value):
    state = initial(ADAM)
    return state.replace(frozen={"teacher": {"w": jnp.full(3, value)}, "anchor": {}})


def test_another_teacher_is_refused_by_name(tmp_path):
    with train.Checkpointer(tmp_path, every=1, teacher="resnet, run 7") as checkpointer:
        checkpointer.save(1, with_teacher(1.0))
        checkpointer.wait()
        saved = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
        assert b"state/frozen" not in saved and b"frozen/teacher" not in saved
        restored = checkpointer.restore(with_teacher(1.0))
        assert float(restored.frozen["teacher"]["w"][0]) == 1.0
        with pytest.raises(ValueError, match="frozen 'teacher'.*resnet, run 7"):
            checkpointer.restore(with_teacher(2.0))
        with pytest.raises(ValueError, match="frozen 'anchor'.*missing here"):
            state = with_teacher(1.0)
            checkpointer.restore(
                state.replace(frozen={"teacher": state.frozen["teacher"]})
            )


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: initial(ADAM, width=17), r"params/hidden.*\[8,16\].*\[8,17\]"),
        (lambda: initial(optax.sgd(0.1)), "opt_state.*missing here"),
        (lambda: initial(optax.sgd(0.1, momentum=0.9)), "opt_state.*missing there"),
        (
            lambda: train.init_state(
                jax.random.key(0), Variables({"w": jnp.ones(2)}), ADAM
            ),
            "'params/w' is missing there and float32",
        ),
    ],
)
def test_checkpoint_of_another_network_or_optimizer(tmp_path, other, message):
    with train.Checkpointer(tmp_path, every=1) as checkpointer:
        checkpointer.save(1, initial(ADAM))
        checkpointer.wait()
        before = listing(tmp_path)
        with pytest.raises(ValueError, match=message):
            checkpointer.restore(other())
    assert listing(tmp_path) == before


def listing(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def largest(folder):
    return max(
        (p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", [cut, flip, os.unlink])
@pytest.mark.parametrize("part", ["state/ocdbt.process_0", "record", "state/manifest"])
def test_damaged_checkpoint_says_so_and_nothing_changes(tmp_path, damage, part):
    state = initial(ADAM, width=2000)
    with train.Checkpointer(tmp_path, every=1) as checkpointer:
        checkpointer.save(1, state)
        checkpointer.save(2, state.replace(step=state.step + 2))
    target = (
        tmp_path / "2/state/manifest.ocdbt"
        if part == "state/manifest"
        else largest(tmp_path / "2" / part)
    )
    damage(target)
    before = listing(tmp_path)
    with train.Checkpointer(tmp_path, every=1) as checkpointer:
        with pytest.raises(train.DamagedCheckpointError) as caught:
            checkpointer.restore(initial(ADAM, width=2000))
        assert str(tmp_path / "2") in str(caught.value)
        assert "remove that folder to go on from step 1" in str(caught.value)
        with pytest.raises(train.DamagedCheckpointError):
            train.fit(
                STEP,
                initial(ADAM, width=2000),
                batches(),
                steps=5,
                checkpointer=checkpointer,
                progress=False,
            )
        assert_equal(checkpointer.restore(initial(ADAM, width=2000), step=1), state)
    assert listing(tmp_path) == before
    shutil.rmtree(tmp_path / "2")
    with train.Checkpointer(tmp_path, every=1) as checkpointer:
        assert checkpointer.latest_step == 1


def rewrite(folder, **changes):
    """Change a record as another run would have written it; ``None`` takes out."""
    (file,) = (folder / "record").glob("process_*.json")
    content = json.loads(file.read_text().split("\n", 1)[1]) | changes
    text = json.dumps({k: v for k, v in content.items() if v is not None})
    file.write_text(f"{zlib.crc32(text.encode())}\n{text}")


def test_a_checkpoint_of_more_processes_is_sound(tmp_path):
    state, data = initial(ADAM), batches()
    with train.Checkpointer(tmp_path, every=1) as checkpointer:
        checkpointer.save(1, state, data)
        checkpointer.wait()
        rewrite(tmp_path / "1", processes=2)
        with pytest.raises(
            ValueError, match=r"of 2 process.*, this one has 1.*batch in"
        ):
            checkpointer.restore(initial(ADAM), batches())
        assert_equal(checkpointer.restore(initial(ADAM)), state)
        rewrite(tmp_path / "1", processes=None)  # as older versions wrote it
        assert_equal(checkpointer.restore(initial(ADAM), batches()), state)


def test_a_process_that_the_run_did_not_have_reads_the_first_record(
    tmp_path, monkeypatch
):
    with train.Checkpointer(tmp_path, every=1) as checkpointer:
        checkpointer.save(1, initial(ADAM))
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert record.read_record(tmp_path / "1")["processes"] == 1
    rewrite(tmp_path / "1", processes=None)
    assert record.read_record(tmp_path / "1")["processes"] == 1
    rewrite(tmp_path / "1", processes=2)  # then its own has been lost
    with pytest.raises(FileNotFoundError, match="process_1.json"):
        record.read_record(tmp_path / "1")


@pytest.mark.parametrize("part", ["record", "state"])
def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(
    tmp_path, monkeypatch, part
):
    def refuse(*_):
        raise PermissionError(13, "Permission denied", "process_0.json")

    with train.Checkpointer(tmp_path, every=1) as checkpointer:
        checkpointer.save(1, initial(ADAM))
        checkpointer.wait()
        if part == "record":
            monkeypatch.setattr(record, "_written", refuse)
        else:  # orbax says something else; and a test by root can't take a right away
            given = checkpointer._orbax, "load_checkpointables"
            monkeypatch.setattr(*given, lambda *_: {})
            monkeypatch.setattr(checkpoint, "open", refuse, raising=False)
        with pytest.raises(PermissionError, match="process_0.json"):
            checkpointer.restore(initial(ADAM))


def test_foreign_folder_and_missing_step(tmp_path):
    with train.Checkpointer(tmp_path, every=1) as checkpointer:
        with pytest.raises(FileNotFoundError, match="no checkpoint in"):
            checkpointer.restore(initial(ADAM))
        checkpointer.save(1, initial(ADAM))
        with pytest.raises(FileNotFoundError, match=r"of step 7.*\[1\]"):
            checkpointer.restore(initial(ADAM), step=7)
        shutil.rmtree(tmp_path / "1" / "record")
        with pytest.raises(ValueError, match="not written by jaxtransfer"):
            checkpointer.restore(initial(ADAM))


def test_a_step_of_another_run_is_not_overwritten(tmp_path):
    with train.Checkpointer(tmp_path, every=1) as checkpointer:
        checkpointer.save(1, initial(ADAM))
    with train.Checkpointer(tmp_path, every=1) as checkpointer:
        with pytest.raises(FileExistsError, match="another directory"):
            checkpointer.save(1, initial(ADAM))


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="can't be written to"):
        train.Checkpointer(tmp_path / "file" / "checkpoints")


def test_full_disk_is_found_at_the_start(tmp_path, monkeypatch):
    state = initial(ADAM, width=20_000)
    size = 3 * 9 * 20_000 * 4  # parameters and Adam's two moments
    usage = shutil.disk_usage(tmp_path)
    with train.Checkpointer(tmp_path, every=1, keep=2) as checkpointer:
        for copies, fits in ((2.9, False), (3.1, True)):
            free = folders.RESERVE + int(copies * size)
            monkeypatch.setattr(
                shutil, "disk_usage", lambda _, free=free: usage._replace(free=free)
            )
            if fits:
                checkpointer.check_space(state)
            else:
                with pytest.raises(OSError, match="MiB left, this run needs"):
                    train.fit(
                        STEP,
                        state,
                        batches(),
                        steps=1,
                        checkpointer=checkpointer,
                        progress=False,
                    )


@pytest.mark.parametrize("argument", ["every", "keep"])
def test_intervals_must_be_positive(tmp_path, argument):
    with pytest.raises(ValueError, match=f"{argument}: must be at least 1, got 0"):
        train.Checkpointer(tmp_path, **{argument: 0})


def test_record_reads_back_what_it_wrote(tmp_path):
    """By the protocol of orbax, which loads it with the state."""
    (tmp_path / record.RECORD).mkdir()
    folder = tmp_path / record.RECORD

    class Created:
        async def await_creation(self):
            return folder

    async def there_and_back():
        await (await record.Record({"step": 3}).save(Created()))
        empty = record.Record({})
        await (await empty.load(folder))
        return empty

    found = asyncio.run(there_and_back())
    assert vars(found) == vars(record.Record({"step": 3}))
    assert record.read_record(tmp_path) == {"step": 3, "processes": 1}
