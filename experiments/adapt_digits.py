"""Domain adaptation between digit data sets: a labelled source, an unlabelled target.

MNIST -> USPS, USPS -> MNIST and MNIST -> MNIST-M by maximum mean discrepancy (MMD),
correlation alignment (CORAL) and an adversarial critic (DANN), against the same network
trained on the source alone and against the bound that the target's own labels give.
Adaptation never reads a target label; what is reported is the last step, on the whole
test split of the target.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.common import (
    Row,
    StudyConfig,
    check_finite,
    command_line,
    progress,
    show,
    start_run,
)
from jaxtransfer import data, losses, nets, ops, prng
from jaxtransfer.methods import adapt
from jaxtransfer.model import from_linen
from jaxtransfer.train import init_state, paired, resident, scan_fit, train_step
from jaxtransfer.typing import Variables

SOURCE_ONLY = "source only"
BOUND = "bound: labelled target"
JUDGED = ("DANN", "CDAN")
"""Methods with a critic."""
TASKS = {
    "digits → inverted": ("digits", "inverted", 1),
    "MNIST → USPS": ("mnist", "usps", 1),
    "USPS → MNIST": ("usps", "mnist", 1),
    "MNIST → MNIST-M": ("mnist", "mnist_m", 3),
}


@dataclasses.dataclass(frozen=True)
class Config(StudyConfig):
    """Options of this study."""

    tasks: tuple[str, ...] = ("MNIST → USPS", "USPS → MNIST", "MNIST → MNIST-M")
    """Which pairs of domains; also "digits → inverted", which is embedded."""
    methods: tuple[str, ...] = ("MMD", "CORAL", "DANN")
    """Which methods beside source only and the bound; also LMMD (local MMD, by class)
    and CDAN (the critic sees features and predictions), with DANN's ramp as LMMD's
    weight, and with DANN's layer and ramp."""
    size: int = 20
    """Height and width of the images in pixels (20: a third of the work of 28)."""
    margin: bool = False
    """Resize whole images of MNIST and MNIST-M; else cut their margin off. Digits were
    fitted into 20 x 20 pixels and moved to their centre of mass in 28 x 28, while those
    of USPS fill their image; of all ink of MNIST's tests 3.2 % lies outside of the
    middle 20 x 20."""
    filters: tuple[int, int] = (16, 32)
    """Filters of LeNet's two convolutions."""
    width: int = 128
    """Width of LeNet's dense layer, the representation."""
    patches: bool = True
    """Convolutions as matrix products: far faster in a compiled run on CPU; without is
    faster on a GPU."""
    batch_norm: bool = True
    """Normalise after each convolution."""
    critic: tuple[int, ...] = (256, 256)
    """Hidden layers of DANN's critic."""
    steps: int = 1000
    """Updates of every method between grey domains."""
    colour_steps: int = 3000
    """Updates of every method where the target is in colour (MNIST-M)."""
    batch_size: int = 64
    """Images of each domain in a step."""
    learning_rate: float = 2e-3
    """Highest learning rate of Adam; cosine decay to 0 after a short warm-up."""
    mmd_weight: float = 1.0
    """Weight of MMD on the representation, five Gaussian kernels."""
    coral_weight: float = 1.0
    """Weight of CORAL on the logits, where Deep CORAL has it."""
    dann_gamma: float = 1.0
    """Steepness of the ramp of DANN's reversed gradient between grey domains: 10 takes
    it to 1 early, as in the paper; 1 takes it slowly to 0.46."""
    dann_tap: str = "features"
    """Layer that DANN's critic reads between grey domains."""
    joint: bool = True
    """Between grey domains, source and target go through the network as one batch."""
    colour_gamma: float = 10.0
    """Steepness of DANN's ramp where the target is in colour."""
    colour_dann_tap: str = "features/norm_1"
    """Layer that DANN's critic reads where the target is in colour: the last
    convolution, as in the paper's network for MNIST-M."""
    colour_joint: bool = False
    """Where the target is in colour, every method but source only and the bound
    normalises each domain by its own batch statistics."""
    figure: bool = True
    """Save features before and after adaptation for the first task."""


