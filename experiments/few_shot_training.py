"""How the few-shot study reads characters, draws tasks and trains on them."""

import dataclasses
from collections.abc import Callable
from threading import Event
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import Progress

from experiments.few_shot_config import Config, Method
from experiments.few_shot_recipes import (
    RECIPES,
    Recipe,
    Setting,
    make_setting,
    network,
)
from jaxtransfer import data, prng
from jaxtransfer.data import episodes
from jaxtransfer.methods import finetune, meta
from jaxtransfer.train import init_state, scan_fit, train_step
from jaxtransfer.train.scan import ScanHistory, resident
from jaxtransfer.train.state import TrainState
from jaxtransfer.typing import Objective, Variables


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


def distorted(key: jax.Array, tasks: Any) -> Any:
    """Every image of the tasks turned, sheared, stretched and shifted by chance."""
    changed = {}
    for name, part in tasks.items():
        images = part["inputs"]
        flat = data.random_affine(
            prng.stream(key, name),
            images.reshape(-1, *images.shape[-3:]),
            rotation=7.0,
            shear=0.14,
            scale=1.14,
            shift=0.05,
        )
        changed[name] = {**part, "inputs": flat.reshape(images.shape)}
    return changed


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
    return make_setting(
        recipe,
        ways=config.ways,
        filters=config.filters,
        image_size=config.image_size,
        steps=steps,
        rate=recipe.rate(config.inner_learning_rate),
        statistics=statistics,
    )


def meta_trainer(config: Config, pool: Pool, method: Method) -> Trainer:
    """A recipe on tasks of the pool."""
    recipe = RECIPES[method]
    assert recipe.build is not None
    steps = max(recipe.steps, config.inner_steps)
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
            drawn = draw(
                config,
                key,
                inputs,
                index,
                tasks=config.tasks,
                queries=config.queries,
                ways=config.train_ways,
            )
            return (
                distorted(prng.stream(key, "distort"), drawn)
                if config.distort
                else drawn
            )

        return sample

    return trainer(
        config,
        init,
        recipe.objective(learner, chosen, config.meta_steps),
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
