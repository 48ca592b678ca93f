"""Model-agnostic meta-learning: ``jax.grad`` nested in ``jax.vmap`` over tasks.

Learned: the meta-parameters, from which a few steps on a task's support examples lead
to parameters that do well on its query examples. The loss inside and outside is any
:data:`~jaxtransfer.typing.Objective`, e.g. ``finetune.objective(model)``.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtransfer import tree
from jaxtransfer.ops.chunked import chunked_mean
from jaxtransfer.ops.varying import vary, varying_axes
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

Adapt = Callable[
    [Params, Frozen, ModelState, Batch, jax.Array], tuple[Params, ModelState]
]


def _inner_step(
    task: Objective, optimizer: optax.GradientTransformation, first_order: bool
) -> Callable[..., tuple[Any, Any]]:
    """One update of the fast parameters on the support examples."""

    def step(
        carry: Any,
        key: jax.Array,
        slow: Params,
        frozen: Frozen,
        support: Batch,
    ) -> tuple[Any, None]:
        fast, opt_state, model_state = carry

        def value(fast: Params) -> tuple[Scalar, ModelState]:
            loss, (state, _) = task(
                tree.combine(fast, slow), frozen, model_state, support, key
            )
            return loss, state

        gradient, model_state = jax.grad(value, has_aux=True)(fast)
        if first_order:
            gradient = jax.lax.stop_gradient(gradient)
        updates, opt_state = optimizer.update(gradient, opt_state, fast)
        return (optax.apply_updates(fast, updates), opt_state, model_state), None

    return step


def _statistics(
    task: Objective,
    params: Params,
    frozen: Frozen,
    model_state: ModelState,
    support: Batch,
    key: jax.Array,
) -> ModelState:
    """Model state that belongs to these parameters, from the support examples.

    An inner step leaves the statistics of the parameters it started from; a query
    normalised by those would meet features of another network.
    """
    if not jax.tree.leaves(model_state):
        return model_state
    _, (model_state, _) = task(params, frozen, model_state, support, key)
    return model_state


def _begin(
    optimizer: optax.GradientTransformation,
    rules: tree.Rules | None,
    params: Params,
    model_state: ModelState,
    support: Batch,
) -> tuple[Any, Params]:
    """The carry of the inner loop, and the parameters that stay as they are."""
    rows = {len(leaf) for leaf in jax.tree.leaves(support)}
    if 0 in rows or not rows:
        raise ValueError("support: no examples to adapt on")
    fast, slow = (params, {}) if rules is None else tree.partition(params, rules)
    carry = fast, optimizer.init(fast), model_state
    return vary(carry, varying_axes((params, support))), slow


def adapt(
    task: Objective,
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    first_order: bool = False,
    remat: bool = True,
    rules: tree.Rules | None = None,
) -> Adapt:
    r"""Make the function that adapts parameters to one task.

    .. math:: \theta_{j+1} = \theta_j - \mathrm{optimizer}(\nabla L_S(\theta_j)),
              \quad j = 0 \dots K-1

    Differentiable with respect to the start, through every step and through the
    optimizer's own state. The model state that is returned (batch statistics) is that
    of the adapted parameters: one more forward pass over the support, which a compiled
    program leaves out where nothing reads it.

    Args:
        task: objective on the support examples, e.g. ``finetune.objective(model)``.
        optimizer: any optax transformation.
        steps: :math:`K \ge 0`.
        first_order: take the inner gradients as constants (FOMAML).
        remat: recompute a step's activations on the way back instead of keeping them:
            memory that hardly grows with ``steps``.
        rules: paths of the parameters that adapt (``"head"`` is ANIL); all if None.

    Returns:
        ``(params, frozen, model_state, support, key) -> (params, model_state)``.

    Raises:
        ValueError: ``steps`` is negative; (at the call) a rule matches nothing or
            there are no support examples.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> def task(params, frozen, model_state, batch, key):
        ...     return jnp.mean((batch["labels"] - params["w"]) ** 2), (model_state, {})
        >>> to_task = adapt(task, optax.sgd(0.5), steps=1)
        >>> adapted, _ = to_task({"w": jnp.array(0.0)}, {}, {},
        ...                      {"labels": jnp.array([2.0, 4.0])}, jax.random.key(0))
        >>> float(adapted["w"])
        3.0

    References:
        Finn, Abbeel, Levine, *Model-agnostic meta-learning for fast adaptation of
        deep networks*, ICML 2017, eq. 1. ANIL: Raghu et al., ICLR 2020.
    """
    if steps < 0:
        raise ValueError(f"steps: got {steps}; it must be 0 or more")
    inner = _inner_step(task, optimizer, first_order)

    def run(
        params: Params,
        frozen: Frozen,
        model_state: ModelState,
        support: Batch,
        key: jax.Array,
    ) -> tuple[Params, ModelState]:
        carry, slow = _begin(optimizer, rules, params, model_state, support)

        def body(carry: Any, key: jax.Array) -> tuple[Any, None]:
            return inner(carry, key, slow, frozen, support)

        if steps == 1:
            carry, _ = body(carry, key)
        elif steps:
            body = jax.checkpoint(body) if remat else body
            carry, _ = jax.lax.scan(body, carry, jax.random.split(key, steps))
        fast, _, model_state = carry
        adapted = tree.combine(fast, slow)
        return adapted, _statistics(task, adapted, frozen, model_state, support, key)

    return run


def _number_of_tasks(batch: Batch) -> int:
    sizes = {len(leaf) for leaf in jax.tree.leaves(dict(batch))}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            "episodes: every array needs the same, non-empty leading axis of tasks; "
            f"got {sorted(sizes)}"
        )
    return sizes.pop()


def objective(
    task: Objective,
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    query: Objective | None = None,
    first_order: bool = False,
    remat: bool = True,
    rules: tree.Rules | None = None,
    chunk: int | None = None,
) -> Objective:
    r"""Query loss after adaptation on the support, averaged over tasks.

    .. math:: L(\theta) = \frac1T \sum_t L_{Q_t}(\theta_K^{(t)}(\theta; S_t))

    Tasks run side by side (``vmap``), or in chunks one after the other with the
    gradient summed as they go, which keeps memory flat in the number of tasks.

    *Batch statistics.* The query is handed the state that the adapted parameters leave
    on the support.
    With ``finetune.objective(model)`` inside and outside, both sets are normalised by
    their own statistics (transductive). With ``query=finetune.objective(model,
    train=False)`` and layers of momentum 0 the query is normalised by the support's
    (non-transductive). Running statistics of the meta-parameters are never updated.

    Args:
        task: objective on the support examples.
        optimizer: any optax transformation, the inner one.
        steps: inner updates.
        query: objective on the query examples; ``task`` if None.
        first_order: FOMAML; see :func:`adapt`.
        remat: see :func:`adapt`.
        rules: which parameters adapt; see :func:`adapt`.
        chunk: tasks that run side by side; must divide the number of tasks. All if
            None. On a CPU 1 is fastest for convolutional networks.

    Returns:
        Objective over ``{"support": …, "query": …}`` with a leading axis of tasks.
        Metrics are the query's, of the adapted parameters.

    Raises:
        ValueError: (at the first call) no tasks, or ``chunk`` does not divide them.

    References:
        Finn, Abbeel, Levine, ICML 2017, algorithm 2.
    """
    to_task = adapt(
        task,
        optimizer,
        steps=steps,
        first_order=first_order,
        remat=remat,
        rules=rules,
    )
    judge = task if query is None else query

    def one(
        params: Params,
        frozen: Frozen,
        model_state: ModelState,
        key: jax.Array,
        episode: Batch,
    ) -> tuple[Scalar, dict[str, Mean]]:
        adapted, state = to_task(params, frozen, model_state, episode["support"], key)
        loss, (_, measured) = judge(adapted, frozen, state, episode["query"], key)
        return loss, metrics_lib.promote(measured)

    def some(
        params: Params,
        frozen: Frozen,
        model_state: ModelState,
        episodes_and_keys: tuple[Batch, jax.Array],
    ) -> tuple[Scalar, dict[str, Mean]]:
        episodes, keys = episodes_and_keys
        losses, measured = jax.vmap(one, in_axes=(None, None, None, 0, 0))(
            params, frozen, model_state, keys, dict(episodes)
        )
        return jnp.mean(losses), jax.tree.map(lambda m: jnp.sum(m, 0), measured)

    def value(
        params: Params,
        frozen: Frozen,
        model_state: ModelState,
        batch: Batch,
        key: jax.Array,
    ) -> tuple[Scalar, tuple[ModelState, Metrics]]:
        tasks = _number_of_tasks(batch)
        work = dict(batch), jax.random.split(key, tasks)
        if chunk is None or chunk >= tasks:
            loss, measured = some(params, frozen, model_state, work)
        else:
            loss, measured = chunked_mean(some, chunk, aux="stack")(
                params, frozen, model_state, work
            )
            measured = jax.tree.map(lambda m: jnp.sum(m, 0), measured)
        return loss, (model_state, measured)

    return value


def trajectory(
    task: Objective,
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    query: Objective | None = None,
    rules: tree.Rules | None = None,
) -> Callable[[Params, Frozen, ModelState, Batch, jax.Array], Metrics]:
    """Make the function that follows the query metrics over the adaptation of tasks.

    Args:
        task: objective on the support examples.
        optimizer: the inner optimizer.
        steps: inner updates.
        query: objective on the query examples; ``task`` if None.
        rules: which parameters adapt.

    Returns:
        ``(params, frozen, model_state, episodes, key) -> metrics``: the query loss
        (``loss``) and the query objective's metrics, each ``[tasks, steps + 1]``, the
        first column before adaptation.

    Raises:
        ValueError: (at the call) as :func:`objective`.
    """
    inner = _inner_step(task, optimizer, first_order=True)
    judge = task if query is None else query

    def one(
        params: Params,
        frozen: Frozen,
        model_state: ModelState,
        key: jax.Array,
        episode: Batch,
    ) -> dict[str, jax.Array]:
        carry, slow = _begin(optimizer, rules, params, model_state, episode["support"])

        def measure(carry: Any) -> dict[str, jax.Array]:
            fast, _, state = carry
            adapted = tree.combine(fast, slow)
            state = _statistics(task, adapted, frozen, state, episode["support"], key)
            loss, (_, measured) = judge(adapted, frozen, state, episode["query"], key)
            pairs = metrics_lib.promote({"loss": loss, **measured})
            return {
                name: jnp.asarray(pair.total) / pair.count
                for name, pair in pairs.items()
            }

        def body(carry: Any, key: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
            carry, _ = inner(carry, key, slow, frozen, episode["support"])
            return carry, measure(carry)

        _, after = jax.lax.scan(body, carry, jax.random.split(key, steps))
        return jax.tree.map(
            lambda first, rest: jnp.concatenate([jnp.asarray(first)[None], rest]),
            measure(carry),
            after,
        )

    def run(
        params: Params,
        frozen: Frozen,
        model_state: ModelState,
        batch: Batch,
        key: jax.Array,
    ) -> Metrics:
        keys = jax.random.split(key, _number_of_tasks(batch))
        return jax.vmap(one, in_axes=(None, None, None, 0, 0))(
            params, frozen, model_state, keys, dict(batch)
        )

    return run


__all__ = ["Adapt", "adapt", "objective", "trajectory"]
