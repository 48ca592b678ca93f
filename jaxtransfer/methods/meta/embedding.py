"""What learners that compare have in common: embeddings, class means, how to judge."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxtransfer import losses, tree
from jaxtransfer.losses.directions import unit
from jaxtransfer.losses.reduction import integers
from jaxtransfer.methods._supervised import Loss, task_loss
from jaxtransfer.methods.meta.learner import (
    Adapted,
    Learner,
    Statistics,
    Visit,
    batch_statistics,
    check_parts,
    check_support,
)
from jaxtransfer.ops.dtypes import common_dtype
from jaxtransfer.ops.products import product
from jaxtransfer.train.metrics import absent, cover
from jaxtransfer.typing import (
    Batch,
    Frozen,
    Inputs,
    Metrics,
    Model,
    ModelState,
    Objective,
    Params,
    Predict,
    Scalar,
    Variables,
)


class Embedding(NamedTuple):
    """A network as a map to features, under one choice of batch statistics.

    Attributes:
        support: ``(params, frozen, model_state, inputs, key) -> features [rows, ...]``.
        query: the same, for query inputs.
        settle: ``(params, frozen, model_state, support, key) -> model_state`` that
            ``query`` is to be given.
        statistics: the same of the support's own statistics, whatever the choice.
    """

    support: Callable[..., jax.Array]
    query: Callable[..., jax.Array]
    settle: Callable[..., ModelState]
    statistics: Callable[..., ModelState]


def embedding(model: Model, tap: str | None, statistics: Statistics) -> Embedding:
    """Run a network to its features as a task's support and query need it.

    Args:
        model: the network; ``frozen["params"]`` are held.
        tap: module whose output is the features; the network's output if None.
        statistics: whose batch statistics normalise. Rows that don't count go through
            the network all the same: under statistics of the batch, a network with
            batch normalisation sees them.

    Returns:
        The maps.

    Raises:
        ValueError: an unknown name of statistics; (at the call) no such tap.
    """
    check_choice("statistics", statistics, ("transductive", "support", "running"))
    taps = () if tap is None else (tap,)

    def run(
        params: Params,
        frozen: Frozen,
        model_state: ModelState,
        inputs: Inputs,
        key: jax.Array | None,
        train: bool,
    ) -> tuple[jax.Array, ModelState]:
        held = frozen.get("params", {})
        output, features, state = model.apply(
            Variables(tree.combine(params, held), model_state),
            inputs,
            train=train,
            key=key,
            taps=taps,
            held=tree.held_modules(params, held),
        )
        return (output if tap is None else features[tap]), state

    def support(params, frozen, model_state, inputs, key):
        train = statistics != "running"
        return run(params, frozen, model_state, inputs, key, train)[0]

    def query(params, frozen, model_state, inputs, key):
        train = statistics == "transductive"
        return run(params, frozen, model_state, inputs, key, train)[0]

    def passed(params, frozen, model_state, batch, key):
        inputs = batch["inputs"]
        features, state = run(params, frozen, model_state, inputs, key, True)
        return features, (state, {})

    def collected(*arguments: Any) -> ModelState:
        return batch_statistics(passed, *arguments)

    def unchanged(params, frozen, model_state, support, key):
        del params, frozen, support, key
        return model_state

    settle = collected if statistics == "support" else unchanged
    return Embedding(support, query, settle, collected)


def check_choice(name: str, value: Any, known: tuple[str, ...]) -> None:
    """Refuse a name that is none of those known.

    Raises:
        ValueError: it isn't.
    """
    if value not in known:
        *others, last = (f'"{choice}"' for choice in known)
        raise ValueError(f"{name}: got {value!r}; choose {', '.join(others)} or {last}")


def check_ways(ways: int) -> None:
    """Refuse fewer than two classes.

    Raises:
        ValueError: ``ways`` is below 2.
    """
    if ways < 2:
        raise ValueError(
            f"ways: got {ways}; it is the most classes that a task has, at least 2"
        )


def membership(support: Batch, ways: int) -> jax.Array:
    """Which row is an example of which class.

    Args:
        support: ``"labels" [rows]``; ``"where" [rows]``; ``"classes" [ways]``.
        ways: classes.

    Returns:
        ``[rows, ways]`` bool; rows and classes that don't count have no member.

    Raises:
        ValueError: labels are no integers ``[rows]`` or, outside of ``jit``, out of
            range.
    """
    labels = jnp.asarray(support["labels"])
    if labels.ndim != 1 or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            "support labels: must be the integers of classes [rows], got "
            f"{labels.dtype}{list(labels.shape)}"
        )
    outside = _outside(support, ways)
    if not isinstance(outside, Tracer) and np.any(outside):
        wrong = sorted(
            {int(label) for label in np.asarray(labels)[np.asarray(outside)]}
        )
        raise ValueError(
            f"support labels: got {wrong[:5]} with ways={ways}; number a task's "
            "classes from 0, raise ways, or mask these rows with where"
        )
    labels = integers(labels)
    member = labels[:, None] == jnp.arange(ways, dtype=labels.dtype)[None]
    if "where" in support:
        member &= cover(support["where"], member)
    if "classes" in support:
        member &= support["classes"][None]
    return member


def of_present(support: Batch, member: jax.Array) -> dict[str, Any]:
    """A support for steps: without classes that lack examples or are left out.

    Args:
        support: as for :func:`membership`.
        member: its result.

    Returns:
        The support with ``"classes"``, and ``"where"`` for the rows of those given.
    """
    batch = {**support, "classes": member.any(axis=0)}
    if "classes" in support:  # of labels out of range the loss is to be not-a-number
        outside = _outside(support, member.shape[1])
        batch["where"] = member.any(axis=1) | outside
    return batch


def _outside(support: Batch, ways: int) -> jax.Array:
    labels = integers(support["labels"])
    outside = (labels < 0) | (labels >= ways)
    where = support.get("where")
    return outside if where is None else outside & cover(where, outside)


def counted(features: jax.Array, support: Batch, ways: int) -> jax.Array:
    """Features with rows that don't count at 0; not-a-number for labels out of range.

    As of the losses, which are an error where they can be seen and not-a-number where
    they are traced.
    """
    if "where" in support:
        shape = (-1,) + (1,) * (features.ndim - 1)
        features = jnp.where(support["where"].reshape(shape), features, 0)
    return jnp.where(jnp.any(_outside(support, ways)), jnp.nan, features)


def flat(features: jax.Array) -> jax.Array:
    """``[rows, features]`` in float32 or wider."""
    wide = features.astype(common_dtype(features.dtype, jnp.float32))
    return wide.reshape(len(wide), -1)


def direction(rows: jax.Array) -> jax.Array:
    """Rows at length 1; 0 stays 0, and not-a-number is not hidden."""
    return jnp.where(jnp.isnan(rows), rows, unit(rows))


def cosines(first: jax.Array, second: jax.Array) -> jax.Array:
    """Cosines between rows, ``[n, m]``; 0 where a row is 0."""
    return product(direction(first), direction(second).T)


def class_means(features: jax.Array, member: jax.Array) -> jax.Array:
    """Means ``[ways, features]`` of the rows of each class; 0 of a class without."""
    weights = member.astype(features.dtype)
    total = product(weights.T, features)
    return total / jnp.maximum(weights.sum(axis=0), 1)[:, None]


def only_present(logits: jax.Array, present: jax.Array) -> jax.Array:
    """Logits with those of classes that the task lacks at :func:`absent`."""
    return jnp.where(present, logits, absent(logits.dtype))


def judged(
    score: Callable[..., jax.Array], loss: Loss = losses.cross_entropy
) -> tuple[Objective, Predict]:
    """Objective over the query, and prediction, of a score.

    Args:
        score: ``(params, frozen, model_state, inputs, key) -> [rows, ways]``.
        loss: of an example.

    Returns:
        :attr:`Learner.query` and :attr:`Learner.predict`.
    """

    def query(
        params: Params,
        frozen: Frozen,
        model_state: ModelState,
        batch: Batch,
        key: jax.Array,
    ) -> tuple[Scalar, tuple[ModelState, Metrics]]:
        outputs = score(params, frozen, model_state, batch["inputs"], key)
        total, measured = task_loss(loss, outputs, batch)
        return total, (model_state, measured)

    def predict(
        params: Params, frozen: Frozen, model_state: ModelState, inputs: Inputs
    ) -> jax.Array:
        return score(params, frozen, model_state, inputs, None)

    return query, predict


def at_once(found: Any, state: ModelState, visit: Visit | None) -> Adapted:
    """What a learner without steps has made of a task: looked at once."""
    if visit is None:
        return Adapted(found, state)
    looked = visit(found, state)
    return Adapted(
        found, state, jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], looked)
    )


def comparing(
    model: Model,
    *,
    ways: int,
    tap: str | None,
    statistics: Statistics,
    fit: Callable[..., Params],
    score: Callable[..., jax.Array],
    own: Params | None = None,
) -> Learner:
    """A learner that makes a classifier of the support's features in closed form.

    Args:
        model: the network.
        ways: classes.
        tap: as for :func:`embedding`.
        statistics: as for :func:`embedding`.
        fit: ``(own, frozen, features [rows, features], member [rows, ways]) ->
            classifier``.
        score: ``(classifier, frozen, features [rows, features]) -> logits [rows,
            ways]``.
        own: initial numbers that the learner learns besides, under ``"metric"``.

    Returns:
        The learner; adapted parameters are ``{"network", "classifier", "present"}``.
    """
    check_ways(ways)
    embed = embedding(model, tap, statistics)

    def init(variables: Variables) -> Variables:
        if own is None:
            return variables
        dtype = common_dtype(jnp.float32, *jax.tree.leaves(variables.params))
        metric = jax.tree.map(lambda value: jnp.asarray(value, dtype), own)
        params = {"network": variables.params, "metric": metric}
        return Variables(params, variables.model_state)

    def parts(params: Params) -> tuple[Params, Params]:
        if own is None:
            return params, {}
        check_parts(params, ("network", "metric"))
        return params["network"], params["metric"]

    def adapt(
        params: Params,
        frozen: Frozen,
        model_state: ModelState,
        support: Batch,
        key: jax.Array,
        visit: Visit | None = None,
    ) -> Adapted:
        check_support(support)
        network, metric = parts(params)
        member = membership(support, ways)
        features = embed.support(network, frozen, model_state, support["inputs"], key)
        features = counted(flat(features), support, ways)
        found = {
            "network": network,
            "classifier": fit(metric, frozen, features, member),
            "present": member.any(axis=0),
        }
        state = embed.settle(network, frozen, model_state, support, key)
        return at_once(found, state, visit)

    def judge(params, frozen, model_state, inputs, key):
        features = embed.query(params["network"], frozen, model_state, inputs, key)
        logits = score(params["classifier"], frozen, flat(features))
        return only_present(logits, params["present"])

    def of_support(params, *arguments):
        return embed.statistics(parts(params)[0], *arguments)

    return Learner(init, adapt, *judged(judge), of_support)
