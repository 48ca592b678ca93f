"""A task of one's own: folders and a network in, predictions and a picture out."""

import csv
import dataclasses
import json
import shutil

import jax
import numpy as np
import optax
import pytest
from PIL import Image

from experiments import adapt_task, few_shot_saved
from experiments.common import command_line
from experiments.few_shot_recipes import RECIPES
from jaxtransfer import data
from jaxtransfer.train import DamagedCheckpointError

ABOUT = {
    "filters": 4,
    "image_size": 8,
    "ways": 3,
    "shots": 1,
    "rate": 0.4,
    "steps": 2,
    "test_steps": 5,
    "statistics": "support",
    "invert": True,
}
STRUCTURES = ("MAML++", "CAVIA", "iMAML", *few_shot_saved.ANY_WAYS)
"""Methods whose meta-parameters or heads are built unlike MAML's."""


def untrained(method):
    """The network of a method, with random weights where a checkpoint has any."""
    blank = few_shot_saved._blank({"method": method, **ABOUT})
    leaves, structure = jax.tree.flatten(blank)
    random = np.random.default_rng(0)
    drawn = [random.normal(0, 0.3, leaf.shape).astype(leaf.dtype) for leaf in leaves]
    return jax.tree.unflatten(structure, drawn)


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "networks"
    for method in ("ProtoNet", "MAML"):
        variables = untrained(method)
        if method == "MAML":  # wins wherever the third class is not masked
            variables.params["head"]["bias"][2] = 100.0
        few_shot_saved.save(
            folder / method, method=method, variables=variables, **ABOUT
        )
    return folder


SHAPES = {
    "bar": np.s_[8:12, :],
    "corner": np.s_[:10, :10],
    "post": np.s_[:, 8:12],
    "square": np.s_[5:15, 5:15],
}


