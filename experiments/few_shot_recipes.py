"""Every few-shot algorithm of the library as it is trained and tested on images."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxtransfer import losses, nets
from jaxtransfer.methods import meta
from jaxtransfer.model import from_linen
from jaxtransfer.train import metrics
from jaxtransfer.typing import Model, Objective, Variables


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a recipe needs to know of the study.

    Attributes:
        model: network with modules ``features`` and ``head``.
        ways: classes of a task.
        steps: gradient steps, in training or at test.
        rate: of the inner SGD on a mean cross-entropy, as the recipe takes it.
        statistics: whose batch statistics normalise.
        width: features of the network, for the relation module.
    """

    model: Model
    ways: int
    steps: int
    rate: float
    statistics: meta.Statistics
    width: int


Build = Callable[[Setting], meta.Learner]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How an algorithm is trained, and what it may choose from at test.

    Attributes:
        build: the learner in training; None for a baseline, whose network is
            pretrained to tell all training classes apart.
        tests: learners at test by name; one of them is chosen on validation tasks.
        objective: what is minimised in training, of the learner, its setting and the
            updates of the run.
        outer: optimizer of the meta-parameters, of a schedule.
        context: numbers of a context in the network.
        query: whether the learner is shown the query's inputs.
        outputs: of the network, if not one for each class.
        steps: fewest inner steps in training, where the study has fewer.
        rate: of the inner SGD, of the study's.
        no_rate: why there is no such rate to choose when it adapts, if there is none.
        descends: whether it takes gradient steps when it adapts.
    """

    build: Build | None
    tests: dict[str, Build]
    objective: Callable[[meta.Learner, Setting, int], Objective] = (
        lambda learner, setting, updates: meta.objective(learner)
    )
    outer: Callable[[optax.Schedule], optax.GradientTransformation] = optax.adam
    context: int = 0
    query: bool = False
    outputs: int | None = None
    steps: int = 0
    rate: Callable[[float], float] = lambda rate: rate
    no_rate: str = ""
    descends: bool = True


def _descend(**options: Any) -> Build:
    """Gradient steps on the mean cross-entropy."""

    def build(s: Setting) -> meta.Learner:
        task = meta.task(s.model, statistics=s.statistics)
        return meta.maml(task, optax.sgd(s.rate), steps=s.steps, **options)

    return build


def _meta_learned(build: Build, **options: Any) -> Recipe:
    return Recipe(build, {"": build}, **options)


def _comparing(build: Build, **options: Any) -> Recipe:
    none = {"no_rate": "it takes no gradient steps", "descends": False}
    return _meta_learned(build, **none, **options)


def _with(learned: Callable[[float], meta.Learned], **options: Any) -> Build:
    """Gradient steps by an optimizer that is learned."""

    def build(s: Setting) -> meta.Learner:
        task = meta.task(s.model, statistics=s.statistics)
        return meta.maml(task, learned(s.rate), steps=s.steps, **options)

    return build


def _compare(learner: Callable[..., meta.Learner], **options: Any) -> Build:
    """A classifier of features in closed form."""

    def build(s: Setting) -> meta.Learner:
        return learner(
            s.model, ways=s.ways, tap="features", statistics=s.statistics, **options
        )

    return build


def _relation(s: Setting) -> meta.Learner:
    module = from_linen(
        nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(64), nn.relu, nn.Dense(1)])
    )
    start = module.init(jax.random.key(0), jnp.ones((1, 2 * s.width)))
    return _compare(meta.relation, module=module, start=start)(s)


def _proto_maml(s: Setting) -> meta.Learner:
    return meta.proto_maml(
        s.model, optax.sgd(s.rate), steps=s.steps, statistics=s.statistics
    )


def _cavia(s: Setting) -> meta.Learner:
    task = meta.task(s.model, statistics=s.statistics)
    return meta.cavia(task, optax.sgd(s.rate), steps=s.steps)


def _implicit(s: Setting) -> meta.Learner:
    task = meta.task(s.model, statistics=s.statistics)
    return meta.implicit_maml(
        task, optax.sgd(s.rate), steps=s.steps, strength=0.5, iterations=3
    )


def _tuned(
    learner: Callable[..., meta.Learner], rates: tuple[float, ...], **options: Any
) -> dict[str, Build]:
    """One learner a step size, to choose from."""

    def of_rate(rate: float) -> Build:
        def build(s: Setting) -> meta.Learner:
            return learner(
                s.model,
                optax.sgd(rate),
                ways=s.ways,
                steps=s.steps,
                tap="features",
                statistics=s.statistics,
                **options,
            )

        return build

    return {f"rate {rate:g}": of_rate(rate) for rate in rates}


def in_turns(model: Model) -> Objective:
    """ProtoNet's loss by cosine, averaged over which image is the example of its class.

    Over images ``[tasks, ways, images, ...]``, which go through the network together.
    Parameters are those of ``meta.prototypical(distance="cosine", learn_scale=True)``.
    """

    def value(params, frozen, model_state, images, key):
        del frozen
        tasks, ways, count = images.shape[:3]
        vectors, _, model_state = model.apply(
            Variables(params["network"], model_state),
            images.reshape(-1, *images.shape[3:]),
            train=True,
            key=key,
        )
        vectors = vectors.reshape(tasks, ways * count, -1)
        vectors /= optax.safe_norm(vectors, 1e-6, axis=-1, keepdims=True)
        cosines = jnp.einsum("tid,tjd->tij", vectors, vectors)
        # [tasks, row, example's number, its class]
        shape = (tasks, ways * count, ways, count)
        logits = params["metric"]["scale"] * jnp.swapaxes(cosines.reshape(shape), 2, 3)
        labels = jnp.repeat(jnp.arange(ways), count)[:, None]
        labels = jnp.broadcast_to(labels, (tasks, ways * count, count))
        number = jnp.tile(jnp.arange(count), ways)
        other = jnp.broadcast_to(number[:, None] != jnp.arange(count), labels.shape)
        loss = metrics.mean(losses.cross_entropy(logits, labels), where=other)
        accuracy = metrics.mean(losses.accuracy(logits, labels), where=other)
        return metrics.value(loss), (model_state, {"accuracy": accuracy})

    return value


def _in_turns(learner: meta.Learner, setting: Setting, updates: int) -> Objective:
    """Of tasks whose support and query are one."""
    del learner, updates
    objective = in_turns(setting.model)

    def value(params, frozen, model_state, batch, key):
        images = [
            part["inputs"].reshape(
                len(part["inputs"]), setting.ways, -1, *part["inputs"].shape[2:]
            )
            for part in (batch["support"], batch["query"])
        ]
        counted = "updates" in model_state
        state = {k: v for k, v in model_state.items() if k != "updates"}
        images = jnp.concatenate(images, axis=2)
        loss, (state, measured) = objective(params, frozen, state, images, key)
        if counted:
            state = {**state, "updates": model_state["updates"] + 1}
        return loss, (state, measured)

    return value


def _cosine(s: Setting) -> meta.Learner:
    return meta.prototypical(
        s.model,
        ways=s.ways,
        distance="cosine",
        learn_scale=True,
        statistics=s.statistics,
    )


def _plus(**options: Any) -> Build:
    """MAML++: rates for each layer and step, scales and offsets for each step."""
    return _with(meta.per_layer_per_step, per_step=".*/norm", **options)


def _multi_step(learner: meta.Learner, setting: Setting, updates: int) -> Objective:
    """Losses after every step in the first tenth of the run, as in MAML++."""
    weights = meta.multi_step_weights(setting.steps, max(updates // 10, 1))
    return meta.objective(learner, step_weights=weights)


def _annealed(learner: meta.Learner, setting: Setting, updates: int) -> Objective:
    """As `_multi_step`, and of first order in the first third of the run."""
    first = _multi_step(_plus(first_order=True)(setting), setting, updates)
    second = _multi_step(learner, setting, updates)
    return meta.stages((max(updates // 3, 1), first), (None, second))


def _reptile_sgd(schedule: optax.Schedule) -> optax.GradientTransformation:
    """The published outer update: a step from 1 to 0 towards the tasks' ends."""
    first = schedule(0)
    return optax.sgd(lambda count: schedule(count) / first)


