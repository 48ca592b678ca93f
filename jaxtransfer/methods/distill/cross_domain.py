"""Distillation from a teacher of one domain to a student for another."""

from collections.abc import Callable

import jax

from jaxtransfer import losses
from jaxtransfer.methods._domains import check_gathered_once, domains, gather, join
from jaxtransfer.methods._supervised import added, task_loss
from jaxtransfer.methods.distill.objective import divergence
from jaxtransfer.methods.distill.student import check_whole, of_student
from jaxtransfer.ops.dtypes import number
from jaxtransfer.train import metrics
from jaxtransfer.typing import (
    Batch,
    Frozen,
    Metrics,
    Model,
    ModelState,
    Objective,
    Params,
    Scalar,
)


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
        ``"labels"`` in ``source`` the student's cross-entropy there is added, among the
        ``"classes"`` that it may have. The
        metric ``distillation`` is that of the target, ``alignment`` the distance.

    Raises:
        ValueError: (at the first call) source and target have different shapes, or one
            of them ``"where"``, layers of the student are held, or the distance has an
            ``axis_name`` too.
    """
    temperature, distillation, alignment = map(
        number, (temperature, distillation, alignment)
    )

    def value(
        params: Params,
        frozen: Frozen,
        model_state: ModelState,
        batch: Batch,
        key: jax.Array,
    ) -> tuple[Scalar, tuple[ModelState, Metrics]]:
        check_whole(params, frozen)
        source, target = domains(batch)
        inputs = join(source["inputs"], target["inputs"])
        count = len(source["inputs"])
        logits, features, student_state = student.apply(
            of_student(params, model_state), inputs, train=True, key=key, taps=(tap,)
        )
        measured: Metrics = {}
        parts: list[Scalar] = []
        if distillation:
            taught, _, _ = teacher.apply(frozen["teacher"], inputs)
            of_source = divergence(logits[:count], taught[:count], temperature)
            of_target = divergence(logits[count:], taught[count:], temperature)
            measured["distillation"] = of_target
            both = metrics.value(of_source) + metrics.value(of_target)
            parts.append(distillation * both / 2)
        if alignment:
            rows = features[tap].reshape(len(inputs), -1)
            check_gathered_once(distance, axis_name, "alignment")
            measured["alignment"] = distance(
                *gather((rows[:count], rows[count:]), axis_name)
            )
            parts.append(alignment * measured["alignment"])
        if "labels" in source:
            task, own = task_loss(losses.cross_entropy, logits[:count], source)
            measured |= own
            parts.append(task)
        return added(*parts), ({**model_state, "student": student_state}, measured)

    return value


__all__ = ["cross_domain_objective"]
