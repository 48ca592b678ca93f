"""Fine-tuning MNIST → USPS with 1, 5, 10 and 50 labels a class.

A LeNet is trained on MNIST, once a seed. With a few labelled USPS images it is then
trained on: all layers, the upper ones, the head alone; or its features are kept and a
logistic regression is fitted to them. The baseline is the same network trained from
scratch on the same few images with as many updates. Each seed has its own weights and
its own labels; the test is USPS's own (2,007 images), after the last update.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Iterator, Sequence

import flax.linen as nn
import jax
import numpy as np
import optax

from experiments.common import Row, StudyConfig, command_line, progress, show, start_run
from jaxtransfer import data, losses, nets, prng, tree
from jaxtransfer.methods import features, finetune
from jaxtransfer.model import from_linen
from jaxtransfer.train import init_state, resident, scan_fit, train_step
from jaxtransfer.typing import Batch, Model, Variables

TAP = "features"
SCRATCH = "from scratch"
METHODS: dict[str, tuple[str, ...]] = {
    SCRATCH: (".*",),
    "all layers": (".*",),
    "convolutions held": ("features/dense", "head"),
    "head only": ("head",),
}
"""What is trained, by method; the rest is held."""
PROBE = "features + logistic regression"


@dataclasses.dataclass(frozen=True)
class Config(StudyConfig):
    """Options of the study."""

    labels: tuple[int, ...] = (1, 5, 10, 50)
    """Labelled target images of each class."""
    source_steps: int = 600
    """Updates on the source."""
    steps: int = 150
    """Updates on the target, from scratch too."""
    batch_size: int = 64
    """Examples in a batch, drawn with replacement."""
    learning_rate: float = 1e-3
    """Adam's step size at the start; it falls to zero along a cosine."""
    l2: float = 1e-2
    """Penalty of the logistic regression."""
    filters: tuple[int, int] = (10, 20)
    """Filters of LeNet's two convolutions."""
    width: int = 128
    """Width of LeNet's representation."""
    patches: bool = True
    """Convolutions as matrix products: far faster in a compiled run on CPU; without is
    faster on a GPU."""
    source_split: str = "train[:20000]"
    """Source images."""
    test_split: str = "test"
    """Target test images."""


PRESETS = {
    "smoke": Config(
        seeds=2,
        labels=(5,),
        source_steps=40,
        steps=20,
        filters=(4, 8),
        width=32,
        source_split="train[:2000]",
        test_split="test[:500]",
    ),
    "cpu": Config(seeds=10),
    "paper": Config(
        seeds=10,
        source_steps=10_000,
        steps=1000,
        filters=(20, 50),
        width=500,
        patches=False,
        source_split="train",
    ),
}


def read(config: Config) -> tuple[Batch, Batch, Batch]:
    """Source, target and target test images."""
    load = functools.partial(data.load, data_dir=config.data_dir)
    return (
        data.as_arrays(load("mnist", config.source_split)),
        data.as_arrays(load("usps", "train"), size=28),
        data.as_arrays(load("usps", config.test_split), size=28),
    )


def few(images: Batch, a_class: int, size: int, seed: tuple[int, int]) -> Batch:
    """Draw a few examples of each class, repeated until there are ``size``.

    One size for every number of labels, so that a method is compiled once. The draws
    of a seed are nested.

    Raises:
        ValueError: fewer than one, or more than a class has.
    """
    fewest = int(np.bincount(images["labels"], minlength=10).min())
    if not 1 <= a_class <= fewest:
        raise ValueError(f"labels: 1 to {fewest} of a class, got {a_class}")
    random = np.random.default_rng(seed)
    orders = [
        random.permutation(np.flatnonzero(images["labels"] == c)) for c in range(10)
    ]
    rows = np.resize(np.concatenate([order[:a_class] for order in orders]), size)
    return {name: array[rows] for name, array in images.items()}


def common_size(labels: Sequence[int], least: int) -> int:
    """A number of rows that every number of labels a class divides evenly."""
    every = 10 * math.lcm(*labels)
    return every * math.ceil(least / every)


