"""Distillation on digits: a large teacher, small students, few labels, two domains.

A LeNet trained on all of MNIST teaches a small dense network that has 100, 1 000 or all
labels: cross-entropy alone, distillation on the same labelled images, and distillation
that also uses all training images without labels. Then the same teacher teaches a small
LeNet for USPS, of which no label is read: distillation, maximum mean discrepancy (MMD)
and both in one objective. All students have the same number of updates; what is
reported is the last one, on the whole test split.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.adapt_digits import images, load_domain
from experiments.common import (
    Row,
    StudyConfig,
    check_finite,
    command_line,
    progress,
    show,
    start_run,
)
from jaxtransfer import nets, prng
from jaxtransfer.methods import adapt, distill
from jaxtransfer.model import from_linen
from jaxtransfer.train import init_state, paired, resident, scan_fit, train_step
from jaxtransfer.typing import Model, Variables

CE = "cross-entropy alone"
KD = "distillation, labelled images"
KD_TRANSFER = "distillation, all images"
STUDENTS = (CE, KD, KD_TRANSFER)

SOURCE_ONLY = "source labels only"
DISTIL = "distillation"
ALIGN = "MMD"
BOTH = "distillation + MMD"
CROSS = {SOURCE_ONLY: (0.0, 0.0), DISTIL: (1.0, 0.0), ALIGN: (0.0, 1.0), BOTH: (1, 1)}


@dataclasses.dataclass(frozen=True)
class Config(StudyConfig):
    """Options of this study."""

    domains: tuple[str, str] = ("mnist", "usps")
    """Domain of the teacher and all labels, and target of the cross-domain rows."""
    labels: tuple[int, ...] = (100, 1000, 0)
    """Labels that the student has, as many of each class; 0 is all."""
    size: int = 20
    """Height and width of the images in pixels."""
    margin: bool = False
    """Resize whole images of MNIST; else cut their margin off, as USPS has none."""
    patches: bool = True
    """Convolutions as matrix products: far faster in a compiled run on CPU; without is
    faster on a GPU."""
    teacher_filters: tuple[int, int] = (32, 64)
    """Filters of the teacher's two convolutions."""
    teacher_width: int = 256
    """Width of the teacher's dense layer."""
    teacher_steps: int = 1500
    """Updates of the teacher."""
    hidden: tuple[int, ...] = (32,)
    """Hidden layers of the dense student."""
    student_filters: tuple[int, int] = (8, 16)
    """Filters of the cross-domain student, a small LeNet."""
    student_width: int = 64
    """Width of the cross-domain student's dense layer."""
    steps: int = 1500
    """Updates of every student."""
    cross_steps: int = 1200
    """Updates of every cross-domain student."""
    batch_size: int = 64
    """Images in a step; half of them from each of two sets where there are two."""
    learning_rate: float = 3e-3
    """Highest learning rate of Adam; cosine decay to 0 after a short warm-up."""
    temperature: float = 4.0
    """Temperature of distillation."""
    alpha: float = 0.9
    """Weight of the teacher against the label on labelled images."""
    distillation: float = 1.0
    """Weight of distillation across domains."""
    alignment: float = 1.0
    """Weight of MMD across domains."""


PRESETS = {
    "smoke": Config(
        domains=("digits", "inverted"),
        labels=(100,),
        size=16,
        teacher_filters=(4, 8),
        teacher_width=32,
        teacher_steps=100,
        student_filters=(4, 4),
        student_width=16,
        steps=50,
        cross_steps=20,
        batch_size=32,
        learning_rate=5e-3,
        patches=False,
        seeds=2,
    ),
    "cpu": Config(),
    "paper": Config(
        size=28,
        margin=True,
        patches=False,
        teacher_width=1024,
        teacher_steps=20_000,
        hidden=(800,),
        steps=20_000,
        cross_steps=10_000,
        batch_size=128,
        learning_rate=1e-3,
        seeds=5,
    ),
}


def lenet(
    filters: tuple[int, int], width: int, config: Config, dropout: float = 0.0
) -> Model:
    """A LeNet as a library model."""
    return from_linen(
        nets.LeNet(
            10,
            filters=filters,
            width=width,
            dropout=dropout,
            batch_norm=True,
            conv=nets.PatchConv if config.patches else nn.Conv,
        )
    )


def make_teacher(config: Config) -> Model:
    """The large LeNet."""
    return lenet(config.teacher_filters, config.teacher_width, config, dropout=0.5)


@functools.cache
def make_cross_start(config: Config) -> Callable:
    """Fresh variables of the cross-domain student, compiled once for all methods."""
    net = lenet(config.student_filters, config.student_width, config)
    example = jnp.zeros((1, config.size, config.size, 1))
    return jax.jit(
        lambda key: distill.init(net.init(prng.stream(key, "model"), example))
    )


