"""The outer level: losses of many tasks after adaptation, and what is learned of them.

:func:`objective` is the meta-learning objective of any learner; :func:`reptile` is the
one that needs no query.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer import prng
from jaxtransfer.methods._counting import count_of, without_count
from jaxtransfer.methods.meta.chunks import Chunk, mean_over_tasks
from jaxtransfer.methods.meta.learner import Learner
from jaxtransfer.ops.dtypes import common_dtype, number
from jaxtransfer.train import metrics as metrics_lib
from jaxtransfer.typing import (
    Batch,
    Frozen,
    Mean,
    Metrics,
    ModelState,
    Objective,
    Params,
    Scalar,
)


def multi_step_weights(steps: int, updates: int) -> Callable[[jax.Array], jax.Array]:
    r"""Weights of the losses after each step that move to the last (MSL of MAML++).

    .. math:: w_i = \max\left(\frac{1-u/U}{K}, \frac{0.03}{K}\right)
              \quad (i < K), \qquad w_K = 1 - \sum_{i<K} w_i

    after :math:`u < U` updates, from then on the last step's loss alone.

    Args:
        steps: :math:`K \ge 1`.
        updates: :math:`U \ge 1`.

    Returns:
        ``(updates so far) -> weights [steps + 1]``, that of the start 0, with sum 1.

    Raises:
        ValueError: ``steps`` or ``updates`` is below 1.

    Example:
        >>> weights = multi_step_weights(2, 10)
        >>> [[round(float(w), 3) for w in weights(count)] for count in (0, 9, 10)]
        [[0.0, 0.5, 0.5], [0.0, 0.05, 0.95], [0.0, 0.0, 1.0]]

    References:
        Antoniou, Edwards, Storkey, *How to train your MAML*, ICLR 2019, section 4; the
        speed, the floor and the end are those of its released code, which counts in
        epochs.
    """
    for name, count in (("steps", steps), ("updates", updates)):
        if count < 1:
            raise ValueError(f"{name}: got {count}; it must be 1 or more")

    def weights(count: Any) -> jax.Array:
        progress = jnp.asarray(count) / updates
        early = jnp.maximum((1 - progress) / steps, 0.03 / steps)
        early = jnp.where(progress < 1, early, 0.0)
        last = 1 - (steps - 1) * early
        return jnp.concatenate([jnp.zeros(1), jnp.full(steps - 1, early), last[None]])

    return weights


def objective(
    learner: Learner,
    *,
    chunk: Chunk = "auto",
    step_weights: Callable[[jax.Array], jax.Array] | None = None,
    collect: float | None = None,
) -> Objective:
    r"""Query loss after adaptation on the support, averaged over tasks.

    .. math:: L(\theta) = \frac1T \sum_t L_{Q_t}(\mathrm{adapt}(\theta; S_t))

    Tasks run side by side (``vmap``) within a chunk; chunks run one after the other
    with the gradient summed as they go, so that memory is flat in the number of tasks.

    Args:
        learner: any, e.g. from :func:`~jaxtransfer.methods.meta.maml`.
        chunk: tasks that run side by side; must divide the number of tasks. Under
            ``jit`` over a mesh the tasks of a chunk are divided among devices, so a
            number should be a multiple of theirs, as ``"auto"`` is.
        step_weights: ``(updates so far) -> weights [steps + 1]`` of the query losses
            before and after each step, e.g. :func:`multi_step_weights`; the last alone
            if None. Needs :func:`~jaxtransfer.methods.meta.counted` variables, and a
            learner with a gradient at every step.
        collect: momentum, 0 ... 1, of running batch statistics of the support examples,
            for ``statistics="running"`` (under the meta-parameters) and ``"per_step"``
            (after each step): the share of the old ones that is kept. Left as they are
            if None.

    Returns:
        Objective over ``{"support": ..., "query": ...}`` with a leading axis of tasks.
        Metrics are the query's after adaptation.

    Raises:
        ValueError: ``collect`` is not in 0 ... 1, or the learner has no statistics to
            collect; ``step_weights`` for implicit MAML; (at the first call) no tasks;
            ``chunk`` does not divide them; weights without a count, or not one for each
            step and the start.

    References:
        Finn, Abbeel, Levine, *Model-agnostic meta-learning*, ICML 2017, algorithm 2.
    """
    if collect is not None and not 0 <= collect <= 1:
        raise ValueError(f"collect: got {collect}; it must lie in 0 ... 1")
    of_support = None if collect is None else learner.statistics
    if collect is not None and of_support is None:
        raise ValueError(
            f"collect: got {collect}, but the learner has no statistics to collect; "
            "make its task with meta.task, or leave collect out"
        )
    if step_weights is not None and learner.gradient_at_end_only:
        raise ValueError(
            "step_weights: implicit MAML has a gradient at its end only; leave "
            "step_weights out"
        )

    def one(params, frozen, given, key_and_task):
        model_state, weights = given
        key, episode = key_and_task
        of_query = prng.stream(key, "query")  # not the dropout of a single step

        def judge(adapted: Any, state: ModelState) -> tuple[Scalar, dict[str, Mean]]:
            loss, (_, measured) = learner.query(
                adapted, frozen, state, episode["query"], of_query
            )
            return loss, metrics_lib.promote(measured)

        found = learner.adapt(
            params,
            frozen,
            model_state,
            episode["support"],
            key,
            **({} if weights is None else {"visit": judge}),
        )
        if weights is None:
            loss, measured = judge(found.params, found.model_state)
        else:
            losses, measured = found.visited
            if weights.shape != losses.shape:
                raise ValueError(
                    f"step_weights: got weights {weights.shape} for {losses.shape} "
                    "losses, of the start and after each step"
                )
            loss = jnp.vdot(weights.astype(losses.dtype), losses)
            measured = jax.tree.map(lambda leaf: leaf[-1], measured)
        state = {}
        if of_support is not None:
            state = jax.lax.stop_gradient(
                of_support(params, frozen, model_state, episode["support"], key)
            )
        return loss, (measured, state)

    mean = mean_over_tasks(one, chunk)

    def value(
        params: Params,
        frozen: Frozen,
        model_state: ModelState,
        batch: Batch,
        key: jax.Array,
    ) -> tuple[Scalar, tuple[ModelState, Metrics]]:
        network_state = without_count(model_state)
        weights = None
        if step_weights is not None:
            weights = step_weights(count_of(model_state, "step_weights"))
        loss, (measured, states) = mean(
            params, frozen, (network_state, weights), batch, key
        )
        if collect is not None:
            network_state = _toward(network_state, states, number(collect))
        measured = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), measured)
        return loss, (_next(model_state, network_state), measured)

    return value


def _toward(state: ModelState, states: ModelState, kept: float) -> ModelState:
    """Running mean of the tasks' statistics; what is not a real number stays."""

    def move(old: jax.Array, new: jax.Array) -> jax.Array:
        if not jnp.issubdtype(new.dtype, jnp.inexact):
            return old
        return kept * old + (1 - kept) * jnp.mean(new, axis=0)

    return jax.tree.map(move, state, states)


