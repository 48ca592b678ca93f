"""Cold-start recommendation: users are tasks, a few ratings are the support.

Learned (MeLU): embeddings of the fields of users and films, common to all, and the
start of the decision layers, which a few gradient steps on a user's ratings adapt.
Baselines: the item's mean, biases of user and item, matrix factorisation (new users
get theirs by ridge regression on their support), and the same network trained on all
ratings at once, as it is and with the decision layers fine-tuned on a user's support.

Four scenarios: existing and new users, existing and new items. New items are those
released last; nobody's rating of one is in any support. Users have 13 to 100 ratings of
existing items, in random order: the last 10 are the query, the others the support. The
query of new items is 10 random ones, for users who have as many; the support is the
same. A fifth of the users is for validation, the same in every seed, and chooses all
settings by the error on existing items; the seed splits the others 80/20 into existing
and new users. Only the support of existing users trains, also the baselines.

Deviations from MeLU: there the support for new items is of new items; the queries of
existing users are held out here. Its films have directors, actors and a classification,
which this data set lacks: here they have genres and the year of release and, as a
variant, an identity (an embedding of the film itself, which new films don't have;
hidden at random in training). A user's area is the first digit of the zip code.

References:
    Lee et al., MeLU: Meta-learned user preference estimator for cold-start
    recommendation, KDD 2019.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import Progress

from experiments import ratings as lib
from experiments.common import Row, StudyConfig, command_line, progress, show, start_run
from experiments.rating_baselines import linear_baselines
from jaxtransfer import losses, nets, prng
from jaxtransfer.methods import meta
from jaxtransfer.model import from_linen
from jaxtransfer.train import TrainState, init_state, scan_fit, train_step
from jaxtransfer.typing import Variables

JOINT, TUNED, MELU = "joint network", "joint network, fine-tuned", "MeLU"
KINDS = ("existing items", "new items")


@dataclasses.dataclass(frozen=True)
class Config(StudyConfig):
    """Options of the study."""

    dataset: Literal["movielens_100k", "synthetic"] = "movielens_100k"
    """Ratings; the made-up ones are for trying out."""
    protocol: lib.Protocol = lib.Protocol()
    """What is new, and who counts."""
    identities: tuple[bool, ...] = (False, True)
    """Networks to run: without and with an embedding of the item itself."""
    hidden: float = 0.2
    """Part of the identities that is hidden in training."""
    embedding: int = 16
    """Width of an embedding."""
    widths: tuple[int, ...] = (64, 64)
    """Hidden decision layers."""
    weight_decay: float = 1.0
    """Of AdamW, times its learning rate, in all networks."""
    block: int = 100
    """Updates between two looks at the validation users; divides the numbers below."""
    tasks: int = 16
    """Users of a meta-step."""
    support: int = 40
    """Most support ratings of a user in meta-training."""
    updates: int = 300
    """Meta-steps."""
    learning_rates: tuple[float, ...] = (3e-3,)
    """Of AdamW on the meta-parameters, to choose from."""
    inner_rates: tuple[float, ...] = (0.05, 0.1)
    """Of the inner SGD, in meta-training and at test, to choose from."""
    inner_steps: int = 3
    """Gradient steps of a user in meta-training."""
    first_order: bool = False
    """Take the inner gradients as constants."""
    joint_updates: int = 400
    """Updates of the network without meta-learning."""
    joint_batch: int = 256
    """Ratings of its updates."""
    joint_learning_rates: tuple[float, ...] = (3e-3,)
    """Of its AdamW, to choose from."""
    tuning_rates: tuple[float, ...] = (0.03, 0.1)
    """Of its fine-tuning by SGD on a user's support, to choose from."""
    steps: int = 10
    """Most gradient steps at test; how many is chosen, for all networks."""
    bias_penalties: tuple[float, ...] = (1.0, 3.0, 10.0)
    """Of the biases, to choose from for users and for items."""
    factor_penalties: tuple[float, ...] = (2.0, 5.0, 10.0, 20.0)
    """Of the factors, to choose from."""
    ranks: tuple[int, ...] = (2, 8)
    """Factors, to choose from."""
    sweeps: int = 15
    """Turns of the alternating ridge regressions."""


PRESETS = {
    "smoke": Config(
        dataset="synthetic",
        protocol=lib.Protocol(most=60, queries=5),
        identities=(True,),
        embedding=4,
        widths=(8, 8),
        block=2,
        tasks=4,
        support=10,
        updates=4,
        inner_rates=(0.05,),
        inner_steps=1,
        joint_updates=4,
        joint_batch=16,
        joint_learning_rates=(3e-3,),
        tuning_rates=(0.01, 0.03),
        steps=2,
        bias_penalties=(3.0,),
        factor_penalties=(5.0,),
        ranks=(2,),
        sweeps=3,
        seeds=2,
    ),
    "cpu": Config(),
    "paper": Config(
        embedding=32,
        tasks=32,
        support=90,
        updates=2000,
        learning_rates=(3e-4, 1e-3, 3e-3),
        inner_rates=(0.01, 0.02, 0.05, 0.1),
        inner_steps=5,
        joint_updates=3000,
        joint_learning_rates=(3e-4, 1e-3, 3e-3),
        ranks=(2, 4, 8, 16),
        seeds=10,
    ),
}


