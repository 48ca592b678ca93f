"""Few-shot learning on Omniglot: every algorithm of the library at one budget.

Meta-trained on tasks made of training characters; tested on tasks of characters that
were never seen, the same for all. Baselines: networks pretrained to tell all training
characters apart, and what can be done with those. Tuned on validation characters only:
the number of gradient steps, and the step size or transform of the baselines.

Two measures: *transductive* (as published: a task's query images are normalised by
their own batch statistics) and *support statistics* (each query image is judged alone,
normalised by the statistics of the support). Training is transductive.

Deviation from the paper's network: the normalisation has a scale, and scale and offset
are adapted with the rest.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import Progress

from experiments.common import Row, StudyConfig, command_line, progress, show, start_run
from experiments.few_shot_recipes import RECIPES, Recipe, Setting, network, with_head
from experiments.few_shot_saved import ANY_WAYS, save
from jaxtransfer import data, prng
from jaxtransfer.data import episodes
from jaxtransfer.methods import finetune, meta
from jaxtransfer.train import init_state, scan_fit, train_step
from jaxtransfer.train.scan import ScanHistory, resident
from jaxtransfer.train.state import TrainState
from jaxtransfer.typing import Objective, Variables

MEASURES: dict[str, meta.Statistics] = {
    "transductive": "transductive",
    "support statistics": "support",
}
Method = Literal[
    "MAML",
    "FOMAML",
    "Reptile",
    "ANIL",
    "BOIL",
    "Meta-SGD",
    "MAML++",
    "meta-curvature",
    "CAVIA",
    "iMAML",
    "ProtoMAML",
    "ProtoNet",
    "Matching",
    "Relation",
    "R2D2",
]
Baseline = Literal[
    "pretrained, head tuned",
    "pretrained, fine-tuned",
    "Baseline++",
    "SimpleShot",
    "nearest neighbour",
    "transductive fine-tuning",
]
ALL: tuple[Method, ...] = get_args(Method)
BASELINES: tuple[Baseline, ...] = get_args(Baseline)


@dataclasses.dataclass(frozen=True)
class Config(StudyConfig):
    """Options of the study."""

    dataset: Literal["omniglot", "digits"] = "omniglot"
    """Where the classes come from; digits (embedded, ten classes) is for trying out."""
    image_size: int = 28
    """Height and width of the images."""
    characters: tuple[int, int, int] = (1100, 100, 423)
    """Classes for meta-training, validation and test, drawn from the seed."""
    ways: int = 5
    """Classes of a task."""
    train_ways: int = 0
    """Classes of a task in meta-training; 0: as many as at test. Only for methods
    without an output of their own for each class, such as ProtoNet."""
    shots: int = 1
    """Support examples of a class."""
    also: tuple[tuple[int, int], ...] = ()
    """Further tests, (ways, shots) each, of the methods that any task suits."""
    queries: int = 3
    """Query examples of a class in meta-training."""
    test_queries: int = 5
    """Query examples of a class in validation and test."""
    filters: int = 32
    """Filters of each of the four convolutions."""
    tasks: int = 16
    """Tasks of a meta-step."""
    methods: tuple[Method, ...] = ALL
    """What is meta-trained."""
    baselines: tuple[Baseline, ...] = BASELINES
    """What is made of a pretrained network."""
    meta_steps: int = 1000
    """Updates of the meta-parameters, the same for every method."""
    learning_rate: float = 3e-3
    """Of Adam on the meta-parameters; falls to 0 along a cosine."""
    inner_steps: int = 1
    """Gradient steps of a task in meta-training, where a recipe has no other number."""
    inner_learning_rate: float = 0.4
    """Of the inner SGD on the mean cross-entropy (the published 0.4 is on a sum over
    classes: 2.0 here in 5-way tasks)."""
    steps: int = 10
    """Most gradient steps at test; how many are taken is chosen on validation tasks."""
    baseline_steps: int = 50
    """Most gradient steps of the baselines that tune."""
    pretrain_steps: int = 1500
    """Updates of the pretrained network."""
    pretrain_batch: int = 128
    """Batch size of the pretrained network."""
    validation_tasks: int = 100
    """Validation tasks, drawn from a fixed key; divides test_tasks."""
    test_tasks: int = 600
    """Test tasks, drawn from a fixed key, the same for all methods and seeds."""
    workers: int = 3
    """Seeds that run side by side, in threads. The table does not depend on it."""
    block: int = 100
    """Updates between two signs of progress; divides meta_steps and pretrain_steps."""


PRESETS = {
    "smoke": Config(
        dataset="digits",
        image_size=8,
        characters=(4, 3, 3),
        ways=3,
        filters=4,
        tasks=2,
        methods=("MAML", "ProtoNet"),
        baselines=("SimpleShot",),
        meta_steps=4,
        pretrain_steps=4,
        pretrain_batch=8,
        steps=2,
        baseline_steps=2,
        validation_tasks=4,
        test_tasks=8,
        block=2,
        seeds=2,
    ),
    "cpu": Config(),
    "paper": Config(
        queries=15,
        test_queries=15,
        filters=64,
        tasks=32,
        workers=1,
        meta_steps=60_000,
        learning_rate=1e-3,
        inner_learning_rate=2.0,
        pretrain_steps=20_000,
        validation_tasks=200,
        block=500,
    ),
}


@dataclasses.dataclass(frozen=True)
class Pool:
    """Images of one part of the characters, on the device."""

    inputs: jax.Array
    index: data.ClassIndex
    labels: jax.Array


def read(config: Config) -> dict[str, Pool]:
    """The three parts of the characters."""
    split = "train+test" if config.dataset == "omniglot" else "train"
    arrays = data.as_arrays(
        data.load(config.dataset, split, data_dir=config.data_dir),
        size=config.image_size,
        channels=1,
        invert=config.dataset == "omniglot",
    )
    key = prng.stream(jax.random.key(config.seed), "split")
    parts = data.omniglot_split(arrays, key, sizes=config.characters)
    return {
        name: Pool(
            jnp.asarray(part["inputs"]),
            data.class_index(part["labels"]),
            jnp.asarray(part["labels"]),
        )
        for name, part in parts.items()
    }


def draw(
    config: Config,
    key: jax.Array,
    inputs: jax.Array,
    index: data.ClassIndex,
    *,
    tasks: int,
    queries: int,
    ways: int = 0,
) -> episodes.Episodes:
    return episodes.sample(
        key,
        inputs,
        index,
        tasks=tasks,
        ways=ways or config.ways,
        shots=config.shots,
        queries=queries,
        rotations=True,
    )


class Trainer(NamedTuple):
    """A kind of run: ``start(key)`` makes a state, ``block(state)`` trains it."""

    start: Callable[[jax.Array], TrainState]
    block: Callable[[TrainState], tuple[TrainState, ScanHistory]]
    blocks: int


def trainer(
    config: Config,
    init: Callable[[jax.Array], Variables],
    objective: Objective,
    optimizer: optax.GradientTransformation,
    steps: int,
    make_sample: Callable[..., Any],
    *arrays: Any,
) -> Trainer:
    """An objective and an optimizer, compiled here, once for all seeds."""
    step = train_step(objective, optimizer)

    @jax.jit
    def start(key: jax.Array) -> TrainState:
        init_key, run_key = prng.streams(key, "init", "run")
        return init_state(run_key, init(init_key), optimizer)

    @jax.jit
    def block(state: TrainState, arrays: Any) -> tuple[TrainState, ScanHistory]:
        return scan_fit(step, state, make_sample(*arrays), steps=config.block)

    state = start(jax.random.key(0))
    compiled = block.lower(state, arrays).compile()
    return Trainer(start, lambda state: compiled(state, arrays), steps // config.block)


def image(config: Config) -> jax.Array:
    return jnp.zeros((1, config.image_size, config.image_size, 1))


def setting(
    config: Config, recipe: Recipe, steps: int, statistics: meta.Statistics
) -> Setting:
    """What a recipe needs to know."""
    model = network(config.ways, config.filters, context=recipe.context)
    _, features, _ = jax.eval_shape(
        lambda key: model.apply(
            model.init(key, image(config)), image(config), taps=("features",)
        ),
        jax.random.key(0),
    )
    width = features["features"].shape[-1]
    rate = config.inner_learning_rate
    return Setting(model, config.ways, steps, rate, statistics, width)


def meta_trainer(config: Config, pool: Pool, method: Method) -> Trainer:
    """A recipe on tasks of the pool."""
    recipe = RECIPES[method]
    assert recipe.build is not None
    steps = recipe.steps or config.inner_steps
    chosen = setting(config, recipe, steps, "transductive")
    if config.train_ways:
        chosen = dataclasses.replace(chosen, ways=config.train_ways)
    learner = recipe.build(chosen)
    schedule = optax.cosine_decay_schedule(config.learning_rate, config.meta_steps)

    def init(key: jax.Array) -> Variables:
        return meta.counted(learner.init(chosen.model.init(key, image(config))))

    def make_sample(inputs: jax.Array, index: data.ClassIndex):
        def sample(key: jax.Array, number: jax.Array):
            key = jax.random.fold_in(key, number)
            return draw(
                config,
                key,
                inputs,
                index,
                tasks=config.tasks,
                queries=config.queries,
                ways=config.train_ways,
            )

        return sample

    return trainer(
        config,
        init,
        recipe.objective(learner, steps, config.meta_steps),
        recipe.outer(schedule),
        config.meta_steps,
        make_sample,
        pool.inputs,
        pool.index,
    )


def pretrainer(config: Config, pool: Pool) -> Trainer:
    """One classification problem over all training characters.

    A character turned by a quarter is a class of its own, as in the tasks.
    """
    classes, rows = config.characters[0], config.pretrain_batch
    model = network(4 * classes, config.filters)

    def make_sample(inputs: jax.Array, labels: jax.Array):
        images = resident({"inputs": inputs, "labels": labels}, rows, replacement=True)

        def sample(key: jax.Array, number: jax.Array):
            batch = images(key, number)
            turn_key = prng.stream(jax.random.fold_in(key, number), "turns")
            turns = jax.random.randint(turn_key, (rows,), 0, 4)
            turned = [jnp.rot90(batch["inputs"], k, (1, 2)) for k in range(4)]
            return {
                "inputs": jnp.stack(turned)[turns, jnp.arange(rows)],
                "labels": batch["labels"] + classes * turns,
            }

        return sample

    steps = config.pretrain_steps
    optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, steps))
    return trainer(
        config,
        lambda key: model.init(key, image(config)),
        finetune.objective(model),
        optimizer,
        steps,
        make_sample,
        pool.inputs,
        pool.labels,
    )


def base_mean(config: Config, variables: Variables, inputs: jax.Array) -> jax.Array:
    """Mean features of training images, for the transforms of SimpleShot."""
    model = network(config.ways, config.filters)
    _, features, _ = model.apply(variables, inputs, train=True, taps=("features",))
    return features["features"].mean(axis=0)


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


def train(
    name: str, trainer: Trainer, key: jax.Array, display: Progress, stop: Event
) -> Variables:
    """A whole run in blocks, with a sign of progress after each.

    Raises:
        FloatingPointError: the loss is not finite any more.
    """
    state = trainer.start(key)
    line = display.add_task(name, total=trainer.blocks)
    for number in range(trainer.blocks):
        if stop.is_set():
            raise RuntimeError(f"{name}: stopped, as another seed failed")
        state, history = trainer.block(state)
        if not np.isfinite(history.train["loss"]).all():
            raise FloatingPointError(
                f"{name}: the loss is not finite in block {number}; take a smaller "
                "--inner-learning-rate or --learning-rate"
            )
        score = float(history.train["accuracy"].mean())
        display.update(line, advance=1, description=f"{name}: accuracy {score:.3f}")
    model_state = {k: v for k, v in state.model_state.items() if k != "updates"}
    display.update(line, visible=False)
    return Variables(state.params, model_state)


def main(config: Config) -> dict[str, Any]:
    """Run the study.

    Returns:
        ``{measure: {method: accuracies by seed in %}}``.

    Raises:
        ValueError: an option does not divide another as it must, or ``train_ways`` or
            ``also`` do not suit a method.
    """
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
    steps = RECIPES[method].steps or config.inner_steps
    save(
        folder / "networks" / method,
        method=method,
        filters=config.filters,
        image_size=config.image_size,
        ways=config.ways,
        shots=config.shots,
        rate=config.inner_learning_rate,
        steps=steps,
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