def _next(model_state: ModelState, network_state: ModelState) -> ModelState:
    if "updates" not in model_state:
        return network_state
    return {**network_state, "updates": model_state["updates"] + 1}


def reptile(learner: Learner, *, chunk: Chunk = "auto") -> Objective:
    r"""Reptile: move the start towards where the tasks end.

    .. math:: \nabla := \frac1T \sum_t (\theta - \theta_K^{(t)})

    as the gradient of :math:`\frac12\|\theta - \theta_K\|^2` with the end held
    constant, so an outer ``optax.sgd(epsilon)`` is the published update, and any other
    optimizer may take its place. There is no query; the loss reported is the mean of
    that distance, and the metrics are those of the query objective on the support.

    Args:
        learner: from :func:`~jaxtransfer.methods.meta.maml` with ``first_order=True``,
            whose adapted parameters are of the shape of the meta-parameters.
        chunk: as for :func:`objective`.

    Returns:
        Objective over ``{"support": ...}`` with a leading axis of tasks.

    Raises:
        ValueError: (at the first call) the learner's adapted parameters are not of the
            shape of the meta-parameters.

    References:
        Nichol, Achiam, Schulman, *On first-order meta-learning algorithms*, 2018,
        algorithm 2.
    """

    def one(params, frozen, model_state, key_and_task):
        key, episode = key_and_task
        found = jax.lax.stop_gradient(
            learner.adapt(params, frozen, model_state, episode["support"], key)
        )
        if jax.tree.map(jnp.shape, found.params) != jax.tree.map(
            jnp.shape, dict(params)
        ):
            raise ValueError(
                "reptile: the adapted parameters are not of the shape of the "
                "meta-parameters; use meta.maml with a fixed optimizer and without "
                "per_step"
            )
        gaps = jax.tree.map(
            lambda a, b: jnp.sum((a - b) ** 2) / 2, dict(params), found.params
        )
        _, (_, measured) = learner.query(
            found.params,
            frozen,
            found.model_state,
            episode["support"],
            prng.stream(key, "query"),
        )
        sums = jax.tree.leaves(gaps)
        dtype = common_dtype(*sums)
        loss = jnp.sum(jnp.stack([gap.astype(dtype) for gap in sums]))
        return loss, metrics_lib.promote(measured)

    mean = mean_over_tasks(one, chunk)

    def value(
        params: Params,
        frozen: Frozen,
        model_state: ModelState,
        batch: Batch,
        key: jax.Array,
    ) -> tuple[Scalar, tuple[ModelState, Metrics]]:
        network_state = without_count(model_state)
        loss, measured = mean(
            params, frozen, network_state, {"support": batch["support"]}, key
        )
        return loss, (
            _next(model_state, network_state),
            jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), measured),
        )

    return value
