"""Distillation without data: a worked example on embedded digits.

A teacher has learned handwritten digits (8x8). A student is to learn them from the
teacher alone: on images that a generator makes from noise, so that the teacher is sure
of them and they are of all classes (DAFL). Beside it: the same student taught on plain
noise, and, as the limit, on the teacher's own training images.
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

from experiments.common import Row, StudyConfig, command_line, progress, show, start_run
from jaxtransfer import data, losses, nets, prng
from jaxtransfer.methods import distill, finetune
from jaxtransfer.methods.distill import Term
from jaxtransfer.model import from_linen
from jaxtransfer.train import init_state, train_step
from jaxtransfer.typing import Objective, Variables

NOISE, GENERATED, REAL = "noise", "generated images", "the teacher's own images"


@dataclasses.dataclass(frozen=True)
class Config(StudyConfig):
    """Options of the example."""

    widths: tuple[int, ...] = (128, 128)
    """Of the teacher's hidden layers."""
    student_widths: tuple[int, ...] = (32,)
    """Of the student's."""
    generator_width: int = 128
    """Of the generator's hidden layer."""
    noise: int = 32
    """Size of the noise."""
    teacher_updates: int = 1500
    """Of the teacher."""
    updates: int = 3000
    """Of a student."""
    batch_size: int = 128
    """Images of an update."""
    learning_rate: float = 2e-3
    """Of Adam; falls to 0 along a cosine."""
    temperature: float = 4.0
    """Of what the student learns."""
    sure: float = 1.0
    """Weight of images that the teacher is sure of."""
    diverse: float = 5.0
    """Weight of images of all classes."""
    active: float = 0.1
    """Weight of images that move the teacher's features."""


PRESETS = {
    "smoke": Config(
        widths=(8,),
        student_widths=(4,),
        generator_width=8,
        noise=4,
        teacher_updates=3,
        updates=3,
        batch_size=8,
        seeds=2,
    ),
    "cpu": Config(),
    "paper": Config(updates=20_000, seeds=10),
}


class Generator(nn.Module):
    """Images ``[batch, 8, 8, 1]`` in 0 … 1 from noise ``[batch, noise]``."""

    width: int

    @nn.compact
    def __call__(self, noise: jax.Array, train: bool = False) -> jax.Array:
        """Make the images."""
        x = noise
        for number in range(2):
            x = nn.Dense(self.width, name=f"hidden{number}")(x)
            x = nn.relu(nn.BatchNorm(not train, momentum=0.9, name=f"norm{number}")(x))
        return nn.sigmoid(nn.Dense(64, name="pixels")(x)).reshape(-1, 8, 8, 1)


Batches = Callable[[jax.Array], dict[str, Any]]


def read(split: str) -> tuple[jax.Array, jax.Array]:
    """Images in 0 … 1 and labels."""
    arrays = data.as_arrays(data.load("digits", split))
    inputs = np.asarray(arrays["inputs"], np.float32)
    return jnp.asarray(inputs / inputs.max()), jnp.asarray(arrays["labels"])


Training = Callable[..., Variables]


def make_training(
    objective: Objective, batch: Batches, *, updates: int, rate: float
) -> Training:
    """All updates in one compiled loop, the same for every seed.

    Returns:
        ``(key, begun, frozen) -> learned variables``. It raises FloatingPointError for
        a loss that is not finite.
    """
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, updates))
    step = train_step(objective, optimizer)

    @jax.jit
    def run(state: Any) -> Any:
        def one(state: Any, _: None) -> Any:
            own = prng.step_key(prng.stream(state.key, "data"), state.step)
            return step(state, batch(own))

        return jax.lax.scan(one, state, None, length=updates)

    def train(key: jax.Array, begun: Variables, frozen: dict[str, Any]) -> Variables:
        state, measured = run(init_state(key, begun, optimizer, frozen=frozen))
        if not np.isfinite(np.asarray(measured["loss"].total[-1])):
            raise FloatingPointError(
                "the loss is not finite; take a smaller --learning-rate"
            )
        return Variables(state.params, state.model_state)

    return train


def main(config: Config) -> dict[str, Any]:
    """Run the example.

    Returns:
        ``{"rows": ..., "teacher": accuracies in %}``.
    """
    folder = start_run("distill_without_data", config)
    started = time.perf_counter()
    (inputs, labels), (test, truth) = read("train"), read("test")
    teacher = from_linen(nets.MLP(10, widths=config.widths))
    student = from_linen(nets.MLP(10, widths=config.student_widths))
    generator = from_linen(Generator(config.generator_width))
    size, shape = config.batch_size, inputs.shape[1:]

    def labelled(key: jax.Array) -> dict[str, Any]:
        numbers = jax.random.randint(key, (size,), 0, len(inputs))
        return {"inputs": inputs[numbers], "labels": labels[numbers]}

    def real(key: jax.Array) -> dict[str, Any]:
        return {"inputs": labelled(key)["inputs"]}

    def noise(key: jax.Array) -> dict[str, Any]:
        return {"inputs": jax.random.uniform(key, (size, *shape))}

    taught = distill.objective(
        student,
        teacher,
        terms={
            "logits": Term(
                loss=losses.knowledge_distillation,
                options={"temperature": config.temperature},
            )
        },
    )
    invented = distill.data_free_objective(
        student,
        teacher,
        generator,
        examples=size,
        noise=config.noise,
        tap="features",
        sure=config.sure,
        diverse=config.diverse,
        active=config.active,
        temperature=config.temperature,
    )
    found: dict[str, list[float]] = {NOISE: [], GENERATED: [], REAL: []}
    teachers: list[float] = []
    make = functools.partial(make_training, rate=config.learning_rate)
    teach = make(finetune.objective(teacher), labelled, updates=config.teacher_updates)
    trainings = {
        NOISE: make(taught, noise, updates=config.updates),
        GENERATED: make(invented, lambda key: {}, updates=config.updates),
        REAL: make(taught, real, updates=config.updates),
    }
    root = jax.random.key(config.seed)
    with progress() as display:
        bar = display.add_task("students", total=3 * config.seeds)
        for seed in range(config.seeds):
            key = prng.stream(root, f"seed {seed}")
            first, second, third = prng.streams(key, "teacher", "student", "generator")
            given = teach(first, teacher.init(first, inputs[:1]), {})
            teachers.append(accuracy(teacher.apply(given, test)[0], truth))
            own = student.init(second, inputs[:1])
            maker = generator.init(third, jnp.zeros((1, config.noise)))
            for name, training in trainings.items():
                begun = distill.init(own)
                if name == GENERATED:
                    begun = distill.with_generator(own, maker)
                trained = training(second, begun, {"teacher": given})
                logits = student.apply(distill.of_student(*trained), test)[0]
                found[name].append(accuracy(logits, truth))
                display.console.print(f"seed {seed}, {name}: {found[name][-1]:.2f} %")
                display.advance(bar)
    rows = [
        Row("digits", name, values, None if name == NOISE else NOISE)
        for name, values in found.items()
    ]
    title = f"Taught without labels by a teacher of {np.mean(teachers):.2f} %"
    show(title, rows, folder, started=started)
    return {"rows": rows, "teacher": teachers}


def accuracy(logits: jax.Array, labels: jax.Array) -> float:
    """In %."""
    return 100 * float(jnp.mean(jnp.argmax(logits, axis=-1) == labels))


if __name__ == "__main__":
    command_line(main, PRESETS)
