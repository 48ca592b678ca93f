"""Measuring a state on a whole data set."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

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

    Args:
        eval_step: ``(state, batch) -> {name: (sum, count)}``, compiled; see
            :func:`~jaxtransfer.train.eval_step`.
        state: what is measured.
        batches: a finite number of them.

    Returns:
        Means by name: floats, or arrays of pairs that are arrays (one number a class).
        A metric that is no pair counts once a batch, however many rows that has.

    Raises:
        ValueError: there is no batch, or a metric is an array and no pair.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxtransfer.train import metrics
        >>> measure = lambda state, batch: {"mean": metrics.mean(batch)}
        >>> evaluate_batches(measure, None, [jnp.ones(3), jnp.zeros(1)])
        {'mean': 0.75}
    """
    totals: dict[str, Mean] = {}
    waiting = None

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
        if waiting is not None:
            add(waiting)
        waiting = metrics
    if waiting is None:
        raise ValueError("batches: there is none to evaluate on")
    add(waiting)
    return metrics_lib.finalize(totals)


__all__ = ["evaluate_batches"]
