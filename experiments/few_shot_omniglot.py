"""Few-shot learning on Omniglot: every algorithm of the library at one budget.

Meta-trained on tasks made of training characters; tested on tasks of characters that
were never seen, the same for all. Baselines: networks pretrained to tell all training
characters apart, and what can be done with those. Tuned on validation characters only:
the number of gradient steps, and the step size or transform of the baselines.

Two measures: *transductive* (as published: a task's query images are normalised by
their own batch statistics) and *support statistics* (each query image is judged alone,
normalised by the statistics of the support). Training is transductive.

Deviation from the paper's network: the normalisation has a scale. Scale and offset
adapt as the other parameters of the features do; not so in MAML++, which learns a scale
and an offset for each step.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import jax
import numpy as np

from experiments.common import (
    Row,
    check_options,
    command_line,
    progress,
    show,
    start_run,
)
from experiments.few_shot_config import MEASURES, PRESETS, Config
from experiments.few_shot_recipes import RECIPES, Recipe, network, with_head
from experiments.few_shot_saved import ANY_WAYS, save
from experiments.few_shot_training import (
    Trainer,
    base_mean,
    draw,
    image,
    meta_trainer,
    pretrainer,
    read,
    setting,
    train,
)
from jaxtransfer import prng
from jaxtransfer.data import episodes
from jaxtransfer.methods import meta
from jaxtransfer.typing import Variables


class Follower:
    """Accuracies of tasks over the steps of a learner, compiled once for all seeds."""

    def __init__(
        self, config: Config, recipe: Recipe, build: Any, measure: str, ways: int
    ):
        steps = config.steps if recipe.build else config.baseline_steps
        chosen = setting(config, recipe, steps, MEASURES[measure])
        chosen = dataclasses.replace(chosen, ways=ways)
        self.learner = build(chosen)
        run = meta.trajectory(self.learner)

        def follow(variables: Variables, frozen: Any, tasks: Any) -> jax.Array:
            if recipe.query:
                tasks = meta.with_unlabelled_query(tasks)
            key = jax.random.key(0)
            params, state = variables
            return run(params, frozen, state, tasks, key)["accuracy"]

        self._follow = jax.jit(follow)
        self._size = config.validation_tasks

    def __call__(self, variables: Variables, frozen: Any, tasks: Any) -> np.ndarray:
        """``[tasks, steps + 1]``, in groups of the number of validation tasks."""
        count = len(tasks["query"]["labels"])
        groups = [
            jax.tree.map(lambda leaf, at=at: leaf[at : at + self._size], tasks)
            for at in range(0, count, self._size)
        ]
        return np.concatenate([self._follow(variables, frozen, g) for g in groups])


def followers(config: Config, method: str, ways: int) -> dict[str, dict[str, Follower]]:
    """By measure, what a method may choose from at test."""
    recipe = RECIPES[method]
    return {
        measure: {
            name: Follower(config, recipe, build, measure, ways)
            for name, build in recipe.tests.items()
        }
        for measure in MEASURES
    }


def judge(
    follow: Mapping[str, Mapping[str, Callable[..., np.ndarray]]],
    variables: Variables,
    frozen: Any,
    validation: Any,
    test: Any,
) -> dict[str, dict[str, Any]]:
    """Choose a variant and steps on validation tasks; accuracies on test tasks.

    Returns:
        By measure: accuracies of the test tasks ``[tasks]`` in %, and what was chosen.
    """
    found = {}
    for measure, variants in follow.items():
        curves = {
            name: run(variables, frozen, validation).mean(0)
            for name, run in variants.items()
        }
        name = max(curves, key=lambda name: curves[name].max())
        steps = int(curves[name].argmax())
        tested = variants[name](variables, frozen, test)
        found[measure] = {
            "variant": name,
            "steps": steps,
            "validation": float(curves[name].max()),
            "by steps": 100 * tested.mean(0),
            "test": 100 * tested[:, steps],
        }
    return found


def main(config: Config) -> dict[str, Any]:
    """Run the study.

    Returns:
        ``{measure: {method: accuracies by seed in %}}``.

    Raises:
        ValueError: an option is not positive or does not divide another as it must, or
            ``train_ways`` or ``also`` do not suit a method.
    """
    check_options(config)
    for whole, part in (
        ("meta_steps", "block"),
        ("pretrain_steps", "block"),
        ("test_tasks", "validation_tasks"),
    ):
        size, divisor = getattr(config, whole), getattr(config, part)
        if size % divisor:
            raise ValueError(f"{whole}: {size} must be a multiple of {part}, {divisor}")
    bound = sorted({*config.methods, *config.baselines} - set(ANY_WAYS))
    for option in ("train_ways", "also"):
        if getattr(config, option) and bound:
            raise ValueError(
                f"{option}: got {getattr(config, option)}, but {bound} may have an "
                f"output for each class; leave it out, or choose methods among "
                f"{sorted(ANY_WAYS)} and no baselines"
            )
    folder = start_run("few_shot_omniglot", config)
    started = time.perf_counter()
    pools = read(config)
    root = jax.random.key(config.seed)

    def fixed(part: str, tasks: int, kind: tuple[int, int]) -> episodes.Episodes:
        pool, key = pools[part], prng.stream(root, part)
        ways, shots = kind
        return draw(
            dataclasses.replace(config, ways=ways, shots=shots),
            key,
            pool.inputs,
            pool.index,
            tasks=tasks,
            queries=config.test_queries,
        )

    kinds = [(config.ways, config.shots), *config.also]
    validation = {
        kind: fixed("validation", config.validation_tasks, kind) for kind in kinds
    }
    test = {kind: fixed("test", config.test_tasks, kind) for kind in kinds}
    keys = [prng.stream(root, f"seed {seed}") for seed in range(config.seeds)]
    results: dict[tuple[int, int], list[dict[str, Any]]] = {
        kind: [{} for _ in keys] for kind in kinds
    }
    minutes: dict[str, float] = {}
    stop = Event()

    def every_seed(run: Callable[[int], Any]) -> list[Any]:
        with ThreadPoolExecutor(config.workers) as pool:
            try:
                return list(pool.map(run, range(config.seeds)))
            except BaseException:  # Ctrl-C too: the others end after their block.
                stop.set()
                raise

    def judged(method: str, starts: list[Variables], frozen: list[Any]) -> None:
        for kind in kinds:
            follow = followers(config, method, kind[0])

            def one(seed: int, kind: tuple[int, int] = kind, follow: Any = follow):
                found = judge(
                    follow, starts[seed], frozen[seed], validation[kind], test[kind]
                )
                results[kind][seed][method] = found
                first = found[next(iter(MEASURES))]
                print(
                    f"{kind[0]}-way {kind[1]}-shot, seed {seed}, {method}: "
                    f"{100 * first['validation']:.2f} % on validation tasks, "
                    f"{first['steps']} steps {first['variant']}",
                    flush=True,
                )

            every_seed(one)

    with progress() as display:

        def trained(name: str, trainer: Trainer) -> list[Variables]:
            return every_seed(
                lambda seed: train(
                    f"seed {seed}, {name}", trainer, keys[seed], display, stop
                )
            )

        for method in config.methods:
            clock = time.perf_counter()
            starts = trained(method, meta_trainer(config, pools["train"], method))
            judged(method, starts, [{}] * len(keys))
            _keep(config, folder, method, starts[0], results[kinds[0]][0][method])
            minutes[method] = (time.perf_counter() - clock) / 60
            _write(results[kinds[0]], minutes, folder)
        if config.baselines:
            clock = time.perf_counter()
            wholes = trained("pretraining", pretrainer(config, pools["train"]))
            pretrained, frozen = [], []
            model = network(config.ways, config.filters)
            for key, whole in zip(keys, wholes, strict=True):
                fresh = model.init(prng.stream(key, "head"), image(config))
                pretrained.append(with_head(whole, fresh))
                some = pools["train"].inputs[
                    :: max(1, len(pools["train"].inputs) // 512)
                ]
                frozen.append({"mean": base_mean(config, pretrained[-1], some)})
            minutes["pretraining"] = (time.perf_counter() - clock) / 60
        for method in config.baselines:
            clock = time.perf_counter()
            judged(method, pretrained, frozen)
            minutes[method] = (time.perf_counter() - clock) / 60
            _write(results[kinds[0]], minutes, folder)
    tables = []
    for kind, found in results.items():
        place = folder if kind == kinds[0] else folder / f"{kind[0]}-way {kind[1]}-shot"
        place.mkdir(exist_ok=True)
        tables.append(_report(config, kind, found, minutes, place, started))
    return tables[0]


def _keep(
    config: Config,
    folder: Path,
    method: str,
    variables: Variables,
    found: Mapping[str, Any],
) -> None:
    """The network of the first seed, for ``experiments.adapt_task``."""
    recipe = RECIPES[method]
    save(
        folder / "networks" / method,
        method=method,
        filters=config.filters,
        image_size=config.image_size,
        ways=config.ways,
        shots=config.shots,
        rate=recipe.rate(config.inner_learning_rate),
        steps=max(recipe.steps, config.inner_steps),
        test_steps=found["support statistics"]["steps"],
        statistics="support",
        variables=variables,
        invert=config.dataset == "omniglot",
    )


def _over_tasks(found: Mapping[str, Any]) -> float:
    values = found["test"]
    return float(1.96 * values.std(ddof=1) / np.sqrt(len(values)))


def _write(
    results: list[dict[str, Any]], minutes: Mapping[str, float], folder: Path
) -> None:
    """What was chosen and found so far, by seed, method and measure."""
    record = [
        {
            method: {
                measure: {
                    "variant": found["variant"],
                    "steps": found["steps"],
                    "validation": found["validation"],
                    "accuracy by steps": found["by steps"].round(3).tolist(),
                    "95 % over tasks": round(_over_tasks(found), 3),
                }
                for measure, found in by_measure.items()
            }
            for method, by_measure in by_method.items()
        }
        for by_method in results
    ]
    text = json.dumps({"minutes": dict(minutes), "seeds": record}, indent=2)
    (folder / "steps.json").write_text(text + "\n")


def _report(
    config: Config,
    kind: tuple[int, int],
    results: list[dict[str, Any]],
    minutes: Mapping[str, float],
    folder: Path,
    started: float,
) -> dict[str, Any]:
    rows, notes = [], []
    table: dict[str, dict[str, list[float]]] = {}
    for measure in MEASURES:
        values = {
            method: [float(found[method][measure]["test"].mean()) for found in results]
            for method in [*config.baselines, *config.methods]
        }
        strongest = None
        if config.baselines:
            strongest = max(config.baselines, key=lambda name: np.mean(values[name]))
        for method in values:
            compared = None if method in config.baselines else strongest
            rows.append(Row(measure, method, values[method], compared))
            of_method = [found[method][measure] for found in results]
            width = np.mean([_over_tasks(found) for found in of_method])
            chosen = [(found["steps"], found["variant"]) for found in of_method]
            notes.append(f"  {measure}, {method}: ± {width:.2f}, {chosen}")
        table[measure] = values
    name = f"{config.dataset.capitalize()}, {kind[0]}-way {kind[1]}-shot"
    show(name, rows, folder, started=started)
    print("95 % over the test tasks of a seed; gradient steps and variant chosen:")
    print("\n".join(notes))
    print("minutes:", {name: round(spent, 1) for name, spent in minutes.items()})
    return table


if __name__ == "__main__":
    command_line(main, PRESETS)
