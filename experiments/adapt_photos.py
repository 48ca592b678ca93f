"""Photographs of another camera or shop: adaptation on a pretrained network's features.

A MobileNetV2 of ImageNet is run once over the photographs of all domains (those of
Office-Caltech10, or a folder DOMAIN/CLASS/IMAGE of your own). On its features a small
network learns from the labels of one domain and the unlabelled photographs of another,
for every pair. Two questions: what does each method gain at a weight that was fixed
beforehand, and which of all networks, of any method and weight, do the validators of
``jaxtransfer.scores`` choose, which see no label of the target?
"""

import csv
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats

from experiments.adapt_digits import local_mmd
from experiments.common import (
    Row,
    check_finite,
    command_line,
    progress,
    show,
    start_run,
)
from experiments.photographs import PhotosConfig, read, read_features
from jaxtransfer import losses, nets, ops, prng, scores
from jaxtransfer.methods import adapt
from jaxtransfer.model import from_linen
from jaxtransfer.train import init_state, scan_fit, train_step
from jaxtransfer.typing import Model, Variables

SOURCE_ONLY = "source only"
METHODS = ("MMD", "CORAL", "LMMD", "MCC", "DANN", "CDAN")
VALIDATORS = ("source accuracy", "entropy", "IM", "BNM", "SND", "IWCV", "DEV")
AT_RANDOM, ORACLE = "at random: mean of all", "oracle: target labels"
_EVERY = 5
"""One of so many labelled photographs is held out, for validators."""


@dataclasses.dataclass(frozen=True)
class Config(PhotosConfig):
    """Options of this study."""

    methods: tuple[str, ...] = METHODS
    """Which methods beside source only: distances of the hidden layer (MMD, CORAL, and
    LMMD by class), class confusion (MCC), a critic of the hidden layer (DANN) and one
    that sees the predictions too (CDAN)."""
    strength: float = 1.0
    """Weight of each method in the table; DANN's ramp takes it there from 0."""
    also: tuple[float, ...] = (0.1, 10.0)
    """Further weights, between which validators choose."""
    width: int = 128
    """Width of the small network's hidden layer, and of the critic's."""
    steps: int = 300
    """Updates of every network."""
    batch_size: int = 64
    """Rows of each domain in an update."""
    learning_rate: float = 1e-3
    """Highest learning rate of Adam; a cosine decay to 0 after a short warm-up."""


PRESETS = {
    "smoke": Config(
        photos="random",
        methods=("MMD", "CDAN"),
        also=(10.0,),
        image_size=32,
        width=8,
        steps=20,
        batch_size=8,
        seeds=2,
    ),
    "cpu": Config(),
    "paper": Config(also=(0.01, 0.03, 0.1, 0.3, 3.0, 10.0), steps=4000, seeds=5),
}


class Domain(NamedTuple):
    """Rows of one domain, those held out last, padded to the rows of all domains."""

    inputs: jax.Array
    """Features ``[rows, features]``."""
    labels: jax.Array
    """Classes ``[rows]``."""
    learned: jax.Array
    """How many are learned from where the domain is the source."""
    count: jax.Array
    """How many there are."""

    @property
    def there(self) -> jax.Array:
        """Which rows are no padding."""
        return jnp.arange(len(self.labels)) < self.count

    @property
    def held_out(self) -> jax.Array:
        """Which rows a source keeps for validators."""
        return self.there & (jnp.arange(len(self.labels)) >= self.learned)


def check_held_out(domains: dict[str, dict[str, Any]]) -> None:
    """Refuse a domain of which no photograph can be held out.

    Raises:
        ValueError: it has too few.
    """
    for name, domain in domains.items():
        if (count := len(domain["labels"])) < _EVERY:
            raise ValueError(
                f"photos: {name} has {count} photographs; give {_EVERY} at least, of "
                "which one is held out"
            )


