"""Tasks followed step by step, and refused where they diverge."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer import prng
from jaxtransfer.methods._counting import without_count
from jaxtransfer.methods.meta.chunks import Chunk, mean_over_tasks
from jaxtransfer.methods.meta.learner import Learner
from jaxtransfer.train import metrics as metrics_lib
from jaxtransfer.typing import Batch, Frozen, Metrics, ModelState, Params


def trajectory(
    learner: Learner, *, chunk: Chunk = "auto"
) -> Callable[[Params, Frozen, ModelState, Batch, jax.Array], Metrics]:
    """Make the function that follows the query metrics over the adaptation of tasks.

    Args:
        learner: any; those without steps have one column.
        chunk: as for :func:`objective`.

    Returns:
        ``(params, frozen, model_state, episodes, key) -> metrics``: the query loss
        (``loss``), the norm of all task parameters (``parameter_norm``), the query
        objective's metrics, each ``[tasks, steps + 1]``, the first column before
        adaptation.

    Raises:
        ValueError: (at the call) as :func:`objective`; a metric of the query is named
            ``loss`` or ``parameter_norm``.
    """

    def one(params, frozen, model_state, key_and_task):
        key, episode = key_and_task
        of_query = prng.stream(key, "query")

        def measure(adapted: Any, state: ModelState) -> dict[str, jax.Array]:
            loss, (_, measured) = learner.query(
                adapted, frozen, state, episode["query"], of_query
            )
            if taken := {"loss", "parameter_norm"} & measured.keys():
                raise ValueError(
                    f"query: its metric {min(taken)!r} has the name of one that is "
                    "measured beside it; choose another"
                )
            norm = metrics_lib.norm(_numbers(adapted))
            pairs = metrics_lib.promote(
                {"loss": loss, "parameter_norm": norm, **measured}
            )
            return {
                name: jnp.asarray(pair.total) / pair.count
                for name, pair in pairs.items()
            }

        found = learner.adapt(
            params, frozen, model_state, episode["support"], key, visit=measure
        )
        return jnp.zeros(()), found.visited

    mean = mean_over_tasks(one, chunk)

    def run(
        params: Params,
        frozen: Frozen,
        model_state: ModelState,
        batch: Batch,
        key: jax.Array,
    ) -> Metrics:
        _, measured = mean(params, frozen, without_count(model_state), batch, key)
        return measured

    return run


def _numbers(adapted: Any) -> list[jax.Array]:
    """The parameters, without what learners keep by them: which classes there are."""
    return [
        leaf
        for leaf in jax.tree.leaves(adapted)
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    ]


def check_finite(curves: Mapping[str, Any], *, first_task: int = 0) -> None:
    """Refuse a trajectory that diverged, and say where.

    Args:
        curves: from :func:`trajectory`, on the host or the device: ``"loss"``, and
            ``"parameter_norm"`` if the message is to have the norm.
        first_task: number of the first task, for the message.

    Raises:
        FloatingPointError: the loss of a task is not finite after some step.

    Example:
        >>> import numpy as np
        >>> losses, norms = np.array([[1.0, np.inf]]), np.array([[2.0, 3e20]])
        >>> check_finite({"loss": losses, "parameter_norm": norms})
        Traceback (most recent call last):
        ...
        FloatingPointError: task 0: the loss is inf after step 1 (1.0 the step
        before), the norm of the parameters 3e+20 (2.0 the step before)...
    """
    losses = np.asarray(jax.device_get(curves["loss"]))
    for number, step in np.argwhere(~np.isfinite(losses)):
        told = f"the loss is {_at(losses[number], step, f' after step {step}')}"
        if "parameter_norm" in curves:
            norms = np.asarray(jax.device_get(curves["parameter_norm"]))
            told += f", the norm of the parameters {_at(norms[number], step)}"
        raise FloatingPointError(
            f"task {first_task + number}: {told}; take a smaller inner rate, "
            "clip the inner gradient (optax.chain(optax.clip_by_global_norm(1.0), "
            "...)), or look at this task's data"
        )


def _at(curve: np.ndarray, step: Any, words: str = "") -> str:
    before = f" ({curve[step - 1]} the step before)" if step else ""
    return f"{curve[step]}{words}{before}"


__all__ = ["check_finite", "trajectory"]