PRESETS = {
    "smoke": Config(
        tasks=("digits → inverted",),
        size=16,
        filters=(4, 8),
        width=32,
        steps=30,
        batch_size=16,
        learning_rate=3e-3,
        patches=False,
        seeds=2,
    ),
    "cpu": Config(),
    "paper": Config(
        size=28,
        margin=True,
        patches=False,
        filters=(20, 50),
        width=500,
        critic=(500, 500),
        steps=10_000,
        colour_steps=20_000,
        batch_size=128,
        learning_rate=1e-3,
        dann_gamma=10.0,
        seeds=5,
    ),
}


def middle(pixels: np.ndarray, size: int) -> np.ndarray:
    """Cut the middle ``size`` x ``size`` out of images."""
    edge = (pixels.shape[1] - size) // 2
    return pixels[:, edge : edge + size, edge : edge + size]


def load_domain(
    name: str, *, size: int, margin: bool, seed: int, data_dir: str | None
) -> dict[str, dict[str, jax.Array]]:
    """``{"train", "test"}`` of one domain, pixels as bytes to keep memory small."""
    domain = {}
    cut = not margin and name in ("mnist", "mnist_m") and size < 28
    # Below 20 pixels the middle 20 are made smaller, not cut.
    whole = min(28, round(size * 28 / 20)) if cut else size
    for part in ("train", "test"):
        source = data.load(
            "digits" if name == "inverted" else name, part, data_dir=data_dir
        )
        # MNIST-M has MNIST's 28 pixels in the middle of 32.
        read = round(whole * 32 / 28) if name == "mnist_m" else whole
        arrays = data.as_arrays(source, size=read)
        pixels = middle(arrays["inputs"], size)
        if name == "inverted":
            pixels = data.shift(pixels, kind="inversion", seed=seed)
        domain[part] = {
            "inputs": jnp.asarray(np.round(255 * pixels).astype(np.uint8)),
            "labels": jnp.asarray(arrays["labels"]),
        }
    return domain


def images(pixels: jax.Array, channels: int) -> jax.Array:
    """Bytes ``[n, height, width, 1 or channels]`` to network inputs in -1 … 1."""
    scaled = pixels.astype(jnp.float32) / 127.5 - 1.0
    return jnp.broadcast_to(scaled, (*scaled.shape[:-1], channels))


def in_colour(config: Config) -> Config:
    """The options with those for a target in colour in their places."""
    return dataclasses.replace(
        config,
        steps=config.colour_steps,
        dann_gamma=config.colour_gamma,
        dann_tap=config.colour_dann_tap,
        joint=config.colour_joint,
    )


def make_network(config: Config) -> Any:
    """LeNet as a library model."""
    return from_linen(
        nets.LeNet(
            10,
            filters=config.filters,
            width=config.width,
            batch_norm=config.batch_norm,
            conv=nets.PatchConv if config.patches else nn.Conv,
        )
    )


@functools.cache
def make_start(judged: str, channels: int, config: Config) -> Callable:
    """Fresh variables, ``key -> Variables``, compiled once for all methods but those
    of :data:`JUDGED`."""
    net = make_network(config)
    critic = from_linen(nets.Critic(config.critic)) if judged else None

    @jax.jit
    def start(key: jax.Array) -> Variables:
        example = jnp.zeros((1, config.size, config.size, channels))
        return adapt.init(
            prng.stream(key, "critic"),
            net,
            net.init(prng.stream(key, "model"), example),
            example,
            critic=critic,
            tap=config.dann_tap if critic else None,
            conditional=judged == "CDAN",
        )

    return start


