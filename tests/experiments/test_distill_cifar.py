import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import distill_cifar as study
from experiments.distill_cifar_rows import make_rows
from jaxtransfer import nets, pretrained
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
    images = study.read(config, "train")
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


def test_what_is_looked_up_is_what_the_teacher_says(key):
    """Of the image and of its mirror image, for any number of images."""
    model = study.resnet(SMOKE, 8)
    inputs = jax.random.normal(key, (3, 32, 32, 3))
    variables = jax.jit(model.init)(key, inputs)
    found = study.look(model, variables, inputs, ("layer1_0",))
    for number, images in enumerate((inputs, inputs[:, :, ::-1])):
        output, features, _ = model.apply(variables, images, taps=("layer1_0",))
        np.testing.assert_allclose(found[""][number], output, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            found["layer1_0"][number], features["layer1_0"], rtol=1e-4, atol=1e-4
        )


def test_a_batch_is_mirrored_as_the_teacher_saw_it(key):
    """The teacher's values of a batch are those of the images in it."""
    images = study.Images(
        jax.random.normal(key, (5, 4, 4, 1)), jnp.arange(5, dtype=jnp.int32)
    )
    both = jnp.stack([images.inputs, images.inputs[:, :, ::-1]])
    taught = {"": both.reshape(2, 5, -1)}
    state = study.init_state(
        key, study.Variables({"w": jnp.zeros(())}), study.optax.sgd(0.1)
    )
    batch = study.sample(SMOKE, state, images, taught)
    np.testing.assert_array_equal(
        batch["inputs"].reshape(SMOKE.batch_size, -1), batch["teacher"][""]
    )
    np.testing.assert_array_equal(batch["labels"], batch["index"])


def test_as_many_images_of_each_class(key):
    labels = jnp.arange(50) % 10
    chosen = study.subset(labels, 3, seed=1)
    assert np.bincount(labels[chosen]).tolist() == [3] * 10
    assert len(set(chosen.tolist())) == 30
    assert (chosen != study.subset(labels, 3, seed=2)).any()
    with pytest.raises(ValueError, match="per_class: got 6, but a class has 5 images"):
        study.subset(labels, 6, seed=1)


def test_the_teacher_s_file(tmp_path, key):
    config = dataclasses.replace(
        SMOKE, weights="small.safetensors", data_dir=str(tmp_path)
    )
    with pytest.raises(FileNotFoundError, match="no file 'small.*--weights"):
        study.read_teacher(config, study.resnet(config, 8))
    model = study.resnet(config, 8)
    variables = jax.jit(model.init)(key, jnp.ones((1, 32, 32, 3)))
    (tmp_path / "weights").mkdir()
    pretrained.save(tmp_path / "weights" / "small.safetensors", variables)
    found = study.read_teacher(config, model)
    jax.tree.map(np.testing.assert_array_equal, found, variables)


def test_an_unknown_row_is_refused(tmp_path):
    config = dataclasses.replace(SMOKE, run_dir=tmp_path, rows=("magic",))
    with pytest.raises(ValueError, match="rows: no 'magic'; choose among"):
        study.main(config)
    assert not list(tmp_path.iterdir())
