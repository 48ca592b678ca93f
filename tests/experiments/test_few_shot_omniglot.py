import dataclasses
import json
import typing

import jax
import numpy as np
import pytest

from experiments import few_shot_config as options
from experiments import few_shot_omniglot as study
from experiments import few_shot_training
from experiments.few_shot_recipes import RECIPES, with_head
from jaxtransfer import data

SMOKE = study.PRESETS["smoke"]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The smoke preset on embedded digits: its results and its folder."""
    config = dataclasses.replace(SMOKE, run_dir=tmp_path_factory.mktemp("runs"))
    results = study.main(config)
    (folder,) = (config.run_dir / "few_shot_omniglot").iterdir()
    return config, results, folder


@pytest.mark.slow
def test_smoke_writes_a_table_of_both_measures(smoke):
    config, results, folder = smoke
    assert list(results) == list(study.MEASURES)
    for methods in results.values():
        assert list(methods) == ["SimpleShot", "MAML", "ProtoNet"]
        assert all(len(values) == config.seeds for values in methods.values())
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert len(rows) == 6
    compared = {row["method"]: row["baseline"] for row in rows}
    assert compared == {
        "SimpleShot": None,
        "MAML": "SimpleShot",
        "ProtoNet": "SimpleShot",
    }
    record = json.loads((folder / "steps.json").read_text())
    found = record["seeds"][0]["MAML"]["transductive"]
    assert len(found["accuracy by steps"]) == config.steps + 1
    assert sorted(record["minutes"]) == [
        "MAML",
        "ProtoNet",
        "SimpleShot",
        "pretraining",
    ]
    assert (folder / "networks" / "MAML").is_dir()


@pytest.mark.slow
def test_same_seed_gives_the_same_table_with_any_number_of_workers(smoke):
    """Of one method, whose numbers don't depend on the others either."""
    config, results, _ = smoke
    alone = {"methods": ("MAML",), "baselines": (), "workers": 1}
    again = study.main(dataclasses.replace(config, **alone))
    expected = {name: {"MAML": found["MAML"]} for name, found in results.items()}
    assert again == expected


def test_every_recipe_has_a_name_on_the_command_line():
    names = typing.get_args(options.Method) + typing.get_args(options.Baseline)
    assert set(names) == set(RECIPES)
    assert all(RECIPES[name].build for name in options.ALL)
    assert not any(RECIPES[name].build for name in options.BASELINES)


@pytest.fixture(scope="module")
def pools():
    return study.read(SMOKE)


def test_no_character_is_in_two_parts(pools):
    images = {
        name: {image.tobytes() for image in np.asarray(pool.inputs)}
        for name, pool in pools.items()
    }
    assert not images["train"] & images["test"]
    assert not images["validation"] & images["test"]
    assert [len(np.unique(pool.labels)) for pool in pools.values()] == [4, 3, 3]


@pytest.mark.parametrize(
    ("method", "rate", "steps"),
    [
        ("MAML", 0.4, 1),
        ("MAML++", 0.4, 3),
        ("Reptile", 0.2, 5),
        ("iMAML", 0.2, 5),
        ("ProtoMAML", 0.02, 1),
        ("CAVIA", 1.0, 1),
    ],
)
def test_rate_and_steps_of_training_are_the_published_and_saved(
    tmp_path, pools, monkeypatch, method, rate, steps
):
    built, kept = [], {}
    build = RECIPES[method].build

    def spy(setting):
        built.append(setting)
        return build(setting)

    recipe = dataclasses.replace(RECIPES[method], build=spy)
    monkeypatch.setitem(RECIPES, method, recipe)
    monkeypatch.setattr(few_shot_training, "trainer", lambda *rest: None)
    for inner_steps in (1, 7):
        config = dataclasses.replace(SMOKE, inner_steps=inner_steps)
        few_shot_training.meta_trainer(config, pools["train"], method)
    assert [(s.rate, s.steps) for s in built] == [(rate, steps), (rate, 7)]
    monkeypatch.setattr(study, "save", lambda *_, **values: kept.update(values))
    study._keep(SMOKE, tmp_path, method, None, {"support statistics": {"steps": 2}})
    assert (kept["rate"], kept["steps"], kept["test_steps"]) == (rate, steps, 2)


