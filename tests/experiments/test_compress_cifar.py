import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments import compress_cifar as study

SMOKE = study.PRESETS["smoke"]


@pytest.mark.slow
def test_smoke_writes_table_figure_and_student(tmp_path):
    """The report says what each network is, and the last student runs as a file."""
    rows = ("labels alone", "distilled, pruned", "distilled, int8")
    config = dataclasses.replace(SMOKE, run_dir=tmp_path, rows=rows, seeds=1)
    found = study.main(config)
    assert [row.method for row in found["rows"]] == list(rows)
    costs = {row.name: row for row in found["measured"]}
    assert list(costs) == ["teacher", *rows]
    plain, pruned, integers = (costs[row] for row in rows)
    assert plain.flops == pruned.flops < costs["teacher"].flops
    assert pruned.nonzero < 0.5 * plain.nonzero and pruned.bytes == plain.bytes
    assert pruned.packed_bytes < 0.6 * plain.packed_bytes
    assert integers.bytes < 0.6 * plain.bytes
    folder = found["folder"]
    assert (folder / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert len((folder / "report.md").read_text().splitlines()) == 2 + len(costs)
    written = json.loads((folder / "results.json").read_text())["rows"]
    baselines = [row["baseline"] for row in written]
    assert baselines == [None, "distilled", "int8"]
    file = found["exported"].student
    student = jax.export.deserialize(bytearray(file.read_bytes()))
    assert student.call(np.zeros((2, 32, 32, 3), np.float32)).shape == (2, 10)


def test_the_share_ends_where_masks_are_made_anew():
    for updates, every in ((500, 10), (10, 2), (3, 2), (1, 1), (997, 100)):
        config = dataclasses.replace(SMOKE, updates=updates, prune_every=every)
        schedule, share = study.sparsity_schedule(config), np.float32(config.sparsity)
        last = max(6 * updates // 10 // every, 1) * every
        assert schedule(last) == share > schedule(last - every)


def test_rows_begin_with_the_same_weights(key):
    teacher = study.resnet(SMOKE, SMOKE.teacher_depth)
    inputs = jax.numpy.ones((2, 32, 32, 3))
    given = jax.jit(teacher.init)(key, inputs)
    first, other = (
        study.make_student(SMOKE, recipe, teacher).start(key, inputs, given).params
        for recipe in (study.Recipe(), study.Recipe(distilled=True, integers=True))
    )
    assert set(first) == {"student"} and set(other) == {"student", "bridges"}
    jax.tree.map(np.testing.assert_array_equal, first["student"], other["student"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": ("magic",)}, "rows: no 'magic'; choose among"),
        ({"sparsity": 1.2}, "sparsity: 0 to 1, got 1.2"),
        ({"kd_weight": -0.1}, "kd_weight: 0 to 1, got -0.1"),
        ({"updates": 0}, "updates: 0 must be 1 or more"),
        ({"latency_batch": 0}, "latency_batch: 0 must be 1 or more"),
    ],
)
def test_what_can_t_be_is_refused_before_any_work(tmp_path, options, message):
    config = dataclasses.replace(SMOKE, run_dir=tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        study.main(config)
    assert not list(tmp_path.iterdir())
