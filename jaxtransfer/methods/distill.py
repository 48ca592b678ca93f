"""Distillation: a student learns a teacher's outputs, in one domain or across two.

Learned: the student (``params["student"]``). Given: the teacher
(``frozen["teacher"]``), which runs in evaluation mode and enters the compiled step as
an argument.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer import losses
from jaxtransfer.methods._domains import gather, join
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


def init(student: Variables) -> Variables:
    """Give a student its role, ``{"student": …}``, as the objectives here expect.

    Args:
        student: variables of the student network.

    Returns:
        Variables for :func:`~jaxtransfer.train.init_state`.

    Example:
        >>> import jax.numpy as jnp
        >>> sorted(init(Variables({"w": jnp.ones(2)})).params)
        ['student']
    """
    return Variables({"student": student.params}, {"student": student.model_state})


def _student(params: Params, model_state: ModelState) -> Variables:
    return Variables(params["student"], model_state["student"])


def _divergence(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    temperature: float,
    where: jax.Array | None,
) -> metrics.Mean:
    if student_logits.shape[-1] != teacher_logits.shape[-1]:
        raise ValueError(
            f"student has {student_logits.shape[-1]} classes, teacher "
            f"{teacher_logits.shape[-1]}: logits can't be distilled; match the heads"
        )
    values = losses.knowledge_distillation(
        student_logits, teacher_logits, temperature=temperature
    )
    return metrics.mean(values, where=where)


def _value(pair: metrics.Mean) -> jax.Array:
    return jnp.asarray(pair.total / jnp.maximum(pair.count, 1))


def objective(
    student: Model,
    teacher: Model,
    *,
    temperature: float = 4.0,
    alpha: float = 0.9,
    loss: Callable[[Any, Any], jax.Array] = losses.cross_entropy,
) -> Objective:
    r"""Knowledge distillation of logits, with or without labels.

    .. math:: L = (1 - \alpha)\, \ell(s(x), y) + \alpha\, T^2\,
              \mathrm{KL}(\mathrm{softmax}(t(x)/T) \,\|\, \mathrm{softmax}(s(x)/T))

    Teacher and student see the same inputs. A batch without ``labels`` (transfer
    data) has the second term alone, at weight 1.

    Args:
        student: network of ``params["student"]``; see :func:`init`.
        teacher: network of ``frozen["teacher"]``, a ``Variables``.
        temperature: :math:`T > 0`.
        alpha: weight of the teacher, 0 … 1; at 0 the teacher is not run.
        loss: task loss, ``(outputs, labels) -> [batch]``.

    Returns:
        Objective over batches ``{"inputs", "labels" (optional), "where" (optional)}``.

    Raises:
        ValueError: ``alpha`` or ``temperature`` is out of range; (at the first call)
            teacher and student differ in their number of classes.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from jaxtransfer.model import from_linen
        >>> net = from_linen(nn.Dense(3))
        >>> variables = net.init(jax.random.key(0), jnp.ones((1, 2)))
        >>> start = init(variables)
        >>> loss, _ = objective(net, net)(
        ...     start.params, {"teacher": variables}, start.model_state,
        ...     {"inputs": jnp.ones((4, 2))}, jax.random.key(1))
        >>> round(abs(float(loss)), 6)
        0.0

    References:
        Hinton, Vinyals, Dean, *Distilling the knowledge in a neural network*, 2015.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha: got {alpha}; a weight is in 0 … 1")
    if temperature <= 0:
        raise ValueError(f"temperature: got {temperature}; it must be positive")

    def value(
        params: Params,
        frozen: Frozen,
        model_state: ModelState,
        batch: Batch,
        key: jax.Array,
    ) -> tuple[Scalar, tuple[ModelState, Metrics]]:
        logits, _, student_state = student.apply(
            _student(params, model_state), batch["inputs"], train=True, key=key
        )
        where = batch.get("where")
        measured: Metrics = {}
        total = jnp.zeros((), jnp.float32)
        weight = alpha if "labels" in batch else 1.0
        if weight:
            taught, _, _ = teacher.apply(frozen["teacher"], batch["inputs"])
            measured["distillation"] = _divergence(logits, taught, temperature, where)
            total += weight * _value(measured["distillation"])
        if "labels" in batch:
            measured["task_loss"] = metrics.mean(
                loss(logits, batch["labels"]), where=where
            )
            measured["accuracy"] = metrics.mean(
                losses.accuracy(logits, batch["labels"]), where=where
            )
            if weight < 1:
                total += (1 - weight) * _value(measured["task_loss"])
        return total, ({**model_state, "student": student_state}, measured)

    return value