def make_optimizer(steps: int, config: Config) -> optax.GradientTransformation:
    """Adam with a short warm-up and cosine decay to 0."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, max(1, steps // 20), steps
    )
    return optax.adam(schedule)


def shaped(pixels: jax.Array, config: Config) -> jax.Array:
    """Network inputs; refuses images of another size at trace time."""
    assert pixels.shape[1:3] == (config.size, config.size)
    return images(pixels, 1)


def count_correct(classify: Callable[[jax.Array], jax.Array], test: Any) -> jax.Array:
    """Right predictions over a test split, a few images at a time."""

    def right(example: Any) -> jax.Array:
        logits = classify(images(example["inputs"][None], 1))
        return jnp.argmax(logits[0]) == example["labels"]

    return jnp.sum(jax.lax.map(right, test, batch_size=250))


def train_teacher(config: Config, source: Any, target: Any) -> tuple[Variables, Any]:
    """A LeNet on all labels of the source; its accuracy (%) on both test splits."""
    net = make_teacher(config)
    steps = config.teacher_steps
    optimizer = make_optimizer(steps, config)
    step = train_step(adapt.objective(net), optimizer)

    @jax.jit
    def run(key: jax.Array, train: Any, tests: Any) -> Any:
        draw = resident(train, 2 * config.batch_size, replacement=True)

        def sample(key: jax.Array, number: jax.Array) -> Any:
            batch = draw(key, number)
            batch = batch | {"inputs": shaped(batch["inputs"], config)}
            return {"source": batch, "target": batch}

        example = jnp.zeros((1, config.size, config.size, 1))
        fresh = net.init(prng.stream(key, "model"), example)
        start = adapt.init(key, net, fresh, example)
        state, _ = scan_fit(
            step, init_state(key, start, optimizer), sample, steps=steps
        )
        trained = Variables(state.params["model"], state.model_state["model"])
        return trained, [
            count_correct(lambda x: net.apply(trained, x)[0], test) for test in tests
        ]

    tests = (source["test"], target["test"])
    key = prng.stream(jax.random.key(config.seed), "teacher")
    trained, correct = run(key, source["train"], tests)
    return trained, [
        100 * int(right) / len(test["labels"])
        for right, test in zip(correct, tests, strict=True)
    ]


def labelled_rows(labels: np.ndarray, count: int, seed: int, config: Config) -> Any:
    """Rows of the labelled images, as many of each class, repeated to all rows.

    The repetition gives every count one shape, and leaves uniform draws as they are
    where the count divides the number of rows (elsewhere some come once more).
    """
    if not count:
        return np.arange(len(labels))
    generator = np.random.default_rng((config.seed, seed, count))
    each = count // 10
    rows = [
        generator.choice(np.flatnonzero(labels == c), each, replace=False)
        for c in range(10)
    ]
    return np.resize(generator.permutation(np.concatenate(rows)), len(labels))


def make_student_run(method: str, config: Config) -> Callable:
    """All seeds of a student, compiled: ``(keys, rows, train, teacher, test) -> …``.

    Gives right predictions and the last loss.

    Seeds are vmapped: the student is dense, and the teacher's parameters are shared.
    """
    student = from_linen(nets.MLP(10, widths=config.hidden))
    teacher = make_teacher(config)
    optimizer = make_optimizer(config.steps, config)
    learn = distill.objective(
        student,
        teacher,
        temperature=config.temperature,
        alpha=0.0 if method == CE else config.alpha,
    )

    def learn_from_both(params, frozen, model_state, batch, key):
        labelled, (model_state, measured) = learn(
            params, frozen, model_state, batch["source"], prng.stream(key, "labelled")
        )
        free, (model_state, _) = learn(
            params, frozen, model_state, batch["target"], prng.stream(key, "free")
        )
        return (labelled + free) / 2, (model_state, measured)

    transfer = method == KD_TRANSFER
    step = train_step(learn_from_both if transfer else learn, optimizer)
    predict = distill.predict(student)

    def one(key, rows, train, teacher_variables, test):
        def look_up(numbers: jax.Array, names: tuple[str, ...]) -> Any:
            batch = {name: train[name][numbers] for name in names}
            return batch | {"inputs": shaped(batch["inputs"], config)}

        half = config.batch_size // 2
        everything = jnp.arange(len(rows))

        def sample(key: jax.Array, number: jax.Array) -> Any:
            if not transfer:
                draw = resident(rows, config.batch_size, replacement=True)
                return look_up(draw(key, number), ("inputs", "labels"))
            draw = paired(
                resident(rows, half, replacement=True),
                resident(everything, half, replacement=True),
            )
            numbers = draw(key, number)
            return {
                "source": look_up(numbers["source"], ("inputs", "labels")),
                "target": look_up(numbers["target"], ("inputs",)),
            }

        example = jnp.zeros((1, config.size, config.size, 1))
        start = distill.init(student.init(prng.stream(key, "model"), example))
        state = init_state(key, start, optimizer, frozen={"teacher": teacher_variables})
        state, history = scan_fit(step, state, sample, steps=config.steps)
        logits = predict(
            state.params, state.frozen, state.model_state, images(test["inputs"], 1)
        )
        correct = jnp.sum(jnp.argmax(logits, axis=-1) == test["labels"])
        return correct, history.train["loss"][-1]

    return jax.jit(jax.vmap(one, in_axes=(0, 0, None, None, None)))


def make_cross_run(method: str, config: Config) -> Callable:
    """One cross-domain student: ``(key, source, target, teacher, test) -> …``.

    Gives right predictions and the last loss.
    """
    distillation, alignment = CROSS[method]
    student = lenet(config.student_filters, config.student_width, config)
    teacher = make_teacher(config)
    optimizer = make_optimizer(config.cross_steps, config)
    objective = distill.cross_domain_objective(
        student,
        teacher,
        tap="features",
        temperature=config.temperature,
        distillation=distillation * config.distillation,
        alignment=alignment * config.alignment,
    )
    step = train_step(objective, optimizer)
    predict = distill.predict(student)

    @jax.jit
    def train(key, start, source, target, taught_by, test):
        half = config.batch_size // 2
        draw = paired(
            resident(source, half, replacement=True),
            resident(target, half, replacement=True),
        )

        def sample(key: jax.Array, number: jax.Array) -> Any:
            return {
                domain: batch | {"inputs": shaped(batch["inputs"], config)}
                for domain, batch in draw(key, number).items()
            }

        state = init_state(key, start, optimizer, frozen={"teacher": taught_by})
        state, history = scan_fit(step, state, sample, steps=config.cross_steps)
        correct = count_correct(
            lambda x: predict(state.params, state.frozen, state.model_state, x), test
        )
        return correct, history.train["loss"][-1]

    def run(key: jax.Array, source: Any, target: Any, taught_by: Any, test: Any) -> Any:
        start = make_cross_start(config)(key)
        return train(key, start, source, target, taught_by, test)

    return run


def main(config: Config) -> dict[str, Any]:
    """Run the study; the table's rows, the teacher's accuracies, the folder."""
    started = time.perf_counter()
    folder = start_run("distill_digits", config)
    source, target = (
        load_domain(
            name,
            size=config.size,
            margin=config.margin,
            seed=config.seed,
            data_dir=config.data_dir,
        )
        for name in config.domains
    )
    labels = np.asarray(source["train"]["labels"])
    fewest = int(np.bincount(labels, minlength=10).min())
    for count in config.labels:
        if count % 10 or not 0 <= count <= 10 * fewest:
            raise ValueError(
                f"labels: got {count}; give a multiple of 10 up to {10 * fewest}, "
                "or 0 for all"
            )
    root = jax.random.key(config.seed)
    keys = jax.vmap(lambda seed: jax.random.fold_in(root, seed))(
        jnp.arange(config.seeds)
    )
    rows: list[Row] = []
    name, other = config.domains
    with progress() as display:
        work = 1 + len(config.labels) * len(STUDENTS) + len(CROSS) * config.seeds
        bar = display.add_task("teacher", total=work)
        teacher, scores = train_teacher(config, source, target)
        display.advance(bar)
        display.console.print(
            f"teacher: {name} {scores[0]:.2f} %, {other} {scores[1]:.2f} %"
        )
        runs = {method: make_student_run(method, config) for method in STUDENTS}
        for count in config.labels:
            chosen = jnp.asarray(
                np.stack(
                    [
                        labelled_rows(labels, count, seed, config)
                        for seed in range(config.seeds)
                    ]
                )
            )
            task = f"{name}, {count or 'all'} labels"
            for method in STUDENTS:
                display.update(bar, description=f"{task}, {method}")
                correct, losses = runs[method](
                    keys, chosen, source["train"], teacher, source["test"]
                )
                check_finite(f"{task}, {method}", losses, config.steps)
                values = 100 * np.asarray(correct) / len(source["test"]["labels"])
                baseline = None if method == CE else CE
                rows.append(Row(task, method, values.tolist(), baseline))
                display.console.print(task, method, np.round(values, 2))
                display.advance(bar)
        task = f"{name} → {other}"
        unlabelled = {"inputs": target["train"]["inputs"]}
        for method in CROSS:
            run = make_cross_run(method, config)
            values = []
            for seed in range(config.seeds):
                display.update(bar, description=f"{task}, {method}, seed {seed}")
                correct, loss = run(
                    keys[seed], source["train"], unlabelled, teacher, target["test"]
                )
                check_finite(f"{task}, {method}", loss, config.cross_steps)
                values.append(100 * int(correct) / len(target["test"]["labels"]))
                display.advance(bar)
            baseline = None if method == SOURCE_ONLY else SOURCE_ONLY
            rows.append(Row(task, method, values, baseline))
            display.console.print(task, method, np.round(values, 2))
    title = (
        f"Digit distillation; teacher: {name} {scores[0]:.2f} %, "
        f"{other} {scores[1]:.2f} %"
    )
    show(title, rows, folder, started=started)
    return {"rows": rows, "teacher": scores, "folder": folder}


if __name__ == "__main__":
    command_line(main, PRESETS)
