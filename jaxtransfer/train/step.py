"""The one update rule: an objective and an optimizer make a pure step."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtransfer import prng
from jaxtransfer.train import metrics as metrics_lib
from jaxtransfer.train.state import TrainState
from jaxtransfer.typing import Batch, Mean, Metrics, Objective, Step


def _per_device(tree: Any, axis_name: str) -> Any:
    """Mark replicated values as differing between devices.

    Under ``shard_map`` with ``check_vma=True`` the gradient of a device's loss with
    respect to *replicated* parameters is summed over devices behind one's back; a
    mean over devices is then too large by their number, and inner steps of MAML mix
    tasks. Values marked as varying keep each device's gradient its own.
    """

    def mark(leaf: Any) -> Any:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf
        return jax.lax.pcast(leaf, axis_name, to="varying")

    return jax.tree.map(mark, tree)


def _mean_over(axis_name: str, tree: Any) -> Any:
    """Mean over devices; counters (integers) take the largest, keys stay."""

    def reduce(leaf: Any) -> Any:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            return jax.lax.pmean(leaf, axis_name)
        return jax.lax.pmax(leaf, axis_name)

    return jax.tree.map(reduce, tree)


def _check_all_rows_count(batch: Batch, axis_name: str) -> None:
    if isinstance(batch, Mapping) and "where" in batch:
        raise ValueError(
            f"batch: got 'where' with axis_name={axis_name!r}; each device would "
            "average its own rows that count, and one with few of them would weigh as "
            "much as the others. Leave axis_name out and run the step by "
            "parallel.jit_step over a mesh, where the batch is one"
        )


def _checked(before: TrainState, after: TrainState) -> TrainState:
    """The new state, if nothing that is frozen was exchanged."""
    pairs = jax.tree.leaves(before.frozen), jax.tree.leaves(after.frozen)
    if [*map(id, pairs[0])] != [*map(id, pairs[1])]:
        raise ValueError(
            "after_update: it changed state.frozen, which is given for the whole run "
            "and not saved; keep what changes (a moving average) in model_state"
        )
    return after


def extra_arguments(
    optimizer: optax.GradientTransformation, **extra: Any
) -> dict[str, Any]:
    """The extra arguments that an optimizer takes; not every one takes any.

    Args:
        optimizer: optax transformation, with extra arguments or without.
        **extra: by the names that optax's have: ``value``, ``grad``, ``value_fn``.

    Returns:
        Those that its ``update`` has by name, or all if it takes any.
    """
    parameters = inspect.signature(optimizer.update).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return extra
    return {name: extra[name] for name in extra.keys() & parameters.keys()}


def train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    axis_name: str | None = None,
    after_update: Callable[[TrainState], TrainState] | None = None,
) -> Step:
    """Make the pure function that does one update.

    ``params <- params + optimizer(grad_params objective)``; the gradient is taken
    with respect to ``state.params`` alone, so what is frozen has no backward pass.

    Args:
        objective: ``(params, frozen, model_state, batch, key) ->
            (loss, (model_state, metrics))``.
        optimizer: optax transformation. One of extra arguments is given optax's
            ``value``, ``grad`` and ``value_fn`` (the loss of other parameters, of the
            same batch and key), e.g. ``optax.contrib.reduce_on_plateau`` and
            ``optax.lbfgs``.
        axis_name: name of the device axis if the step runs under
            :func:`~jaxtransfer.parallel.pmap_step` or
            :func:`~jaxtransfer.parallel.shard_map_step`: gradients, model state and
            metrics are reduced over it: the mean, of integers the largest. A memory
            in the model state must be the same on all devices (``axis_name`` of what
            writes it). Leave it out for ``jit``, on one device or over a mesh.
        after_update: called with the new state, e.g. for a moving average, which it
            keeps in ``model_state``.

    Returns:
        ``(state, batch) -> (state, metrics)``; metrics hold ``loss`` and
        ``gradient_norm`` beside the objective's own, each as (sum, count). Its
        attribute ``axis_name`` is the one given.

    Raises:
        ValueError: (at the first call) a metric of the objective is named ``loss`` or
            ``gradient_norm``; ``after_update`` changes what is frozen; or, with
            ``axis_name``, the batch is a dict with ``"where"``: each device would
            average its own rows that count, however few they are; or the optimizer is a
            line search, which asks for the loss of all devices. Run the step without
            ``axis_name`` by :func:`~jaxtransfer.parallel.jit_step` over a mesh.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from jaxtransfer.train import init_state
        >>> from jaxtransfer.typing import Variables
        >>> def objective(params, frozen, model_state, batch, key):
        ...     return jnp.mean((batch - params["w"]) ** 2), (model_state, {})
        >>> step = train_step(objective, optax.sgd(0.5))
        >>> start = Variables({"w": jnp.zeros(())})
        >>> state = init_state(jax.random.key(0), start, optax.sgd(0.5))
        >>> state, metrics = step(state, jnp.array([2.0, 4.0]))
        >>> float(state.params["w"]), int(state.step)
        (3.0, 1)
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Mean]]:
        if axis_name is not None:
            _check_all_rows_count(batch, axis_name)
        key = prng.step_key(state.key, state.step)
        params, frozen, before = state.params, state.frozen, state.model_state
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
            params, frozen, before = _per_device((params, frozen, before), axis_name)

        def loss_of(params: Any) -> jax.Array:
            if axis_name is not None:
                raise ValueError(
                    "optimizer: a line search asks for the loss of all devices, but "
                    f"axis_name={axis_name!r} gives each its own; leave axis_name out "
                    "and run the step by parallel.jit_step over a mesh"
                )
            return objective(params, frozen, before, batch, key)[0]

        (loss, (model_state, metrics)), gradient = jax.value_and_grad(
            objective, has_aux=True
        )(params, frozen, before, batch, key)
        if taken := {"loss", "gradient_norm"} & metrics.keys():
            raise ValueError(
                f"objective: its metric {min(taken)!r} has the name of one that the "
                "step adds ('loss', 'gradient_norm'); choose another"
            )
        metrics = metrics_lib.promote({"loss": loss, **metrics})
        if axis_name is not None:
            gradient, model_state = _mean_over(axis_name, (gradient, model_state))
            metrics = jax.lax.psum(metrics, axis_name)
        metrics["gradient_norm"] = metrics_lib.mean(metrics_lib.norm(gradient))
        extra = extra_arguments(
            optimizer,
            value=metrics_lib.value(metrics["loss"]),
            grad=gradient,
            value_fn=loss_of,
        )
        updates, opt_state = optimizer.update(
            gradient, state.opt_state, state.params, **extra
        )
        state = state.replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            model_state=model_state,
            opt_state=opt_state,
        )
        if after_update is not None:
            state = _checked(state, after_update(state))
        return state, metrics

    step.axis_name = axis_name  # pyright: ignore[reportFunctionMemberAccess]
    return step


