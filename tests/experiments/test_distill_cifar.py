import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import distill_cifar as study
from experiments.distill_cifar_rows import make_rows
from jaxtransfer import nets
from jaxtransfer.model import from_linen

SMOKE = study.PRESETS["smoke"]


def test_smoke_writes_a_table(tmp_path):
    """Rows of all kinds: a memory, a bridge and another head, a cohort, none."""
    rows = ("KD", "CRD", "SimKD", "mutual")
    config = dataclasses.replace(SMOKE, run_dir=tmp_path, rows=rows, seeds=1)
    found = study.main(config)
    assert [row.method for row in found["rows"]] == list(rows)
    (file,) = tmp_path.rglob("results.json")
    written = json.loads(file.read_text())["rows"]
    assert all(0 <= value <= 100 for row in written for value in row["values"])


def test_seeds_side_by_side_learn_the_same(key):
    """One program of many updates, against one call an update, seed after seed."""
    config = dataclasses.replace(SMOKE, updates=4)
    teacher = study.resnet(config, config.teacher_depth)
    variables = study.read_teacher(config, teacher)
    images = study.read(config, "train", 2)
    taps = study.last_blocks(config.teacher_depth)
    lessons = []
    for start in (0, 5):
        own = study.Images(*(part[start:][:15] for part in images))
        taught = study.look(teacher, variables, own.inputs, taps)
        lessons.append(study.Lesson(own, taught, variables))
    keys = list(jax.random.split(key))
    found = []
    for side_by_side in (False, True):
        config = dataclasses.replace(config, side_by_side=side_by_side)
        student = study.make_student(config, "CRD", teacher)
        states = list(map(student.start, keys, lessons))
        given = [(own.images, own.taught) for own in lessons]
        if side_by_side:
            found.append(study.follow_together("CRD", states, student, given, 4))
        else:
            pairs = zip(states, given, strict=True)
            found.append(
                [study.follow("CRD", s, student.update, g, 4) for s, g in pairs]
            )
    for one, other in zip(*found, strict=True):
        assert int(one.step) == int(other.step) == 4
        for a, b in zip(
            jax.tree.leaves((one.params, one.model_state)),
            jax.tree.leaves((other.params, other.model_state)),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_every_row_can_begin(key):
    """Taps, bridges and memories of all rows exist for student and teacher."""
    student, teacher = (nets.ResNet(10, depth=depth, filters=4) for depth in (8, 14))
    x, labels = jnp.ones((2, 32, 32, 3)), jnp.arange(20) % 10
    own, given = (
        jax.eval_shape(from_linen(net).init, key, x) for net in (student, teacher)
    )
    for name, terms in make_rows(8, 14, 4, key, labels).items():
        task = study.distill.objective(
            from_linen(student), from_linen(teacher), terms=terms
        )

        def run(own, given, terms=terms, task=task):
            begun = study.distill.start(
                key,
                from_linen(student),
                from_linen(teacher),
                terms,
                student_variables=own,
                teacher_variables=given,
                inputs=x,
            )
            batch = {"inputs": x, "labels": labels[:2], "index": jnp.arange(2)}
            return task(
                begun.params, {"teacher": given}, begun.model_state, batch, key
            )[0]

        assert jax.eval_shape(run, own, given).shape == (), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": ("magic",)}, "rows: no 'magic'; choose among"),
        ({"batch_size": 0}, "batch_size: 0 must be 1 or more"),
        ({"test_images": -5}, "test_images: -5 must be 1 or more"),
        ({"per_class": (2, 0)}, "per_class: 0 must be 1 or more"),
        ({"updates": 0}, "updates: 0 must be 1 or more"),
        ({"learning_rate": -1.0}, "learning_rate: -1.0 must be greater than 0"),
        ({"kd_temperature": float("nan")}, "kd_temperature: must be a number, got nan"),
    ],
)
def test_what_can_t_be_is_refused_before_any_work(tmp_path, options, message):
    config = dataclasses.replace(SMOKE, run_dir=tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        study.main(config)
    assert not list(tmp_path.iterdir())


def test_only_layers_that_a_row_learns_from_are_looked_at():
    config = dataclasses.replace(SMOKE, teacher_depth=20, student_depth=8)
    first, second, third = study.last_blocks(20)
    for rows, taps in (
        (["labels alone", "KD", "mutual"], ()),
        (["hint"], (second,)),
        (["SimKD", "CRD"], (third,)),
        (["KD", "hint", "similarity"], (second, third)),
        (["review"], (first, second, third)),
    ):
        assert study.looked_at(config, rows) == taps


def test_values_of_earlier_runs_are_taken_up(tmp_path, monkeypatch):
    """Rows and seeds that are there are not trained again; gains are over both."""
    config = dataclasses.replace(SMOKE, run_dir=tmp_path, rows=("tuned KD",), seeds=1)
    study.main(config)
    (first,) = tmp_path.rglob("values.jsonl")
    line = json.loads(first.read_text())
    first.write_text(json.dumps(line | {"value": 55.0}) + "\n")
    trained = []
    follow = study.follow
    monkeypatch.setattr(
        study, "follow", lambda name, *rest: trained.append(name) or follow(name, *rest)
    )
    again = dataclasses.replace(
        config, rows=("labels alone", "tuned KD"), seeds=2, earlier=(first.parent,)
    )
    rows = study.main(again)["rows"]
    assert sorted(trained) == ["labels alone", "labels alone", "tuned KD"]
    assert rows[1].values[0] == 55.0 and rows[1].baselines == ("labels alone",)
    (folder,) = set(path.parent for path in tmp_path.rglob("table.md")) - {first.parent}
    table = (folder / "table.md").read_text().splitlines()
    assert "| labels alone |" in table[-1].partition("±")[2]
    with pytest.raises(ValueError, match="run with updates = 2, this run has 3"):
        study.main(dataclasses.replace(again, updates=3))
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        study.main(dataclasses.replace(again, earlier=(tmp_path,)))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"per_class": (99,)}, "got 99, but a class has"), ({"seeds": 0}, "seeds: 0 m")],
)
def test_counts_that_can_not_be(tmp_path, options, message, monkeypatch):
    monkeypatch.setattr(study, "accuracy", lambda *_: pytest.fail("work began"))
    monkeypatch.setattr(
        study, "read", lambda *_: study.Images(None, jnp.arange(20) % 10)
    )
    config = dataclasses.replace(SMOKE, run_dir=tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        study.main(config)


def test_all_images_leave_none_to_score_with(tmp_path):
    config = dataclasses.replace(SMOKE, run_dir=tmp_path, scored_on="valid")
    with pytest.raises(ValueError, match="none are left to score with.*--per-class"):
        study.main(config)


def test_another_number_of_classes(tmp_path):
    config = dataclasses.replace(
        SMOKE, run_dir=tmp_path, dataset="cifar100", rows=("SimKD",), seeds=1
    )
    study.main(config)
    (file,) = tmp_path.rglob("results.json")
    record = json.loads(file.read_text())
    assert record["title"].startswith("CIFAR-100: ")
    assert record["rows"][0]["task"] == "200 images"