def test_choice_looks_at_validation_alone():
    """Variant and steps that are best on validation are taken, whatever the test."""
    table = {
        ("slow", "validation"): [0.0, 0.2, 0.9],
        ("quick", "validation"): [0.5, 1.0, 0.1],
        ("slow", "test"): [1.0, 1.0, 1.0],
        ("quick", "test"): [0.0, 0.7, 0.9],
    }

    def variant(name):
        return lambda variables, frozen, tasks: np.array([table[name, tasks]])

    follow = {"transductive": {name: variant(name) for name in ("slow", "quick")}}
    found = study.judge(follow, None, {}, "validation", "test")["transductive"]
    assert (found["variant"], found["steps"]) == ("quick", 1)
    assert found["test"].tolist() == [70.0]


def test_new_head_keeps_the_pretrained_features(key):
    image = np.zeros((1, 8, 8, 1), np.float32)
    whole, fresh = (study.network(n, 4).init(key, image) for n in (12, SMOKE.ways))
    start = with_head(whole, fresh)
    kept, given = start.params["features"], whole.params["features"]
    jax.tree.map(np.testing.assert_array_equal, kept, given)
    assert start.params["head"]["bias"].shape == (SMOKE.ways,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"meta_steps": 5}, "meta_steps: 5 must be a multiple of block, 2"),
        ({"test_tasks": 6}, "test_tasks: 6 must be a multiple of validation_tasks, 4"),
        ({"block": 0}, "block: 0 must be 1 or more"),
        ({"validation_tasks": 0}, "validation_tasks: 0 must be 1 or more"),
        ({"test_tasks": 0}, "test_tasks: 0 must be 1 or more"),
        (
            {"train_ways": 4},
            r"train_ways: got 4, but \['MAML', 'SimpleShot'\] may have",
        ),
        ({"also": ((2, 2),)}, r"also: got \(\(2, 2\),\), but \['MAML', 'SimpleShot'\]"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, options, message):
    config = dataclasses.replace(SMOKE, run_dir=tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        study.main(config)
    assert not list(tmp_path.iterdir())


def test_one_training_and_several_kinds_of_tasks(tmp_path, capsys):
    config = dataclasses.replace(
        SMOKE,
        run_dir=tmp_path,
        methods=("ProtoNet",),
        baselines=(),
        train_ways=4,
        also=((2, 2),),
        distort=True,
        seeds=1,
    )
    study.main(config)
    assert "Digits, 2-way 2-shot" in capsys.readouterr().out
    tables = {path.parent.name for path in tmp_path.rglob("table.md")}
    assert len(tables) == 2 and "2-way 2-shot" in tables


@pytest.mark.data
def test_omniglot_is_read_with_ink_as_one(data_dir, monkeypatch):
    """A few of its images, for time; `tests/data` counts all of them."""
    if data.find_prepared("omniglot", data_dir=data_dir) is None:
        pytest.skip("omniglot is not prepared in JAXTRANSFER_DATA_DIR")
    load, asked = data.load, []

    def some(name, split, **options):
        asked.append((name, split))
        return load(name, "train[:500]", **options)

    monkeypatch.setattr(few_shot_training.data, "load", some)
    known = {int(x["labels"]) for x in some("omniglot", "train", data_dir=data_dir)}
    sizes = (20, 10, len(known) - 30)
    config = dataclasses.replace(study.Config(), data_dir=data_dir, characters=sizes)
    pools = study.read(config)
    assert asked[1:] == [("omniglot", "train+test")]
    assert [len(np.unique(p.labels)) for p in pools.values()] == list(sizes)
    assert pools["test"].inputs.shape[1:] == (28, 28, 1)
    assert float(pools["test"].inputs.mean()) < 0.2
