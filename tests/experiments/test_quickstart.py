"""The quickstart end to end: nothing but the package and scikit-learn's digits."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import quickstart

SMOKE = quickstart.PRESETS["smoke"]


@pytest.mark.slow
def test_smoke_has_five_ways_and_begins_alike_again(tmp_path, capsys, monkeypatch):
    """Again: two ways; the others repeat in the tests of their studies."""
    config = dataclasses.replace(SMOKE, run_dir=tmp_path)
    first = quickstart.main(config)
    assert all(len(row.values) == config.seeds for row in first)
    tasks = list(dict.fromkeys(row.task for row in first))
    assert len(tasks) == 5
    (folder,) = (tmp_path / "quickstart").iterdir()
    assert (folder / "quickstart.png").read_bytes()[:4] == b"\x89PNG"
    written = json.loads((folder / "results.json").read_text())["rows"]
    assert len(written) == len(first)
    assert str(folder) in capsys.readouterr().out.strip().splitlines()[-1]
    for way in ("distillation", "meta_learning", "adaptation"):
        monkeypatch.setattr(quickstart, way, lambda *given: [])
    monkeypatch.setattr(quickstart, "draw", lambda *given: None)
    again = quickstart.main(config)
    assert again == [row for row in first if row.task in tasks[:2]]


def test_a_run_folder_that_cannot_be_made_is_refused_before_any_work(
    tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(quickstart, "load_digits", lambda: pytest.fail("work began"))
    config = dataclasses.replace(SMOKE, run_dir=tmp_path / "file")
    with pytest.raises(OSError, match="--run-dir"):
        quickstart.main(config)


def test_a_student_has_labels(tmp_path):
    config = dataclasses.replace(SMOKE, run_dir=tmp_path, student_labels=0)
    with pytest.raises(ValueError, match="student_labels: 0 must be 1 or more"):
        quickstart.main(config)


def test_help_shows_options_with_their_meaning(capsys):
    with pytest.raises(SystemExit) as stop:
        quickstart.command_line(quickstart.main, quickstart.PRESETS, args=["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "--labels-a-class" in shown and "Target labels of each class" in shown


def test_the_few_labels_are_balanced_and_differ_between_seeds():
    digits = quickstart.load_digits()
    few = quickstart.few(digits.second_half, 3, SMOKE)
    assert few["inputs"].shape == (SMOKE.seeds, 30, 8, 8, 1)
    for labels in few["labels"]:
        assert np.bincount(labels).tolist() == [3] * 10
    assert not np.array_equal(few["inputs"][0], few["inputs"][1])
