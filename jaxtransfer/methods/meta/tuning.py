"""What the baselines that train have in common: a fresh head, and who is tuned."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import optax

from jaxtransfer import losses, prng
from jaxtransfer.methods._supervised import task_loss
from jaxtransfer.methods.meta.descent import maml
from jaxtransfer.methods.meta.embedding import (
    check_choice,
    check_ways,
    counted,
    embedding,
    flat,
    judged,
    membership,
    of_present,
    only_present,
)
from jaxtransfer.methods.meta.learner import (
    Adapted,
    Learner,
    Statistics,
    Task,
    Visit,
    check_support,
)
from jaxtransfer.ops.dtypes import number
from jaxtransfer.typing import (
    Batch,
    Frozen,
    Metrics,
    Model,
    ModelState,
    Params,
    Scalar,
    Variables,
)

Body = Literal["held", "tuned"]
"""What is trained on a task's support: the head alone, or the network with it."""


class Head(NamedTuple):
    """A classifier on features.

    Attributes:
        start: ``(key, features [rows, features], member [rows, ways]) -> params``.
        score: ``(params, features [rows, features]) -> logits [rows, ways]``.
    """

    start: Callable[[jax.Array, jax.Array, jax.Array], Params]
    score: Callable[[Params, jax.Array], jax.Array]


def uniform_kernel(
    key: jax.Array, features: jax.Array, member: jax.Array
) -> dict[str, jax.Array]:
    """A kernel drawn uniformly within one over the root of the number of features."""
    shape = (features.shape[1], member.shape[1])
    bound = features.shape[1] ** -0.5
    kernel = jax.random.uniform(key, shape, features.dtype, -bound, bound)
    return {"kernel": kernel}


def tuned(
    model: Model,
    optimizer: optax.GradientTransformation,
    head: Head,
    *,
    ways: int,
    steps: int,
    tap: str | None,
    body: Body,
    statistics: Statistics,
    entropy_weight: float | None = None,
) -> Learner:
    """A learner that trains a fresh head, and maybe the network, on the support.

    Args:
        model: the network.
        optimizer: of a task.
        head: the classifier.
        ways: classes.
        steps: steps of the optimizer, all support examples in each.
        tap: module whose output is the features; the network's output if None.
        body: what is trained.
        statistics: whose batch statistics normalise.
        entropy_weight: of the predictions' entropy on ``support["unlabelled"]``, for
            a body that is tuned; None is without.

    Returns:
        The learner; adapted parameters are ``{"network", "head", "present"}``.
    """
    check_ways(ways)
    check_choice("body", body, ("held", "tuned"))
    embed = embedding(model, tap, statistics)
    held = body == "held"

    def entropy(
        params: Params,
        frozen: Frozen,
        model_state: ModelState,
        batch: Batch,
        key: jax.Array,
    ) -> Scalar:
        network = params["network"]
        state = embed.settle(network, frozen, model_state, batch, key)
        features = embed.query(network, frozen, state, batch["unlabelled"], key)
        logits = only_present(
            head.score(params["head"], flat(features)), batch["classes"]
        )
        return losses.mean(losses.entropy(logits), where=batch.get("unlabelled_where"))

    def inside(
        params: Params,
        frozen: Frozen,
        model_state: ModelState,
        batch: Batch,
        key: jax.Array,
    ) -> tuple[Scalar, tuple[ModelState, Metrics]]:
        features = batch["inputs"]
        if not held:
            network = params["network"]
            features = flat(embed.support(network, frozen, model_state, features, key))
        logits = head.score(params["head"], features)
        total, measured = task_loss(losses.cross_entropy, logits, batch)
        if entropy_weight is not None:
            unsure = entropy(params, frozen, model_state, batch, key)
            total = total + number(entropy_weight) * unsure
        return total, (model_state, measured)

    def settle(params: Params, *arguments: Any) -> ModelState:
        return embed.settle(params["network"], *arguments)

    inner = maml(
        Task(inside, inside, statistics=None if held else settle),
        optimizer,
        steps=steps,
        # The features of a held body are given, and want their gradient.
        backward="stored" if held else "forward-over-reverse",
    )

    def adapt(
        params: Params,
        frozen: Frozen,
        model_state: ModelState,
        support: Batch,
        key: jax.Array,
        visit: Visit | None = None,
    ) -> Adapted:
        check_support(support)
        if entropy_weight is not None and "unlabelled" not in support:
            raise ValueError(
                f"support: got {sorted(support)} without 'unlabelled', the inputs "
                "whose predictions are to become sure; wrap the episodes in "
                "meta.with_unlabelled_query"
            )
        member = membership(support, ways)
        present = member.any(axis=0)
        features = embed.support(params, frozen, model_state, support["inputs"], key)
        features = counted(flat(features), support, ways)
        begun: Params = {"head": head.start(prng.stream(key, "head"), features, member)}
        batch = of_present(support, member)

        def found(fast: Params) -> dict[str, Any]:
            return {"network": params, **fast, "present": present}

        def looking(settled: ModelState | None = None) -> Visit | None:
            seen = visit
            if seen is None:
                return None
            return lambda fast, state: seen(
                found(fast), state if settled is None else settled
            )

        if not held:
            start = {**begun, "network": params}
            end = inner.adapt(start, frozen, model_state, batch, key, looking())
            return end._replace(params=found(end.params))
        settled = embed.settle(params, frozen, model_state, support, key)
        batch = {**batch, "inputs": features}
        end = inner.adapt(begun, {}, {}, batch, key, looking(settled))
        return Adapted(found(end.params), settled, end.visited)

    def judge(params, frozen, model_state, inputs, key):
        features = embed.query(params["network"], frozen, model_state, inputs, key)
        logits = head.score(params["head"], flat(features))
        return only_present(logits, params["present"])

    return Learner(_same, adapt, *judged(judge), embed.statistics)


def _same(variables: Variables) -> Variables:
    return variables


__all__ = ["Body", "Head", "tuned", "uniform_kernel"]