def padded(inputs: np.ndarray, labels: np.ndarray, rows: int) -> Domain:
    """A domain as :class:`Domain` has it; images of a class lie together before."""
    place = np.arange(len(labels))
    order = np.argsort(place % _EVERY == _EVERY - 1, kind="stable")
    more = rows - len(labels)
    return Domain(
        jnp.asarray(np.pad(inputs[order], [(0, more), (0, 0)])),
        jnp.asarray(np.pad(labels[order], (0, more))),
        jnp.asarray(len(labels) - len(labels) // _EVERY),
        jnp.asarray(len(labels)),
    )


def make_terms(method: str, strength: Any, critic: Model) -> tuple[adapt.Term, ...]:
    """What a method adds to the source loss, with a weight that may be traced.

    Raises:
        ValueError: an unknown method.
    """

    def ramp(done: jax.Array) -> jax.Array:
        return strength * ops.dann(done)

    def confusion(source: adapt.Domain, target: adapt.Domain) -> jax.Array:
        del source
        return losses.minimum_class_confusion(target.outputs)

    unbiased = partial(losses.mmd, estimator="unbiased")
    terms = {
        SOURCE_ONLY: lambda: (),
        "MMD": lambda: (adapt.align(unbiased, tap="features", weight=ramp),),
        "CORAL": lambda: (adapt.align(losses.coral, tap="features", weight=ramp),),
        "LMMD": lambda: (
            adapt.compare(local_mmd, tap="features", weight=ramp, name="local"),
        ),
        "MCC": lambda: (adapt.compare(confusion, weight=ramp, name="confusion"),),
        "DANN": lambda: (adapt.dann(critic, tap="features", reversal=ramp),),
        "CDAN": lambda: (adapt.cdan(critic, tap="features", reversal=ramp),),
    }
    if method not in terms:
        raise ValueError(
            f"methods: {method!r} is unknown; choose from {', '.join(METHODS)}"
        )
    return terms[method]()


def make_run(method: str, classes: int, config: Config) -> Callable:
    """All seeds and weights of a method, compiled.

    ``(strengths [weights], keys [seeds], source, target inputs, target there, weights
    of the source's rows) -> (target logits, validators, last loss)``, each with
    ``[weights, seeds]`` in front. No target label goes in.
    """
    net = from_linen(nets.MLP(classes, widths=(config.width,)))
    critic = from_linen(nets.Critic((config.width,)))
    warm_up = max(1, config.steps // 20)
    optimizer = optax.adam(
        optax.warmup_cosine_decay_schedule(
            0.0, config.learning_rate, warm_up, config.steps
        )
    )

    def one(strength, key, source, target, there, density):
        example = source.inputs[:2]
        judged = method in ("DANN", "CDAN")
        start = adapt.init(
            prng.stream(key, "critic"),
            net,
            net.init(prng.stream(key, "model"), example),
            example,
            critic=critic if judged else None,
            tap="features" if judged else None,
            conditional=method == "CDAN",
        )
        terms = make_terms(method, strength, critic)
        step = train_step(adapt.objective(net, *terms, steps=config.steps), optimizer)

        def sample(key: jax.Array, number: jax.Array | int) -> dict[str, Any]:
            streams = prng.streams(jax.random.fold_in(key, number), "source", "target")
            counts = source.learned, jnp.sum(there)
            a, b = (
                jax.random.randint(stream, (config.batch_size,), 0, count)
                for stream, count in zip(streams, counts, strict=True)
            )
            labelled = {"inputs": source.inputs[a], "labels": source.labels[a]}
            return {"source": labelled, "target": {"inputs": target[b]}}

        state = init_state(key, start, optimizer)
        state, history = scan_fit(step, state, sample, steps=config.steps)
        trained = Variables(state.params["model"], state.model_state["model"])
        of_source, of_target = (
            net.apply(trained, inputs, taps=("features",))[:2]
            for inputs in (source.inputs, target)
        )
        found = validate(of_source, of_target, source, there, density)
        return of_target[0], found, history.train["loss"][-1]

    seeds = jax.vmap(one, in_axes=(None, 0, None, None, None, None))
    return jax.jit(jax.vmap(seeds, in_axes=(0, None, None, None, None, None)))


def validate(
    of_source: tuple[jax.Array, dict[str, jax.Array]],
    of_target: tuple[jax.Array, dict[str, jax.Array]],
    source: Domain,
    there: jax.Array,
    density: jax.Array,
) -> dict[str, jax.Array]:
    """What the validators say of a network, from outputs and features; no target label.

    Args:
        of_source: logits and features of the source's rows.
        of_target: of the target's.
        source: the source.
        there: which of the target's rows are no padding.
        density: of each source row the ratio of densities, on the backbone's features.
    """
    (logits, hidden), (target_logits, target_hidden) = of_source, of_target
    kept = source.held_out
    wrong = 1.0 - losses.accuracy(logits, source.labels)
    apart, _ = scores.held_out_domain_logits(
        hidden["features"],
        target_hidden["features"],
        source_where=source.there,
        target_where=there,
    )
    learned_density = scores.density_ratio(apart, where=source.there)
    return {
        "source accuracy": scores.source_accuracy(logits, source.labels, where=kept),
        "entropy": scores.negative_entropy(target_logits, where=there),
        "IM": scores.mutual_information(target_logits, where=there),
        "BNM": scores.nuclear_norm(target_logits, where=there),
        "SND": scores.soft_neighborhood_density(target_logits, where=there),
        "IWCV": scores.importance_weighted_validation(wrong, density, where=kept),
        "DEV": scores.deep_embedded_validation(wrong, learned_density, where=kept),
    }


@jax.jit
def densities(source: Domain, target: jax.Array, there: jax.Array) -> jax.Array:
    """Of each source row ``p_target / p_source`` on the backbone's features."""
    logits, _ = scores.held_out_domain_logits(
        source.inputs, target, source_where=source.there, target_where=there
    )
    return scores.density_ratio(logits, where=source.there)


def judge(logits: jax.Array, target: Domain) -> np.ndarray:
    """Accuracy in percent ``[weights, seeds]``: here the target's labels are read."""
    accuracy = partial(
        scores.oracle_target_accuracy,
        target_labels=target.labels,
        where=target.there,
    )
    return 100 * np.asarray(jax.vmap(jax.vmap(accuracy))(logits))


class Trained(NamedTuple):
    """What came of a method for one pair of domains, ``[weights, seeds]``."""

    accuracy: np.ndarray
    validators: dict[str, np.ndarray]


def choices(trained: list[Trained]) -> dict[str, np.ndarray]:
    """Accuracy ``[seeds]`` of what each validator chooses of all networks of a pair.

    Of several that it likes best, their mean; one that is not a number is no choice.
    """
    accuracy = np.concatenate([each.accuracy for each in trained])
    found = {AT_RANDOM: accuracy.mean(axis=0)}
    for name in VALIDATORS:
        values = np.concatenate([each.validators[name] for each in trained])
        best = [
            values[int(scores.choose(jnp.asarray(v))), n]
            for n, v in enumerate(values.T)
        ]
        found[name] = np.mean(accuracy, axis=0, where=values == np.array(best))
    return found | {ORACLE: accuracy.max(axis=0)}


def rank_correlations(pairs: Iterable[list[Trained]]) -> dict[str, float]:
    """Spearman's between what a validator says and the accuracy; mean over pairs and
    seeds."""
    found: dict[str, list[float]] = {name: [] for name in VALIDATORS}
    for trained in pairs:
        accuracy = np.concatenate([each.accuracy for each in trained])
        for name in VALIDATORS:
            values = np.concatenate([each.validators[name] for each in trained])
            for said, right in zip(values.T, accuracy.T, strict=True):
                if min(np.ptp(said), np.ptp(right)) > 0:  # else they say nothing
                    result: Any = scipy.stats.spearmanr(said, right)
                    found[name].append(float(result.statistic))
    return {name: float(np.mean(each or [0.0])) for name, each in found.items()}


def save_networks(
    path: Path, by_pair: dict[str, dict[str, Trained]], strengths: tuple[float, ...]
) -> None:
    """The accuracy of every network and what the validators say of it, as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file)
        lines.writerow(["pair", "method", "weight", "seed", "accuracy", *VALIDATORS])
        for pair, methods in by_pair.items():
            for method, each in methods.items():
                values = [each.accuracy, *(each.validators[v] for v in VALIDATORS)]
                for weight, seed in np.ndindex(each.accuracy.shape):
                    numbers = [float(value[weight, seed]) for value in values]
                    strength = "" if method == SOURCE_ONLY else strengths[weight]
                    lines.writerow([pair, method, strength, seed, *numbers])


def main(config: Config) -> dict[str, Any]:
    """Run the study; the table's rows and the folder of results."""
    started = time.perf_counter()
    for method in config.methods:
        make_terms(method, 1.0, from_linen(nets.Critic()))
    strengths = (config.strength, *config.also)
    if len({*strengths}) < len(strengths) or min(strengths) <= 0:
        raise ValueError(f"also: weights {strengths} must differ and be positive")
    photographs = read(config)
    check_held_out(photographs)
    folder = start_run("adapt_photos", config)
    found = read_features(config, photographs)
    rows = max(map(len, found.values()))
    domains = {
        name: padded(found[name], photographs[name]["labels"], rows) for name in found
    }
    classes = len(next(iter(photographs.values()))["names"])
    methods = (SOURCE_ONLY, *config.methods)
    runs = {method: make_run(method, classes, config) for method in methods}
    root = jax.random.key(config.seed)
    keys = jax.vmap(lambda seed: jax.random.fold_in(root, seed))(
        jnp.arange(config.seeds)
    )
    by_pair: dict[str, dict[str, Trained]] = {}
    with progress() as display:
        pairs = list(itertools.permutations(domains, 2))
        bar = display.add_task("adapt_photos", total=len(pairs) * len(methods))
        for names in pairs:
            pair = " → ".join(names)
            raw_source, raw_target = (domains[name] for name in names)
            source, target = standardised(raw_source, raw_target)
            given = source, target.inputs, target.there
            density = densities(*given)
            by_pair[pair] = {}
            for method in methods:
                display.update(bar, description=f"{pair}, {method}")
                weights = strengths[:1] if method == SOURCE_ONLY else strengths
                logits, validators, loss = runs[method](
                    jnp.asarray(weights), keys, *given, density
                )
                check_finite(f"{pair}, {method}", loss, config.steps)
                by_pair[pair][method] = Trained(
                    judge(logits, target),
                    {name: np.asarray(value) for name, value in validators.items()},
                )
                display.advance(bar)
            scored = {m: each.accuracy[0].mean() for m, each in by_pair[pair].items()}
            listed = ", ".join(f"{m} {value:.1f}" for m, value in scored.items())
            display.console.print(f"{pair}: {listed}")
    save_networks(folder / "networks.csv", by_pair, strengths)
    table = make_rows(by_pair, methods)
    show("Photographs, all of the target", table, folder, started=started)
    ranked = rank_correlations([*trained.values()] for trained in by_pair.values())
    print("Rank correlation of a validator with the accuracy, mean of pairs and seeds:")
    print("  " + ", ".join(f"{name} {value:.2f}" for name, value in ranked.items()))
    return {"rows": table, "folder": folder, "by_pair": by_pair}


def standardised(source: Domain, target: Domain) -> tuple[Domain, Domain]:
    """Both domains with mean 0 and deviation 1 over the source's rows."""
    there = source.there[:, None]
    mean = jnp.mean(source.inputs, axis=0, where=there)
    deviation = jnp.std(source.inputs, axis=0, where=there)
    scale = jnp.where(deviation == 0, 1.0, deviation)

    def of(domain: Domain) -> Domain:
        return domain._replace(inputs=(domain.inputs - mean) / scale)

    return of(source), of(target)


def make_rows(
    by_pair: dict[str, dict[str, Trained]], methods: tuple[str, ...]
) -> list[Row]:
    """Each method at the fixed weight, then each validator's choice, over all pairs."""

    def over_pairs(values: list[np.ndarray]) -> list[float]:
        return np.mean(values, axis=0).tolist()

    rows = [
        Row(
            "weight fixed",
            method,
            over_pairs([trained[method].accuracy[0] for trained in by_pair.values()]),
            None if method == SOURCE_ONLY else SOURCE_ONLY,
        )
        for method in methods
    ]
    chosen = [choices([*trained.values()]) for trained in by_pair.values()]
    return rows + [
        Row(
            "network chosen",
            name,
            over_pairs([each[name] for each in chosen]),
            None if name == AT_RANDOM else AT_RANDOM,
        )
        for name in chosen[0]
    ]


if __name__ == "__main__":
    command_line(main, PRESETS)
