"""Cold-start recommendation on made-up ratings."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import rating_baselines as linear
from experiments import rating_networks as networks
from experiments import ratings as lib
from experiments import recommend_movielens as study
from jaxtransfer import data

SMOKE = study.PRESETS["smoke"]
RATINGS = lib.synthetic(0)
ITEMS = len(RATINGS.items)
SCENARIOS = [
    f"{who} users, {what} items"
    for who in ("existing", "new")
    for what in ("existing", "new")
]


def drawn(number):
    key = jax.random.key(number)
    return lib.split(RATINGS, SMOKE.protocol, fixed=jax.random.key(9), key=key)


SPLIT = drawn(0)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The smoke preset: its results and its folder."""
    config = dataclasses.replace(SMOKE, run_dir=tmp_path_factory.mktemp("runs"))
    results = study.main(config)
    (folder,) = (config.run_dir / "recommend_movielens").iterdir()
    return config, results, folder


@pytest.mark.slow
def test_smoke_writes_a_table_for_every_measure(smoke):
    config, results, folder = smoke
    assert list(results) == list(lib.MEASURES)
    for name, scenarios in results.items():
        assert list(scenarios) == SCENARIOS
        for methods in scenarios.values():
            assert len(methods) == 6
            values = np.array(list(methods.values()))
            assert values.shape == (6, config.seeds)
            assert np.isfinite(values).all() and (values > 0).all()
        rows = json.loads((folder / name / "results.json").read_text())["rows"]
        assert len(rows) == 24
        compared = [row["method"] for row in rows if row["baseline"]]
        assert compared == ["MeLU + identity"] * 4
        row = next(row for row in rows if row["baseline"])
        gain = np.mean(scenarios[row["task"]][row["baseline"]]) - np.mean(row["values"])
        begins = f"| {row['task']} | {row['method']} |"
        table = (folder / name / "table.md").read_text().splitlines()
        line = next(line for line in table if line.startswith(begins))
        shown = float(line.split("|")[-2].split(" ± ")[0])
        assert shown == pytest.approx(gain if name == "MAE" else -gain, abs=1e-3)
    # Nobody's rating tells one new item from another.
    blind = results["nDCG@1"]["new users, new items"]
    assert blind["item mean"] == blind["user and item bias"]


@pytest.mark.slow
def test_same_seed_gives_the_same_table(smoke):
    config, results, _ = smoke
    assert study.main(config) == results


def test_what_is_tested_is_in_no_support():
    split = jax.device_get(SPLIT)
    where, years = split.where, RATINGS.years
    assert (years[split.items[where]] < SMOKE.protocol.new_from).all()
    old, new = split.asked
    has_new = split.complete[1]
    assert has_new.any() and not has_new.all()
    assert (years[new[has_new]] >= SMOKE.protocol.new_from).all()
    truth = {(user, item): rating for user, item, rating in RATINGS.pairs.tolist()}
    for row, user in enumerate(split.users.tolist()):
        support = split.items[row][where[row]].tolist()
        assert not set(support) & set(old[row].tolist())
        assert len(set(support)) == len(support)
        given = split.ratings[row][where[row]].tolist()
        assert given == [truth[user, item] for item in support]
        for kind in np.flatnonzero(split.complete[:, row]):
            asked = split.asked[kind, row].tolist()
            answers = split.answers[kind, row].tolist()
            assert answers == [truth[user, item] for item in asked]
    parts = [split.train, split.validation, split.new]
    together = np.concatenate(parts).tolist()
    assert sorted(together) == list(range(len(split.users)))


def test_seeds_differ_but_for_the_validation_users():
    other = drawn(1)
    assert other.validation.tolist() == SPLIT.validation.tolist()
    assert other.new.tolist() != SPLIT.new.tolist()
    assert other.asked.tolist() != SPLIT.asked.tolist()


def test_episodes_split_the_support_of_training_users(key):
    tables = networks.tables_of(SMOKE, RATINGS, identity=True)
    config = dataclasses.replace(SMOKE, hidden=0.0)
    mean = lib.training_mean(SPLIT)
    draw = functools.partial(jax.jit, static_argnums=0)(networks.draw_tasks)
    episodes = jax.device_get(draw(config, key, tables, SPLIT, mean))
    split = jax.device_get(SPLIT)
    known = [set(split.items[row][split.where[row]].tolist()) for row in split.train]
    column = len(lib.FIELDS)  # The identity: the number of the item, plus 1.
    for task in range(config.tasks):
        seen = []
        for part in ("support", "query"):
            where = episodes[part]["where"][task]
            numbers = episodes[part]["inputs"][task, :, column][where] - 1
            seen.append(set(numbers.tolist()))
            assert len(seen[-1]) == int(where.sum()) >= 1
        assert not seen[0] & seen[1]
        assert any(seen[0] | seen[1] <= items for items in known)
    hidden = dataclasses.replace(SMOKE, hidden=1.0)
    episodes = draw(hidden, key, tables, SPLIT, mean)
    assert (episodes["support"]["inputs"][:, :, column] == 0).all()


