"""Lake's one-shot challenge: which of 20 unknown characters of one alphabet is it?

Learned: an embedding, on tasks of characters from the 30 background alphabets, or from
the five of a minimal set alone; judged on the 20 runs of the challenge, whose alphabets
were never seen, by the cosine to the one drawing of each character. Baselines: nearest
neighbour of the pixels, and the modified Hausdorff distance, both without training.
People make 4.5 % errors.

Each test drawing is judged alone: batch normalisation uses the statistics of the run's
20 training drawings. No choice was made on the runs: with --held-out N the study trains
on the other background alphabets and judges tasks of N held-out ones in their place.

In training every drawing of a task takes its turn as the one example of its class, so
that a task of M drawings a class counts as M tasks. Rows "views" and "seeds together"
are ensembles: of distorted copies of the drawings, and of all seeds.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import Progress

from experiments.common import (
    Row,
    StudyConfig,
    command_line,
    interval,
    progress,
    show,
    start_run,
)
from experiments.few_shot_recipes import in_turns
from experiments.omniglot_characters import WAYS, Characters, Pool, Set, pool_of
from jaxtransfer import data, nets, prng
from jaxtransfer.data.episodes import Rotations
from jaxtransfer.methods import meta
from jaxtransfer.methods.meta.learner import Learner
from jaxtransfer.model import from_linen
from jaxtransfer.train import init_state, train_step
from jaxtransfer.typing import Model, Variables


@dataclasses.dataclass(frozen=True)
class Config(StudyConfig):
    """Options of the study."""

    dataset: Literal["omniglot", "synthetic"] = "omniglot"
    """Where characters come from; synthetic (blots, no data) is for trying out."""
    sets: tuple[Set, ...] = ("background", "small1", "small2")
    """What is trained on, each alone."""
    held_out: int = 0
    """Background alphabets that are held out and judged in place of the challenge."""
    image_size: int = 28
    """Height and width of the images."""
    filters: int = 64
    """Filters of each of the four convolutions."""
    embedding: int = 256
    """Width of the embedding."""
    steps: int = 3000
    """Updates on the background set."""
    small_steps: int = 1000
    """Updates on a minimal set."""
    tasks: int = 1
    """Tasks of an update."""
    drawings: int = 6
    """Drawings of a character in a task."""
    within: float = 0.5
    """Share of the tasks whose characters are of one alphabet."""
    rotations: Rotations = "tasks"
    """What is turned by quarters: "classes" (more of them), whole "tasks", or False."""
    learning_rate: float = 5e-3
    """Of Adam; falls to 0 along a cosine."""
    rotation: float = 7.0
    """Most degrees that a drawing is turned."""
    shear: float = 0.14
    """Most shear of a drawing."""
    scale: float = 1.14
    """Most that a drawing is stretched, along either axis."""
    shift: float = 0.05
    """Most shift of a drawing, as a share of its side."""
    views: int = 8
    """Distorted copies of each drawing in the rows "views"; 0 leaves them out."""
    report: int = 50
    """Updates between two signs of progress."""


PRESETS = {
    "smoke": Config(
        dataset="synthetic",
        sets=("background", "small1"),
        image_size=12,
        filters=8,
        embedding=32,
        steps=20,
        small_steps=10,
        drawings=3,
        views=2,
        report=10,
        seeds=2,
    ),
    "cpu": Config(),
    "paper": Config(
        steps=60_000,
        small_steps=20_000,
        tasks=8,
        rotation=10.0,
        shear=0.2,
        scale=1.2,
        shift=0.07,
        report=500,
        seeds=5,
    ),
}


def sampler(config: Config, pool: Pool) -> Callable[..., Any]:
    """``(key, inputs) -> images [tasks, ways, drawings, ...]``, distorted."""

    def sample(key: jax.Array, inputs: jax.Array) -> jax.Array:
        which_key, task_key, distort_key = prng.streams(
            key, "which", "tasks", "distort"
        )
        options = {
            "tasks": config.tasks,
            "ways": WAYS,
            "shots": 1,
            "queries": config.drawings - 1,
            "rotations": config.rotations,
        }
        across = data.draw(task_key, pool.index, **options)
        inside = data.draw(task_key, pool.index, groups=pool.groups, **options)
        is_inside = jax.random.bernoulli(which_key, config.within, (config.tasks, 1))
        drawn = jax.tree.map(lambda a, b: jnp.where(is_inside, a, b), inside, across)
        episodes = data.gather(inputs, drawn)
        images = [
            episodes[part]["inputs"].reshape(config.tasks, WAYS, -1, *inputs.shape[1:])
            for part in ("support", "query")
        ]
        images = jnp.concatenate(images, axis=2)
        flat = distorted(config, distort_key, images.reshape(-1, *inputs.shape[1:]))
        return flat.reshape(images.shape)

    return sample


def distorted(config: Config, key: jax.Array, images: jax.Array) -> jax.Array:
    return data.random_affine(
        key,
        images,
        rotation=config.rotation,
        shear=config.shear,
        scale=config.scale,
        shift=config.shift,
    )


def network(config: Config) -> Model:
    """Conv4 with a linear map of all its last positions to the embedding.

    ``nn.Conv``: the kernels are the same for all tasks, and no scan is around them.
    """
    return from_linen(
        nets.Conv4(config.embedding, filters=config.filters, pooled=False, conv=nn.Conv)
    )


def learner(model: Model) -> Learner:
    """Cosine to the one example of each class, with a learned scale."""
    return meta.prototypical(
        model,
        ways=WAYS,
        distance="cosine",
        learn_scale=True,
        statistics="support",
    )


def trainer(config: Config, pool: Pool, steps: int) -> Callable[..., Variables]:
    """``(key, name, display) -> variables`` after all updates."""
    model = network(config)
    optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, steps))
    step, sample = train_step(in_turns(model), optimizer), sampler(config, pool)

    @jax.jit
    def start(key: jax.Array) -> Any:
        init_key, run_key = prng.streams(key, "init", "run")
        image = jnp.zeros((1, *pool.inputs.shape[1:]))
        variables = learner(model).init(model.init(init_key, image))
        return init_state(run_key, variables, optimizer)

    @jax.jit
    def update(state: Any, inputs: jax.Array) -> Any:
        key = prng.step_key(prng.stream(state.key, "data"), state.step)
        return step(state, sample(key, inputs))

    def train(key: jax.Array, name: str, display: Progress) -> Variables:
        state = start(key)
        line = display.add_task(name, total=steps)
        seen: list[Any] = []
        for number in range(1, steps + 1):
            state, measured = update(state, pool.inputs)
            seen.append(measured["accuracy"])
            if number % config.report == 0 or number == steps:
                pairs = jax.device_get(seen)
                score = sum(p.total for p in pairs) / sum(p.count for p in pairs)
                text = f"{name}: accuracy {score:.3f}"
                display.update(line, advance=len(seen), description=text)
                seen = []
        return Variables(state.params, state.model_state)

    return train


def judge(config: Config) -> Callable[[Variables, data.ChallengeRuns], Any]:
    """``(variables, runs) -> cosines {"one view", "views"} [runs, test, training]``."""
    comparing = learner(network(config))

    def similarity(variables: Variables, training, test) -> jax.Array:
        support = {"inputs": training, "labels": jnp.arange(len(training))}
        key = jax.random.key(0)  # Nothing in the network is random.
        found = comparing.adapt(
            variables.params, {}, variables.model_state, support, key
        )
        assert comparing.predict is not None
        logits = comparing.predict(found.params, {}, found.model_state, test)
        return logits / variables.params["metric"]["scale"]

    @jax.jit
    def one_view(variables: Variables, runs: Any) -> jax.Array:
        return jax.lax.map(lambda run: similarity(variables, *run), runs)

    @jax.jit
    def views(variables: Variables, runs: Any) -> jax.Array:
        def view(total: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
            changed = [
                distorted(config, part_key, part.reshape(-1, *part.shape[2:]))
                for part_key, part in zip(jax.random.split(key), runs, strict=True)
            ]
            pair = tuple(c.reshape(p.shape) for c, p in zip(changed, runs, strict=True))
            return total + one_view(variables, pair), None

        keys = jax.random.split(jax.random.key(0), config.views)
        return jax.lax.scan(view, one_view(variables, runs), keys)[0]

    def both(variables: Variables, runs: data.ChallengeRuns) -> dict[str, np.ndarray]:
        pair = (jnp.asarray(runs.training), jnp.asarray(runs.test))
        found = {"": np.asarray(one_view(variables, pair))}
        if config.views:
            found[f", {config.views + 1} views"] = np.asarray(views(variables, pair))
        return found

    return both


def untrained(
    small: data.ChallengeRuns, large: data.ChallengeRuns
) -> dict[str, np.ndarray]:
    """Similarities that need no training, by the name of the row."""
    test, training = (
        part.reshape(*part.shape[:2], -1) for part in (small.test, small.training)
    )
    apart = np.linalg.norm(test[:, :, None] - training[:, None], axis=-1)
    hausdorff = [
        data.modified_hausdorff(test[..., 0], training[..., 0])
        for test, training in zip(large.test, large.training, strict=True)
    ]
    return {
        "pixels, nearest neighbour": -apart,
        "modified Hausdorff distance": -np.stack(hausdorff),
    }


def main(config: Config) -> dict[str, list[float]]:
    """Run the study.

    Returns:
        ``{method: errors in % by seed}``.

    Raises:
        ValueError: fewer than two drawings, or more alphabets held out than there are.
    """
    if config.drawings < 2:
        raise ValueError(f"drawings: {config.drawings} must be 2 or more")
    if config.views < 0:
        raise ValueError(f"views: 0 or more, got {config.views}")
    folder = start_run("omniglot_challenge", config)
    started = time.perf_counter()
    characters = Characters(
        config.dataset == "synthetic", config.image_size, config.seed, config.data_dir
    )
    arrays = {name: characters.read(name) for name in config.sets}
    if config.held_out:
        background = arrays.get("background") or characters.read("background")
        rest, small = characters.hold_out(background, config.held_out)
        arrays |= {"background": rest} if "background" in arrays else {}
        large, task = small, f"{config.held_out} held-out alphabets"
    else:
        small, large = characters.challenge()
        task = "the 20 runs" if config.dataset == "omniglot" else "blots"
    results: dict[str, list[float]] = {}

    def record(name: str, similarity: np.ndarray) -> float:
        error = 100 * float(data.challenge_error(similarity, small.answers).mean())
        results.setdefault(name, []).append(error)
        return error

    for name, similarity in untrained(small, large).items():
        record(name, similarity)
    root, compare = jax.random.key(config.seed), judge(config)
    with progress() as display:
        for name in config.sets:
            steps = config.steps if name == "background" else config.small_steps
            train = trainer(config, pool_of(arrays[name]), steps)
            together: dict[str, Any] = {}
            for seed in range(config.seeds):
                key = prng.stream(root, f"{name}, seed {seed}")
                variables = train(key, f"{name}, seed {seed}", display)
                for suffix, similarity in compare(variables, small).items():
                    error = record(f"ProtoNet, {name}{suffix}", similarity)
                    together[suffix] = together.get(suffix, 0) + similarity
                    display.console.print(f"{name}, seed {seed}{suffix}: {error:.2f} %")
            if config.seeds > 1:
                for suffix, similarity in together.items():
                    record(f"ProtoNet, {name}{suffix}, seeds together", similarity)
    rows = [Row(task, name, values) for name, values in results.items()]
    show("One-shot challenge", rows, folder, unit="error %", started=started)
    best = min(results, key=lambda name: interval(results[name])[0])
    print(f"least error: {best}, {interval(results[best])[0]:.2f} %; people: 4.5 %")
    return results


if __name__ == "__main__":
    command_line(main, PRESETS)
