"""Five ways of transferring knowledge, on digits, in about a minute on a laptop.

Fine-tuning, feature extraction, distillation, meta-learning and domain adaptation, each
beside its honest baseline, on the 8x8 digits that scikit-learn carries and on turned
versions of them made on the spot. All seeds of a method run side by side in one
compiled program.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import angles, figures
from experiments.common import Row, StudyConfig, command_line, progress, show, start_run
from experiments.figures import Result
from jaxtransfer import data, losses, nets, ops, prng
from jaxtransfer.methods import adapt, distill, features, finetune, meta
from jaxtransfer.model import from_linen
from jaxtransfer.train import init_state, metrics, scan_fit, train_step
from jaxtransfer.train.scan import paired, resident
from jaxtransfer.typing import Batch, Model, Objective, Predict, Variables

RECORDS = 20  # points of a learning curve


@dataclasses.dataclass(frozen=True)
class Config(StudyConfig):
    """Options of the quickstart."""

    seeds: int = 8
    """Repetitions: initial weights, batches and the few labels differ."""
    labels_a_class: int = 2
    """Target labels of each class, for fine-tuning and feature extraction."""
    student_width: int = 16
    """Hidden units of the student; its teacher has two layers of 128."""
    student_labels: int = 10
    """Labels of each class that the student is given; the teacher had all of them."""
    temperature: float = 4.0
    """Softening of the teacher's predictions."""
    shots: int = 2
    """Labelled examples of each class in a few-shot task."""
    inner_steps: int = 3
    """Gradient steps on a task's support while meta-learning."""
    inner_learning_rate: float = 0.1
    """Step size of MAML's adaptation to a task."""
    baseline_learning_rate: float = 0.01
    """Step size of the baseline's adaptation, which larger steps harm."""
    strength: float = 0.6
    """Target of domain adaptation: turned by up to 60 x strength degrees."""
    learning_rate: float = 3e-3
    """Adam's step size."""
    adaptation_learning_rate: float = 1e-3
    """Adam's step size for domain adaptation: the adversarial game is delicate."""
    reversal: float = 0.1
    """DANN: strength of the reversed gradient at the end of its ramp."""
    batch_size: int = 64
    """Examples in a batch (of each domain)."""
    steps: int = 600
    """Updates of every training but the meta-learner's."""
    meta_steps: int = 800
    """Updates of the meta-learner and of its baseline, 4 tasks each."""
    drawn_images: int = 250
    """Test images of each domain whose features are drawn in the plane."""


PRESETS = {
    "smoke": Config(seeds=2, steps=40, meta_steps=40, drawn_images=12),
    "cpu": Config(),
    "paper": Config(seeds=20, steps=2000, meta_steps=4000),
}


class Digits(NamedTuple):
    """Upright training images, the same in two halves, and test images."""

    upright: Batch
    first_half: Batch
    second_half: Batch
    test: Batch


def load_digits() -> Digits:
    train, test = (data.as_arrays(data.load("digits", s)) for s in ("train", "test"))
    half = len(train["labels"]) // 2
    first = {name: array[:half] for name, array in train.items()}
    second = {name: array[half:] for name, array in train.items()}
    return Digits(train, first, second, test)


def turned(images: Batch, seed: int, strength: float = 1.0) -> Batch:
    inputs = data.shift(images["inputs"], kind="rotation", seed=seed, strength=strength)
    return {**images, "inputs": inputs}


def few(images: Batch, a_class: int, config: Config) -> Batch:
    """Draw a few examples of each class, others for each seed: ``[seeds, few, …]``."""
    rows = []
    for seed in range(config.seeds):
        random = np.random.default_rng([config.seed, seed])
        classes = (np.flatnonzero(images["labels"] == c) for c in range(10))
        drawn = [random.choice(members, a_class, replace=False) for members in classes]
        rows.append(np.concatenate(drawn))
    return {name: array[np.stack(rows)] for name, array in images.items()}


def each_seed(function: Callable, per_seed: Any, *shared: Any) -> Any:
    """Run a function of one seed for all seeds, in one compiled program."""
    axes = (0, *[None] * len(shared))
    return jax.device_get(jax.jit(jax.vmap(function, axes))(per_seed, *shared))


