import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import omniglot_challenge as study
from experiments import omniglot_characters as characters
from experiments.few_shot_recipes import in_turns
from jaxtransfer import data
from jaxtransfer.methods import meta
from jaxtransfer.model import from_linen
from jaxtransfer.nets import MLP

SMOKE = study.PRESETS["smoke"]


@pytest.fixture(scope="module")
def pool():
    return characters.pool_of(characters.synthetic(jax.random.key(1), 3, 5, 12))


@pytest.mark.slow
def test_smoke_names_every_row_and_learns(tmp_path):
    """On the set that the options name; ensembles are rows of their own."""
    config = dataclasses.replace(
        SMOKE, run_dir=tmp_path, sets=("background",), steps=60
    )
    results = study.main(config)
    assert {name: len(values) for name, values in results.items()} == {
        "pixels, nearest neighbour": 1,
        "modified Hausdorff distance": 1,
        "ProtoNet, background": 2,
        "ProtoNet, background, 3 views": 2,
        "ProtoNet, background, seeds together": 1,
        "ProtoNet, background, 3 views, seeds together": 1,
    }
    assert np.mean(results["ProtoNet, background"]) < 70  # of 95 by chance
    (folder,) = (tmp_path / "omniglot_challenge").iterdir()
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert [row["method"] for row in rows] == list(results)
    assert {row["task"] for row in rows} == {"blots"}


def test_loss_is_that_of_prototypical_networks(key):
    """The mean over which drawing is the support, without batch statistics."""
    model = from_linen(MLP(5, widths=(8,)))
    images = jax.random.uniform(key, (1, 3, 4, 8, 8, 1))
    learner = meta.prototypical(model, ways=3, distance="cosine", learn_scale=True)
    start = learner.init(model.init(key, images[0, 0]))
    published = jax.jit(meta.objective(learner))
    found, (_, measured) = in_turns(model)(start.params, {}, {}, images, key)

    def part(numbers):
        chosen = images[0][:, jnp.array(numbers)].reshape(1, -1, 8, 8, 1)
        return {
            "inputs": chosen,
            "labels": jnp.repeat(jnp.arange(3), len(numbers))[None],
        }

    values = []
    for number in range(4):
        rest = [other for other in range(4) if other != number]
        episodes = {"support": part([number]), "query": part(rest)}
        loss, (_, own) = published(start.params, {}, {}, episodes, key)
        values.append((loss, own["accuracy"].total))
    losses, correct = map(np.array, zip(*values, strict=True))
    np.testing.assert_allclose(found, losses.mean(), rtol=1e-5)
    assert measured["accuracy"].count == 4 * 9
    assert measured["accuracy"].total == correct.sum()


@pytest.mark.parametrize("within", [0.0, 1.0])
def test_tasks_are_within_an_alphabet_as_often_as_asked(key, pool, within):
    """All twenty blots of an alphabet, or blots of several; drawings of one class."""
    config = dataclasses.replace(
        SMOKE,
        within=within,
        tasks=4,
        rotations=False,
        rotation=0.0,
        shear=0.0,
        scale=1.0,
        shift=0.0,
    )
    images = study.sampler(config, pool)(key, pool.inputs)
    assert images.shape == (4, 20, 3, 12, 12, 1)
    number = {image.tobytes(): n for n, image in enumerate(np.asarray(pool.inputs))}
    rows = np.array(
        [number[image.tobytes()] for image in np.asarray(images).reshape(-1, 12, 12, 1)]
    ).reshape(4, 20, 3)
    classes = rows // 5
    assert np.all(classes == classes[..., :1])
    assert all(len(set(task.ravel().tolist())) == 60 for task in rows)
    alphabets = [len(set((task[:, 0] // 20).tolist())) for task in classes]
    assert all(count == 1 if within else count > 1 for count in alphabets)


def test_held_out_alphabets_are_judged_and_never_trained_on():
    """Runs of held-out drawings alone; both drawings of a class are of one class."""
    source = characters.Characters(synthetic=True, size=12)
    arrays = source.read("background")
    rest, runs = source.hold_out(arrays, 2, tasks=3)
    assert len(np.unique(rest["alphabet"])) == 4
    number = {image.tobytes(): n for n, image in enumerate(arrays["inputs"])}
    kept = {image.tobytes() for image in rest["inputs"]}
    for training, test in zip(runs.training, runs.test, strict=True):
        pairs = [
            (number[a.tobytes()] // 8, number[b.tobytes()] // 8)
            for a, b in zip(training, test, strict=True)
        ]
        assert all(first == second for first, second in pairs)
        assert len(set(pairs)) == 20 and len({first // 20 for first, _ in pairs}) == 1
        assert not kept & {image.tobytes() for image in (*training, *test)}
    with pytest.raises(ValueError, match="held_out: 6 must be less than 6"):
        source.hold_out(arrays, 6)


def test_untrained_rows_find_exact_copies():
    """Both baselines know a drawing again, wherever it stands in the run."""
    arrays = characters.synthetic(jax.random.key(2), 1, 1, 12)
    order = np.random.default_rng(0).permutation(20)
    training = arrays["inputs"][None]
    runs = data.ChallengeRuns(training, training[:, order], order[None])
    for similarity in study.untrained(runs, runs).values():
        assert data.challenge_error(similarity, runs.answers) == 0


def test_one_drawing_is_refused(tmp_path):
    config = dataclasses.replace(SMOKE, run_dir=tmp_path, drawings=1)
    with pytest.raises(ValueError, match="drawings: 1 must be 2 or more"):
        study.main(config)
    assert not list(tmp_path.iterdir())
