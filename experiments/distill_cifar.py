"""Distilling a real ResNet-56 into small students, on few images of CIFAR.

Every family of distillation has a row: the same student, images, updates and seeds,
with the weights of the papers. What the teacher says is computed once and looked up.
Last epoch; the complete test set.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.cifar import (
    CifarConfig,
    Images,
    accuracy,
    follow,
    look,
    make_optimizer,
    read,
    read_teacher,
    resnet,
    sample,
    subset,
)
from experiments.common import (
    Row,
    check_finite,
    command_line,
    keep,
    kept,
    progress,
    show,
    start_run,
)
from experiments.distill_cifar_rows import (
    CE,
    MUTUAL,
    SIMKD,
    TASK_WEIGHT,
    TUNED,
    last_blocks,
    make_rows,
    projector,
)
from jaxtransfer import nets, parallel, prng
from jaxtransfer.methods import distill
from jaxtransfer.methods.distill.terms import paths, tapped
from jaxtransfer.train import init_state, train_step
from jaxtransfer.typing import Model, Variables


@dataclasses.dataclass(frozen=True)
class Config(CifarConfig):
    """Options of the study."""

    per_class: tuple[int, ...] = (15,)
    """Training images of a class, a block of rows each."""
    cohort: int = 2
    """Students that learn from each other in the row of mutual learning."""
    kd_temperature: float = 4.0
    """Of the row of tuned KD."""
    kd_weight: float = 0.9
    """Of the teacher in the row of tuned KD; the labels have the rest."""
    scored_on: str = "test"
    """"test", or "valid" to choose options by: training images that are not used."""
    side_by_side: bool = False
    """Seeds trained side by side by one program of many updates. For an accelerator,
    where an update of so small a network is mostly waiting; takes the memory of all."""
    earlier: tuple[Path, ...] = ()
    """Folders of runs of the same options, stopped or of other rows or seeds, whose
    values are taken up."""


PRESETS = {
    "smoke": Config(
        weights="random",
        teacher_depth=8,
        filters=4,
        per_class=(2,),
        updates=2,
        batch_size=8,
        test_images=20,
        seeds=2,
    ),
    "cpu": Config(),
    "paper": Config(
        student_depth=20,
        per_class=(5000,),
        updates=187_500,  # 240 epochs of all 50,000 images
        seeds=5,
        side_by_side=True,
    ),
}


class Lesson(NamedTuple):
    """What a row is trained on and with."""

    images: Images
    taught: Mapping[str, jax.Array]
    teacher: Variables


class Student(NamedTuple):
    """A row, compiled once for all seeds.

    Attributes:
        start: ``(key, lesson) -> training state``.
        update: ``(state, (images, taught)) -> (state, metrics)``.
        together: :attr:`stride` updates of several seeds.
        stride: how many at once.
        logits: ``(state, lesson, inputs) -> logits`` of the trained student.
    """

    start: Callable[[jax.Array, Lesson], Any]
    update: Callable[[Any, Any], Any]
    together: Callable[[Any, Any], Any]
    stride: int
    logits: Callable[[Any, Lesson, jax.Array], jax.Array]


def make_student(config: Config, row: str, teacher: Model) -> Student:
    """The objective of a row, and what belongs to it."""
    # Students under vmap are grouped convolutions otherwise, which are slow.
    several = config.side_by_side or row == MUTUAL
    layer = {"conv": nets.PatchConv} if several else {}
    student = resnet(config, config.student_depth, **layer)
    optimizer = make_optimizer(config)
    depths = config.student_depth, config.teacher_depth, config.filters
    tuned = config.kd_temperature, config.kd_weight
    init = jax.jit(student.init)
    if row == MUTUAL:
        objective = distill.mutual_objective(student)
        init = jax.jit(
            lambda key, some: distill.init_cohort(
                key, student, some, students=config.cohort
            )
        )
    else:
        any_key, any_labels = jax.random.key(0), jnp.zeros(2, jnp.int32)
        objective = distill.objective(
            student,
            teacher,
            terms=make_rows(*depths, any_key, any_labels, tuned)[row],
            task_weight=1 - tuned[1] if row == TUNED else TASK_WEIGHT.get(row, 1.0),
        )

    def start(key: jax.Array, lesson: Lesson) -> Any:
        begun = init(prng.stream(key, "init"), lesson.images.inputs[:2])
        if row != MUTUAL:
            memory_key, bridge_key = prng.streams(key, "memory", "bridges")
            begun = distill.start(
                bridge_key,
                student,
                teacher,
                make_rows(*depths, memory_key, lesson.images.labels, tuned)[row],
                student_variables=begun,
                teacher_variables=lesson.teacher,
                inputs=lesson.images.inputs[:2],
            )
        return init_state(prng.stream(key, "run"), begun, optimizer)

    step = train_step(objective, optimizer)

    def update(state: Any, given: Any) -> Any:
        return step(state, sample(config, state, *given))

    stride = math.gcd(config.updates, 50)

    @functools.partial(jax.jit, donate_argnums=0)
    def together(states: Any, given: Any) -> Any:
        def next_one(states: Any, _: None) -> Any:
            states, measured = jax.vmap(update)(states, given)
            return states, measured["loss"].total

        states, losses = jax.lax.scan(next_one, states, length=stride)
        return states, losses[-1]

    bridge_path = last_blocks(config.teacher_depth)[-1]
    own_path = last_blocks(config.student_depth)[-1]

    @jax.jit
    def logits(state: Any, lesson: Lesson, inputs: jax.Array) -> jax.Array:
        if row == MUTUAL:
            own = distill.of_cohort(state.params, state.model_state, 0)
            return student.apply(own, inputs)[0]
        own = distill.of_student(state.params, state.model_state)
        outputs, features, _ = student.apply(own, inputs, taps=(own_path,))
        if row != SIMKD:
            return outputs
        bridge = projector((), lesson.taught[bridge_path].shape)
        between = Variables(
            state.params["bridges"]["maps"], state.model_state["bridges"]["maps"]
        )
        pooled = bridge.apply(between, features[own_path])[0].mean(axis=(1, 2))
        head = lesson.teacher.params["linear"]
        return pooled @ head["kernel"] + head["bias"]

    return Student(start, parallel.jit_step(update), together, stride, logits)


def looked_at(config: Config, rows: list[str]) -> tuple[str, ...]:
    """Layers of the teacher that the rows learn from; only these are kept in memory."""
    depths = config.student_depth, config.teacher_depth, config.filters
    terms = make_rows(*depths, jax.random.key(0), jnp.zeros(2, jnp.int32))
    used = [term.teacher for row in rows for term in terms[row].values()]
    return tapped(path for one in used for path in paths(one))


def follow_together(
    row: str, states: list[Any], student: Student, given: list[Any], updates: int
) -> list[Any]:
    """The same for several seeds at once, with what each is given.

    Raises:
        FloatingPointError: a loss is not finite at the end.
    """
    states, given = (
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
        for trees in (states, given)
    )
    losses = jnp.zeros(0)
    for _ in range(updates // student.stride):
        states, losses = student.together(states, given)
    check_finite(row, losses, updates)
    return [jax.tree.map(lambda leaf, n=n: leaf[n], states) for n in range(len(losses))]


def train_students(
    config: Config,
    name: str,
    student: Student,
    keys: list[jax.Array],
    lessons: list[Lesson],
) -> list[Any]:
    """The states of a row's students after all updates, one a key."""
    states = list(map(student.start, keys, lessons))
    given = [(own.images, own.taught) for own in lessons]
    if config.side_by_side:
        return follow_together(name, states, student, given, config.updates)
    return [
        follow(name, state, student.update, own, config.updates)
        for state, own in zip(states, given, strict=True)
    ]