def alternate(**steps: Step) -> Step:
    """Several players in one step: each updates its own role, in the order given.

    The state's ``params`` (and ``opt_state``: see :func:`init_state`) are dicts by
    role. The step of a role is given ``params = state.params[role]``; the other
    roles' current parameters reach it as ``frozen[role]``, so no gradient flows
    into them. This is the shape of ADDA, MCD and GAN-like games.

    Args:
        **steps: a step by role, each from :func:`train_step`.

    Returns:
        A step that does one update of every role and counts as one step. Metrics
        are named ``role/name``. Its attribute ``axis_name`` is that of the steps.

    Raises:
        ValueError: the steps differ in ``axis_name``; (at the first call) a role has no
            parameters, or is in ``frozen`` as well; and as :func:`train_step`.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from jaxtransfer.train import init_state
        >>> from jaxtransfer.typing import Variables
        >>> def toward(other):
        ...     def objective(params, frozen, model_state, batch, key):
        ...         return (params - frozen[other]) ** 2 / 2, (model_state, {})
        ...     return train_step(objective, optax.sgd(1.0))
        >>> start = Variables({"a": jnp.array(0.0), "b": jnp.array(4.0)})
        >>> sgd = {"a": optax.sgd(1.0), "b": optax.sgd(1.0)}
        >>> state = init_state(jax.random.key(0), start, sgd)
        >>> state, _ = alternate(a=toward("b"), b=toward("a"))(state, None)
        >>> float(state.params["a"]), float(state.params["b"])
        (4.0, 4.0)
    """
    made = {
        role: step.axis_name  # pyright: ignore[reportFunctionMemberAccess]
        for role, step in steps.items()
        if hasattr(step, "axis_name")
    }
    if len(axis_names := set(made.values())) > 1:
        raise ValueError(
            f"alternate: the steps differ in axis_name, {made}; make all of them with "
            "train_step(..., axis_name=...) of the same, or none"
        )

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Mean]]:
        params, opt_state = dict(state.params), dict(state.opt_state)
        if unknown := set(steps) - set(params):
            raise ValueError(
                f"alternate: role {sorted(unknown)[0]!r} has no parameters; "
                f"roles are {sorted(params)}"
            )
        if both := set(state.frozen) & set(params):
            raise ValueError(
                f"alternate: role {sorted(both)[0]!r} is both learned and frozen; "
                "rename it in frozen"
            )
        model_state, metrics = state.model_state, {}
        for role, role_step in steps.items():
            others = {name: params[name] for name in params if name != role}
            turn, role_metrics = role_step(
                state.replace(
                    params=params[role],
                    frozen={**state.frozen, **others},
                    opt_state=opt_state[role],
                    model_state=model_state,
                    key=prng.stream(state.key, role),
                ),
                batch,
            )
            params[role], opt_state[role] = turn.params, turn.opt_state
            model_state = turn.model_state
            metrics |= {f"{role}/{name}": m for name, m in role_metrics.items()}
        return state.replace(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            model_state=model_state,
        ), metrics

    for axis_name in axis_names:
        step.axis_name = axis_name  # pyright: ignore[reportFunctionMemberAccess]
    return step