class Tables(NamedTuple):
    """Fields of users and items, and identities ``[items]`` (0: unknown), or None."""

    users: jax.Array
    items: jax.Array
    identities: jax.Array | None


def read(config: Config) -> lib.Ratings:
    """The data set."""
    if config.dataset == "synthetic":
        return lib.synthetic(config.seed)
    return lib.movielens_100k(config.data_dir)


def tables_of(config: Config, ratings: lib.Ratings, identity: bool) -> Tables:
    """What a network may know of users and items."""
    known = ratings.years < config.protocol.new_from
    numbers = np.where(known, np.arange(len(known)) + 1, 0)
    return Tables(
        jnp.asarray(ratings.users),
        jnp.asarray(ratings.items),
        jnp.asarray(numbers) if identity else None,
    )


def describe(
    tables: Tables, users: jax.Array, items: jax.Array, hidden: Any = False
) -> jax.Array:
    """Inputs ``[..., rows, columns]`` of users ``[...]`` and items ``[..., rows]``."""
    own = tables.users[users][..., None, :]
    fields = tables.items[items]
    parts = [jnp.broadcast_to(own, (*items.shape, own.shape[-1])), fields[..., :1]]
    if tables.identities is not None:
        parts.append(jnp.where(hidden, 0, tables.identities[items])[..., None])
    return jnp.concatenate([*parts, fields[..., 1:]], axis=-1)


