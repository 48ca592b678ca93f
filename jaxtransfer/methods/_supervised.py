"""The task loss of a network on labelled examples: what several methods build on."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer import losses, tree
from jaxtransfer.ops.dtypes import common_dtype
from jaxtransfer.train import metrics
from jaxtransfer.typing import (
    Batch,
    Frozen,
    Inputs,
    Metrics,
    Model,
    ModelState,
    Objective,
    Params,
    Predict,
    Scalar,
    Variables,
)

Loss = Callable[[Any, Any], jax.Array]
"""``(outputs [batch, ...], labels [batch, ...]) -> [batch]``."""


def task_loss(
    loss: Loss, outputs: jax.Array, batch: Batch
) -> tuple[Scalar, dict[str, Any]]:
    """Mean loss over the rows that count, and metrics.

    Args:
        loss: of an example.
        outputs: ``[batch, ...]``.
        batch: ``"labels" [batch, ...]``; ``"where" [batch]`` for rows that count, or
            one of more axes; ``"classes" [classes]`` (or ``[batch, classes]``) for the
            classes that the task has.

    Returns:
        The loss, and ``task_loss`` and, for integer labels that are classes (one for
        several outputs), ``accuracy``. Labels that don't count may be anything (-1 is
        usual): they reach no gradient either.

    Raises:
        ValueError: ``"classes"`` is not one for each output, or ``"where"`` is not
            boolean.
    """
    outputs, labels = metrics.counted(outputs, batch)
    where = batch.get("where")
    task = metrics.mean(loss(outputs, labels), where=where)
    measured: Metrics = {"task_loss": task}
    integers = jnp.issubdtype(labels.dtype, jnp.integer)
    if integers and _of_classes(outputs, labels):
        accuracy = losses.accuracy(outputs, labels)
        measured["accuracy"] = metrics.mean(accuracy, where=where)
    return metrics.value(task), measured


def added(*parts: Scalar) -> Scalar:
    """Parts of a loss added up, in float32 at least; of other dtypes in the widest."""
    dtype = common_dtype(jnp.float32, *parts)
    return sum((jnp.asarray(part, dtype) for part in parts), jnp.zeros((), dtype))


def _of_classes(outputs: Any, labels: jax.Array) -> bool:
    """Whether labels can be classes: one for the several outputs of a place."""
    shape = getattr(outputs, "shape", ())  # a tree of outputs has none
    return labels.shape == shape[:-1] and shape[-1:] > (1,)


def supervised(model: Model, loss: Loss, *, train: bool) -> Objective:
    """Task loss of a network, of which ``frozen["params"]`` are held.

    Args:
        model: the network.
        loss: of an example.
        train: run what is trained in training mode.

    Returns:
        Objective over batches as :func:`task_loss` reads them, with ``"inputs"``.
    """

    def value(
        params: Params,
        frozen: Frozen,
        model_state: ModelState,
        batch: Batch,
        key: jax.Array,
    ) -> tuple[Scalar, tuple[ModelState, Metrics]]:
        held = frozen.get("params", {})
        outputs, _, model_state = model.apply(
            Variables(tree.combine(params, held), model_state),
            batch["inputs"],
            train=train,
            key=key,
            held=tree.held_modules(params, held),
        )
        total, measured = task_loss(loss, outputs, batch)
        return total, (model_state, measured)

    return value


def predict(model: Model, *, train: bool = False) -> Predict:
    """Outputs of the whole network, trained and held layers together.

    Args:
        model: the network.
        train: normalise by the batch's own statistics.

    Returns:
        ``(params, frozen, model_state, inputs) -> outputs``.
    """

    def run(
        params: Params, frozen: Frozen, model_state: ModelState, inputs: Inputs
    ) -> Any:
        held = frozen.get("params", {})
        return model.apply(
            Variables(tree.combine(params, held), model_state),
            inputs,
            train=train,
            held=tree.held_modules(params, held),
        )[0]

    return run
