"""Cold-start recommendation: users are tasks, a few ratings are the support.

Learned (MeLU): embeddings of the fields of users and films, common to all, and the
start of the decision layers, which a few gradient steps on a user's ratings adapt.
Baselines: the item's mean, biases of user and item, matrix factorisation (new users
get theirs by ridge regression on their support), and the same network trained on all
ratings at once, as it is and with the decision layers fine-tuned on a user's support.

Four scenarios: existing and new users, existing and new items. New items are those
released last; nobody's rating of one is in any support. Users have 13 to 100 ratings of
existing items, in random order: the last 10 are the query, the others the support. The
query of new items is 10 random ones, for users who have as many; the support is the
same. A fifth of the users is for validation, the same in every seed, and chooses all
settings by the error on existing items; the seed splits the others 80/20 into existing
and new users. Only the support of existing users trains, also the baselines.

Deviations from MeLU: there the support for new items is of new items; the queries of
existing users are held out here. Its films have directors, actors and a classification,
which this data set lacks: here they have genres and the year of release and, as a
variant, an identity (an embedding of the film itself, which new films don't have;
hidden at random in training). A user's area is the first digit of the zip code.

References:
    Lee et al., MeLU: Meta-learned user preference estimator for cold-start
    recommendation, KDD 2019.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from rich.progress import Progress

from experiments import ratings as lib
from experiments.common import Row, command_line, progress, show, start_run
from experiments.rating_baselines import linear_baselines
from experiments.rating_config import PRESETS, Config
from experiments.rating_networks import MELU, networks, programs, tables_of
from jaxtransfer import prng

KINDS = ("existing items", "new items")


def read(config: Config) -> lib.Ratings:
    """The data set."""
    if config.dataset == "synthetic":
        return lib.synthetic(config.seed)
    return lib.movielens_100k(config.data_dir)


def main(config: Config) -> dict[str, Any]:
    """Run the study.

    Returns:
        ``{measure: {scenario: {method: values by seed}}}``.

    Raises:
        ValueError: ``block`` does not divide the updates; too few users are left, or
            none of a scenario.
        FileNotFoundError: the data set is not prepared; the message says how to.
    """
    for name in ("updates", "joint_updates"):
        if getattr(config, name) % config.block:
            raise ValueError(
                f"{name}: {getattr(config, name)} must be a multiple of block, "
                f"{config.block}"
            )
    ratings = read(config)
    folder = start_run("recommend_movielens", config)
    started = time.perf_counter()
    root = jax.random.key(config.seed)
    keys = [prng.stream(root, f"seed {seed}") for seed in range(config.seeds)]
    fixed = prng.stream(root, "validation")
    splits = [lib.split(ratings, config.protocol, fixed=fixed, key=key) for key in keys]
    print(_about(splits))
    found: list[dict[str, Any]] = [
        linear_baselines(
            split,
            len(ratings.items),
            prng.stream(key, "factors"),
            bias_penalties=config.bias_penalties,
            factor_penalties=config.factor_penalties,
            ranks=config.ranks,
            sweeps=config.sweeps,
        )
        for split, key in zip(splits, keys, strict=True)
    ]
    with progress() as display:
        for identity in config.identities:
            tables = tables_of(config, ratings, identity)
            compiled = programs(config, tables)
            suffix = " + identity" if identity else ""
            for seed, (split, key) in enumerate(zip(splits, keys, strict=True)):
                tick = _ticker(config, display, f"seed {seed}{suffix}")
                several = networks(config, compiled, tables, split, key, tick)
                found[seed] |= {f"{name}{suffix}": of for name, of in several.items()}
    return _report(splits, found, folder, started)


def _ticker(config: Config, display: Progress, name: str) -> Callable[[], None]:
    runs = len(config.learning_rates) * len(config.inner_rates) * config.updates
    runs += len(config.joint_learning_rates) * config.joint_updates
    line = display.add_task(name, total=runs // config.block)
    return lambda: display.advance(line)


def _about(splits: list[lib.Split]) -> str:
    split = splits[0]
    sizes = ", ".join(
        f"{len(getattr(split, name))} {word}"
        for name, word in (
            ("train", "existing users"),
            ("new", "new users"),
            ("validation", "validation users"),
        )
    )
    rows = np.asarray(split.where.sum(-1))
    with_new = [int(split.complete[1, split.new].sum()) for split in splits]
    return (
        f"{sizes}; support of {rows.min()} to {rows.max()} ratings, {rows.mean():.1f} "
        f"in the mean; new users with a query of new items, by seed: {with_new}"
    )


def _mean_over_users(
    split: lib.Split, chosen: lib.Chosen, kind: int, part: str
) -> list[float]:
    """The measures, averaged over the users of a part who have a query of the kind."""
    of_users = np.asarray(lib.measure(chosen.predictions, split.answers))[kind]
    rows = np.asarray(getattr(split, part))
    complete = np.asarray(split.complete)[kind, rows]
    return of_users[rows[complete]].mean(0).tolist()


def _report(
    splits: list[lib.Split], found: list[dict[str, Any]], folder: Any, started: float
) -> dict[str, Any]:
    table: dict[str, Any] = {name: {} for name in lib.MEASURES}
    for who, part in (("existing users", "train"), ("new users", "new")):
        for kind, what in enumerate(KINDS):
            scenario = f"{who}, {what}"
            for method in found[0]:
                values = [
                    _mean_over_users(split, methods[method], kind, part)
                    for split, methods in zip(splits, found, strict=True)
                ]
                for name, of_seeds in zip(
                    lib.MEASURES, zip(*values, strict=True), strict=True
                ):
                    table[name].setdefault(scenario, {})[method] = list(of_seeds)
    for name, scenarios in table.items():
        rows = []
        is_error = name == "MAE"
        for scenario, methods in scenarios.items():
            others = [method for method in methods if not method.startswith(MELU)]
            sign = 1 if is_error else -1
            strongest = min(others, key=lambda method: sign * np.mean(methods[method]))
            rows += [
                Row(scenario, method, of, None if method in others else strongest)
                for method, of in methods.items()
            ]
        (folder / name).mkdir()
        better = "lower" if is_error else "higher"
        title = f"{name} of a user's query ({better} is better)"
        show(
            title,
            rows,
            folder / name,
            unit=name,
            digits=3,
            lower_is_better=is_error,
            started=started,
        )
    print("Chosen on validation users, by seed:")
    for method in found[0]:
        print(f"  {method}: {[methods[method].settings for methods in found]}")
    return table


if __name__ == "__main__":
    command_line(main, PRESETS)