def draw_tasks(
    config: Config, key: jax.Array, tables: Tables, split: lib.Split, mean: jax.Array
) -> Any:
    """Episodes of training users, each with a support and a query of its own ratings.

    The query is at most half of a user's ratings.
    """
    user_key, order_key, hide_key = prng.streams(key, "users", "order", "hidden")
    users = jax.random.choice(user_key, split.train, (config.tasks,), replace=False)
    where = split.where[users]
    score = jnp.where(where, jax.random.uniform(order_key, where.shape), 2.0)
    order = jnp.argsort(score, axis=-1)[:, : config.protocol.queries + config.support]
    items, labels = (
        jnp.take_along_axis(part[users], order, axis=-1)
        for part in (split.items, split.ratings - mean)
    )
    hidden = jax.random.bernoulli(hide_key, config.hidden, items.shape)
    inputs = describe(tables, split.users[users], items, hidden)
    count = where.sum(-1, keepdims=True)
    asked = jnp.minimum(config.protocol.queries, count // 2)
    place = jnp.arange(order.shape[1])

    def part(where: jax.Array, rows: int) -> Any:
        return {
            "inputs": inputs[:, :rows],
            "labels": labels[:, :rows, None],
            "where": where[:, :rows],
        }

    return {
        "support": part((place >= asked) & (place < count), len(place)),
        "query": part(place < asked, config.protocol.queries),
    }


class Programs(NamedTuple):
    """What is compiled once for a network.

    Attributes:
        start: ``key -> state``.
        joint, meta: ``(state, tables, split, learning rate, inner rate) -> state``: a
            block of updates without and with meta-learning.
        follow: ``(params, tables, split, users, rate) -> predictions [users, steps + 1,
            2, queries]`` before and after each step on the support.
    """

    start: Callable[..., TrainState]
    joint: Callable[..., TrainState]
    meta: Callable[..., TrainState]
    follow: Callable[..., jax.Array]


def programs(config: Config, tables: Tables) -> Programs:
    """Make the functions of a network."""
    fields, genres = lib.FIELDS, lib.GENRES
    if tables.identities is not None:
        fields = (*fields, len(tables.identities) + 1)
    network = nets.UserPreference(fields, genres, config.embedding, config.widths)
    model = from_linen(network)
    task = meta.task(model, loss=losses.mean_squared_error)

    def learner(rate: Any, steps: int, **options: Any) -> meta.Learner:
        return meta.maml(
            task, optax.sgd(rate), steps=steps, rules="decision", **options
        )

    def adamw(rate: Any, updates: int) -> optax.GradientTransformation:
        falling = optax.cosine_decay_schedule(1.0, updates)
        return optax.adamw(
            lambda step: rate * falling(step), weight_decay=config.weight_decay
        )

    @jax.jit
    def start(key: jax.Array) -> TrainState:
        init_key, run_key = prng.streams(key, "init", "run")
        row = jnp.zeros((1, len(fields) + genres), jnp.int32)
        return init_state(run_key, model.init(init_key, row), adamw(1.0, 1))

    @jax.jit
    def meta_block(state, tables, split, rate, inner_rate) -> TrainState:
        mean = lib.training_mean(split)
        # The network is small: keeping what a step needs is quicker than redoing it.
        inner = learner(
            inner_rate,
            config.inner_steps,
            first_order=config.first_order,
            backward="stored",
        )
        step = train_step(
            meta.objective(inner, chunk=None), adamw(rate, config.updates)
        )

        def sample(key: jax.Array, number: jax.Array | int) -> Any:
            key = jax.random.fold_in(key, number)
            return draw_tasks(config, key, tables, split, mean)

        return scan_fit(step, state, sample, steps=config.block)[0]

    @jax.jit
    def joint_block(state, tables, split, rate, _) -> TrainState:
        mean = lib.training_mean(split)
        step = train_step(task.query, adamw(rate, config.joint_updates))
        where = split.where[split.train]
        places = jnp.nonzero(where.ravel(), size=where.size)[0]

        def sample(key: jax.Array, number: jax.Array | int) -> Any:
            row_key, hide_key = prng.streams(
                jax.random.fold_in(key, number), "rows", "hidden"
            )
            shape = (config.joint_batch,)
            drawn = places[jax.random.randint(row_key, shape, 0, where.sum())]
            rows, columns = split.train[drawn // where.shape[1]], drawn % where.shape[1]
            hidden = jax.random.bernoulli(hide_key, config.hidden, (*shape, 1))
            items = split.items[rows, columns, None]
            inputs = describe(tables, split.users[rows], items, hidden)[:, 0]
            labels = split.ratings[rows, columns, None] - mean
            return {"inputs": inputs, "labels": labels}

        return scan_fit(step, state, sample, steps=config.block)[0]

    @jax.jit
    def follow(params, tables, split, users, rate) -> jax.Array:
        mean = lib.training_mean(split)
        tuned = learner(rate, config.steps)

        def one(row: jax.Array) -> jax.Array:
            user = split.users[row]
            support = {
                "inputs": describe(tables, user, split.items[row]),
                "labels": split.ratings[row][:, None] - mean,
                "where": split.where[row],
            }
            asked = split.asked[:, row]
            inputs = describe(tables, user, asked.ravel())

            def answer(params: Any, state: Any) -> jax.Array:
                answers = model.apply(Variables(params, state), inputs)[0]
                return answers.reshape(asked.shape)

            key = jax.random.key(0)  # Nothing in the network is random.
            found = tuned.adapt(params, {}, {}, support, key, visit=answer)
            return mean + found.visited

        return jax.lax.map(one, users, batch_size=min(16, len(users)))

    return Programs(start, joint_block, meta_block, follow)


def networks(
    config: Config,
    compiled: Programs,
    tables: Tables,
    split: lib.Split,
    key: jax.Array,
    tick: Callable[[], None],
) -> dict[str, lib.Chosen]:
    """The network without and with meta-learning, at its best on validation users."""

    def everyone(params: Any, rate: float, steps: int) -> np.ndarray:
        """Predictions for all users, in groups of one size, that of the validation."""
        size, count = len(split.validation), len(split.users)
        groups = []
        for at in range(0, count, size):
            users = jnp.minimum(jnp.arange(at, at + size), count - 1)
            followed = compiled.follow(params, tables, split, users, rate)
            groups.append(np.asarray(followed[:, steps]))
        return np.concatenate(groups)[:count].swapaxes(0, 1)

    found: dict[str, list[lib.Choice]] = {JOINT: [], TUNED: [], MELU: []}

    def look(name: str, state: TrainState, rate: float, settings: Any) -> None:
        followed = compiled.follow(state.params, tables, split, split.validation, rate)
        errors = np.asarray(lib.validation_errors(split, followed[:, :, 0]))
        for steps in [0] if name == JOINT else range(1, len(errors)):
            chosen = {**settings, "updates": int(state.step)}
            if steps:
                chosen |= {"inner rate": rate, "steps": steps}
            predict = functools.partial(everyone, state.params, rate, steps)
            found[name].append(lib.Choice(errors[steps], chosen, predict))

    for rate in config.joint_learning_rates:
        state = compiled.start(key)
        for _ in range(config.joint_updates // config.block):
            state = compiled.joint(state, tables, split, rate, 0.0)
            settings = {"learning rate": rate}
            look(JOINT, state, 0.0, settings)
            for tuning in config.tuning_rates:
                look(TUNED, state, tuning, settings)
            tick()
    for rate in config.learning_rates:
        for inner in config.inner_rates:
            state = compiled.start(key)
            for _ in range(config.updates // config.block):
                state = compiled.meta(state, tables, split, rate, inner)
                look(MELU, state, inner, {"learning rate": rate})
                tick()
    return {name: lib.choose(choices) for name, choices in found.items()}


def main(config: Config) -> dict[str, Any]:
    """Run the study.

    Returns:
        ``{measure: {scenario: {method: values by seed}}}``.

    Raises:
        ValueError: ``block`` does not divide the updates; too few users are left.
        FileNotFoundError: the data set is not prepared; the message says how to.
    """
    for name in ("updates", "joint_updates"):
        if getattr(config, name) % config.block:
            raise ValueError(
                f"{name}: {getattr(config, name)} must be a multiple of block, "
                f"{config.block}"
            )
    ratings = read(config)
    folder = start_run("recommend_movielens", config)
    started = time.perf_counter()
    root = jax.random.key(config.seed)
    keys = [prng.stream(root, f"seed {seed}") for seed in range(config.seeds)]
    fixed = prng.stream(root, "validation")
    splits = [lib.split(ratings, config.protocol, fixed=fixed, key=key) for key in keys]
    print(_about(splits))
    found: list[dict[str, Any]] = [
        linear_baselines(
            split,
            len(ratings.items),
            prng.stream(key, "factors"),
            bias_penalties=config.bias_penalties,
            factor_penalties=config.factor_penalties,
            ranks=config.ranks,
            sweeps=config.sweeps,
        )
        for split, key in zip(splits, keys, strict=True)
    ]
    with progress() as display:
        for identity in config.identities:
            tables = tables_of(config, ratings, identity)
            compiled = programs(config, tables)
            suffix = " + identity" if identity else ""
            for seed, (split, key) in enumerate(zip(splits, keys, strict=True)):
                tick = _ticker(config, display, f"seed {seed}{suffix}")
                several = networks(config, compiled, tables, split, key, tick)
                found[seed] |= {f"{name}{suffix}": of for name, of in several.items()}
    return _report(splits, found, folder, started)


def _ticker(config: Config, display: Progress, name: str) -> Callable[[], None]:
    runs = len(config.learning_rates) * len(config.inner_rates) * config.updates
    runs += len(config.joint_learning_rates) * config.joint_updates
    line = display.add_task(name, total=runs // config.block)
    return lambda: display.advance(line)


def _about(splits: list[lib.Split]) -> str:
    split = splits[0]
    sizes = ", ".join(
        f"{len(getattr(split, name))} {word}"
        for name, word in (
            ("train", "existing users"),
            ("new", "new users"),
            ("validation", "validation users"),
        )
    )
    rows = np.asarray(split.where.sum(-1))
    with_new = [int(split.complete[1, split.new].sum()) for split in splits]
    return (
        f"{sizes}; support of {rows.min()} to {rows.max()} ratings, {rows.mean():.1f} "
        f"in the mean; new users with a query of new items, by seed: {with_new}"
    )


def _mean_over_users(
    split: lib.Split, chosen: lib.Chosen, kind: int, part: str
) -> list[float]:
    """The measures, averaged over the users of a part who have a query of the kind."""
    of_users = np.asarray(lib.measure(chosen.predictions, split.answers))[kind]
    rows = np.asarray(getattr(split, part))
    complete = np.asarray(split.complete)[kind, rows]
    return of_users[rows[complete]].mean(0).tolist()


def _report(
    splits: list[lib.Split], found: list[dict[str, Any]], folder: Any, started: float
) -> dict[str, Any]:
    table: dict[str, Any] = {name: {} for name in lib.MEASURES}
    for who, part in (("existing users", "train"), ("new users", "new")):
        for kind, what in enumerate(KINDS):
            scenario = f"{who}, {what}"
            for method in found[0]:
                values = [
                    _mean_over_users(split, methods[method], kind, part)
                    for split, methods in zip(splits, found, strict=True)
                ]
                for name, of_seeds in zip(
                    lib.MEASURES, zip(*values, strict=True), strict=True
                ):
                    table[name].setdefault(scenario, {})[method] = list(of_seeds)
    for name, scenarios in table.items():
        rows = []
        for scenario, methods in scenarios.items():
            others = [method for method in methods if not method.startswith(MELU)]
            sign = 1 if name == "MAE" else -1
            strongest = min(others, key=lambda method: sign * np.mean(methods[method]))
            rows += [
                Row(scenario, method, of, None if method in others else strongest)
                for method, of in methods.items()
            ]
        (folder / name).mkdir()
        better = "lower" if name == "MAE" else "higher"
        title = f"{name} of a user's query ({better} is better)"
        show(title, rows, folder / name, unit=name, digits=3, started=started)
    print("Chosen on validation users, by seed:")
    for method in found[0]:
        print(f"  {method}: {[methods[method].settings for methods in found]}")
    return table


if __name__ == "__main__":
    command_line(main, PRESETS)
