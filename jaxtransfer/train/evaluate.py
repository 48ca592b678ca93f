"""Measuring a state on a whole data set."""

import json
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from jaxtransfer.processes import exchange, is_own
from jaxtransfer.train import metrics as metrics_lib
from jaxtransfer.typing import Mean


def evaluate_batches(
    eval_step: Callable[[Any, Any], dict[str, Mean]],
    state: Any,
    batches: Iterable[Any],
) -> dict[str, Any]:
    """Measure a state on many batches, exactly.

    ``sum over batches of totals / sum over batches of counts``, added up on the host
    in double precision; a batch is fetched when the next one is on its way.

    With several hosts each process gives its part of every batch and all get the means
    of the whole: ``parallel.jit_step(eval_step(...), mesh)``, and batches of
    ``data.evaluation_batches(..., shard=(jax.process_index(), jax.process_count()))``.
    A state that no step has given back yet is laid over the mesh for each batch anew:
    lay it there once (:func:`~jaxtransfer.parallel.replicate`).

    Args:
        eval_step: ``(state, batch) -> {name: (sum, count)}``, compiled: of
            :func:`~jaxtransfer.parallel.jit_step` over
            :func:`~jaxtransfer.train.eval_step`.
        state: what is measured.
        batches: a finite number of them.

    Returns:
        Means by name: floats, or arrays of pairs that are arrays (one number a class).
        A metric that is no pair counts once a batch, however many rows that has.

    Raises:
        ValueError: there is no batch; a metric is an array and no pair; or, with
            several processes, what the step gives is of the rows of one alone.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxtransfer.train import metrics
        >>> measure = lambda state, batch: {"mean": metrics.mean(batch)}
        >>> evaluate_batches(measure, None, [jnp.ones(3), jnp.zeros(1)])
        {'mean': 0.75}
    """
    totals: dict[str, Mean] = {}
    waiting = None
    several = jax.process_count() > 1
    reduced = getattr(eval_step, "axis_name", None) is not None  # by pmap_step

    def add(metrics: Any) -> None:
        nonlocal totals
        metrics = jax.device_get(metrics_lib.promote(metrics))
        pairs = {
            name: Mean(np.float64(m.total), np.float64(m.count))
            for name, m in metrics.items()
        }
        totals = metrics_lib.merge(totals, pairs)

    for batch in batches:
        metrics = eval_step(state, batch)
        if several and not reduced and all(map(is_own, jax.tree.leaves(metrics))):
            raise _of_one_alone()
        if waiting is not None:
            add(waiting)
        waiting = metrics
    if waiting is None:
        raise ValueError("batches: there is none to evaluate on")
    add(waiting)
    means = metrics_lib.finalize(totals)
    if several and not reduced:
        _check_same(means)
    return means


def _check_same(means: dict[str, Any]) -> None:
    """Refuse means that differ: rows of one process that JAX took for those of all."""
    numbers = json.dumps([np.asarray(means[name]).tolist() for name in sorted(means)])
    every = [jax.tree.leaves(json.loads(said)) for said in exchange(numbers)]
    if any(
        len(one) != len(every[0])
        or not np.allclose(one, every[0], rtol=1e-5, atol=0.0, equal_nan=True)
        for one in every
    ):
        raise _of_one_alone()


def _of_one_alone() -> ValueError:
    return ValueError(
        f"eval_step: what it gives process {jax.process_index()} is of its own rows "
        "alone; compile it by parallel.jit_step(eval_step(...), mesh) with a mesh of "
        "all devices, and give each process its part of the batches "
        "(data.evaluation_batches(..., shard=(jax.process_index(), "
        "jax.process_count())))"
    )


__all__ = ["evaluate_batches"]