def eval_step(
    metric_fn: Callable[[Any, Any, Any, Batch], Metrics],
    *,
    axis_name: str | None = None,
) -> Callable[[TrainState, Batch], dict[str, Mean]]:
    """Make the pure function that measures one batch.

    Args:
        metric_fn: ``(params, frozen, model_state, batch) -> metrics``, e.g.
            :func:`~jaxtransfer.train.metrics.classification`.
        axis_name: as in :func:`train_step`; rows may be left out by ``"where"``, for
            totals and counts are summed.

    Returns:
        ``(state, batch) -> metrics`` as (sum, count) pairs, to be merged with
        :func:`~jaxtransfer.train.metrics.merge`; its attribute ``axis_name`` is the
        one given, ``measures`` is true. :func:`~jaxtransfer.parallel.jit_step` compiles
        it, over a mesh too.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from jaxtransfer.train import init_state, metrics
        >>> from jaxtransfer.typing import Variables
        >>> measure = eval_step(lambda p, f, s, b: {"error": jnp.mean(b - p["w"])})
        >>> start = Variables({"w": jnp.zeros(())})
        >>> state = init_state(jax.random.key(0), start, optax.sgd(0.5))
        >>> metrics.finalize(measure(state, jnp.array([1.0, 3.0])))
        {'error': 2.0}
    """

    def step(state: TrainState, batch: Batch) -> dict[str, Mean]:
        metrics = metrics_lib.promote(
            metric_fn(state.params, state.frozen, state.model_state, batch)
        )
        return metrics if axis_name is None else jax.lax.psum(metrics, axis_name)

    step.axis_name = axis_name  # pyright: ignore[reportFunctionMemberAccess]
    step.measures = True  # pyright: ignore[reportFunctionMemberAccess]
    return step