def draw(folder, counts):
    """Dark shapes on white, a class each, every image a little different."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.full((20, 20), 255, np.uint8)
            pixels[SHAPES[name]] = 10 * number
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def options(tmp_path, checkpoint, **more):
    return adapt_task.Config(
        checkpoint=checkpoint,
        support=tmp_path / "support",
        query=tmp_path / "query",
        run_dir=tmp_path / "runs",
        **more,
    )


def test_more_classes_than_in_training_with_unequal_shots(tmp_path, networks, capsys):
    """A metric method tells four classes apart, and everything is written."""
    draw(tmp_path / "support", {"bar": 3, "corner": 1, "post": 2, "square": 1})
    draw(tmp_path / "query", {"post": 2, "bar": 1, "square": 2})
    places = [f"--{name}={tmp_path / name}" for name in ("support", "query")]
    found = command_line(
        adapt_task.main,
        adapt_task.PRESETS,
        args=[
            f"--checkpoint={networks / 'ProtoNet'}",
            f"--run-dir={tmp_path}",
            *places,
        ],
    )
    true = ["bar", "post", "post", "square", "square"]
    assert [row["class"] for row in found] == true
    assert [row["prediction"] for row in found] == true
    for row in found:
        assert list(row["probabilities"]) == ["bar", "corner", "post", "square"]
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert row["confidence"] == max(row["probabilities"].values())
    (folder,) = (tmp_path / "adapt_task").iterdir()
    assert (folder / "adapt_task.png").read_bytes()[:4] == b"\x89PNG"
    with (folder / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["prediction"] for row in rows] == true
    assert rows[0]["image"] == str(tmp_path / "query" / "bar" / "0.png")
    assert float(rows[0]["p(bar)"]) == found[0]["confidence"]
    written = json.loads((folder / "predictions.json").read_text())
    assert written["accuracy"] == 1.0 and len(written["predictions"]) == 5
    shown = capsys.readouterr().out
    assert "accuracy: 5 of 5, 100.0% (chance is 25.0 %)" in shown
    assert "--invert False" not in shown


def test_fewer_classes_than_outputs_and_a_query_without_labels(
    tmp_path, networks, capsys
):
    """MAML with a head of three learns two classes; the third is out of the game."""
    draw(tmp_path / "support", {"bar": 2, "post": 1})
    (tmp_path / "query").mkdir()
    for name in ("bar", "post"):
        image = tmp_path / "support" / name / "0.png"
        shutil.copy(image, tmp_path / "query" / f"some {name}.png")
    found = adapt_task.main(options(tmp_path, networks / "MAML"))
    assert [row["prediction"] for row in found] == ["bar", "post"]
    assert all("class" not in row for row in found)
    assert all(list(row["probabilities"]) == ["bar", "post"] for row in found)
    (folder,) = (tmp_path / "runs" / "adapt_task").iterdir()
    losses = json.loads((folder / "predictions.json").read_text())
    losses = losses["support loss by step"]
    assert len(losses) == 6 and losses[-1] < losses[0] < 10
    assert "accuracy" not in capsys.readouterr().out


def test_light_ink_on_dark_is_noticed(tmp_path, networks, capsys):
    draw(tmp_path / "support", {"bar": 1, "post": 1})
    draw(tmp_path / "query", {"bar": 1})
    for image in tmp_path.rglob("*.png"):
        Image.fromarray(255 - np.asarray(Image.open(image))).save(image)
    saved = few_shot_saved.load(networks / "ProtoNet")
    wrong, _, _ = adapt_task.read(options(tmp_path, networks), saved)
    assert "--invert False" in capsys.readouterr().out
    right, _, _ = adapt_task.read(options(tmp_path, networks, invert=False), saved)
    assert "--invert False" not in capsys.readouterr().out
    np.testing.assert_allclose(right["inputs"], 1 - wrong["inputs"], atol=1e-6)


@pytest.mark.parametrize("method", STRUCTURES)
def test_methods_can_be_built_for_another_number_of_classes(method):
    """Traced only; methods that compare, for more classes than in training."""
    ways = 4 if method in few_shot_saved.ANY_WAYS else 2
    about = {"method": method, **ABOUT}
    saved = few_shot_saved.Saved(**about, variables=few_shot_saved._blank(about))
    steps = 3 if RECIPES[method].descends else None
    learner, variables = saved.learner(ways, steps=steps)
    rows = {
        "inputs": np.zeros((5, 8, 8, 1), np.float32),
        "labels": np.arange(5) % ways,
    }

    def outputs(variables, rows, key):
        adapted = learner.adapt(variables.params, {}, variables.model_state, rows, key)
        return learner.predict(adapted.params, {}, adapted.model_state, rows["inputs"])

    shape = jax.eval_shape(outputs, variables, rows, jax.random.key(0)).shape
    assert shape == (5, max(ways, 3))


def test_what_is_loaded_is_what_was_saved(networks):
    saved = few_shot_saved.load(networks / "ProtoNet")
    assert few_shot_saved._about(saved) == {"method": "ProtoNet", **ABOUT}
    jax.tree.map(np.testing.assert_array_equal, saved.variables, untrained("ProtoNet"))
    assert saved.reading() == {"size": 8, "channels": 1, "invert": True}
    with pytest.raises(FileExistsError):
        few_shot_saved.save(
            networks / "ProtoNet",
            method="ProtoNet",
            variables=saved.variables,
            **ABOUT,
        )


def support_of(saved, folder, counts):
    return data.image_folder(draw(folder, counts), **saved.reading())


def test_more_classes_than_outputs_are_refused(tmp_path, networks):
    saved = few_shot_saved.load(networks / "MAML")
    support = support_of(saved, tmp_path, dict.fromkeys(SHAPES, 1))
    with pytest.raises(ValueError, match=r"4 classes.* head of 3.*--ways 4.*ProtoNet"):
        adapt_task.adapt(saved, support)


def test_a_rate_that_diverges_is_named_with_step_and_loss(tmp_path, networks):
    saved = few_shot_saved.load(networks / "MAML")
    support = support_of(saved, tmp_path, {"bar": 1, "post": 1})
    with pytest.raises(FloatingPointError, match=r"rate: 1e\+30 .*after step 1 \("):
        adapt_task.adapt(saved, support, rate=1e30, steps=1)


OWN = {
    "inputs": np.random.default_rng(1).random((2, 8, 8, 1), np.float32),
    "labels": np.arange(2),
    "names": ["bar", "post"],
}
"""A support in memory, an image a class."""


def saved_as(method, **changes):
    about = {"method": method, **ABOUT, **changes}
    return few_shot_saved.Saved(**about, variables=untrained(method))


@pytest.mark.parametrize("method", ["Reptile", "iMAML"])
def test_as_many_steps_as_asked_are_taken(method):
    """Also by methods that take no fewer than five in training."""
    assert len(adapt_task.adapt(saved_as(method), OWN, steps=1).losses) == 2
    assert len(adapt_task.adapt(saved_as(method, test_steps=2), OWN).losses) == 3


@pytest.mark.parametrize(
    "method", ["MAML", "Reptile", "BOIL", "CAVIA", "iMAML", "ProtoMAML"]
)
def test_the_rate_is_the_one_asked_for(method, monkeypatch):
    saved, taken, sgd = saved_as(method), [], optax.sgd
    monkeypatch.setattr(optax, "sgd", lambda rate: taken.append(rate) or sgd(rate))
    saved.learner(2)
    saved.learner(2, rate=0.1)
    assert taken == [ABOUT["rate"], 0.1]


@pytest.mark.parametrize(
    ("method", "why"),
    [("Meta-SGD", "learned its rates"), ("MAML++", "learned its rates")]
    + [(name, "no gradient steps") for name in few_shot_saved.ANY_WAYS[1:]],
)
def test_a_rate_is_refused_where_there_is_none(method, why):
    with pytest.raises(ValueError, match=f"^rate: got 0.1, but .*none to .*{why}"):
        adapt_task.adapt(saved_as(method), OWN, rate=0.1)


def test_steps_are_refused_where_there_are_none():
    with pytest.raises(ValueError, match="^steps: got 3, but ProtoNet takes no grad"):
        adapt_task.adapt(saved_as("ProtoNet"), OWN, steps=3)


@pytest.mark.parametrize("rate", [0.0, -0.1, float("nan"), float("inf")])
def test_a_rate_that_is_not_positive_is_refused(rate):
    with pytest.raises(ValueError, match=r"^rate: got .* positive and finite"):
        adapt_task.adapt(saved_as("MAML"), OWN, rate=rate)


def test_weights_that_are_not_finite_do_not_blame_a_rate_nobody_chose():
    saved = saved_as("Meta-SGD")
    bad = jax.tree.map(lambda leaf: leaf * np.nan, saved.variables)
    with pytest.raises(FloatingPointError, match="^the steps diverged, or the weights"):
        adapt_task.adapt(dataclasses.replace(saved, variables=bad), OWN)


def test_steps_that_raise_the_loss_are_told_with_the_remedy(
    tmp_path, networks, capsys, monkeypatch
):
    draw(tmp_path / "support", {"bar": 1, "post": 1})
    draw(tmp_path / "query", {"bar": 1})
    config = options(tmp_path, networks / "MAML", rate=1e6)

    def told(*losses):
        task = adapt_task.Task(lambda inputs: np.full((1, 2), 0.5), np.array(losses))
        monkeypatch.setattr(adapt_task, "adapt", lambda *_, **options: task)
        adapt_task.main(config)
        return capsys.readouterr().out

    assert "Warning" not in told(0.696, 0.5) + told(0.696)
    remedy = "from 0.696 to 1.402e+10; try a smaller --rate than 1e+06"
    assert remedy in told(0.696, 0.1, 14020346880.0)


def test_a_support_that_does_not_fit_is_refused(tmp_path, networks):
    saved = few_shot_saved.load(networks / "ProtoNet")
    support = support_of(saved, tmp_path, {"bar": 1, "post": 1})
    with pytest.raises(ValueError, match="at least two"):
        adapt_task.adapt(saved, support | {"names": ["bar"]})
    with pytest.raises(ValueError, match=r"labels\[1\] = 5"):
        adapt_task.adapt(saved, support | {"labels": np.array([0, 5])})
    large = data.image_folder(tmp_path, channels=1)
    with pytest.raises(ValueError, match=r"\(20, 20, 1\).*\(8, 8, 1\).*reading"):
        adapt_task.adapt(saved, large)


@pytest.mark.parametrize(
    ("support", "query", "error", "message"),
    [
        ({"bar": 1}, {"bar": 1}, ValueError, "only one class, 'bar'"),
        ({"bar": 1, "post": 1}, {}, FileNotFoundError, "no folder .*query"),
        ({"bar": 1, "post": 1}, {"bar": 0}, ValueError, "no images in .*query"),
        ({"bar": 1, "post": 1}, {"square": 1}, ValueError, "'square' in .*query"),
    ],
)
def test_folders_that_do_not_fit_leave_no_run(
    tmp_path, networks, support, query, error, message
):
    draw(tmp_path / "support", support)
    draw(tmp_path / "query", query)
    with pytest.raises(error, match=message):
        adapt_task.main(options(tmp_path, networks / "ProtoNet"))
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def copied(tmp_path, networks):
    return shutil.copytree(networks / "MAML", tmp_path / "MAML")


def rewrite(folder, **changes):
    file = folder / few_shot_saved.ABOUT
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    "changes",
    [{"filters": 8}, {"ways": 5}, {"method": "Meta-SGD"}, {"method": "MAML++"}],
)
def test_weights_of_another_network_are_refused(copied, changes):
    rewrite(copied, **changes)
    with pytest.raises(ValueError, match="copy the whole folder of one network"):
        few_shot_saved.load(copied)


def test_damaged_weights_are_named_with_the_remedy(copied):
    files = [file for file in copied.rglob("*") if file.is_file() and "d" in file.parts]
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert files
    with pytest.raises(DamagedCheckpointError, match='again: .*--methods "MAML"'):
        few_shot_saved.load(copied)


@pytest.mark.parametrize("part", ["weights", "weights/0"])
def test_missing_weights_are_named(copied, part):
    shutil.rmtree(copied / part)
    with pytest.raises(FileNotFoundError, match="not complete.*copy the whole folder"):
        few_shot_saved.load(copied)


def test_a_damaged_or_foreign_description_is_refused(copied):
    file = copied / few_shot_saved.ABOUT
    rewrite(copied, method="MAML+")
    with pytest.raises(ValueError, match=r"'MAML\+' is none of .*nearest: 'MAML"):
        few_shot_saved.load(copied)
    text = file.read_text()
    file.write_text(text[: len(text) // 2])
    with pytest.raises(DamagedCheckpointError, match="network.json can't be read"):
        few_shot_saved.load(copied)
    file.write_text('{"weight_decay": 0.1}')
    with pytest.raises(ValueError, match="not of a few-shot network"):
        few_shot_saved.load(copied)


@pytest.mark.parametrize(
    "changes",
    [
        {"filters": "four"},
        {"filters": None},
        {"filters": 4.0},
        {"image_size": 0},
        {"ways": True},
        {"shots": 0},
        {"steps": -1},
        {"test_steps": -1},
        {"rate": "0.4"},
        {"rate": float("nan")},
        {"rate": -0.4},
        {"statistics": ["support"]},
        {"invert": 1},
        {"version": 3},
    ],
)
def test_values_of_the_description_are_checked(copied, changes):
    rewrite(copied, **changes)
    (name,) = changes
    with pytest.raises(ValueError, match=f"^checkpoint '.*MAML': .*{name} "):
        few_shot_saved.load(copied)


@pytest.mark.parametrize(
    ("method", "rate"), [("ProtoMAML", 0.02), ("CAVIA", 1.0), ("Reptile", 0.2)]
)
def test_the_rate_of_an_older_description_is_the_one_it_was_trained_with(
    tmp_path, method, rate
):
    """The first version noted the rate of the study, of which this was made."""
    variables = untrained(method)
    few_shot_saved.save(tmp_path, method=method, variables=variables, **ABOUT)
    assert few_shot_saved.load(tmp_path).rate == ABOUT["rate"]
    file = tmp_path / few_shot_saved.ABOUT
    about = json.loads(file.read_text())
    del about["version"]
    file.write_text(json.dumps(about))
    assert few_shot_saved.load(tmp_path).rate == rate


def test_a_folder_without_a_network_points_to_one(tmp_path, networks):
    with pytest.raises(FileNotFoundError, match=r"did you mean.*networks/ProtoNet"):
        few_shot_saved.load(networks.parent)
    with pytest.raises(FileNotFoundError, match="is no folder.*few_shot_omniglot"):
        few_shot_saved.load(tmp_path / "nothing")


def test_baselines_are_not_saved(tmp_path, networks):
    saved = few_shot_saved.load(networks / "ProtoNet")
    about = dataclasses.asdict(saved) | {"variables": saved.variables}
    with pytest.raises(ValueError, match="'SimpleShot' is none of"):
        few_shot_saved.save(tmp_path, **about | {"method": "SimpleShot"})
