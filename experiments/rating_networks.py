"""The networks of the study of ratings: without meta-learning, tuned, and MeLU."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import ratings as lib
from experiments.rating_config import Config
from jaxtransfer import losses, nets, prng
from jaxtransfer.methods import meta
from jaxtransfer.model import from_linen
from jaxtransfer.train import TrainState, init_state, scan_fit, train_step
from jaxtransfer.typing import Variables

JOINT, TUNED, MELU = "joint network", "joint network, fine-tuned", "MeLU"


class Tables(NamedTuple):
    """Fields of users and items, and identities ``[items]`` (0: unknown), or None."""

    users: jax.Array
    items: jax.Array
    identities: jax.Array | None


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
