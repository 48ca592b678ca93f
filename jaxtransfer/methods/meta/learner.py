"""The seam of meta-learning: a learner adapts to a task's support set.

Every algorithm is a :class:`Learner`; :func:`~jaxtransfer.methods.meta.objective` makes
of any of them the objective whose gradient is the meta-gradient.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol, get_args

import jax
import jax.numpy as jnp
from jax.tree_util import DictKey

from jaxtransfer import losses, tree
from jaxtransfer.methods._supervised import Loss, predict, supervised
from jaxtransfer.model.calls import lies_under
from jaxtransfer.typing import (
    Batch,
    Frozen,
    Model,
    ModelState,
    Objective,
    Params,
    Predict,
    Variables,
)

Statistics = Literal["transductive", "support", "running"]
"""Whose batch statistics normalise a task's images.

- ``"transductive"``: of the examples that go through together: the support by its own,
  the query by its own. As published by MAML and Reptile; a query's prediction depends
  on the other queries.
- ``"support"``: the support's, for both, of the parameters that are adapted. A query is
  judged alone. Of layers that are held, those in the model state. Layers whose output
  in training mode reads the running statistics (``nets.StochNorm``) are refused.
- ``"running"``: those in the model state, for both; see ``collect`` of
  :func:`~jaxtransfer.methods.meta.objective`.

Networks without batch normalisation are the same under all three, but for dropout,
which follows them: ``"transductive"`` drops in the support and in the query, where
``Learner.predict`` has no key and is an error, ``"support"`` in the support alone,
``"running"`` nowhere.
"""

StepStatistics = Literal["transductive", "support", "running", "per_step"]
"""Those of :data:`Statistics`, or, for learners of gradient steps:

- ``"per_step"``: running statistics of their own for every step (BNRS of MAML++): an
  array ``[steps + 1, ...]`` in the model state for each one of the network, of which
  step ``j`` is normalised by row ``j`` and the query by the last. ``collect`` fills row
  ``j`` with the support's statistics after ``j`` steps.