def learn(
    config: Config,
    key: jax.Array,
    objective: Objective,
    predict: Predict,
    variables: Variables,
    sample: Callable,
    test: Batch,
    frozen: dict | None = None,
) -> tuple[Any, jax.Array]:
    """Train one seed; gives what it learned and its test accuracy on the way."""
    optimizer = optax.adam(config.learning_rate)
    measure = metrics.classification(predict)
    state, history = scan_fit(
        train_step(objective, optimizer),
        init_state(key, variables, optimizer, frozen=frozen),
        sample,
        steps=config.steps,
        eval_every=config.steps // RECORDS,
        evaluate=lambda s: measure(s.params, s.frozen, s.model_state, test),
    )
    return state.params, 100 * history.evaluation["accuracy"]


def learned(
    config: Config, task: str, method: str, baseline: str | None, outcome: Any
) -> Result:
    params, curve = outcome
    steps = (1 + np.arange(RECORDS)) * (config.steps // RECORDS)
    return Result(task, method, curve[:, -1], baseline, steps, curve, params)


def batches(images: Batch, config: Config) -> Callable:
    """Batches drawn on the device; no larger than the set."""
    size = min(config.batch_size, len(images["inputs"]))
    return resident(images, size, replacement=True)


def supervised(
    config: Config, model: Model, keys: jax.Array, images: Batch, test: Batch
) -> tuple[Any, jax.Array]:
    """Train a network from fresh weights, for every seed."""

    def run(key: jax.Array, images: Batch, test: Batch) -> tuple[Any, jax.Array]:
        return learn(
            config,
            key,
            finetune.objective(model),
            finetune.predict(model),
            model.init(prng.stream(key, "init"), images["inputs"][:1]),
            batches(images, config),
            test,
        )

    return each_seed(run, keys, images, test)


# --- 1 and 2: reuse a network trained on turned digits, for upright ones -------------

CLASSIFIER = from_linen(nets.MLP(10, widths=(64, 64)))


def fine_tuning(
    config: Config, keys: jax.Array, digits: Digits, source: Any
) -> Iterator[Result]:
    task = f"1 fine-tune, {config.labels_a_class} labels a class"
    labelled = few(digits.second_half, config.labels_a_class, config)
    fresh = each_seed(
        lambda key, x: CLASSIFIER.init(prng.stream(key, "init"), x).params,
        keys,
        digits.test["inputs"][:1],
    )

    def run(trained: Any, seed: Any, test: Batch) -> tuple[Any, jax.Array]:
        key, start, images = seed
        variables, frozen = finetune.split(Variables(start), trained)
        return learn(
            config,
            key,
            finetune.objective(CLASSIFIER),
            finetune.predict(CLASSIFIER),
            variables,
            batches(images, config),
            test,
            frozen,
        )

    for method, start, trained in (
        ("from scratch", fresh, ".*"),
        ("all layers", source, ".*"),
        ("first layer held", source, ("features/dense_1", "head")),
        ("head only", source, "head"),
    ):
        seeds = (keys, start, labelled)
        outcome = each_seed(functools.partial(run, trained), seeds, digits.test)
        baseline = None if start is fresh else "from scratch"
        yield learned(config, task, method, baseline, outcome)


def feature_extraction(config: Config, digits: Digits, source: Any) -> Iterator[Result]:
    task = f"2 features, {config.labels_a_class} labels a class"
    labelled = few(digits.second_half, config.labels_a_class, config)
    to_layer = features.extract(CLASSIFIER, tap="features/dense_0")

    def run(represent: Callable, seed: Any, test: Batch) -> jax.Array:
        params, images = seed
        probe = features.logistic_regression(
            represent(params, images["inputs"]), images["labels"], classes=10, l2=1e-2
        )
        logits = represent(params, test["inputs"]) @ probe["kernel"] + probe["bias"]
        return 100 * jnp.mean(losses.accuracy(logits, test["labels"]))

    for method, represent in (
        ("logistic regression on pixels", lambda _, x: x.reshape(len(x), -1)),
        ("… on the first layer", lambda params, x: to_layer(Variables(params), x)),
    ):
        function = functools.partial(run, represent)
        accuracy = each_seed(function, (source, labelled), digits.test)
        baseline = "logistic regression on pixels" if "first" in method else None
        yield Result(task, method, accuracy, baseline)


# --- 3: a large network teaches a small one ------------------------------------------


def distillation(config: Config, keys: jax.Array, digits: Digits) -> Iterator[Result]:
    task = f"3 distil, {config.student_labels} labels a class"
    teacher = from_linen(nets.MLP(10, widths=(128, 128)))
    student = from_linen(nets.MLP(10, widths=(config.student_width,)))
    taught = supervised(config, teacher, keys, digits.upright, digits.test)
    yield learned(config, task, "teacher, all labels", None, taught)

    def run(
        alpha: float, seed: Any, images: Batch, test: Batch
    ) -> tuple[Any, jax.Array]:
        key, teacher_params, labelled = seed
        start = student.init(prng.stream(key, "init"), test["inputs"][:1])
        return learn(
            config,
            key,
            distill.objective(
                student, teacher, temperature=config.temperature, alpha=alpha
            ),
            distill.predict(student),
            distill.init(start),
            batches(images or labelled, config),
            test,
            {"teacher": Variables(teacher_params)},
        )

    seeds = keys, taught[0], few(digits.upright, config.student_labels, config)
    unlabelled = {"inputs": digits.upright["inputs"]}
    for method, alpha, images in (
        ("student alone", 0.0, {}),
        ("distilled, same images", 0.9, {}),
        ("distilled, unlabelled images", 1.0, unlabelled),
    ):
        outcome = each_seed(functools.partial(run, alpha), seeds, images, digits.test)
        baseline = "student alone" if alpha else None
        yield learned(config, task, method, baseline, outcome)


# --- 4: learn to adapt to an angle that was never seen -------------------------------

TASKS, TEST_TASKS, QUERIES, TEST_STEPS = 4, 50, 3, 20


def meta_learning(config: Config, keys: jax.Array, digits: Digits) -> Iterator[Result]:
    task = f"4 new angle, {config.shots} labels a class"
    model = from_linen(nets.MLP(10, widths=(64, 32)))
    classify = finetune.objective(model)
    draw_tasks = functools.partial(angles.tasks, shots=config.shots, queries=QUERIES)
    inner = optax.sgd(config.inner_learning_rate)
    learner = meta.maml(meta.task(model), inner, steps=config.inner_steps)

    def together(params, frozen, model_state, tasks, key):
        """The usual start: one network for all tasks, of which it sees every image."""
        both = jax.tree.map(
            lambda *parts: jnp.concatenate([jnp.concatenate(p) for p in parts]),
            *tasks.values(),
        )
        return classify(params, frozen, model_state, both, key)

    def train(objective: Objective, key: jax.Array, pool: Any) -> Any:
        optimizer = optax.adam(config.learning_rate)
        start = model.init(prng.stream(key, "init"), pool[0][:1])
        state, _ = scan_fit(
            train_step(objective, optimizer),
            init_state(key, start, optimizer),
            lambda key, step: draw_tasks(
                jax.random.fold_in(key, step), *pool, tasks=TASKS
            ),
            steps=config.meta_steps,
        )
        return state.params

    def test(learning_rate: float, seed: Any, pool: Any) -> jax.Array:
        key, params = seed
        inner = optax.sgd(learning_rate)
        follow = meta.trajectory(meta.maml(meta.task(model), inner, steps=TEST_STEPS))
        tasks = draw_tasks(prng.stream(key, "test"), *pool, tasks=TEST_TASKS)
        return 100 * follow(params, {}, {}, tasks, key)["accuracy"].mean(0)

    def pool(images: Batch) -> Any:
        return jnp.asarray(images["inputs"]), data.class_index(images["labels"])

    baseline = "all angles, fine-tuned"
    for method, objective, rate in (
        (baseline, together, config.baseline_learning_rate),
        ("MAML", meta.objective(learner), config.inner_learning_rate),
    ):
        params = each_seed(
            functools.partial(train, objective), keys, pool(digits.upright)
        )
        function = functools.partial(test, rate)
        curve = each_seed(function, (keys, params), pool(digits.test))
        steps = np.arange(TEST_STEPS + 1)
        if method == baseline:
            yield Result(task, "all angles, as it is", curve[:, 0])
        beside = None if method == baseline else baseline
        yield Result(task, method, curve[:, -1], beside, steps, curve)


# --- 5: labels in one domain, images in both -----------------------------------------


def shifted_domains(config: Config, digits: Digits) -> Batch:
    """Upright digits with labels; turned ones, of other images, without."""
    seed, strength = config.seed, config.strength
    target = turned(digits.second_half, seed + 1, strength)
    return {
        "source": digits.first_half,
        "target": {"inputs": target["inputs"]},
        "test": turned(digits.test, seed + 2, strength),
    }


def adaptation(config: Config, keys: jax.Array, domains: Batch) -> Iterator[Result]:
    task = "5 adapt, upright → turned"
    critic = from_linen(nets.Critic((64,)))
    config = dataclasses.replace(config, learning_rate=config.adaptation_learning_rate)

    def ramp(done: jax.Array) -> jax.Array:
        return config.reversal * ops.dann(done)

    def run(terms: Any, key: jax.Array, domains: Batch) -> tuple[Any, jax.Array]:
        example = domains["test"]["inputs"][:1]
        start = CLASSIFIER.init(prng.stream(key, "init"), example)
        return learn(
            config,
            key,
            adapt.objective(CLASSIFIER, *terms, steps=config.steps),
            adapt.predict(CLASSIFIER),
            adapt.init(key, CLASSIFIER, start, example, critic=critic, tap="features"),
            paired(
                batches(domains["source"], config), batches(domains["target"], config)
            ),
            domains["test"],
        )

    for method, terms in (
        ("source only", ()),
        ("MMD", (adapt.align(losses.mmd, tap="features"),)),
        ("CORAL", (adapt.align(losses.coral, tap="features", weight=30.0),)),
        ("DANN", (adapt.dann(critic, tap="features", reversal=ramp),)),
    ):
        outcome = each_seed(functools.partial(run, terms), keys, domains)
        baseline = "source only" if terms else None
        yield learned(config, task, method, baseline, outcome)


def draw(
    results: list[Result], digits: Digits, domains: Batch, drawn: int, path: Path
) -> None:
    """Learning curves, and the first seed's features of both domains in the plane."""
    by_task: dict[str, list[Result]] = {}
    for result in results:
        by_task.setdefault(result.task, []).append(result)

    fine, probe, distilled, meta, adapted = by_task.values()
    with figures.panels(path) as axes:
        figures.curves(axes["a"], fine[0].task, fine, "updates")
        bars = {r.method: r.accuracy for r in probe}
        figures.bars(axes["b"], probe[0].task, bars)
        figures.curves(axes["c"], distilled[0].task, distilled[1:], "updates")
        figures.curves(axes["d"], meta[0].task, meta, "steps on the task")
        figures.curves(axes["e"], adapted[0].task, adapted, "updates")
        rows = slice(drawn)
        test, shifted = digits.test, domains["test"]
        for panel, result in (("f", adapted[0]), ("g", adapted[1])):
            params = jax.tree.map(lambda leaf: leaf[0], result.params["model"])
            represent = features.extract(CLASSIFIER, tap="features")
            figures.plane(
                axes[panel],
                f"features, {result.method}",
                represent(Variables(params), test["inputs"][rows]),
                test["labels"][rows],
                represent(Variables(params), shifted["inputs"][rows]),
                shifted["labels"][rows],
            )


def main(config: Config) -> list[Row]:
    started = time.perf_counter()
    for name in ("labels_a_class", "student_labels"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}: {getattr(config, name)} must be 1 or more")
    folder = start_run("quickstart", config)
    if config.steps < RECORDS or config.steps % RECORDS:
        raise ValueError(f"steps: got {config.steps}; give a multiple of {RECORDS}")
    keys = jax.random.split(jax.random.key(config.seed), config.seeds)
    digits = load_digits()
    domains = shifted_domains(config, digits)
    results: list[Result] = []
    with progress() as bar:
        first = bar.add_task(f"{'source network':18}", total=1)
        copies = [turned(digits.first_half, seed) for seed in range(4)]
        images = {n: np.concatenate([copy[n] for copy in copies]) for n in copies[0]}
        source, _ = supervised(config, CLASSIFIER, keys, images, digits.test)
        bar.advance(first)
        for name, (way, total) in {
            "fine-tuning": (fine_tuning(config, keys, digits, source), 4),
            "feature extraction": (feature_extraction(config, digits, source), 2),
            "distillation": (distillation(config, keys, digits), 4),
            "meta-learning": (meta_learning(config, keys, digits), 3),
            "domain adaptation": (adaptation(config, keys, domains), 4),
        }.items():
            results += bar.track(way, total=total, description=f"{name:18}")
        last = bar.add_task(f"{'figure':18}", total=1)
        draw(results, digits, domains, config.drawn_images, folder / "quickstart.png")
        bar.advance(last)
    rows = [Row(r.task, r.method, r.accuracy.tolist(), r.baseline) for r in results]
    print(f"Figure: {folder / 'quickstart.png'}")
    show("Five ways of transfer", rows, folder, digits=1, started=started)
    return rows


if __name__ == "__main__":
    command_line(main, PRESETS)
