"""The adaptation study end to end on embedded digits, and its refusals."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import adapt_digits
from experiments.adapt_digits import BOUND, PRESETS, SOURCE_ONLY

SMOKE = PRESETS["smoke"]


def domain(name, config):
    return adapt_digits.load_domain(
        name,
        size=config.size,
        margin=config.margin,
        seed=config.seed,
        data_dir=config.data_dir,
    )


@pytest.mark.slow
def test_smoke_prints_the_same_rows_again_and_saves_its_files(tmp_path):
    config = dataclasses.replace(SMOKE, run_dir=tmp_path, steps=8)
    first = adapt_digits.main(config)
    second = adapt_digits.main(
        dataclasses.replace(config, methods=("DANN", "CDAN", "LMMD"))
    )
    shared = (SOURCE_ONLY, "DANN", BOUND)
    one, other = (
        [row for row in run["rows"] if row.method in shared] for run in (first, second)
    )
    assert one == other
    assert {row.method for row in second["rows"]} == {*shared, "CDAN", "LMMD"}
    assert [row.method for row in first["rows"]] == [
        SOURCE_ONLY,
        "MMD",
        "CORAL",
        "DANN",
        BOUND,
    ]
    assert all(len(row.values) == config.seeds for row in first["rows"])
    assert (first["folder"] / "features.png").stat().st_size > 10_000
    recorded = json.loads((first["folder"] / "results.json").read_text())
    assert [row["values"] for row in recorded["rows"]] == [
        row.values for row in first["rows"]
    ]
    tables = [
        (run["folder"] / "table.md").read_text().splitlines() for run in (first, second)
    ]
    assert len(set(tables[1]) - set(tables[0])) == 2


def test_adaptation_gets_no_target_label(tmp_path, monkeypatch):
    seen = {}

    def make_run(method, channels, steps, config):
        def run(key, source, target, test):
            seen.setdefault(method, []).append((source, target))
            return jnp.array(0), method, {}

        return run

    monkeypatch.setattr(adapt_digits, "make_run", make_run)
    config = dataclasses.replace(SMOKE, run_dir=tmp_path, figure=False, seeds=1)
    adapt_digits.main(config)
    images = domain("inverted", config)["train"]["inputs"]
    for method, calls in seen.items():
        for source, target in calls:
            assert set(target) == {"inputs"}, method
            from_target = bool(jnp.array_equal(source["inputs"], images))
            assert from_target == (method == BOUND)


def test_a_network_that_diverged_is_no_result(tmp_path, monkeypatch):
    def make_run(method, channels, steps, config):
        return lambda *given: (jnp.array(0), None, {"task_loss": jnp.nan})

    monkeypatch.setattr(adapt_digits, "make_run", make_run)
    config = dataclasses.replace(SMOKE, run_dir=tmp_path, figure=False)
    with pytest.raises(FloatingPointError, match="inverted, source only: the loss is"):
        adapt_digits.main(config)


def test_grey_images_become_coloured_and_centred():
    pixels = jnp.array([[[[0]], [[255]]]], jnp.uint8)
    inputs = adapt_digits.images(pixels, 3)
    assert inputs.shape == (1, 2, 1, 3)
    np.testing.assert_allclose(inputs[0, :, 0, :], [[-1.0] * 3, [1.0] * 3])


def test_the_source_only_objective_ignores_the_target():
    config = dataclasses.replace(SMOKE, steps=3)
    source, other = domain("digits", config), domain("inverted", config)
    run = adapt_digits.make_run(SOURCE_ONLY, 1, config.steps, config)
    test = jax.tree.map(lambda x: x[:20], source["test"])
    results = [
        run(jax.random.key(0), source["train"], {"inputs": pixels}, test)
        for pixels in (source["train"]["inputs"], other["train"]["inputs"])
    ]
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tasks": ("MNIST → SVHN",)}, "tasks"),
        ({"methods": ("ADDA",)}, "methods"),
        ({"dann_tap": "nope"}, "tap 'nope' names no module"),
    ],
)
def test_unknown_names_are_refused_before_any_work(tmp_path, change, message):
    config = dataclasses.replace(SMOKE, run_dir=tmp_path, **change)
    with pytest.raises(ValueError, match=message):
        adapt_digits.main(config)
    assert not list(tmp_path.iterdir())


@pytest.mark.data
def test_every_target_test_split_is_complete(data_dir, monkeypatch):
    load = adapt_digits.data.load

    def few_to_train_on(name, part, **options):
        return load(name, "train[:50]" if part == "train" else part, **options)

    monkeypatch.setattr(adapt_digits.data, "load", few_to_train_on)
    config = dataclasses.replace(PRESETS["cpu"], data_dir=data_dir)
    for name, count in (("usps", 2007), ("mnist_m", 3000), ("mnist", 10_000)):
        if adapt_digits.data.find_prepared(name, data_dir=data_dir) is None:
            pytest.skip(f"{name} is not prepared in JAXTRANSFER_DATA_DIR")
        test = domain(name, config)["test"]
        assert test["inputs"].shape[:3] == (count, config.size, config.size)
        assert test["inputs"].dtype == jnp.uint8
        assert int(test["inputs"].max()) > 200
