"""The distillation study end to end on embedded digits, and what its students see."""

import dataclasses

import numpy as np
import pytest

from experiments import distill_digits
from experiments.distill_digits import CROSS, PRESETS, STUDENTS

SMOKE = PRESETS["smoke"]


@pytest.mark.slow
def test_smoke_has_every_row_and_writes_a_table(tmp_path):
    config = dataclasses.replace(SMOKE, run_dir=tmp_path)
    found = distill_digits.main(config)
    assert [row.method for row in found["rows"]] == [*STUDENTS, *CROSS]
    assert all(len(row.values) == config.seeds for row in found["rows"])
    table = (found["folder"] / "table.md").read_text()
    assert all(method in table for method in (*STUDENTS, *CROSS))


def test_labelled_rows_are_balanced_and_of_one_shape():
    labels = np.arange(1000) % 10
    rows = distill_digits.labelled_rows(labels, 100, 0, SMOKE)
    assert len(rows) == len(labels) and len(set(rows)) == 100
    assert np.bincount(labels[rows]).tolist() == [100] * 10
    again = distill_digits.labelled_rows(labels, 100, 0, SMOKE)
    other = distill_digits.labelled_rows(labels, 100, 1, SMOKE)
    np.testing.assert_array_equal(rows, again)
    assert set(rows) != set(other)


def test_all_labels_are_all_rows():
    rows = distill_digits.labelled_rows(np.arange(50) % 10, 0, 0, SMOKE)
    np.testing.assert_array_equal(rows, np.arange(50))


def test_a_student_that_diverged_is_no_result(tmp_path, monkeypatch):
    def run(method, config):
        return lambda *given: (np.zeros(config.seeds), np.full(config.seeds, np.nan))

    teacher = None, [0.0, 0.0]
    monkeypatch.setattr(distill_digits, "train_teacher", lambda *given: teacher)
    monkeypatch.setattr(distill_digits, "make_student_run", run)
    config = dataclasses.replace(SMOKE, run_dir=tmp_path)
    message = f"{STUDENTS[0]}: the loss is not finite after {config.steps} updates"
    with pytest.raises(FloatingPointError, match=message):
        distill_digits.main(config)


@pytest.mark.parametrize("count", [15, -10, 10_000])
def test_impossible_label_counts_are_refused(tmp_path, count):
    config = dataclasses.replace(SMOKE, run_dir=tmp_path, labels=(count,))
    with pytest.raises(ValueError, match="labels"):
        distill_digits.main(config)
