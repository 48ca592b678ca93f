"""Metrics travel as (sum, count), so that merging them is exact."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from jaxtransfer.losses.reduction import first_axes, widen
from jaxtransfer.ops.dtypes import common_dtype
from jaxtransfer.typing import Batch, Mean, Metrics, Predict

ABSENT = -1e9
"""Logit of a class that a task does not have."""


def absent(dtype: Any) -> float:
    """``ABSENT``, or the least number of a dtype in which that is infinite.

    Args:
        dtype: of the logits.

    Example:
        >>> absent(jnp.float32), absent(jnp.float16)
        (-1000000000.0, -65504.0)
    """
    floating = jnp.issubdtype(dtype, jnp.floating)
    return max(ABSENT, float(jnp.finfo(dtype).min)) if floating else ABSENT


def mean(values: ArrayLike, *, where: ArrayLike | None = None) -> Mean:
    """Summarise per-example values as (sum, count).

    Args:
        values: ``[...]``.
        where: bool, of all axes of the values or the first ones (``[batch]``); what
            doesn't count (padding) is ``False``.

    Returns:
        The pair of ``[]``.

    Raises:
        ValueError: ``where`` is not boolean.

    Example:
        >>> import jax.numpy as jnp
        >>> padded = jnp.array([True, True, False])
        >>> pair = mean(jnp.array([1.0, 0.0, 1.0]), where=padded)
        >>> float(pair.total), float(pair.count)
        (1.0, 2.0)
    """
    values = widen(jnp.asarray(values))
    if where is None:
        return Mean(jnp.sum(values), jnp.asarray(values.size, values.dtype))
    where = jnp.broadcast_to(cover(where, values), values.shape)
    return Mean(
        jnp.sum(jnp.where(where, values, 0)), jnp.sum(where.astype(values.dtype))
    )


def cover(where: ArrayLike, values: ArrayLike) -> jax.Array:
    """A mask of the first axes of ``values`` as one that broadcasts to all of them.

    Raises:
        ValueError: the mask is not boolean: numbers would weigh the count, not the sum.

    Example:
        >>> cover(jnp.array([True, False]), jnp.ones((2, 3))).shape
        (2, 1)
    """
    where = jnp.asarray(where)
    if where.dtype != bool:
        raise ValueError(f"where: must be boolean, got {where.dtype}; use `where > 0`")
    return first_axes(where, jnp.ndim(values))


def counted(outputs: Any, batch: Batch) -> tuple[Any, jax.Array]:
    """Outputs and labels of a batch as losses and accuracies take them.

    Args:
        outputs: ``[batch, ..., classes]``.
        batch: ``"labels" [batch, ...]``; ``"where"``, for rows that count, whose labels
            may be anything elsewhere and become 0; ``"classes" [classes]`` or ``[batch,
            classes]``, where the logits of the others become :func:`absent`, at all
            places of an example.

    Raises:
        ValueError: ``"classes"`` is not one for each output, or ``"where"`` is not
            boolean.
    """
    labels, where = jnp.asarray(batch["labels"]), batch.get("where")
    if where is not None:
        labels = jnp.where(cover(where, labels), labels, 0)
    if "classes" in batch:
        present = jnp.asarray(batch["classes"])
        if present.shape[-1:] != outputs.shape[-1:]:
            raise ValueError(
                f"classes: got shape {present.shape} for outputs {outputs.shape}; give "
                "[classes], or [batch, classes] where a batch is divided among devices"
            )
        if present.ndim > 1:
            present = jnp.expand_dims(present, tuple(range(1, outputs.ndim - 1)))
        outputs = jnp.where(present, outputs, absent(outputs.dtype))
    return outputs, labels


def value(pair: Mean) -> jax.Array:
    """The mean of a pair, differentiably; 0 where nothing was counted.

    Example:
        >>> float(value(Mean(3.0, 2.0)))
        1.5
    """
    return jnp.asarray(pair.total / jnp.where(pair.count == 0, 1, pair.count))


def norm(tree: Any) -> jax.Array:
    """Euclidean norm of all numbers of a tree, in float32 or wider.

    Squares of float16 overflow and vanish.

    Args:
        tree: pytree of arrays.

    Returns:
        Scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> float(norm({"a": jnp.full(1, 3e4, jnp.float16), "b": jnp.full(1, 4e4)}))
        50000.0
    """
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    dtype = common_dtype(jnp.float32, *leaves)
    return optax.tree.norm([leaf.astype(dtype) for leaf in leaves])


def promote(metrics: Metrics) -> dict[str, Mean]:
    """Turn scalars into one-value means; pairs stay as they are.

    Raises:
        ValueError: a metric is an array, of which nobody knows what counts.
    """

    def pair(name: str, value: Any) -> Mean:
        if isinstance(value, Mean):
            return value
        if jnp.ndim(value):
            raise ValueError(
                f"metrics: {name!r} has shape {jnp.shape(value)}; give metrics.mean of "
                "values, or Mean(total, count), of arrays too (of classes)"
            )
        return mean(value)

    return {name: pair(name, value) for name, value in metrics.items()}


def merge(first: Mapping[str, Mean], second: Mapping[str, Mean]) -> dict[str, Mean]:
    """Add up two sets of metrics; a name that one of them lacks is kept.

    Example:
        >>> both = merge({"a": Mean(1.0, 1.0)}, {"a": Mean(0.0, 3.0)})
        >>> finalize(both)
        {'a': 0.25}
    """
    merged = dict(first)
    for name, value in second.items():
        merged[name] = (
            jax.tree.map(lambda a, b: a + b, merged[name], value)
            if name in merged
            else value
        )
    return merged


def finalize(metrics: Mapping[str, Mean]) -> dict[str, Any]:
    """Divide sums by counts, on the host; ``nan`` where nothing was counted.

    Args:
        metrics: pairs by name, of numbers or of arrays (one a class).

    Returns:
        A float each, or an array.

    Example:
        >>> pair = Mean(jnp.array([1.0, 0.0]), jnp.array([2.0, 0.0]))
        >>> finalize({"recall": pair})["recall"].tolist()
        [0.5, nan]
    """

    def divided(pair: Mean) -> Any:
        total, count = map(np.asarray, pair)
        known = count != 0
        ratio = np.where(known, total / np.where(known, count, 1), np.nan)
        return ratio if ratio.ndim else float(ratio)

    pairs = jax.device_get(dict(metrics))
    return {name: divided(pair) for name, pair in pairs.items()}


def classification(predict: Predict) -> Callable[..., Metrics]:
    """Metric function for classifiers: accuracy and cross-entropy.

    Args:
        predict: ``(params, frozen, model_state, inputs) -> logits [batch, classes]``;
            each method module has one.

    Returns:
        ``(params, frozen, model_state, batch) -> {"accuracy", "cross_entropy"}`` for
        :func:`~jaxtransfer.train.eval_step`. Rows where ``batch["where"]`` is false
        don't count, nor do classes that ``batch["classes"]`` lacks, as in training.
    """
    from jaxtransfer import losses

    def metrics(params: Any, frozen: Any, model_state: Any, batch: Batch) -> Metrics:
        outputs = predict(params, frozen, model_state, batch["inputs"])
        (logits, labels), where = counted(outputs, batch), batch.get("where")
        return {
            "accuracy": mean(losses.accuracy(logits, labels), where=where),
            "cross_entropy": mean(losses.cross_entropy(logits, labels), where=where),
        }

    return metrics
