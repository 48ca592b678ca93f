"""A small student of a real ResNet on CIFAR-10: distilled, pruned, in 8-bit integers.

The same student, images, updates and seeds in each row: trained by labels alone or by a
teacher too, with all its weights or a part of them, in floating point or in integers.
The teacher teaches its logits and, as a hint, the maps of its middle stage, computed
once for each image and its mirror image and looked up (about 1 GB for all images).
Temperature and weight of the logits are those that `distill_cifar` chose for 150
images, on others; the hint has its paper's weight. Last epoch; the complete test set.
Rows in integers are scored with their weights in integers. One table and one figure
show what each network costs on this device; the student of the last row is exported.

Needs the extras `experiments` and `compress`.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

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
    command_line,
    interval,
    keep,
    progress,
    show,
    start_run,
)
from experiments.distill_cifar_rows import last_blocks
from jaxtransfer import compress, losses, nets, parallel, prng
from jaxtransfer.methods import distill
from jaxtransfer.methods.distill import Term
from jaxtransfer.model import from_linen
from jaxtransfer.train import init_state, train_step
from jaxtransfer.typing import Model, Variables


@dataclasses.dataclass(frozen=True)
class Config(CifarConfig):
    """Options of the study."""

    weights: str = "cifar10_resnet20.safetensors"
    teacher_depth: int = 20
    updates: int = 400
    per_class: int = 1500
    """Training images of a class, the same for all seeds."""
    kd_temperature: float = 8.0
    """Of the teacher's logits."""
    kd_weight: float = 0.5
    """Of the teacher's logits; the labels have the rest."""
    hint_weight: float = 100.0
    """Of the maps of the middle stage; 0 leaves them out."""
    sparsity: float = 0.8
    """Share of each kernel's weights that pruning sets to zero."""
    prune_every: int = 10
    """Updates between new masks; the share rises from a tenth of the updates to six."""
    latency_batch: int = 1
    """Images of the pass whose time is taken."""


PRESETS = {
    "smoke": Config(
        weights="random",
        teacher_depth=14,
        filters=4,
        per_class=2,
        updates=10,
        batch_size=8,
        prune_every=2,
        test_images=20,
        seeds=2,
    ),
    "cpu": Config(),
    "paper": Config(
        weights="cifar10_resnet56.safetensors",
        teacher_depth=56,
        updates=56_000,
        prune_every=100,
        latency_batch=64,
        seeds=5,
    ),
}


class Recipe(NamedTuple):
    """How a row is trained, and what its honest comparison is."""

    distilled: bool = False
    pruned: bool = False
    integers: bool = False
    baseline: str | None = None


CE, KD, INT8 = "labels alone", "distilled", "int8"
RECIPES = {
    CE: Recipe(),
    KD: Recipe(distilled=True, baseline=CE),
    f"{KD}, pruned": Recipe(distilled=True, pruned=True, baseline=KD),
    INT8: Recipe(integers=True, baseline=CE),
    f"{KD}, int8": Recipe(distilled=True, integers=True, baseline=INT8),
    f"{KD}, pruned, int8": Recipe(True, True, True, baseline=f"{KD}, int8"),
}


class Lesson(NamedTuple):
    """What students are trained on."""

    images: Images
    taught: Mapping[str, jax.Array]


def make_terms(config: Config) -> dict[str, Term]:
    """What the teacher teaches."""
    middle = [last_blocks(d)[1] for d in (config.student_depth, config.teacher_depth)]
    return {
        "logits": Term(
            loss=losses.knowledge_distillation,
            weight=config.kd_weight,
            options={"temperature": config.kd_temperature},
        ),
        "maps": Term(
            loss=losses.hint,
            student=middle[0],
            teacher=middle[1],
            bridge=distill.match(always=True, norm=True),
            weight=config.hint_weight,
        ),
    }


class Student(NamedTuple):
    """A row, compiled once for all seeds.

    Attributes:
        start: ``(key, inputs, teacher's variables) -> training state``.
        update: ``(state, lesson) -> (state, metrics)``.
        model: what is used after training.
        finish: ``training state -> variables`` of ``model``.
        outputs: ``(variables, inputs) -> logits`` of ``model``.
    """

    start: Callable[[jax.Array, jax.Array, Variables], Any]
    update: Callable[[Any, Lesson], Any]
    model: Model
    finish: Callable[[Any], Variables]
    outputs: Callable[[Variables, jax.Array], jax.Array]