def test_padding_changes_nothing(key):
    """More rows that don't count, with anything in them."""
    shape = len(SPLIT.users), 7
    padded = SPLIT._replace(
        items=jnp.concatenate([SPLIT.items, jnp.full(shape, 3)], -1),
        ratings=jnp.concatenate([SPLIT.ratings, jnp.full(shape, 99.0)], -1),
        where=jnp.concatenate([SPLIT.where, jnp.zeros(shape, bool)], -1),
    )
    tables = networks.tables_of(SMOKE, RATINGS, identity=True)
    compiled = networks.programs(SMOKE, tables)
    params = compiled.start(key).params

    def predictions(split):
        penalties = jnp.array([[1.0, 2.0, 3.0]])
        return (
            linear.item_mean(split, ITEMS),
            linear._asked(split, ITEMS, penalties, key, 2, 3),
            compiled.follow(params, tables, split, SPLIT.validation, 0.05),
        )

    for one, other in zip(predictions(SPLIT), predictions(padded), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    _, _, followed = predictions(SPLIT)
    assert followed.shape[1:] == (SMOKE.steps + 1, 2, SMOKE.protocol.queries)
    assert float(jnp.abs(followed[:, 1] - followed[:, 0]).min()) > 0


def test_biases_are_the_ridge_solution(key):
    """Rank 0 after many turns: the closed form over users and items at once."""
    penalties = jnp.array([2.0, 3.0, 1.0])
    found = linear.factorisation(SPLIT, ITEMS, penalties, key, rank=0, sweeps=300)
    values, there = (
        np.asarray(part)[SPLIT.train] for part in linear.matrix(SPLIT, ITEMS)
    )
    mean = float(lib.training_mean(SPLIT))
    user, item = np.nonzero(there)
    users = len(values)
    design = np.zeros((len(user), users + ITEMS))
    design[np.arange(len(user)), user] = 1
    design[np.arange(len(user)), users + item] = 1
    ridge = np.diag(np.repeat([2.0, 3.0], [users, ITEMS]))
    target = design.T @ (values[user, item] - mean)
    biases = np.linalg.solve(design.T @ design + ridge, target)
    wanted = mean + biases[:users, None] + biases[users:]
    np.testing.assert_allclose(np.asarray(found)[SPLIT.train], wanted, atol=1e-3)


def test_choice_is_by_validation_error_and_never_of_a_run_that_diverged():
    def choice(error, value):
        return lib.Choice(error, {"value": value}, lambda: np.full(2, value))

    found = lib.choose([choice(np.nan, 1.0), choice(0.8, 2.0), choice(0.9, 3.0)])
    assert found.predictions.tolist() == [2.0, 2.0]
    assert found.settings == {"value": 2.0, "validation": 0.8}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"updates": 5}, ValueError, "updates: 5 must be a multiple of block, 2"),
        (
            {"dataset": "movielens_100k"},
            FileNotFoundError,
            "jaxtransfer.data.prepare movielens_100k --manual-dir",
        ),
        (
            {"protocol": lib.Protocol(fewest=10, queries=10)},
            ValueError,
            "fewest > queries",
        ),
        ({"protocol": lib.Protocol(new_from=2000)}, ValueError, "0 ratings of new"),
        ({"protocol": lib.Protocol(new=0.0)}, ValueError, "'new': 0,.* each needs one"),
        (
            {"protocol": lib.Protocol(new_from=1998, queries=12, most=60)},
            ValueError,
            "none of the .* existing users has 12 ratings of new items; lower queries",
        ),
        ({"protocol": lib.Protocol(queries=0)}, ValueError, "protocol.queries: 0 must"),
    ],
)
def test_bad_input_is_refused(tmp_path, options, error, message):
    config = dataclasses.replace(
        SMOKE, run_dir=tmp_path / "runs", data_dir=str(tmp_path), **options
    )
    with pytest.raises(error, match=message):
        study.main(config)


@pytest.mark.data
def test_movielens_is_read_whole(data_dir):
    if data.find_prepared("movielens_100k", data_dir=data_dir) is None:
        pytest.skip("movielens_100k is not prepared in JAXTRANSFER_DATA_DIR")
    ratings = lib.movielens_100k(data_dir)
    assert ratings.pairs.shape == (100_000, 3)
    assert ratings.users.shape == (943, 4) and ratings.items.shape == (1682, 20)
    highest = [*ratings.users.max(0), ratings.items[:, 0].max()]
    assert all(top < size for top, size in zip(highest, lib.FIELDS, strict=True))
    assert np.bincount(ratings.pairs[:, 2]).tolist() == [
        *(0, 6110, 11370, 27145, 34174, 21201)
    ]
