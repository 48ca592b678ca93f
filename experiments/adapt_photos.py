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
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats

from experiments.adapt_digits import local_mmd
from experiments.common import (
    Row,
    StudyConfig,
    check_finite,
    command_line,
    find,
    progress,
    show,
    start_run,
)
from jaxtransfer import data, losses, nets, ops, parallel, pretrained, prng, scores
from jaxtransfer.methods import adapt, features
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
class Config(StudyConfig):
    """Options of this study."""

    photos: str = "office_caltech10"
    """Folder DOMAIN/CLASS/IMAGE, or its name below --data-dir; "random" (patterns, and
    an untrained network) is for trying out."""
    domains: tuple[str, ...] = ()
    """Its subfolders that take part; all if there are none."""
    weights: str = "imagenet_mobilenet_v2_1.0_224.npz"
    """File of the pretrained network, under weights/ of a folder of --data-dir, or a
    path."""
    layout: Literal["keras", "timm", "torchvision"] = "keras"
    """Whose names it has; "keras" with the normalisation folded into the
    convolutions."""
    methods: tuple[str, ...] = METHODS
    """Which methods beside source only: distances of the hidden layer (MMD, CORAL, and
    LMMD by class), class confusion (MCC), a critic of the hidden layer (DANN) and one
    that sees the predictions too (CDAN)."""
    strength: float = 1.0
    """Weight of each method in the table; DANN's ramp takes it there from 0."""
    also: tuple[float, ...] = (0.1, 10.0)
    """Further weights, between which validators choose."""
    image_size: int = 224
    """Height and width in pixels that photographs are brought to."""
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


class Backbone(NamedTuple):
    """A MobileNetV2 as others have trained it."""

    net: nets.MobileNetV2
    names: Callable[[], pretrained.Naming]
    mean: float | tuple[float, ...]
    """Of pixels in 0 … 1, taken off them."""
    deviation: float | tuple[float, ...]
    """By which they are divided then."""
    tap: str
    """What the last ReLU6 is given."""


_FOLDED = nets.MobileNetV2(1001, padding="same", batch_norm=False)
_BY_CHANNEL = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bn2")
BACKBONES = {
    "keras": Backbone(
        _FOLDED, pretrained.keras_mobilenet_v2, 128 / 255, 128 / 255, "conv_head"
    ),
    "timm": Backbone(nets.MobileNetV2(1000), pretrained.torch, *_BY_CHANNEL),
    "torchvision": Backbone(
        nets.MobileNetV2(1000), pretrained.torchvision_mobilenet_v2, *_BY_CHANNEL
    ),
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


def read(config: Config) -> dict[str, dict[str, Any]]:
    """``{"inputs", "labels", "names"}`` of each domain.

    Raises:
        ValueError: fewer than two domains, one that is not there or has too few
            photographs, or other classes in one of them.
    """
    if config.photos == "random":
        return _patterns(config)
    folder = find("photos", config.photos, config, folder=True)
    there = sorted(
        place.name
        for place in folder.iterdir()
        if place.is_dir() and not place.name.startswith(".")
    )
    chosen = config.domains or tuple(there)
    if missing := [name for name in chosen if name not in there]:
        raise ValueError(f"domains: {folder} has no {missing}, but {there}")
    if len(chosen) < 2:
        raise ValueError(
            f"photos: {folder} has the domains {there}; at least two take part"
        )
    domains = {
        name: data.image_folder(folder / name, size=config.image_size, channels=3)
        for name in chosen
    }
    for name, domain in domains.items():
        if (count := len(domain["labels"])) < _EVERY:
            raise ValueError(
                f"photos: {name} has {count} photographs; give {_EVERY} at least, of "
                "which one is held out"
            )
    (first, one), *others = domains.items()
    for name, other in others:
        if other["names"] != one["names"]:
            raise ValueError(
                f"photos: the classes of {name}, {other['names']}, are not those of "
                f"{first}, {one['names']}; name the folders alike"
            )
    return domains


def _patterns(config: Config) -> dict[str, dict[str, Any]]:
    """Three domains of three noisy patterns, each in a colour of its own."""
    random, size = np.random.default_rng(0), config.image_size
    classes = random.uniform(size=(3, size, size, 1))
    domains = {}
    for name in config.domains or ("red", "green", "blue"):
        labels = np.repeat(np.arange(3, dtype=np.int32), 8)
        noise = random.uniform(size=(len(labels), size, size, 1))
        pixels = (classes[labels] + noise) / 2 * random.uniform(size=3)
        inputs = pixels.astype(np.float32)
        domains[name] = {"inputs": inputs, "labels": labels, "names": ["a", "b", "c"]}
    return domains


def read_features(
    config: Config, domains: dict[str, dict[str, Any]]
) -> dict[str, np.ndarray]:
    """Features ``[rows, features]`` of each domain, as the classifier sees them."""
    backbone = BACKBONES[config.layout]
    net = from_linen(backbone.net)
    example = jax.ShapeDtypeStruct((1, *(2 * [config.image_size]), 3), jnp.float32)
    if config.photos == "random":
        variables = jax.jit(net.init)(jax.random.key(0), jnp.zeros(example.shape))
    else:
        file = find("weights", config.weights, config, under="weights")
        variables, _ = pretrained.load(file, net, example, names=backbone.names())
    last = features.extract(net, tap=backbone.tap)
    mean, deviation = jnp.asarray(backbone.mean), jnp.asarray(backbone.deviation)

    @parallel.jit  # pooled at once: all maps of a domain are gigabytes
    def run(variables: Variables, pixels: jax.Array) -> jax.Array:
        found = last(variables, (pixels - mean) / deviation)
        return jnp.mean(nn.relu6(found), axis=(1, 2))

    def all_of(images: np.ndarray) -> np.ndarray:
        size = 32
        full = np.pad(images, [(0, -len(images) % size), *[(0, 0)] * 3])
        parts = [run(variables, part) for part in np.split(full, len(full) // size)]
        return np.concatenate(parts)[: len(images)]

    return {name: all_of(domain["inputs"]) for name, domain in domains.items()}


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
                ranks = [scipy.stats.rankdata(numbers) for numbers in (said, right)]
                if min(map(np.ptp, ranks)) > 0:  # else they say nothing
                    found[name].append(np.corrcoef(ranks)[0, 1])
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