def sparsity_schedule(config: Config) -> Callable[[Any], Any]:
    """From a tenth of the updates to six tenths, ending where masks are made anew."""
    every = config.prune_every
    end = max(6 * config.updates // 10 // every, 1) * every
    return compress.cubic_sparsity(config.sparsity, begin=end // 6, end=end)


def make_student(config: Config, recipe: Recipe, teacher: Model) -> Student:
    """Network, objective and optimizer of a row."""
    net = nets.ResNet(
        config.classes, depth=config.student_depth, filters=config.filters
    )
    model = served = from_linen(net)
    convert: Callable[[Variables], Variables] = lambda variables: variables  # noqa: E731
    if recipe.integers:
        image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
        model, served, convert, _ = compress.quantized(net, image)
    optimizer = make_optimizer(config)
    if recipe.pruned:
        optimizer = compress.pruned(
            optimizer,
            sparsity_schedule(config),
            rules="student/(.*/)?kernel",
            every=config.prune_every,
        )
    terms = make_terms(config) if recipe.distilled else {}
    task_weight = 1 - config.kd_weight if recipe.distilled else 1.0
    objective = distill.objective(model, teacher, terms=terms, task_weight=task_weight)
    step = train_step(objective, optimizer)
    init = jax.jit(from_linen(net).init)  # of one form for all rows: the same weights

    def start(key: jax.Array, inputs: jax.Array, given: Variables) -> Any:
        begun = distill.start(
            prng.stream(key, "bridges"),
            model,
            teacher,
            terms,
            student_variables=init(prng.stream(key, "init"), inputs),
            teacher_variables=given,
            inputs=inputs,
        )
        return init_state(prng.stream(key, "run"), begun, optimizer)

    def update(state: Any, lesson: Lesson) -> Any:
        return step(state, sample(config, state, *lesson))

    @jax.jit
    def finish(state: Any) -> Variables:
        return convert(distill.of_student(state.params, state.model_state))

    @jax.jit
    def outputs(variables: Variables, inputs: jax.Array) -> jax.Array:
        return served.apply(variables, inputs)[0]

    return Student(start, parallel.jit_step(update), served, finish, outputs)


def write_report(folder: Path, measured: list[compress.Measured]) -> None:
    """The table, printed too, and the figure."""
    text = compress.table(measured)
    print(text)
    (folder / "report.md").write_text(text + "\n")
    compress.figure(measured, folder / "report.png")


def main(config: Config) -> dict[str, Any]:
    """Run the study.

    Returns:
        ``{"rows": ..., "measured": what each network costs, the teacher first,
        "exported": the files of the last student, "folder": where they are}``.

    Raises:
        ValueError: an unknown row, a share outside of 0 to 1, or an option that is
            not positive.
        FileNotFoundError: there is no file of the teacher.
    """
    if unknown := sorted(set(config.rows) - set(RECIPES)):
        raise ValueError(f"rows: no {unknown[0]!r}; choose among {list(RECIPES)}")
    for name in ("sparsity", "kd_weight"):
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name}: 0 to 1, got {getattr(config, name)}")
    teacher = resnet(config, config.teacher_depth)
    teacher_variables = read_teacher(config, teacher)
    folder = start_run("compress_cifar", config)
    started = time.perf_counter()
    everything = read(config, "train", config.per_class)
    test = read(config, "test", config.per_class)
    test = Images(*(part[: config.test_images] for part in test))
    names = [row for row in RECIPES if not config.rows or row in config.rows]
    students = {row: make_student(config, RECIPES[row], teacher) for row in names}
    root = jax.random.key(config.seed)
    found: dict[str, list[float]] = {row: [] for row in names}
    shown: dict[str, Variables] = {}
    some = test.inputs[: config.latency_batch]
    with progress() as display:
        bar = display.add_task("teacher", total=1 + config.seeds * len(names))
        measured = [
            compress.measure(
                "teacher",
                teacher,
                teacher_variables,
                some,
                score=lambda run: accuracy(run, test),
            )
        ]
        display.console.print(f"teacher: {measured[0].score:.2f} %")
        chosen = subset(everything.labels, config.per_class, config.seed)
        images = Images(everything.inputs[chosen], everything.labels[chosen])
        taps = (last_blocks(config.teacher_depth)[1],) if config.hint_weight else ()
        lesson = Lesson(images, look(teacher, teacher_variables, images.inputs, taps))
        display.advance(bar)
        for seed in range(config.seeds):
            key = prng.stream(root, f"seed {seed}")
            for row in names:
                display.update(bar, description=row)
                student = students[row]
                begun = student.start(key, images.inputs[:2], teacher_variables)
                state = follow(row, begun, student.update, lesson, config.updates)
                variables = student.finish(state)
                value = accuracy(
                    lambda x, own=student, v=variables: own.outputs(v, x), test
                )
                found[row].append(value)
                keep(folder, "values.jsonl", seed=seed, row=row, value=value)
                shown.setdefault(row, variables)
                display.console.print(f"seed {seed}, {row}: {value:.2f} %")
                display.advance(bar)
    for row in names:
        score, _ = interval(found[row])
        model = students[row].model
        measured.append(compress.measure(row, model, shown[row], some, score=score))
    last = names[-1]
    exported = compress.export_student(
        folder / "student", students[last].model, shown[last], some
    )
    write_report(folder, measured)
    title = (
        f"CIFAR-{config.classes}: ResNet-{config.teacher_depth} "
        f"({measured[0].score:.2f} %) to ResNet-{config.student_depth}"
    )
    task = f"{len(images.labels)} images"
    rows = [
        Row(task, row, values, RECIPES[row].baseline) for row, values in found.items()
    ]
    show(title, rows, folder, started=started)
    return {"rows": rows, "measured": measured, "exported": exported, "folder": folder}


if __name__ == "__main__":
    command_line(main, PRESETS)
