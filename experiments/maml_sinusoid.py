"""MAML on sinusoids: learn a start from which a few points fix a wave.

Learned: the meta-parameters of a small network, on waves of random amplitude and phase.
*MAML* is good after as many steps as it was trained for; *MAML++* learns its step sizes
too (one a layer and step) and counts the loss after every step.
Baselines: the same fine-tuning from an untrained network and from a network that was
pretrained on the points of all waves, each with the step size that is best on
validation waves.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import Progress

from experiments.common import (
    Row,
    StudyConfig,
    check_options,
    command_line,
    progress,
    show,
    start_run,
)
from jaxtransfer import losses, nets, prng
from jaxtransfer.data import episodes
from jaxtransfer.methods import finetune, meta
from jaxtransfer.model import from_linen
from jaxtransfer.train import TrainState, init_state, scan_fit, train_step

REPORTED = (0, 1, 5, 10)


@dataclasses.dataclass(frozen=True)
class Config(StudyConfig):
    """Options of the study."""

    widths: tuple[int, ...] = (40, 40)
    """Hidden layers, with ReLU."""
    shots: int = 10
    """Support points, and query points, of a task in meta-training."""
    test_shots: tuple[int, ...] = (5, 10)
    """Support points of the test tasks."""
    test_queries: int = 100
    """Query points of a test task."""
    tasks: int = 25
    """Tasks of a meta-step."""
    meta_steps: int = 70_000
    """Updates of the meta-parameters, and of the pretrained baseline."""
    learning_rate: float = 1e-3
    """Of Adam on the meta-parameters."""
    cosine: bool = False
    """Let the learning rate fall to 0 along a cosine."""
    inner_steps: int = 1
    """Gradient steps of a task in meta-training."""
    inner_learning_rate: float = 0.01
    """Of the inner SGD on the mean squared error, also at test."""
    steps: int = 10
    """Gradient steps at test; of MAML++ no more than it has rates for."""
    baseline_rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.02, 0.05)
    """Step sizes of the baselines to choose from on validation tasks."""
    validation_tasks: int = 200
    """Tasks on which the baselines' step size is chosen, drawn from a fixed key."""
    test_tasks: int = 600
    """Test tasks, drawn from a fixed key, the same for all methods and seeds."""
    block: int = 1000
    """Updates between two signs of progress; divides meta_steps."""


PRESETS = {
    "smoke": Config(meta_steps=200, block=100, seeds=2, test_tasks=50),
    "cpu": Config(meta_steps=40_000, learning_rate=3e-3, cosine=True, inner_steps=5),
    "paper": Config(),
}


Follow = Callable[[Any, float, episodes.Episodes], np.ndarray]
META = ("MAML", "MAML++")


def learner(config: Config, name: str, rate: Any, steps: int) -> meta.Learner:
    """How a method adapts; the baselines do as MAML does."""
    model = from_linen(nets.MLP(1, widths=config.widths))
    task = meta.task(model, loss=losses.mean_squared_error)
    if name == "MAML++":
        rates = meta.per_layer_per_step(config.inner_learning_rate)
        return meta.maml(task, rates, steps=steps)
    return meta.maml(task, optax.sgd(rate), steps=steps)


def tasks_of(config: Config, part: str, count: int, shots: int) -> episodes.Episodes:
    """Fixed tasks of validation or test; 5 and 10 shots are tasks of their own."""
    key = prng.stream(jax.random.key(config.seed), f"{part} {shots}")
    return episodes.sinusoid(key, tasks=count, shots=shots, queries=config.test_queries)


def points(batch: episodes.Episodes) -> dict[str, jax.Array]:
    """All points of all tasks as one batch."""
    support, query = batch["support"], batch["query"]
    return {
        name: jnp.concatenate([support[name], query[name]], axis=1).reshape(-1, 1)
        for name in support
    }


def outer_optimizer(rate: Any) -> optax.GradientTransformation:
    """Adam without the spikes of long inner loops; learned rates move slowly.

    An update of Adam's is as large as its rate: that of the weights would change inner
    rates of 0.01 by a third at once.
    """

    def adam(scale: float) -> optax.GradientTransformation:
        return optax.chain(
            optax.clip_by_global_norm(10.0), optax.adam(rate), optax.scale(scale)
        )

    def kinds(params: Any) -> Any:
        return {
            part: jax.tree.map(
                lambda _, part=part: "rates" if part == "optimizer" else "weights", leaf
            )
            for part, leaf in params.items()
        }

    return optax.multi_transform({"weights": adam(1.0), "rates": adam(0.03)}, kinds)