def make_terms(method: str, critic: Any, config: Config) -> tuple[adapt.Term, ...]:
    """What a method adds to the source loss."""
    if method == "MMD":
        distance = partial(losses.mmd, estimator="unbiased")
        return (adapt.align(distance, tap="features", weight=config.mmd_weight),)
    if method == "CORAL":
        return (adapt.align(losses.coral, tap="head", weight=config.coral_weight),)
    if method == "DANN":
        ramp = partial(ops.dann, gamma=config.dann_gamma)
        return (adapt.dann(critic, tap=config.dann_tap, reversal=ramp),)
    if method == "CDAN":
        ramp = partial(ops.dann, gamma=config.dann_gamma)
        return (adapt.cdan(critic, tap=config.dann_tap, reversal=ramp),)
    if method == "LMMD":
        ramp = partial(ops.dann, gamma=config.dann_gamma)
        return (adapt.compare(local_mmd, tap="features", weight=ramp, name="local"),)
    if method in (SOURCE_ONLY, BOUND):
        return ()
    raise ValueError(
        f"methods: {method!r} is unknown; choose from MMD, CORAL, DANN, CDAN, LMMD"
    )


def local_mmd(source: adapt.Domain, target: adapt.Domain) -> jax.Array:
    """Local MMD, class by class by what is predicted for the target."""
    return losses.local_maximum_mean_discrepancy(
        source.features, target.features, source.labels, jax.nn.softmax(target.outputs)
    )


def make_run(method: str, channels: int, steps: int, config: Config) -> Callable:
    """One run, compiled: ``(key, source, target, test) -> (correct, …)``."""
    net = make_network(config)
    critic = from_linen(nets.Critic(config.critic)) if method in JUDGED else None
    warm_up = max(1, steps // 20)
    optimizer = optax.adam(
        optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warm_up, steps)
    )
    terms = make_terms(method, critic, config)
    step = train_step(
        adapt.objective(net, *terms, steps=steps, joint=config.joint), optimizer
    )
    predict = adapt.predict(net)

    @jax.jit
    def train(key: jax.Array, start: Variables, source: Any, target: Any, test: Any):
        draw = paired(
            resident(source, config.batch_size, replacement=True),
            resident(target, config.batch_size, replacement=True),
        )

        def sample(key: jax.Array, number: jax.Array) -> Any:
            return {
                domain: batch | {"inputs": images(batch["inputs"], channels)}
                for domain, batch in draw(key, number).items()
            }

        state = init_state(key, start, optimizer)
        state, history = scan_fit(step, state, sample, steps=steps)

        def right(example: Any) -> jax.Array:
            inputs = images(example["inputs"][None], channels)
            logits = predict(state.params, state.frozen, state.model_state, inputs)
            return jnp.argmax(logits[0]) == example["labels"]

        correct = jnp.sum(jax.lax.map(right, test, batch_size=250))
        variables = Variables(state.params["model"], state.model_state["model"])
        last = {name: values[-100:].mean() for name, values in history.train.items()}
        return correct, variables, last

    def run(key: jax.Array, source: Any, target: Any, test: Any) -> Any:
        judged = method if method in JUDGED else ""
        start = make_start(judged, channels, config)(key)
        return train(key, start, source, target, test)

    return run


def check_tap(config: Config, channels: int) -> None:
    """Refuse a layer for DANN's critic that the network does not have.

    Raises:
        ValueError: there is none of that name.
    """
    net, key = make_network(config), jax.random.key(0)
    image = jnp.zeros((1, config.size, config.size, channels))
    jax.eval_shape(
        lambda: net.apply(net.init(key, image), image, taps=(config.dann_tap,))
    )


