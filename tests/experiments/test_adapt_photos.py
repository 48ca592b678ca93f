"""The study of photographs: its rows, what sees labels of the target, its refusals."""

import csv
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import adapt_photos, photographs
from experiments.adapt_photos import AT_RANDOM, ORACLE, PRESETS, SOURCE_ONLY, Trained
from jaxtransfer import pretrained
from jaxtransfer.model import from_linen

SMOKE = dataclasses.replace(
    PRESETS["smoke"], methods=("CDAN",), domains=("red", "green"), steps=4
)


def random_features(config, domains):
    """In place of a network's, which takes long to compile."""
    random = np.random.default_rng(0)
    return {
        name: random.normal(size=(len(domain["labels"]), 5)).astype(np.float32)
        for name, domain in domains.items()
    }


@pytest.mark.slow
def test_rows_files_and_networks_that_get_no_label_of_the_target(tmp_path, monkeypatch):
    seen, make_run = [], adapt_photos.make_run

    def spied(method, classes, config):
        run = make_run(method, classes, config)

        def called(*given):
            seen.append(given)
            return run(*given)

        return called

    monkeypatch.setattr(adapt_photos, "read_features", random_features)
    monkeypatch.setattr(adapt_photos, "make_run", spied)
    config = dataclasses.replace(SMOKE, run_dir=tmp_path)
    found = adapt_photos.main(config)
    methods = [row.method for row in found["rows"]]
    assert methods[:2] == [SOURCE_ONLY, "CDAN"]
    assert methods[2] == AT_RANDOM and methods[-1] == ORACLE
    assert methods[3:-1] == [*adapt_photos.VALIDATORS]
    assert all(len(row.values) == config.seeds for row in found["rows"])
    with (found["folder"] / "networks.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * (1 + 2) * config.seeds
    assert {line["weight"] for line in lines} == {"", "1.0", "10.0"}
    assert {line["seed"] for line in lines} == {"0", "1"}
    assert len(seen) == 4
    for _, _, source, target, there, density in seen:
        rows = len(source.labels)
        assert target.shape == (rows, 5)
        assert there.shape == density.shape == (rows,) and there.dtype == bool
    first, second = seen[0], seen[2]
    assert not np.array_equal(first[2].inputs, second[2].inputs)
    # With the target's labels the other way round a method is given the same numbers.
    domains = photographs.read(config)
    turned = {**domains["green"], "labels": domains["green"]["labels"][::-1]}
    monkeypatch.setattr(adapt_photos, "read", lambda _: {**domains, "green": turned})
    stopped = KeyboardInterrupt

    def only(method, classes, config):
        def called(*given):
            seen.append(given)
            raise stopped

        return called

    monkeypatch.setattr(adapt_photos, "make_run", only)
    with pytest.raises(stopped):
        adapt_photos.main(config)
    jax.tree.map(np.testing.assert_array_equal, first[2:], seen[-1][2:])


@pytest.mark.parametrize("layout", ["keras", "timm"])
def test_features_are_of_the_file_for_any_number_of_photographs(
    layout, tmp_path, monkeypatch
):
    """Those of 24 photographs, and of the same twice; a small network of one stage."""
    whole = photographs.BACKBONES[layout]
    net = whole.net.clone(stages=((1, 16, 1, 1),), last=8)
    monkeypatch.setitem(photographs.BACKBONES, layout, whole._replace(net=net))
    domain = photographs.read(dataclasses.replace(SMOKE, domains=("red",)))["red"]
    model, file = from_linen(net), tmp_path / "net.npz"
    variables = jax.jit(model.init)(jax.random.key(5), domain["inputs"][:1])
    pretrained.save(file, variables, names=whole.names())
    config = dataclasses.replace(SMOKE, photos="mine", layout=layout, weights=str(file))
    twice = {"inputs": np.concatenate([domain["inputs"]] * 2)}
    found = photographs.read_features(config, {"once": domain, "twice": twice})
    assert found["once"].shape == (24, 8)
    np.testing.assert_allclose(
        found["twice"], np.tile(found["once"], (2, 1)), atol=1e-6
    )
    inputs = (domain["inputs"] - np.array(whole.mean)) / np.array(whole.deviation)
    head = variables.params["classifier"]
    logits = model.apply(variables, inputs.astype(np.float32))[0]
    np.testing.assert_allclose(
        found["once"] @ head["kernel"] + head["bias"], logits, rtol=1e-4, atol=1e-5
    )


def test_every_fifth_photograph_is_held_out_of_each_class():
    labels = np.repeat(np.arange(3, dtype=np.int32), 10)
    inputs = np.arange(30.0, dtype=np.float32)[:, None]
    domain = adapt_photos.padded(inputs, labels, 40)
    assert int(domain.learned) == 24 and int(domain.count) == 30
    assert domain.inputs.shape == (40, 1)
    held = np.asarray(domain.labels)[np.asarray(domain.held_out)]
    assert held.tolist() == [0, 0, 1, 1, 2, 2]
    assert sorted(domain.inputs[:30, 0].tolist()) == inputs[:, 0].tolist()
    one, other = adapt_photos.standardised(domain, domain._replace(inputs=2 * inputs))
    np.testing.assert_allclose(np.std(np.asarray(one.inputs)[:30]), 1, rtol=1e-5)
    np.testing.assert_allclose(np.std(np.asarray(other.inputs)), 2, rtol=1e-5)


def test_a_validator_chooses_among_all_networks_of_a_seed():
    """Two methods of one and two weights, two seeds; not-a-number is not chosen, and
    of those that are equally good the mean counts."""
    first = np.array([[50.0, 60.0]])
    second = np.array([[70.0, 40.0], [90.0, 80.0]])
    values = [np.array([[0.5, 0.1]]), np.array([[0.6, 0.2], [np.nan, 0.1]])]
    trained = [
        Trained(accuracy, {name: value for name in adapt_photos.VALIDATORS})
        for accuracy, value in zip((first, second), values, strict=True)
    ]
    found = adapt_photos.choices(trained)
    np.testing.assert_allclose(found[AT_RANDOM], [70, 60])
    assert found["IM"].tolist() == [70, 40]
    assert found[ORACLE].tolist() == [90, 80]
    same = [
        Trained(first, dict.fromkeys(adapt_photos.VALIDATORS, np.zeros((1, 2)))),
        Trained(second, dict.fromkeys(adapt_photos.VALIDATORS, np.zeros((2, 2)))),
    ]
    assert adapt_photos.choices(same)["DEV"].tolist() == [70, 60]


def test_rank_correlations_are_means_of_pairs_and_seeds():
    """One seed in the order of the accuracy, one the other way round, one constant."""
    accuracy = np.array([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0], [3.0, 3.0, 3.0]])
    values = np.array([[0.1, 3.0, 5.0], [0.2, 2.0, 5.0], [0.9, 1.0, 5.0]])
    trained = Trained(accuracy, dict.fromkeys(adapt_photos.VALIDATORS, values))
    same = Trained(accuracy, dict.fromkeys(adapt_photos.VALIDATORS, accuracy))
    found = adapt_photos.rank_correlations([[trained], [same]])
    assert found == pytest.approx(dict.fromkeys(adapt_photos.VALIDATORS, 3 / 5))