def learn(
    config: Config,
    model: Model,
    rules: tuple[str, ...],
    steps: int,
    key: jax.Array,
    start: Variables,
    images: Batch,
) -> Variables:
    """Train what the rules select; gives the whole network after the last update."""
    variables, frozen = finetune.split(start, rules)
    optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, steps))
    state, _ = scan_fit(
        train_step(finetune.objective(model), optimizer),
        init_state(key, variables, optimizer, frozen=frozen),
        resident(images, config.batch_size, replacement=True),
        steps=steps,
    )
    params = tree.combine(state.params, state.frozen["params"])
    return Variables(params, state.model_state)


def check_held(before: Variables, after: Variables, rules: tuple[str, ...]) -> None:
    """Stop unless what is held is bit-identical after training."""
    held, same = (tree.partition(v.params, rules)[1] for v in (before, after))
    if tree.fingerprint(held) != tree.fingerprint(same):
        raise AssertionError(f"training {rules} changed what it should have held")


def study(
    config: Config, domains: tuple[Batch, Batch, Batch]
) -> Iterator[tuple[str, str, float]]:
    """Train on the source once a seed, then every method on every number of labels.

    Args:
        config: the options.
        domains: source, target and target test images.

    Yields:
        Task, method and test accuracy in per cent.
    """
    source, target, test = domains
    model = from_linen(
        nets.LeNet(
            10,
            filters=config.filters,
            width=config.width,
            conv=nets.PatchConv if config.patches else nn.Conv,
        )
    )
    init = jax.jit(model.init)
    outputs = jax.jit(lambda variables, inputs: model.apply(variables, inputs)[0])
    compiled = functools.cache(
        lambda *setting: jax.jit(functools.partial(learn, config, model, *setting))
    )

    def accuracy(logits: jax.Array) -> float:
        return 100 * float(np.mean(losses.accuracy(logits, test["labels"])))

    for seed in range(config.seeds):
        key = jax.random.fold_in(jax.random.key(config.seed), seed)
        roles = ("source", "target")
        fresh = {r: init(prng.stream(key, r), test["inputs"][:1]) for r in roles}
        trained = compiled((".*",), config.source_steps)(
            prng.stream(key, "fit source"), fresh["source"], source
        )
        yield "no labels", "source", accuracy(outputs(trained, test["inputs"]))
        extract = functools.partial(features.extract_all, model, trained, tap=TAP)
        test_features = extract(test["inputs"])
        for labels in config.labels:
            task = f"{labels} labels a class"
            size = common_size(config.labels, config.batch_size)
            images = few(target, labels, size, (config.seed, seed))
            for method, rules in METHODS.items():
                start = fresh["target"] if method == SCRATCH else trained
                tuned = compiled(rules, config.steps)(
                    prng.stream(key, f"fit {labels}"), start, images
                )
                check_held(start, tuned, rules)
                yield task, method, accuracy(outputs(tuned, test["inputs"]))
            probe = features.logistic_regression(
                extract(images["inputs"]), images["labels"], classes=10, l2=config.l2
            )
            logits = test_features @ probe["kernel"] + probe["bias"]
            yield task, PROBE, accuracy(logits)


def main(config: Config) -> list[Row]:
    started = time.perf_counter()
    folder = start_run("finetune_digits", config)
    domains = read(config)
    for labels in config.labels:  # refused before any training
        few(domains[1], labels, 1, (config.seed, 0))
    total = config.seeds * (1 + len(config.labels) * (len(METHODS) + 1))
    values: dict[tuple[str, str], list[float]] = {}
    with progress() as bar:
        for task, method, value in bar.track(
            study(config, domains), total, description="runs"
        ):
            values.setdefault((task, method), []).append(value)
    rows = [
        Row(task, method, found, None if method in (SCRATCH, "source") else SCRATCH)
        for (task, method), found in values.items()
    ]
    print("What was held is bit-identical to the source after every training.")
    show("MNIST → USPS, few labels", rows, folder, started=started)
    return rows


if __name__ == "__main__":
    command_line(main, PRESETS)