RECIPES = {
    "MAML": _meta_learned(_descend()),
    "FOMAML": _meta_learned(_descend(first_order=True)),
    "Reptile": _meta_learned(
        _descend(first_order=True),
        objective=lambda learner, setting, updates: meta.reptile(learner),
        outer=_reptile_sgd,
        steps=5,
        rate=lambda rate: rate / 2,
    ),
    "ANIL": _meta_learned(_descend(rules="head")),
    "BOIL": _meta_learned(_descend(rules="features")),
    "Meta-SGD": _meta_learned(_with(meta.meta_sgd), no_rate="it learned its rates"),
    "MAML++": _meta_learned(
        _plus(),
        objective=_multi_step,
        steps=3,
        no_rate="it learned its rates",
    ),
    "MAML++ annealed": _meta_learned(
        _plus(),
        objective=_annealed,
        steps=3,
        no_rate="it learned its rates",
    ),
    "meta-curvature": _meta_learned(_with(meta.meta_curvature)),
    "CAVIA": _meta_learned(_cavia, context=100, rate=lambda _: 1.0),
    "iMAML": _meta_learned(_implicit, steps=5, rate=lambda rate: rate / 2),
    "ProtoMAML": _meta_learned(_proto_maml, rate=lambda rate: rate / 20),
    "ProtoNet": _comparing(_compare(meta.prototypical)),
    "ProtoNet in turns": _comparing(_cosine, objective=_in_turns, outputs=256),
    "Matching": _comparing(_compare(meta.matching, scale=10.0)),
    "Relation": _comparing(_relation),
    "R2D2": _comparing(_compare(meta.ridge)),
    "pretrained, head tuned": Recipe(None, _tuned(meta.fine_tuning, (0.1, 1.0))),
    "pretrained, fine-tuned": Recipe(
        None, _tuned(meta.fine_tuning, (0.1, 1.0), body="tuned")
    ),
    "Baseline++": Recipe(None, _tuned(meta.cosine_head, (0.1, 1.0), scale=10.0)),
    "SimpleShot": Recipe(
        None,
        {
            name: _compare(meta.simple_shot, transform=name)
            for name in ("none", "l2", "centred_l2")
        },
    ),
    "nearest neighbour": Recipe(
        None,
        {
            name: _compare(meta.nearest_neighbors, transform=name)
            for name in ("none", "l2")
        },
    ),
    "transductive fine-tuning": Recipe(
        None, _tuned(meta.transductive_fine_tuning, (0.01, 0.1)), query=True
    ),
}


def network(outputs: int, filters: int, *, context: int = 0) -> Model:
    """Four strided convolutions whose last positions all are features."""
    return from_linen(
        nets.Conv4(outputs, filters=filters, pooled=False, context=context)
    )


def make_setting(
    recipe: Recipe,
    *,
    ways: int,
    filters: int,
    image_size: int,
    steps: int,
    rate: float,
    statistics: meta.Statistics,
) -> Setting:
    """The network of a recipe, with what else it needs to know."""
    model = network(recipe.outputs or ways, filters, context=recipe.context)
    image = jnp.zeros((1, image_size, image_size, 1))
    _, features, _ = jax.eval_shape(
        lambda key: model.apply(model.init(key, image), image, taps=("features",)),
        jax.random.key(0),
    )
    width = features["features"].shape[-1]
    return Setting(model, ways, steps, rate, statistics, width)


def with_head(whole: Variables, fresh: Variables) -> Variables:
    """Pretrained features under another head."""
    return Variables(
        {**fresh.params, "features": whole.params["features"]},
        {**fresh.model_state, **whole.model_state},
    )