def main(config: Config) -> dict[str, Any]:
    """Run the study.

    Returns:
        ``{"rows": ..., "teacher": accuracy in %}``.

    Raises:
        ValueError: an unknown row, an option that is not positive, a weight outside of
            0 to 1, unknown images to score with, or more images of a class than there
            are.
        FileNotFoundError: there is no file of the teacher.
    """
    known = list(make_rows(8, 8, 1, jax.random.key(0), jnp.zeros(4, int)))
    if unknown := sorted(set(config.rows) - set(known)):
        raise ValueError(f"rows: no {unknown[0]!r}; choose among {known}")
    if not 0 <= config.kd_weight <= 1:
        raise ValueError(f"kd_weight: 0 to 1, got {config.kd_weight}")
    if config.scored_on not in ("test", "valid"):
        raise ValueError(f"scored_on: 'test' or 'valid', got {config.scored_on!r}")
    free = ("rows", "seeds", "per_class", "side_by_side")
    lines = kept(config.earlier, "values.jsonl", config, free=free)
    try:
        before = {(x["images"], x["seed"], x["row"]): x["value"] for x in lines}
    except KeyError as error:
        raise ValueError(
            f"earlier: a line of a values.jsonl has no {error}; give folders of runs "
            "of this study"
        ) from error
    teacher = resnet(config, config.teacher_depth)
    teacher_variables = read_teacher(config, teacher)
    folder = start_run("distill_cifar", config)
    started = time.perf_counter()
    most = max(config.per_class)
    train = read(config, "train", most)
    unused = config.scored_on == "valid"
    if unused and config.classes * most >= len(train.labels):
        raise ValueError(
            f"scored_on: with {most} images a class all {len(train.labels)} are "
            "trained on and none are left to score with; give fewer with --per-class"
        )
    subset(train.labels, most, seed=0)  # Too many are refused before any work.
    everything = train if unused else read(config, "test", most)
    test = Images(*(part[: config.test_images] for part in everything))
    names = [row for row in known if not config.rows or row in config.rows]
    root = jax.random.key(config.seed)
    students = {name: make_student(config, name, teacher) for name in names}
    rows: list[Row] = []
    with progress() as display:
        work = len(config.per_class) * config.seeds * len(names)
        bar = display.add_task("teacher", total=work)
        run = jax.jit(lambda variables, x: teacher.apply(variables, x)[0])
        score = accuracy(lambda x: run(teacher_variables, x), test)
        display.console.print(f"teacher: {score:.2f} %")
        for count in config.per_class:
            amount = config.classes * count
            found: dict[str, list[float]] = {name: [] for name in names}
            seeds = list(range(config.seeds))
            # Seed by seed, so that a study that is stopped has whole ones.
            for group in [seeds] if config.side_by_side else [[s] for s in seeds]:
                already = {
                    name: [before.get((amount, seed, name)) for seed in group]
                    for name in names
                }
                lessons, tests = [], []
                missing = [name for name in names if None in already[name]]
                taps = looked_at(config, missing)
                for seed in group if missing else ():
                    chosen = subset(train.labels, count, seed, config.seed)
                    images = Images(train.inputs[chosen], train.labels[chosen])
                    taught = look(teacher, teacher_variables, images.inputs, taps)
                    lessons.append(Lesson(images, taught, teacher_variables))
                    if unused:
                        rest = np.setdiff1d(np.arange(len(train.labels)), chosen)
                        rest = rest[: config.test_images]
                        test = Images(*(part[rest] for part in train))
                    tests.append(test)
                keys = [prng.stream(root, f"seed {seed}") for seed in group]
                for name in names:
                    display.update(bar, description=f"{amount} images, {name}")
                    values = already[name]
                    if None in values:
                        student = students[name]
                        states = train_students(config, name, student, keys, lessons)
                        values = [
                            accuracy(
                                functools.partial(student.logits, *given), held_out
                            )
                            for *given, held_out in zip(
                                states, lessons, tests, strict=True
                            )
                        ]
                    for seed, value in zip(group, values, strict=True):
                        found[name].append(value)
                        line = {"images": amount, "seed": seed, "row": name}
                        keep(folder, "values.jsonl", **line, value=value)
                        display.console.print(
                            f"{amount} images, seed {seed}, {name}: {value:.2f} %"
                        )
                        display.advance(bar)
            for name, values in found.items():
                compared = tuple(x for x in (CE, TUNED) if name not in (x, CE))
                rows.append(Row(f"{amount} images", name, values, compared))
    title = (
        f"CIFAR-{config.classes}: ResNet-{config.teacher_depth} ({score:.2f} %) to "
        f"ResNet-{config.student_depth}"
    )
    show(title, rows, folder, started=started)
    return {"rows": rows, "teacher": score}


if __name__ == "__main__":
    command_line(main, PRESETS)