def cross_domain_objective(
    student: Model,
    teacher: Model,
    *,
    tap: str,
    temperature: float = 4.0,
    distillation: float = 1.0,
    alignment: float = 1.0,
    distance: Callable[[jax.Array, jax.Array], Scalar] = (
        losses.maximum_mean_discrepancy
    ),
    axis_name: str | None = None,
) -> Objective:
    r"""Distil a source teacher into a student for an unlabelled target domain.

    .. math:: L = \lambda_d \left[ \mathrm{KD}_T(s, t; x^S) + \mathrm{KD}_T(s, t; x^T)
              \right] / 2 + \lambda_a\, d(\phi_s(x^S), \phi_s(x^T))

    The teacher teaches on the inputs of both domains (on its own domain it is right
    more often); the student's tapped features of the two are drawn together. No
    labels are read. ``alignment=0`` is distillation alone.

    Args:
        student: network of ``params["student"]``; see :func:`init`.
        teacher: network of ``frozen["teacher"]``, trained on the source domain.
        tap: path of the student's layer whose outputs ``[batch, ...]`` are aligned.
        temperature: :math:`T > 0`.
        distillation: :math:`\lambda_d \ge 0`; at 0 the teacher is not run.
        alignment: :math:`\lambda_a \ge 0`; at 0 the distance is not computed.
        distance: set distance of ``[n, features]`` and ``[m, features]``.
        axis_name: device axis to gather features over under ``pmap`` or ``shard_map``.

    Returns:
        Objective over ``{"source": {"inputs"}, "target": {"inputs"}}``. With
        ``"labels"`` in ``source`` the student's cross-entropy there is added.

    Raises:
        ValueError: (at the first call) source and target have different shapes.
    """

    def value(
        params: Params,
        frozen: Frozen,
        model_state: ModelState,
        batch: Batch,
        key: jax.Array,
    ) -> tuple[Scalar, tuple[ModelState, Metrics]]:
        source, target = batch["source"], batch["target"]
        inputs = join(source["inputs"], target["inputs"])
        count = len(source["inputs"])
        logits, features, student_state = student.apply(
            _student(params, model_state), inputs, train=True, key=key, taps=(tap,)
        )
        measured: Metrics = {}
        total = jnp.zeros((), jnp.float32)
        if distillation:
            taught, _, _ = teacher.apply(frozen["teacher"], inputs)
            of_source = _divergence(logits[:count], taught[:count], temperature, None)
            of_target = _divergence(logits[count:], taught[count:], temperature, None)
            measured["distillation"] = of_target
            total += distillation * (_value(of_source) + _value(of_target)) / 2
        if alignment:
            rows = features[tap].reshape(len(inputs), -1)
            measured["alignment"] = distance(
                *gather((rows[:count], rows[count:]), axis_name)
            )
            total += alignment * measured["alignment"]
        if "labels" in source:
            measured["task_loss"] = metrics.mean(
                losses.cross_entropy(logits[:count], source["labels"])
            )
            total += _value(measured["task_loss"])
        return total, ({**model_state, "student": student_state}, measured)

    return value


def predict(student: Model) -> Predict:
    """Outputs of the student.

    Args:
        student: the network given to the objective.

    Returns:
        ``(params, frozen, model_state, inputs) -> outputs`` in evaluation mode.
    """

    def run(
        params: Params, frozen: Frozen, model_state: ModelState, inputs: Inputs
    ) -> Any:
        del frozen
        return student.apply(_student(params, model_state), inputs)[0]

    return run


__all__ = ["cross_domain_objective", "init", "objective", "predict"]