def save_features(
    path: Path, net: Any, trained: dict[str, Variables], domains: Any, channels: int
) -> None:
    """Figure: the representation of both domains on two principal axes, by method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    @jax.jit
    def represent(variables: Variables, pixels: jax.Array) -> jax.Array:
        return net.apply(variables, images(pixels, channels), taps=("features",))[1][
            "features"
        ]

    figure, axes = plt.subplots(1, len(trained), figsize=(5 * len(trained), 4.6))
    tests = [part["test"]["inputs"][:400] for part in domains]
    labels = [part["test"]["labels"][:400] for part in domains]
    for axis, (method, variables) in zip(
        np.atleast_1d(axes), trained.items(), strict=True
    ):
        rows = [np.asarray(represent(variables, pixels)) for pixels in tests]
        both = np.concatenate(rows)
        centre = both.mean(axis=0)
        plane = np.linalg.svd(both - centre, full_matrices=False)[2][:2].T
        for part, colours, marker, name in zip(
            rows, labels, "ox", ("source", "target"), strict=True
        ):
            axis.scatter(
                *((part - centre) @ plane).T,
                c=np.asarray(colours),
                cmap="tab10",
                vmin=0,
                vmax=9,
                marker=marker,
                s=14,
                alpha=0.6,
                linewidths=0.8 if marker == "x" else 0,
                label=name,
            )
        axis.set(title=method, xlabel="first axis", ylabel="second axis")
        axis.legend()
    figure.suptitle("Test images of source (o) and target (x); colour is the class")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(config: Config) -> dict[str, Any]:
    """Run the study; the table's rows and the folder of results."""
    started = time.perf_counter()
    for task in config.tasks:
        if task not in TASKS:
            raise ValueError(f"tasks: {task!r} is unknown; choose from {list(TASKS)}")
    for method in config.methods:
        make_terms(method, from_linen(nets.Critic(config.critic)), config)
    colours = {TASKS[task][2] for task in config.tasks}
    for channels in colours if {*JUDGED} & {*config.methods} else ():
        check_tap(config if channels == 1 else in_colour(config), channels)
    folder = start_run("adapt_digits", config)
    domain = {
        name: load_domain(
            name,
            size=config.size,
            margin=config.margin,
            seed=config.seed,
            data_dir=config.data_dir,
        )
        for name in dict.fromkeys(n for task in config.tasks for n in TASKS[task][:2])
    }
    methods = (SOURCE_ONLY, *config.methods, BOUND)
    rows, measured = [], []
    with progress() as display:
        bar = display.add_task(
            "adapt_digits", total=len(config.tasks) * len(methods) * config.seeds
        )
        for task in config.tasks:
            source_name, target_name, channels = TASKS[task]
            source, target = domain[source_name], domain[target_name]
            setting = config if channels == 1 else in_colour(config)
            steps = setting.steps
            unlabelled = {"inputs": target["train"]["inputs"]}
            kept = {}
            for method in methods:
                run = make_run(method, channels, steps, setting)
                labelled = target["train"] if method == BOUND else source["train"]
                values = []
                for seed in range(config.seeds):
                    display.update(bar, description=f"{task}, {method}, seed {seed}")
                    key = jax.random.fold_in(jax.random.key(config.seed), seed)
                    correct, variables, last = run(
                        key, labelled, unlabelled, target["test"]
                    )
                    values.append(100 * int(correct) / len(target["test"]["labels"]))
                    last = {name: float(value) for name, value in last.items()}
                    check_finite(f"{task}, {method}", list(last.values()), steps)
                    measured.append({"task": task, "method": method} | last)
                    kept.setdefault(method, variables)
                    display.advance(bar)
                baseline = None if method == SOURCE_ONLY else SOURCE_ONLY
                rows.append(Row(task, method, values, baseline))
                scores = ", ".join(f"{value:.1f}" for value in values)
                signals = ", ".join(f"{k} {v:.3f}" for k, v in last.items())
                display.console.print(f"{task}, {method}: {scores} ({signals})")
            if config.figure and task == config.tasks[0]:
                shown = {m: kept[m] for m in (SOURCE_ONLY, *config.methods)}
                save_features(
                    folder / "features.png",
                    make_network(setting),
                    shown,
                    (source, target),
                    channels,
                )
    show("Digit adaptation, target test split", rows, folder, started=started)
    return {"rows": rows, "folder": folder, "training": measured}


if __name__ == "__main__":
    command_line(main, PRESETS)
