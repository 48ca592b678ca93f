"""MAML on Omniglot: learn a start from which one example a class is enough.

Learned: the meta-parameters of a small convolutional network, on tasks made of training
characters; tested on tasks of characters that were never seen. Baselines: the same
fine-tuning from an untrained network and from a network that was pretrained to tell all
training characters apart (new head). Tuned on validation characters only: the number
of gradient steps of every method and the step size of the baselines.

Two measures: *transductive* (as published: a task's query images are normalised by
their own batch statistics) and *support statistics* (each query image is judged alone,
normalised by the statistics of the support).

Deviation from the paper's network: the normalisation has a scale, and scale and offset
are adapted with the rest.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import Progress

from experiments.common import Row, StudyConfig, command_line, progress, show, start_run
from jaxtransfer import data, nets, prng
from jaxtransfer.data import episodes
from jaxtransfer.methods import finetune, maml
from jaxtransfer.model import from_linen
from jaxtransfer.train import init_state, scan_fit, train_step
from jaxtransfer.train.scan import ScanHistory, resident
from jaxtransfer.train.state import TrainState
from jaxtransfer.typing import Model, Objective, Variables

MEASURES = ("transductive", "support statistics")


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
    shots: int = 1
    """Support examples of a class."""
    queries: int = 3
    """Query examples of a class in meta-training."""
    test_queries: int = 5
    """Query examples of a class in validation and test."""
    filters: int = 32
    """Filters of each of the four convolutions."""
    pooled: bool = False
    """Mean over the last 2x2 positions (as published) or all of them as features."""
    tasks: int = 16
    """Tasks of a meta-step."""
    chunk: int | None = 4
    """Tasks that run side by side, a divisor of tasks; None: all (on a GPU)."""
    methods: tuple[Literal["MAML", "FOMAML"], ...] = ("MAML",)
    """What is meta-trained: second order, first order."""
    meta_steps: int = 6000
    """Updates of the meta-parameters."""
    learning_rate: float = 3e-3
    """Of Adam on the meta-parameters; falls to 0 along a cosine."""
    inner_steps: int = 1
    """Gradient steps of a task in meta-training."""
    inner_learning_rate: float = 0.4
    """Of the inner SGD on the mean cross-entropy (the published 0.4 is on a sum over
    classes: 2.0 here in 5-way tasks)."""
    steps: int = 10
    """Most gradient steps at test; how many are taken is chosen on validation tasks."""
    baseline_rates: tuple[float, ...] = (0.1, 0.5, 2.0)
    """Step sizes of the baselines' fine-tuning to choose from on validation tasks."""
    pretrain_steps: int = 1500
    """Updates of the pretrained baseline."""
    pretrain_batch: int = 128
    """Batch size of the pretrained baseline."""
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
        chunk=None,
        methods=("MAML",),
        meta_steps=4,
        pretrain_steps=4,
        pretrain_batch=8,
        steps=2,
        baseline_rates=(0.1, 1.0),
        validation_tasks=4,
        test_tasks=8,
        block=2,
        seeds=2,
    ),
    "cpu": Config(),
    "paper": Config(
        queries=1,
        test_queries=1,
        filters=64,
        pooled=True,
        tasks=32,
        chunk=None,
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


def draw(config: Config, key: jax.Array, inputs, index, tasks: int, queries: int):
    return episodes.sample(
        key,
        inputs,
        index,
        tasks=tasks,
        ways=config.ways,
        shots=config.shots,
        queries=queries,
        rotations=True,
    )


def network(config: Config, outputs: int):
    return from_linen(nets.Conv4(outputs, filters=config.filters, pooled=config.pooled))


class Trainer(NamedTuple):
    """A kind of run: ``start(key)`` makes a state, ``block(state)`` trains it."""

    start: Callable[[jax.Array], TrainState]
    block: Callable[[TrainState], tuple[TrainState, ScanHistory]]
    blocks: int


def trainer(
    config: Config,
    model: Model,
    objective: Objective,
    steps: int,
    make_sample: Callable[..., Any],
    *arrays: Any,
) -> Trainer:
    """Adam with a cosine on an objective; compiled here, once for all seeds."""
    schedule = optax.cosine_decay_schedule(config.learning_rate, steps)
    optimizer = optax.adam(schedule)
    step = train_step(objective, optimizer)

    @jax.jit
    def start(key: jax.Array) -> TrainState:
        init_key, run_key = prng.streams(key, "init", "run")
        image = jnp.zeros((1, config.image_size, config.image_size, 1))
        return init_state(run_key, model.init(init_key, image), optimizer)

    @jax.jit
    def block(state: TrainState, arrays: Any) -> tuple[TrainState, ScanHistory]:
        return scan_fit(step, state, make_sample(*arrays), steps=config.block)

    state = start(jax.random.key(0))
    compiled = block.lower(state, arrays).compile()
    return Trainer(start, lambda state: compiled(state, arrays), steps // config.block)


def meta_trainer(config: Config, pool: Pool, *, first_order: bool) -> Trainer:
    """Second- or first-order MAML on tasks of the pool."""
    model = network(config, config.ways)
    objective = maml.objective(
        finetune.objective(model),
        optax.sgd(config.inner_learning_rate),
        steps=config.inner_steps,
        first_order=first_order,
        chunk=config.chunk,
    )

    def make_sample(inputs: jax.Array, index: data.ClassIndex):
        def sample(key: jax.Array, number: jax.Array):
            key = jax.random.fold_in(key, number)
            return draw(config, key, inputs, index, config.tasks, config.queries)

        return sample

    arrays = pool.inputs, pool.index
    return trainer(config, model, objective, config.meta_steps, make_sample, *arrays)


def pretrainer(config: Config, pool: Pool) -> Trainer:
    """One classification problem over all training characters.

    A character turned by a quarter is a class of its own, as in the tasks.
    """
    classes, rows = config.characters[0], config.pretrain_batch
    model = network(config, 4 * classes)

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

    objective, steps = finetune.objective(model), config.pretrain_steps
    arrays = pool.inputs, pool.labels
    return trainer(config, model, objective, steps, make_sample, *arrays)


def untrained(config: Config, key: jax.Array) -> Variables:
    """A fresh network for tasks."""
    image = jnp.zeros((1, config.image_size, config.image_size, 1))
    return network(config, config.ways).init(key, image)


def with_new_head(config: Config, key: jax.Array, variables: Variables) -> Variables:
    """The pretrained network with an untrained head of ``ways`` outputs."""
    fresh = untrained(config, key)
    return Variables(
        {**variables.params, "head": fresh.params["head"]}, fresh.model_state
    )


def follower(config: Config, tasks: data.episodes.Episodes):
    """``(variables, rates, tasks) -> accuracies [tasks, steps + 1]`` by measure.

    ``rates`` are the step sizes of the features and of the head.
    """
    size = config.validation_tasks
    model = network(config, config.ways)
    own, supports = finetune.objective(model), finetune.objective(model, train=False)

    def query(params, frozen, model_state, batch, key):
        loss, (_, first) = own(params, frozen, model_state, batch, key)
        _, (_, second) = supports(params, frozen, model_state, batch, key)
        both = (first["accuracy"], second["accuracy"])
        return loss, (model_state, dict(zip(MEASURES, both, strict=True)))

    @jax.jit
    def follow(variables, rates, batch):
        def descend(gradient, _):
            return {
                part: jax.tree.map(lambda leaf, rate=rate: -rate * leaf, gradient[part])
                for part, rate in rates.items()
            }

        run = maml.trajectory(
            own, optax.stateless(descend), steps=config.steps, query=query
        )

        def one(task):
            task = jax.tree.map(lambda leaf: leaf[None], task)
            key = jax.random.key(0)  # Nothing in the network is random.
            return run(variables.params, {}, variables.model_state, task, key)

        several = jax.lax.map(one, batch, batch_size=config.chunk or size)
        return {name: several[name][:, 0] for name in MEASURES}

    group = jax.tree.map(lambda leaf: leaf[:size], tasks)
    variables = untrained(config, jax.random.key(0))
    compiled = follow.lower(variables, _rates(1.0), group).compile()

    def in_groups(variables, rates, tasks):
        groups = [
            compiled(
                variables,
                rates,
                jax.tree.map(lambda leaf, at=at: leaf[at : at + size], tasks),
            )
            for at in range(0, len(tasks["query"]["labels"]), size)
        ]
        return jax.tree.map(lambda *parts: np.concatenate(parts), *groups)

    return in_groups


def _rates(rate: float, *, head_only: bool = False) -> dict[str, np.ndarray]:
    """Step sizes of the features and of the head."""
    features = 0.0 if head_only else rate
    return {"features": np.float32(features), "head": np.float32(rate)}


def judge(follow, variables, rates, validation, test, *, head_only=False):
    """Choose rate and steps on validation tasks; accuracies on test tasks.

    Returns:
        By measure: accuracies of the test tasks ``[tasks, steps + 1]`` in %, and what
        was chosen.
    """

    def at(rate, tasks):
        return follow(variables, _rates(rate, head_only=head_only), tasks)

    tried = {rate: at(rate, validation) for rate in rates}
    tested, found = {}, {}
    for measure in MEASURES:
        score = {rate: tried[rate][measure].mean(0)[1:] for rate in rates}
        rate = max(rates, key=lambda rate: score[rate].max())
        steps = 1 + int(score[rate].argmax())
        if rate not in tested:
            tested[rate] = at(rate, test)
        found[measure] = {
            "rate": rate,
            "steps": steps,
            "validation": float(score[rate].max()),
            "test": 100 * tested[rate][measure],
        }
    return found


def train(
    name: str, trainer: Trainer, key: jax.Array, display: Progress, stop: Event
) -> Variables:
    """A whole run in blocks, with a sign of progress after each."""
    state = trainer.start(key)
    line = display.add_task(name, total=trainer.blocks)
    for _ in range(trainer.blocks):
        if stop.is_set():
            raise RuntimeError(f"{name}: stopped, as another seed failed")
        state, history = trainer.block(state)
        score = float(history.train["accuracy"].mean())
        display.update(line, advance=1, description=f"{name}: accuracy {score:.3f}")
    return Variables(state.params, state.model_state)


def main(config: Config) -> dict[str, Any]:
    """Run the study.

    Returns:
        ``{measure: {method: accuracies by seed in %}}``.

    Raises:
        ValueError: an option does not divide another as it must.
    """
    for whole, part in (
        ("meta_steps", "block"),
        ("pretrain_steps", "block"),
        ("test_tasks", "validation_tasks"),
    ):
        size, divisor = getattr(config, whole), getattr(config, part)
        if size % divisor:
            raise ValueError(f"{whole}: {size} must be a multiple of {part}, {divisor}")
    folder = start_run("maml_omniglot", config)
    started = time.perf_counter()
    pools = read(config)
    root = jax.random.key(config.seed)

    def fixed(part: str, tasks: int):
        pool, key = pools[part], prng.stream(root, part)
        return draw(config, key, pool.inputs, pool.index, tasks, config.test_queries)

    validation = fixed("validation", config.validation_tasks)
    test = fixed("test", config.test_tasks)
    print("compiling")
    pretraining = pretrainer(config, pools["train"])
    meta = {
        name: meta_trainer(config, pools["train"], first_order=name == "FOMAML")
        for name in config.methods
    }
    follow = follower(config, validation)
    results: list[dict[str, Any]] = [{} for _ in range(config.seeds)]
    stop, writing = Event(), Lock()

    def repetition(seed: int, display: Progress) -> None:
        key = prng.stream(root, f"seed {seed}")
        head_key = prng.stream(key, "head")

        def record(method, variables, rates, **options):
            results[seed][method] = judge(
                follow, variables, rates, validation, test, **options
            )
            with writing:
                _write_steps(results, folder)
            first = results[seed][method][MEASURES[0]]
            score = f"{100 * first['validation']:.2f} % on validation tasks"
            display.console.print(
                f"seed {seed}, {method}: {score}, {first['steps']} steps"
            )

        for method, trainer in meta.items():
            start = train(f"seed {seed}, {method}", trainer, key, display, stop)
            record(method, start, (config.inner_learning_rate,))
        rates = config.baseline_rates
        record("untrained, fine-tuned", untrained(config, head_key), rates)
        key = prng.stream(key, "pretraining")
        whole = train(f"seed {seed}, pretraining", pretraining, key, display, stop)
        start = with_new_head(config, head_key, whole)
        record("pretrained, head tuned", start, rates, head_only=True)
        record("pretrained, fine-tuned", start, rates)

    with progress() as display, ThreadPoolExecutor(config.workers) as pool:
        try:
            list(pool.map(lambda seed: repetition(seed, display), range(config.seeds)))
        except BaseException:  # Ctrl-C too: the other threads end after their block.
            stop.set()
            raise
    return _report(config, results, folder, started)


def _final(found: dict[str, Any]) -> np.ndarray:
    """Accuracy of each test task after the chosen number of steps."""
    return found["test"][:, found["steps"]]


def _write_steps(results: list[dict[str, Any]], folder: Path) -> None:
    """What was chosen and found so far, by seed, method and measure."""
    record = [
        {
            method: {
                measure: {
                    "rate": found["rate"],
                    "steps": found["steps"],
                    "validation": found["validation"],
                    "accuracy by steps": found["test"].mean(0).round(3).tolist(),
                    "95 % over tasks": round(_over_tasks(found), 3),
                }
                for measure, found in by_measure.items()
            }
            for method, by_measure in dict(by_method).items()
        }
        for by_method in results
    ]
    (folder / "steps.json").write_text(json.dumps(record, indent=2) + "\n")


def _over_tasks(found: dict[str, Any]) -> float:
    values = _final(found)
    return float(1.96 * values.std(ddof=1) / np.sqrt(len(values)))


def _report(
    config: Config, results: list[dict[str, Any]], folder: Path, started: float
) -> dict[str, Any]:
    rows, notes = [], []
    table: dict[str, dict[str, list[float]]] = {}
    baselines = [name for name in results[0] if name not in config.methods]
    for measure in MEASURES:
        values = {
            method: [float(_final(found[method][measure]).mean()) for found in results]
            for method in [*baselines, *config.methods]
        }
        strongest = max(baselines, key=lambda name: np.mean(values[name]))
        for method in values:
            of_method = [found[method][measure] for found in results]
            compared = strongest if method in config.methods else None
            rows.append(Row(measure, method, values[method], compared))
            width = np.mean([_over_tasks(found) for found in of_method])
            steps = [found["steps"] for found in of_method]
            notes.append(f"  {measure}, {method}: ± {width:.2f}, steps {steps}")
        table[measure] = values
    name = f"{config.dataset.capitalize()}, {config.ways}-way {config.shots}-shot"
    show(name, rows, folder, started=started)
    print("95 % over the test tasks of a seed, and gradient steps (by validation):")
    print("\n".join(notes))
    return table


if __name__ == "__main__":
    command_line(main, PRESETS)