def folder(path, photographs=3, **domains):
    """So many photographs of each class."""
    for domain, classes in domains.items():
        for name in classes:
            place = path / domain / name
            place.mkdir(parents=True)
            for number in range(photographs):
                Image.new("RGB", (12, 9)).save(place / f"{number}.png")
    return str(path)


def test_photographs_of_a_folder(tmp_path, monkeypatch):
    photos = folder(tmp_path / "mine", shop="ab", street="ab")
    (tmp_path / "mine" / ".hidden").mkdir()
    monkeypatch.setenv("JAXTRANSFER_DATA_DIR", str(tmp_path))
    config = dataclasses.replace(SMOKE, photos=photos, domains=("street", "shop"))
    for given in (photos, "mine"):
        domains = photographs.read(dataclasses.replace(config, photos=given))
        assert list(domains) == ["street", "shop"]
        every = dataclasses.replace(config, photos=given, domains=())
        assert list(photographs.read(every)) == ["shop", "street"]
        assert domains["shop"]["inputs"].shape == (6, 32, 32, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"photos": "nowhere"}, "photos: no folder 'nowhere'.*--data-dir"),
        ({"domains": ("shop", "sea")}, r"domains: .* has no \['sea'\], but \['few'"),
        ({"domains": ("shop",)}, "at least two take part"),
        ({"domains": ("shop", "few")}, "few has 2 photographs; give 5 at least"),
        ({"domains": ("shop", "other")}, r"the classes of other, \['a', 'c'\]"),
        ({"methods": ("CADN",)}, "methods: 'CADN' is unknown; choose from MMD"),
        ({"also": (1.0,)}, "also: weights .* must differ"),
        ({"strength": -1.0}, "must differ and be positive"),
    ],
)
def test_refusals(tmp_path, options, message):
    photos = folder(tmp_path / "mine", shop="ab", street="ab", other="ac")
    folder(tmp_path / "mine", photographs=1, few="ab")
    config = dataclasses.replace(
        SMOKE, photos=photos, domains=("shop", "street"), run_dir=tmp_path
    )
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        adapt_photos.main(dataclasses.replace(config, **options))


def test_the_network_diverged(tmp_path, monkeypatch):
    def diverged(method, classes, config):
        def run(strengths, keys, *given):
            return None, {}, jnp.full((len(strengths), len(keys)), jnp.nan)

        return run

    monkeypatch.setattr(adapt_photos, "read_features", random_features)
    monkeypatch.setattr(adapt_photos, "make_run", diverged)
    monkeypatch.setattr(adapt_photos, "densities", lambda *given: None)
    with pytest.raises(FloatingPointError, match="red → green, source only"):
        adapt_photos.main(dataclasses.replace(SMOKE, run_dir=tmp_path))
