"""Objectives that follow one another."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.methods._counting import count_of
from jaxtransfer.ops.dtypes import common_dtype
from jaxtransfer.train import metrics
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


def stages(*parts: tuple[int | None, Objective]) -> Objective:
    """One objective after the other: hints first, then distillation.

    Or meta-gradients of first order, then of second (derivative-order annealing of
    MAML++): ``stages((n, objective(first)), (None, objective(second)))``. The stage
    follows the count of updates, so a run that is resumed is in the right one. Only the
    stage's objective is computed (``lax.switch``; under ``vmap`` over runs, all).

    Args:
        *parts: (updates, objective), in turn; None for the last, which has no end. All
            return a model state of the same structure, which is that of the variables.

    Returns:
        Objective over variables of ``counted`` (of ``distill`` or ``meta``). Its
        metrics are those of all stages; what a stage does not measure counts nothing.

    Raises:
        ValueError: no parts, a number of updates below 1, or None before the last; (at
            the first call) nobody counts.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> def pull(to):
        ...     def objective(params, frozen, model_state, batch, key):
        ...         return (params["w"] - to) ** 2, (model_state, {})
        ...     return objective
        >>> both = stages((2, pull(0.0)), (None, pull(1.0)))
        >>> def loss(updates):
        ...     state = {"updates": jnp.array(updates)}
        ...     start = {"w": jnp.array(3.0)}
        ...     return float(both(start, {}, state, {}, jax.random.key(0))[0])
        >>> loss(1), loss(2)
        (9.0, 4.0)

    References:
        Hints, then distillation: Romero et al., *FitNets*, ICLR 2015, algorithm 1.
        First order, then second: Antoniou, Edwards, Storkey, *How to train your MAML*,
        ICLR 2019, section 4.
    """
    lengths = [length for length, _ in parts]
    if (
        not parts
        or None in lengths[:-1]
        or any(n is not None and n < 1 for n in lengths)
    ):
        raise ValueError(
            f"stages: got lengths {lengths}; give (updates, objective) for each, 1 or "
            "more, and None for the last alone"
        )
    ends = _ends(lengths)

    def value(
        params: Params,
        frozen: Frozen,
        model_state: ModelState,
        batch: Batch,
        key: jax.Array,
    ) -> tuple[Scalar, tuple[ModelState, Metrics]]:
        updates = count_of(model_state, "stages")
        given = params, frozen, model_state, batch, key
        kinds: dict[str, Mean] = {}  # shape and dtype of every metric
        dtype = jnp.float32
        for _, objective in parts:
            loss, (_, measured) = jax.eval_shape(_promoted(objective), *given)
            dtype = common_dtype(dtype, loss.dtype)
            for name, pair in measured.items():
                kinds[name] = jax.tree.map(_wider, pair, kinds.get(name, pair))

        def branch(objective: Objective) -> Callable[..., Any]:
            def run(*given: Any) -> Any:
                loss, (state, measured) = _promoted(objective)(*given)
                nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), kinds)
                every = {**nothing, **measured}
                every = jax.tree.map(lambda x, z: jnp.asarray(x, z.dtype), every, kinds)
                state = {**state, "updates": updates + 1}
                return jnp.asarray(loss, dtype), (state, every)

            return run

        starts = jnp.asarray(ends, updates.dtype)
        number = jnp.searchsorted(starts, updates, side="right")
        return jax.lax.switch(number, [branch(part) for _, part in parts], *given)

    return value


def _ends(lengths: Sequence[int | None]) -> list[int]:
    """Numbers of updates at which the next stage begins."""
    ends, total = [], 0
    for length in lengths[:-1]:
        total += length or 0
        ends.append(total)
    return ends


def _wider(one: Any, other: Any) -> jax.ShapeDtypeStruct:
    """What two stages measure under one name, in float32 at least."""
    return jax.ShapeDtypeStruct(one.shape, common_dtype(jnp.float32, one, other))


def _promoted(objective: Objective) -> Objective:
    def run(*given: Any) -> Any:
        loss, (state, measured) = objective(*given)
        return loss, (state, metrics.promote(measured))

    return run


__all__ = ["stages"]
