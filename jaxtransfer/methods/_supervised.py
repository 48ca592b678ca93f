"""The task loss of a network on labelled examples: what several methods build on."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer import losses, tree
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

ABSENT = -1e9
"""Logit of a class that a task does not have."""


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
        The loss, and ``task_loss`` and, for integer labels, ``accuracy``. Labels that
        don't count may be anything (-1 is usual): they reach no gradient either.

    Raises:
        ValueError: ``"classes"`` is not one for each output, or ``"where"`` is not
            boolean.
    """
    labels, where = jnp.asarray(batch["labels"]), batch.get("where")
    if where is not None:
        labels = jnp.where(metrics.cover(where, labels), labels, 0)
    if "classes" in batch:
        present = jnp.asarray(batch["classes"])
        if present.shape[-1:] != outputs.shape[-1:]:
            raise ValueError(
                f"classes: got shape {present.shape} for outputs {outputs.shape}; give "
                "[classes], or [batch, classes] where a batch is divided among devices"
            )
        outputs = jnp.where(present, outputs, ABSENT)
    task = metrics.mean(loss(outputs, labels), where=where)
    measured: Metrics = {"task_loss": task}
    if jnp.issubdtype(labels.dtype, jnp.integer):
        accuracy = losses.accuracy(outputs, labels)
        measured["accuracy"] = metrics.mean(accuracy, where=where)
    return metrics.value(task), measured


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