def train(config: Config, name: str, keys: jax.Array, display: Progress) -> Any:
    """All seeds side by side: meta-parameters with a leading axis of seeds.

    Raises:
        FloatingPointError: the loss of a seed is not finite any more.
    """
    model = from_linen(nets.MLP(1, widths=config.widths))
    own = learner(config, name, config.inner_learning_rate, config.inner_steps)
    if name == "MAML++":
        weights = jnp.full(config.inner_steps + 1, 1 / config.inner_steps).at[0].set(0)
        objective = meta.objective(own, step_weights=lambda updates: weights)
    elif name == "MAML":
        objective = meta.objective(own)
    else:
        objective = finetune.objective(model, loss=losses.mean_squared_error)
    rate = config.learning_rate
    if config.cosine:
        rate = optax.cosine_decay_schedule(rate, config.meta_steps)
    optimizer = optax.adam(rate)
    if name in META:
        optimizer = outer_optimizer(rate)
    step = train_step(objective, optimizer)

    def sample(key: jax.Array, number: jax.Array) -> Any:
        batch = episodes.sinusoid(
            jax.random.fold_in(key, number),
            tasks=config.tasks,
            shots=config.shots,
            queries=config.shots,
        )
        return batch if name in META else points(batch)

    def start(key: jax.Array) -> TrainState:
        init_key, run_key = prng.streams(key, "init", "run")
        variables = model.init(init_key, jnp.ones((1, 1)))
        if name in META:
            variables = meta.counted(own.init(variables))
        return init_state(run_key, variables, optimizer)

    @jax.jit
    @jax.vmap
    def block(state: TrainState) -> tuple[TrainState, jax.Array]:
        state, history = scan_fit(step, state, sample, steps=config.block)
        return state, history.train["loss"].mean()

    state = jax.jit(jax.vmap(start))(keys)
    if name == "untrained":
        return state.params
    blocks = config.meta_steps // config.block
    line = display.add_task(name, total=blocks)
    for number in range(blocks):
        state, loss = block(state)
        if not np.isfinite(loss).all():
            raise FloatingPointError(
                f"{name}: the loss of a seed is not finite within updates "
                f"{number * config.block} to {(number + 1) * config.block} "
                f"({np.round(loss, 3).tolist()}); take a smaller --learning-rate or "
                "--inner-learning-rate"
            )
        text = f"{name}: loss {float(loss.mean()):.3f}"
        display.update(line, advance=1, description=text)
    return state.params


def follower(config: Config, name: str) -> Follow:
    """``(params, rate, tasks) -> errors [seeds, tasks, steps + 1]``."""

    @jax.jit
    def follow(params: Any, rate: jax.Array, batch: episodes.Episodes) -> jax.Array:
        steps = config.steps
        if name == "MAML++":
            steps = min(steps, config.inner_steps)
        run = meta.trajectory(learner(config, name, rate, steps))
        key = jax.random.key(0)  # Nothing in the network is random.
        return jax.vmap(lambda params: run(params, {}, {}, batch, key)["loss"])(params)

    return lambda params, rate, tasks: np.asarray(
        follow(params, jnp.float32(rate), tasks)
    )


def judge(
    config: Config, follow: Follow, params: Any, rates: tuple[float, ...], shots: int
) -> tuple[np.ndarray, list[float]]:
    """Errors on test tasks with each seed's best rate on validation tasks."""
    validation = tasks_of(config, "validation", config.validation_tasks, shots)
    test = tasks_of(config, "test", config.test_tasks, shots)
    last = [follow(params, rate, validation)[:, :, -1].mean(1) for rate in rates]
    best = np.argmin(np.nan_to_num(last, nan=np.inf), axis=0)
    tested = {which: follow(params, rates[which], test) for which in set(best)}
    errors = [tested[which][seed] for seed, which in enumerate(best)]
    return np.stack(errors), [rates[which] for which in best]


def main(config: Config) -> dict[str, Any]:
    """Run the study.

    Returns:
        ``{task: {method: mean squared errors by seed}}``.

    Raises:
        ValueError: an option is not positive, or ``block`` does not divide
            ``meta_steps``.
    """
    check_options(config)
    if config.meta_steps % config.block:
        raise ValueError(
            f"meta_steps: {config.meta_steps} must be a multiple of block, "
            f"{config.block}"
        )
    if not config.baseline_rates:
        raise ValueError("baseline_rates: none; give one at least")
    folder = start_run("maml_sinusoid", config)
    started = time.perf_counter()
    root = jax.random.key(config.seed)
    keys = jnp.stack([prng.stream(root, f"seed {n}") for n in range(config.seeds)])
    as_maml, with_rates = follower(config, "MAML"), follower(config, "MAML++")
    found: dict[int, dict[str, np.ndarray]] = {shots: {} for shots in config.test_shots}
    notes = []
    with progress() as display:
        for method in ("untrained", "pretrained", *META):
            follow = with_rates if method == "MAML++" else as_maml
            params = train(config, method, keys, display)
            own = (config.inner_learning_rate,)
            rates = own if method in META else config.baseline_rates
            for shots in config.test_shots:
                errors, chosen = judge(config, follow, params, rates, shots)
                found[shots][method] = errors
                last = errors[:, :, -1]
                width = 1.96 * last.std(1, ddof=1) / np.sqrt(last.shape[1])
                note = f"{shots} points, {method}: ± {width.mean():.3f}, rate {chosen}"
                display.console.print(f"{note}, MSE {last.mean():.3f}")
                notes.append(f"  {note}")
    rows = []
    table: dict[str, dict[str, list[float]]] = {}
    for shots, by_method in found.items():
        for steps in [step for step in REPORTED if step <= config.steps]:
            task = f"{shots} points, {steps} steps"
            table[task] = {
                method: errors[:, :, steps].mean(1).tolist()
                for method, errors in by_method.items()
                if steps < errors.shape[-1]
            }
            rows += [
                Row(task, method, values, "pretrained" if method in META else None)
                for method, values in table[task].items()
            ]
    show(
        "Sinusoids",
        rows,
        folder,
        unit="MSE",
        digits=3,
        lower_is_better=True,
        started=started,
    )
    print("95 % over the test tasks of a seed after the last step, and step sizes:")
    print("\n".join(notes))
    return table


if __name__ == "__main__":
    command_line(main, PRESETS)