"""

Visit = Callable[[Any, ModelState], Any]
"""``(task parameters, model state) -> arrays``, seen before and after each step."""


class Adapted(NamedTuple):
    """What a learner has made of a task.

    Attributes:
        params: what :attr:`Learner.query` and :attr:`Learner.predict` take.
        model_state: statistics that belong to them.
        visited: what ``visit`` returned, with a leading axis ``[steps + 1]``; the first
            before any step, the last of ``params``. None without ``visit``.
    """

    params: Any
    model_state: ModelState
    visited: Any = None


class Adapt(Protocol):
    """The signature of :attr:`Learner.adapt`."""

    def __call__(
        self,
        params: Params,
        frozen: Frozen,
        model_state: ModelState,
        support: Batch,
        key: jax.Array,
        visit: Visit | None = None,
    ) -> Adapted:
        """Adapt to one task, differentiably."""
        ...


class Learner(NamedTuple):
    """A way to learn a task from a few examples, as pure functions.

    Attributes:
        init: the meta-parameters, of the network's variables: the same, or with what
            the learner learns besides (rates, an extra network).
        adapt: ``(params, frozen, model_state, support, key, visit=None) -> Adapted``.
        query: objective over the query examples: ``(Adapted.params, frozen,
            Adapted.model_state, query, key) -> (loss, (model_state, metrics))``.
        predict: ``(Adapted.params, frozen, Adapted.model_state, inputs) -> outputs``.
        statistics: ``(params, frozen, model_state, support, key) -> model_state`` of
            the support examples under the meta-parameters, to be collected; None if
            there are none.
        gradient_at_end_only: whether :attr:`Adapted.visited` has no gradient;
            :attr:`Adapted.params` have theirs all the same.
    """

    init: Callable[[Variables], Variables]
    adapt: Adapt
    query: Objective
    predict: Predict | None = None
    statistics: Callable[..., ModelState] | None = None
    gradient_at_end_only: bool = False


class Task(NamedTuple):
    """What is to be learned: the loss inside and the loss outside; see :func:`task`.

    Attributes:
        support: objective on the support examples.
        query: objective on the query examples.
        predict: outputs of adapted parameters.
        statistics: ``(params, frozen, model_state, support, key) -> model_state`` that
            a query is normalised by; None leaves the state as it is.
        collected: the same signature: statistics of the support examples to be
            collected; see ``collect`` of
            :func:`~jaxtransfer.methods.meta.objective`. None if there are none.
        per_step: whether the model state has a row for every step; see
            :data:`StepStatistics`.
    """

    support: Objective
    query: Objective
    predict: Predict | None = None
    statistics: Callable[..., ModelState] | None = None
    collected: Callable[..., ModelState] | None = None
    per_step: bool = False


def batch_statistics(
    task: Objective,
    params: Params,
    frozen: Frozen,
    model_state: ModelState,
    support: Batch,
    key: jax.Array,
) -> ModelState:
    """Statistics of the support examples alone, whatever the layers' momentum.

    A layer keeps ``m * old + (1 - m) * batch``, and its output in training mode does
    not read ``old``; so two passes that differ in ``old`` alone (of which a compiled
    program runs one) give ``m`` and the batch's statistics. What a pass does not change
    stays as it is, and so do the statistics of held layers, which are normalised by
    them, and state that is no mean, variance or size of a batch, such as that of
    spectral normalisation.

    Raises:
        ValueError: the output reads statistics that the layer writes, as that of
            ``nets.StochNorm`` does: other layers would be given the statistics of
            another input. A layer that is fixed, and writes none, may.
    """

    def passed(old: ModelState) -> tuple[Any, ModelState]:
        output, (after, _) = task(params, frozen, old, support, key)
        # Flax gives statistics of float64 inputs back as float64.
        return output, jax.tree.map(
            lambda x, o, m: x.astype(o.dtype) if m else x, after, old, moved
        )

    moved = _moved(params, frozen, model_state)
    if not any(jax.tree.leaves(moved)):
        return model_state
    try:
        return _solved(passed, model_state, moved)
    except _Read as error:
        # Layers that are fixed read the running statistics, too, but write none.
        written = _written(passed, model_state)
        fewer = jax.tree.map(lambda m, w: m and w, moved, written)
        if fewer == moved:
            raise ValueError(_CANNOT_BE_TOLD) from error
    try:
        return _solved(passed, model_state, fewer)
    except _Read as error:
        raise ValueError(_CANNOT_BE_TOLD) from error


_CANNOT_BE_TOLD = (
    "statistics: those of the support are asked for, and in training mode the "
    "network's output reads running ones that it writes, as that of nets.StochNorm "
    'does, so that they can\'t be told apart; choose statistics="transductive" or '
    '"running" and leave collect out, or set probability=1 in StochNorm'
)


class _Read(Exception):
    """The output of a pass depends on the statistics that it was given."""


def _solved(
    passed: Callable[[ModelState], tuple[Any, ModelState]],
    model_state: ModelState,
    moved: Any,
) -> ModelState:
    """The batch's statistics, of two passes that differ in the running ones."""

    def solve(
        of_zero: jax.Array,
        of_old: jax.Array,
        old: jax.Array,
        before: jax.Array,
        moved: bool,
    ) -> jax.Array:
        if not moved:
            return before
        kept = jax.lax.stop_gradient((of_old - of_zero) / old)
        return jnp.where(kept < 1, of_zero / jnp.where(kept < 1, 1 - kept, 1), before)

    _, of_zero = passed(
        jax.tree.map(lambda x, m: jnp.zeros_like(x) if m else x, model_state, moved)
    )
    # As large as the statistics are, so that the difference keeps its digits.
    old = jax.tree.map(
        lambda x, before, m: 1 + jnp.abs(jax.lax.stop_gradient(x)) if m else before,
        of_zero,
        model_state,
        moved,
    )
    of_old = _without_reading(passed, old, moved)
    return jax.tree.map(solve, of_zero, of_old, old, model_state, moved)


def _without_reading(
    passed: Callable[[ModelState], tuple[Any, ModelState]], old: ModelState, moved: Any
) -> ModelState:
    """The state after a pass whose output must not depend on the statistics of old.

    They get an axis of length 1, which the output has then, too, if it reads them.
    """
    axes = jax.tree.map(lambda m: 0 if m else None, moved)
    lifted = jax.tree.map(lambda x, m: x[None] if m else x, old, moved)
    try:
        _, after = jax.vmap(passed, in_axes=(axes,), out_axes=(None, 0))(lifted)
    except ValueError as error:
        if "out_axes" not in str(error):
            raise
        raise _Read from error
    return jax.tree.map(lambda x: x[0], after)


def _written(
    passed: Callable[[ModelState], tuple[Any, ModelState]], model_state: ModelState
) -> Any:
    """Which leaves of the state a pass gives back as others, by its trace."""
    leaves, structure = jax.tree.flatten(model_state)

    def after(*leaves: Any) -> list[Any]:
        return jax.tree.leaves(passed(jax.tree.unflatten(structure, leaves))[1])

    trace = jax.make_jaxpr(after)(*leaves).jaxpr
    return jax.tree.unflatten(
        structure,
        [
            one is not other
            for one, other in zip(trace.invars, trace.outvars, strict=True)
        ],
    )


