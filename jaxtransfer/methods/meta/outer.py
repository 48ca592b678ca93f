"""The outer level: losses of many tasks after adaptation, and what is learned of them.

:func:`objective` is the meta-learning objective of any learner; :func:`reptile` is the
one that needs no query; :func:`trajectory` only looks.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from jaxtransfer.methods.meta.learner import Learner
from jaxtransfer.ops.chunked import chunked_mean
from jaxtransfer.ops.footprint import traced_bytes
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

Chunk = int | Literal["auto"] | None
"""Tasks that run side by side. ``"auto"``: on a CPU as many as stay in its caches, on
an accelerator as many as fit in 4 GB; over a mesh, so many on every device. None:
all."""

_ROOM = {"cpu": 4e6}
_ACCELERATOR_ROOM = 4e9


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
    for name, number in (("steps", steps), ("updates", updates)):
        if number < 1:
            raise ValueError(f"{name}: got {number}; it must be 1 or more")

    def weights(count: Any) -> jax.Array:
        progress = jnp.asarray(count) / updates
        early = jnp.maximum((1 - progress) / steps, 0.03 / steps)
        early = jnp.where(progress < 1, early, 0.0)
        last = 1 - (steps - 1) * early
        return jnp.concatenate([jnp.zeros(1), jnp.full(steps - 1, early), last[None]])

    return weights


def _number_of_tasks(batch: Batch) -> int:
    sizes = {len(leaf) for leaf in jax.tree.leaves(dict(batch))}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            "episodes: every array needs the same, non-empty leading axis of tasks; "
            f"got {sorted(sizes)}"
        )
    return sizes.pop()


def _chunk(chunk: Chunk, tasks: int, one: Callable[..., Any], *arguments: Any) -> int:
    """How many tasks run side by side."""
    if chunk is None:
        return tasks
    if isinstance(chunk, int):
        return min(chunk, tasks)
    if chunk != "auto":
        raise ValueError(f'chunk: got {chunk!r}; choose a number, "auto" or None')
    platform = jax.default_backend()
    room = _ROOM.get(platform, _ACCELERATOR_ROOM)
    fit = max(1, int(room // max(traced_bytes(one, *arguments), 1)))
    devices = _devices(arguments)
    whole = [size for size in range(devices, tasks + 1, devices) if tasks % size == 0]
    return max((size for size in whole if size <= fit * devices), default=tasks)


def _devices(arguments: Any) -> int:
    """Devices of the mesh that ``jit`` lays arrays over; 1 within ``shard_map``."""

    def of(leaf: Any) -> int:
        sharding = getattr(jax.typeof(leaf), "sharding", None)
        mesh = getattr(sharding, "mesh", None)
        if mesh is None:
            return 1
        axes = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
        return math.prod(size for size, kind in axes if kind != AxisType.Manual)

    return max(map(of, jax.tree.leaves(arguments)), default=1)


def _mean_over_tasks(
    one: Callable[..., tuple[Scalar, Any]], chunk: Chunk
) -> Callable[..., tuple[Scalar, Any]]:
    """``(params, frozen, model_state, keys, tasks) -> (mean, aux of each task)``."""

    def some(params, frozen, model_state, keys_and_tasks):
        values, aux = jax.vmap(one, in_axes=(None, None, None, 0))(
            params, frozen, model_state, keys_and_tasks
        )
        return jnp.mean(values), aux

    def run(params, frozen, model_state, batch, key):
        tasks = _number_of_tasks(batch)
        work = jax.random.split(key, tasks), dict(batch)
        first = jax.tree.map(lambda leaf: leaf[0], work)
        size = _chunk(chunk, tasks, one, params, frozen, model_state, first)
        if size == tasks:
            return some(params, frozen, model_state, work)
        value, aux = chunked_mean(some, size, aux="stack")(
            params, frozen, model_state, work
        )
        # Chunk k of n holds the tasks k, k + n, ...
        return value, jax.tree.map(
            lambda leaf: leaf.swapaxes(0, 1).reshape(tasks, *leaf.shape[2:]), aux
        )

    return run


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
            if None. Needs :func:`~jaxtransfer.methods.meta.counted` variables.
        collect: momentum, 0 ... 1, of running batch statistics of the support examples,
            for ``statistics="running"`` (under the meta-parameters) and ``"per_step"``
            (after each step): the share of the old ones that is kept. Left as they are
            if None.

    Returns:
        Objective over ``{"support": ..., "query": ...}`` with a leading axis of tasks.
        Metrics are the query's after adaptation.

    Raises:
        ValueError: ``collect`` is not in 0 ... 1, or the learner has no statistics to
            collect; (at the first call) no tasks; ``chunk`` does not divide them;
            weights without a count, or not one for each step and the start.

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

    def one(params, frozen, given, key_and_task):
        model_state, weights = given
        key, episode = key_and_task

        def judge(adapted: Any, state: ModelState) -> tuple[Scalar, dict[str, Mean]]:
            loss, (_, measured) = learner.query(
                adapted, frozen, state, episode["query"], key
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
            loss = jnp.vdot(weights, losses)
            measured = jax.tree.map(lambda leaf: leaf[-1], measured)
        state = {}
        if of_support is not None:
            state = jax.lax.stop_gradient(
                of_support(params, frozen, model_state, episode["support"], key)
            )
        return loss, (measured, state)

    mean = _mean_over_tasks(one, chunk)

    def value(
        params: Params,
        frozen: Frozen,
        model_state: ModelState,
        batch: Batch,
        key: jax.Array,
    ) -> tuple[Scalar, tuple[ModelState, Metrics]]:
        network_state = _without_count(model_state)
        weights = None
        if step_weights is not None:
            weights = step_weights(_count(model_state))
        loss, (measured, states) = mean(
            params, frozen, (network_state, weights), batch, key
        )
        if collect is not None:
            network_state = _toward(network_state, states, collect)
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


def _without_count(model_state: ModelState) -> ModelState:
    return {name: part for name, part in model_state.items() if name != "updates"}


def _count(model_state: ModelState) -> jax.Array:
    if "updates" not in model_state:
        raise ValueError(
            "step_weights follow the number of updates, which the model state lacks; "
            "start from meta.counted(variables)"
        )
    return model_state["updates"]


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
            found.params, frozen, found.model_state, episode["support"], key
        )
        loss = jnp.sum(jnp.stack(jax.tree.leaves(gaps)))
        return loss, metrics_lib.promote(measured)

    mean = _mean_over_tasks(one, chunk)

    def value(
        params: Params,
        frozen: Frozen,
        model_state: ModelState,
        batch: Batch,
        key: jax.Array,
    ) -> tuple[Scalar, tuple[ModelState, Metrics]]:
        network_state = _without_count(model_state)
        loss, measured = mean(
            params, frozen, network_state, {"support": batch["support"]}, key
        )
        return loss, (
            _next(model_state, network_state),
            jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), measured),
        )

    return value


def trajectory(
    learner: Learner, *, chunk: Chunk = "auto"
) -> Callable[[Params, Frozen, ModelState, Batch, jax.Array], Metrics]:
    """Make the function that follows the query metrics over the adaptation of tasks.

    Args:
        learner: any; those without steps have one column.
        chunk: as for :func:`objective`.

    Returns:
        ``(params, frozen, model_state, episodes, key) -> metrics``: the query loss
        (``loss``), the query objective's metrics, each ``[tasks, steps + 1]``, the
        first column before adaptation.

    Raises:
        ValueError: (at the call) as :func:`objective`.
    """

    def one(params, frozen, model_state, key_and_task):
        key, episode = key_and_task

        def measure(adapted: Any, state: ModelState) -> dict[str, jax.Array]:
            loss, (_, measured) = learner.query(
                adapted, frozen, state, episode["query"], key
            )
            pairs = metrics_lib.promote({"loss": loss, **measured})
            return {
                name: jnp.asarray(pair.total) / pair.count
                for name, pair in pairs.items()
            }

        found = learner.adapt(
            params, frozen, model_state, episode["support"], key, visit=measure
        )
        return jnp.zeros(()), found.visited

    mean = _mean_over_tasks(one, chunk)

    def run(
        params: Params,
        frozen: Frozen,
        model_state: ModelState,
        batch: Batch,
        key: jax.Array,
    ) -> Metrics:
        _, measured = mean(params, frozen, _without_count(model_state), batch, key)
        return measured

    return run


def check_finite(curves: Mapping[str, Any], *, first_task: int = 0) -> None:
    """Refuse a trajectory that diverged, and say where.

    Args:
        curves: from :func:`trajectory`, on the host or the device.
        first_task: number of the first task, for the message.

    Raises:
        FloatingPointError: the loss of a task is not finite after some step.

    Example:
        >>> import numpy as np
        >>> check_finite({"loss": np.array([[1.0, np.inf]])})
        Traceback (most recent call last):
        ...
        FloatingPointError: task 0: the loss is inf after step 1 (1.0 the step
        before)...
    """
    losses = np.asarray(jax.device_get(curves["loss"]))
    for number, step in np.argwhere(~np.isfinite(losses)):
        curve = losses[number]
        before = f" ({curve[step - 1]} the step before)" if step else ""
        raise FloatingPointError(
            f"task {first_task + number}: the loss is {curve[step]} after step {step}"
            f"{before}; take a smaller inner rate, clip the inner gradient "
            "(optax.chain(optax.clip_by_global_norm(1.0), ...)), or look at "
            "this task's data"
        )
