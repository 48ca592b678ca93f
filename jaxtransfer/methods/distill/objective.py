"""The objective of distillation: a task loss and any number of terms.

Learned: the student (``params["student"]``) and its bridges (``params["bridges"]``).
Given: the teacher or teachers (``frozen["teacher"]``), which run in evaluation mode and
enter the compiled step as an argument.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxtransfer import losses, prng
from jaxtransfer.methods._supervised import added, task_loss
from jaxtransfer.methods.distill.student import check_whole
from jaxtransfer.methods.distill.terms import Scheduled, Term, evaluate, weigh
from jaxtransfer.methods.distill.views import Teacher, Terms, Views, bridge_of, sides
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
    Variables,
)


def divergence(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    temperature: Any,
    where: jax.Array | None = None,
) -> metrics.Mean:
    """Knowledge distillation over the rows that count.

    Raises:
        ValueError: they differ in their number of classes.
    """
    values = _knowledge_distillation(
        student_logits, teacher_logits, temperature=temperature, where=where
    )
    return metrics.mean(values, where=where)


def _knowledge_distillation(
    student_logits: jax.Array, teacher_logits: jax.Array, **options: Any
) -> jax.Array:
    if student_logits.shape[-1] != teacher_logits.shape[-1]:
        raise ValueError(
            f"student has {student_logits.shape[-1]} classes, teacher "
            f"{teacher_logits.shape[-1]}: logits can't be distilled; match the heads"
        )
    return losses.knowledge_distillation(student_logits, teacher_logits, **options)


def objective(
    student: Model,
    teacher: Teacher = None,
    *,
    terms: Terms | None = None,
    task_weight: Scheduled | None = None,
    temperature: float | None = None,
    alpha: float | None = None,
    loss: Callable[[Any, Any], jax.Array] = losses.cross_entropy,
) -> Objective:
    r"""Distillation: a task loss and weighted terms between student and teachers.

    .. math:: L = w\, \ell(s(x), y) + \sum_k w_k\, L_k(s(x), t(x))

    Without ``terms``, knowledge distillation of logits:

    .. math:: L = (1 - \alpha)\, \ell(s(x), y) + \alpha\, T^2\,
              \mathrm{KL}(\mathrm{softmax}(t(x)/T) \,\|\, \mathrm{softmax}(s(x)/T))

    Teacher and student see the same inputs, unless the batch has ``teacher_inputs``.
    Each network is run once, whatever taps it. A batch without ``labels`` (transfer
    data) has no task loss; without ``terms`` the other part then has weight 1.

    Args:
        student: network of ``params["student"]``; see :func:`init` and :func:`start`.
        teacher: network of ``frozen["teacher"]``, a ``Variables``; or several by name,
            of ``frozen["teacher"][name]``; None if no term needs one.
        terms: by name; see :class:`~jaxtransfer.methods.distill.Term`.
        task_weight: :math:`w`, a number or a schedule, with ``terms``; 1 by default.
            0.0 leaves the task loss out.
        temperature: :math:`T > 0`, without ``terms``; 4 by default.
        alpha: weight of the teacher, 0 … 1, without ``terms``; 0.9 by default, at 0 it
            is not run.
        loss: task loss, ``(outputs, labels) -> [batch]``.

    Returns:
        Objective over batches ``{"inputs", "labels" (optional), "where" (optional)}``
        and what the terms read. ``"teacher"`` in a batch, ``{"": outputs, path:
        features}`` (by name if there are several), takes the place of running it. Its
        metrics are ``task_loss``, ``accuracy`` for integer labels, and the terms by
        name, without their weights.

    Raises:
        ValueError: ``alpha`` or ``temperature`` is out of range or a schedule, which
            terms alone have; one of them is given with ``terms``, or ``task_weight``
            without; an unknown teacher, or a name that is taken; (at the first call)
            teacher and student differ in their number of classes, several teachers of
            one term have unlike shapes, a bridge or a memory was not started, layers of
            the student are held, or the batch lacks what a term reads, or has
            ``"teacher"`` of another form.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from jaxtransfer.methods import distill
        >>> from jaxtransfer.model import from_linen
        >>> net = from_linen(nn.Dense(3))
        >>> variables = net.init(jax.random.key(0), jnp.ones((1, 2)))
        >>> begun = distill.init(variables)
        >>> loss, _ = distill.objective(net, net)(
        ...     begun.params, {"teacher": variables}, begun.model_state,
        ...     {"inputs": jnp.ones((4, 2))}, jax.random.key(1))
        >>> round(abs(float(loss)), 6)
        0.0

    References:
        Hinton, Vinyals, Dean, *Distilling the knowledge in a neural network*, 2015.
    """
    plain = terms is None
    if plain and task_weight is not None:
        raise ValueError(
            f"task_weight: got {task_weight} without terms, where it is 1 - alpha; "
            "give alpha=..., or terms={'logits': distill.Term("
            "loss=losses.knowledge_distillation, weight=..., options={'temperature': "
            "...})} beside it"
        )
    for name, given in (("alpha", alpha), ("temperature", temperature)):
        if not plain and given is not None:
            raise ValueError(
                f"{name}: got {given} with terms, which have their own; give "
                "distill.Term(weight=..., options={'temperature': ...}) and "
                "task_weight=..."
            )
        if callable(given):
            raise ValueError(
                f"{name}: a schedule needs a term; give terms={{'logits': "
                "distill.Term(loss=losses.knowledge_distillation, weight=..., "
                "options={'temperature': ...})} and task_weight=..., of which each may "
                "be a schedule, and begin with distill.start(...)"
            )
    alpha = 0.9 if alpha is None else alpha
    temperature = 4.0 if temperature is None else temperature
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha: got {alpha}; a weight is in 0 … 1")
    if temperature <= 0:
        raise ValueError(f"temperature: got {temperature}; it must be positive")
    if plain:
        terms = {
            "distillation": Term(
                loss=_knowledge_distillation, options={"temperature": temperature}
            )
        }
        task_weight = 1 - alpha
    elif task_weight is None:
        task_weight = 1.0
    taken = sorted({"loss", "task_loss", "accuracy", "gradient_norm"} & set(terms))
    if taken:
        raise ValueError(f"terms: {taken[0]!r} is the name of a metric; choose another")

    if not plain or teacher is not None:
        Views(student, teacher, terms)  # refuses unknown teachers

    def weighted(batch: Batch) -> Terms:
        """The terms that count for such a batch."""
        now = terms
        if plain:
            weight = alpha if "labels" in batch else 1.0
            now = {n: dataclasses.replace(t, weight=weight) for n, t in terms.items()}
        return {name: term for name, term in now.items() if not term.absent}

    def value(
        params: Params,
        frozen: Frozen,
        model_state: ModelState,
        batch: Batch,
        key: jax.Array,
    ) -> tuple[Scalar, tuple[ModelState, Metrics]]:
        check_whole(params, frozen)
        now = weighted(batch)
        views = Views(student, teacher, now)
        updates = model_state.get("updates")
        own, student_state = views.of_student(params, model_state, batch, key)
        others = views.of_teachers(own, frozen, model_state, batch)
        state: dict[str, Any] = {**model_state, "student": student_state}
        bridges, carried = dict(state.get("bridges", {})), dict(state.get("terms", {}))
        measured: Metrics = {}
        parts: list[Scalar] = []
        for name, term in now.items():
            here, there = sides(name, term, own, others)
            if term.bridge is not None:
                model, mine = bridge_of(name, term, own, others)
                if model is not None:
                    crossed, bridges[name] = _cross(
                        name, model, params, bridges, mine, key
                    )
                    here = crossed if type(mine) is tuple else (crossed,)
            measured[name] = evaluate(
                name,
                term,
                here,
                there,
                batch,
                updates=updates,
                carried=carried,
                key=prng.stream(key, f"term {name}"),
            )
            what, found = f"term {name!r}: its weight", metrics.value(measured[name])
            parts.append(weigh(updates, term.weight, what, found))
        if "labels" in batch:
            task, of_task = task_loss(loss, own[""], batch)
            measured |= of_task
            if callable(task_weight) or task_weight:
                parts.append(weigh(updates, task_weight, "task_weight", task))
        for name, kept in (("bridges", bridges), ("terms", carried)):
            if kept:
                state[name] = kept
        if updates is not None:
            state["updates"] = updates + 1
        return added(*parts), (state, measured)

    return value


def _cross(
    name: str,
    model: Model,
    params: Params,
    states: Mapping[str, Any],
    inputs: Any,
    key: jax.Array,
) -> tuple[Any, ModelState]:
    """Student's features over a bridge, and the bridge's state."""
    if name not in params.get("bridges", {}):
        raise ValueError(
            f"term {name!r} needs a bridge, which the parameters lack; begin with "
            "distill.start(...)"
        )
    output, _, state = model.apply(
        Variables(params["bridges"][name], states.get(name, {})),
        inputs,
        train=True,
        key=prng.stream(key, f"bridge {name}"),
    )
    return output, state


__all__ = ["objective"]
