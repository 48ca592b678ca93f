import dataclasses
import json

import numpy as np
import pytest

from experiments import maml_sinusoid as study

SMALL = dataclasses.replace(
    study.PRESETS["smoke"],
    widths=(16, 16),
    meta_steps=4,
    block=2,
    test_shots=(5,),
    steps=1,
    test_tasks=10,
    validation_tasks=10,
)


def test_same_seed_prints_the_same_table(tmp_path, capsys):
    config = dataclasses.replace(SMALL, run_dir=tmp_path)
    first = study.main(config)
    printed = capsys.readouterr().out
    assert study.main(config) == first
    assert printed.splitlines()[:5] == capsys.readouterr().out.splitlines()[:5]
    assert list(first) == ["5 points, 0 steps", "5 points, 1 steps"]
    values = first["5 points, 1 steps"]
    assert list(values) == ["untrained", "pretrained", "MAML", "MAML++"]
    assert all(len(v) == 2 and np.isfinite(v).all() for v in values.values())
    assert all(one != other for one, other in values.values()), "seeds are alike"
    folder = min((tmp_path / "maml_sinusoid").iterdir())
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert len(rows) == 8 and {row["baseline"] for row in rows} == {None, "pretrained"}


def test_training_tells_maml_from_its_baseline(tmp_path):
    """A short run already adapts; the pretrained network can't."""
    config = dataclasses.replace(
        study.PRESETS["smoke"],
        run_dir=tmp_path,
        learning_rate=1e-2,
        inner_steps=3,
        meta_steps=400,
        block=200,
        test_shots=(10,),
        seeds=1,
        test_tasks=100,
    )
    table = study.main(config)
    first, last = table["10 points, 1 steps"], table["10 points, 10 steps"]
    assert last["MAML"][0] < 0.7 * last["pretrained"][0]
    assert first["MAML++"][0] < 0.7 * first["pretrained"][0]
    assert "MAML++" not in last  # It has rates for three steps.


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    config = dataclasses.replace(SMALL, run_dir=tmp_path, inner_learning_rate=1e30)
    message = "MAML: the loss of a seed is not finite within updates 0 to 2 .*--inner"
    with pytest.raises(FloatingPointError, match=message):
        study.main(config)


def test_all_points_of_all_tasks_are_one_batch(key):
    tasks = study.episodes.sinusoid(key, tasks=3, shots=2, queries=4)
    batch = study.points(tasks)
    assert batch["inputs"].shape == batch["labels"].shape == (18, 1)

    def pairs(arrays):
        columns = [np.ravel(arrays[name]).tolist() for name in ("inputs", "labels")]
        return sorted(zip(*columns, strict=True))

    assert pairs(batch) == sorted(pairs(tasks["support"]) + pairs(tasks["query"]))


@pytest.mark.parametrize(
    "option", ["block", "inner_steps", "validation_tasks", "test_tasks"]
)
def test_zero_as_an_option_is_refused(tmp_path, option):
    config = dataclasses.replace(SMALL, run_dir=tmp_path, **{option: 0})
    with pytest.raises(ValueError, match=f"^{option}: 0 must be 1 or more"):
        study.main(config)
    assert not list(tmp_path.iterdir())


def test_a_baseline_needs_a_rate(tmp_path):
    with pytest.raises(ValueError, match="baseline_rates: none"):
        study.main(dataclasses.replace(SMALL, run_dir=tmp_path, baseline_rates=()))


def test_block_must_divide_the_steps(tmp_path):
    with pytest.raises(ValueError, match="meta_steps: 5 must be a multiple of block"):
        study.main(dataclasses.replace(SMALL, run_dir=tmp_path, meta_steps=5))
    assert not list(tmp_path.iterdir())
