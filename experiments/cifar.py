"""What the studies of CIFAR share: images, a trained ResNet, how a student learns.

The teacher's outputs and features are computed once, for each image and its mirror
image, and looked up in training. Deviation from the usual recipe: images are mirrored,
not shifted (a teacher that is looked up has seen no shifted ones).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.common import StudyConfig, check_finite, find
from jaxtransfer import data, nets, pretrained, prng
from jaxtransfer.model import from_linen
from jaxtransfer.typing import Model, Variables

CLASSES = {"cifar10": 10, "cifar100": 100}


@dataclasses.dataclass(frozen=True)
class CifarConfig(StudyConfig):
    """Options of a study in which a trained ResNet teaches a small one."""

    dataset: Literal["cifar10", "cifar100"] = "cifar10"
    """What the teacher was trained on."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Of a channel, taken off the inputs as in the teacher's training."""
    deviation: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Of a channel, by which the inputs are divided as in the teacher's training."""
    weights: str = "cifar10_resnet56.safetensors"
    """The teacher's file, under weights/ of a folder of --data-dir, or a path; "random"
    (an untrained one) is for trying out."""
    teacher_depth: int = 56
    """Depth of the teacher, 6n + 2."""
    student_depth: int = 8
    """Depth of the student, 6n + 2."""
    filters: int = 16
    """Filters of the first stage of both."""
    rows: tuple[str, ...] = ()
    """Rows of the table; all if there are none."""
    updates: int = 300
    """Updates of a student."""
    batch_size: int = 64
    """Images of an update."""
    learning_rate: float = 0.05
    """Of SGD with momentum 0.9; falls to 0 along a cosine."""
    weight_decay: float = 5e-4
    """Of all the student's weights."""
    test_images: int = 10_000
    """Images to score with, the first ones."""

    @property
    def classes(self) -> int:
        """Of the data set."""
        return CLASSES[self.dataset]


class Images(NamedTuple):
    """Normalised images on the device."""

    inputs: jax.Array
    labels: jax.Array


def read(config: CifarConfig, split: str, per_class: int) -> Images:
    """A split, or ``per_class`` images of noise a class for a random teacher."""
    if config.weights == "random":
        random = np.random.default_rng(0)
        labels = np.arange(config.classes * per_class, dtype=np.int32) % config.classes
        shape = (len(labels), 32, 32, 3)
        return Images(
            jnp.asarray(random.normal(size=shape), jnp.float32), jnp.asarray(labels)
        )
    arrays = data.as_arrays(data.load(config.dataset, split, data_dir=config.data_dir))
    mean, deviation = (
        np.asarray(x, np.float32) for x in (config.mean, config.deviation)
    )
    inputs = (arrays["inputs"] - mean) / deviation
    return Images(jnp.asarray(inputs), jnp.asarray(arrays["labels"]))


def read_teacher(config: CifarConfig, model: Model) -> Variables:
    """The trained teacher; every entry of its file is used."""
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    if config.weights == "random":
        return jax.jit(model.init)(jax.random.key(0), jnp.zeros(image.shape))
    file = find("weights", config.weights, config, under="weights")
    return pretrained.load(file, model, image)[0]


def resnet(config: CifarConfig, depth: int, **options: Any) -> Model:
    net = nets.ResNet(config.classes, depth=depth, filters=config.filters, **options)
    return from_linen(net)


def look(
    model: Model, variables: Variables, inputs: jax.Array, taps: tuple[str, ...]
) -> dict[str, jax.Array]:
    """Outputs (under ``""``) and features of images and of their mirror images.

    Returns:
        ``[2, images, ...]`` by path.
    """

    @jax.jit
    def some(variables: Variables, inputs: jax.Array) -> dict[str, jax.Array]:
        outputs, features, _ = model.apply(variables, inputs, taps=taps)
        return {**features, "": outputs}

    parts = []
    for turned in (inputs, inputs[:, :, ::-1]):
        blocks = [
            some(variables, turned[n : n + 250]) for n in range(0, len(turned), 250)
        ]
        parts.append(jax.tree.map(lambda *x: jnp.concatenate(x), *blocks))
    return jax.tree.map(lambda *x: jnp.stack(x), *parts)


def subset(labels: jax.Array, count: int, seed: int, root: int = 0) -> np.ndarray:
    """Numbers of as many images of each class, drawn from the seed and a root.

    Raises:
        ValueError: a class has fewer.
    """
    generator = np.random.default_rng((seed, count, root))  # of 0 as without it
    labels = np.asarray(labels)
    classes = [np.flatnonzero(labels == c) for c in range(labels.max() + 1)]
    fewest = min(map(len, classes))
    if count > fewest:
        raise ValueError(f"per_class: got {count}, but a class has {fewest} images")
    return np.concatenate([generator.choice(c, count, replace=False) for c in classes])


def accuracy(logits: Callable[[jax.Array], jax.Array], test: Images) -> float:
    """In %, a few images at a time."""
    found = [
        jnp.argmax(logits(test.inputs[n : n + 500]), axis=-1)
        for n in range(0, len(test.labels), 500)
    ]
    return 100 * float(jnp.mean(jnp.concatenate(found) == test.labels))


def make_optimizer(config: CifarConfig) -> optax.GradientTransformation:
    """Of a student."""
    schedule = optax.cosine_decay_schedule(config.learning_rate, config.updates)
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(schedule, momentum=0.9),
    )


def sample(
    config: CifarConfig, state: Any, images: Images, taught: Mapping[str, jax.Array]
) -> dict[str, Any]:
    """A batch of an update, some of it mirrored, with what the teacher said of it."""
    key = prng.step_key(prng.stream(state.key, "data"), state.step)
    number_key, turn_key = prng.streams(key, "numbers", "turns")
    shape = (config.batch_size,)
    numbers = jax.random.randint(number_key, shape, 0, len(images.labels))
    turned = jax.random.bernoulli(turn_key, 0.5, shape)
    inputs = images.inputs[numbers]
    inputs = jnp.where(turned[:, None, None, None], inputs[:, :, ::-1], inputs)
    which = turned.astype(jnp.int32)
    return {
        "inputs": inputs,
        "labels": images.labels[numbers],
        "index": numbers,
        "teacher": {path: values[which, numbers] for path, values in taught.items()},
    }


def follow(row: str, state: Any, update: Callable[..., Any], given: Any, updates: int):
    """All updates of a student on what it is given; its training state.

    Raises:
        FloatingPointError: the loss is not finite at the end.
    """
    measured = {}
    for _ in range(updates):
        state, measured = update(state, given)
    check_finite(row, measured["loss"].total, updates)
    return state