def _moved(params: Params, frozen: Frozen, model_state: ModelState) -> Any:
    """Which leaves of the state are statistics of layers that are not held."""
    held = tree.held_modules(params, frozen.get("params", {}))
    network = whole(params, frozen)

    def one(path: tuple[Any, ...], leaf: jax.Array) -> bool:
        names = [part.key for part in path if isinstance(part, DictKey)]
        module: list[str] = []
        node: Any = network
        while names and isinstance(node := node.get(names[0]), Mapping):
            module.append(names.pop(0))  # a part with collections of its own
        place = "/".join(module + names[1:])
        # The size of a batch is a statistic of nets.TaskNorm.
        is_statistic = bool(names) and re.search("mean|var|^size$", names[-1])
        real = jnp.issubdtype(leaf.dtype, jnp.inexact)
        return bool(real and is_statistic and not lies_under(place, held))

    return jax.tree_util.tree_map_with_path(one, model_state)


def task(
    model: Model,
    *,
    loss: Loss = losses.cross_entropy,
    query_loss: Loss | None = None,
    statistics: StepStatistics = "support",
) -> Task:
    r"""A supervised task of a network: classification, or regression.

    Args:
        model: the network.
        loss: ``(outputs [rows, ...], labels [rows, ...]) -> [rows]``, inside and
            outside.
        query_loss: the loss outside, if it is another.
        statistics: whose batch statistics normalise; see :data:`StepStatistics`.

    Returns:
        Objectives over ``{"inputs" [rows, ...], "labels" [rows, ...]}``, with ``"where"
        [rows]`` for rows that count and ``"classes" [ways]`` for classes that there
        are, so that tasks of different size share one compiled program. Rows that
        don't count still enter the statistics of a batch; ``"running"`` and
        ``"per_step"`` take none of it.

    Raises:
        ValueError: an unknown name of statistics.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, optax
        >>> from jaxtransfer.methods import meta
        >>> from jaxtransfer.model import from_linen
        >>> net = from_linen(nn.Dense(3))
        >>> start = net.init(jax.random.key(0), jnp.ones((1, 2)))
        >>> support = {"inputs": jnp.eye(2), "labels": jnp.array([0, 2])}
        >>> learner = meta.maml(task(net), optax.sgd(1.0), steps=5)
        >>> adapted = learner.adapt(*start[:1], {}, {}, support, jax.random.key(1))
        >>> learner.predict(adapted.params, {}, {}, jnp.eye(2)).argmax(-1).tolist()
        [0, 2]
    """
    if statistics not in get_args(StepStatistics):
        raise ValueError(
            f"statistics: got {statistics!r}; choose one of {get_args(StepStatistics)}"
        )
    train = statistics in ("transductive", "support")
    own = statistics == "transductive"
    outside = loss if query_loss is None else query_loss
    in_training = supervised(model, loss, train=True)

    def of_batch(*arguments: Any) -> ModelState:
        return batch_statistics(in_training, *arguments)

    return Task(
        supervised(model, loss, train=train),
        supervised(model, outside, train=own),
        predict(model, train=own),
        of_batch if statistics == "support" else None,
        of_batch,
        statistics == "per_step",
    )


def check_support(support: Batch) -> None:
    """Refuse a task without examples.

    Raises:
        ValueError: no arrays, or arrays of no rows.
    """
    examples = {name: leaf for name, leaf in support.items() if name != "classes"}
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(examples)]
    if not shapes or 0 in {shape[0] for shape in shapes if shape}:
        raise ValueError("support: no examples to adapt on")


def check_parts(params: Params, names: tuple[str, ...]) -> None:
    """Refuse meta-parameters that are not those of a learner with its own.

    Raises:
        ValueError: a part is missing.
    """
    if not set(names) <= set(params):
        raise ValueError(
            f"params: got {sorted(params)} where the learner needs {list(names)}; "
            "begin with learner.init(variables)"
        )


def whole(params: Params, frozen: Frozen) -> dict[str, Any]:
    """All parameters of a network, learned and held."""
    return tree.combine(params, frozen.get("params", {}))


__all__ = [
    "Adapt",
    "Adapted",
    "Learner",
    "Statistics",
    "StepStatistics",
    "Task",
    "Visit",
    "task",
]
