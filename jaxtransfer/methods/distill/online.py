"""Students that learn together."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer import losses
from jaxtransfer.methods._supervised import Loss, task_loss
from jaxtransfer.ops.dtypes import number
from jaxtransfer.train import metrics
from jaxtransfer.typing import (
    Batch,
    Frozen,
    Inputs,
    Mean,
    Metrics,
    Model,
    ModelState,
    Objective,
    Params,
    Scalar,
    Variables,
)


def init_cohort(
    key: jax.Array, student: Model, inputs: Inputs, *, students: int
) -> Variables:
    """Several students of one architecture, each with its own first values.

    Args:
        key: of the first values.
        student: the network.
        inputs: example of its inputs.
        students: how many, 2 or more.

    Returns:
        Variables for :func:`~jaxtransfer.train.init_state`: ``params["cohort"]`` has a
        leading axis ``[students]``.

    Raises:
        ValueError: fewer than two students.
    """
    if students < 2:
        raise ValueError(f"students: got {students}; a cohort has 2 or more")
    keys = jax.random.split(key, students)
    made = jax.vmap(student.init, in_axes=(0, None))(keys, inputs)
    return Variables({"cohort": made.params}, {"cohort": made.model_state})


def of_cohort(params: Params, model_state: ModelState, number: int) -> Variables:
    """One student of a cohort, as variables of its network.

    Args:
        params: of the training state.
        model_state: of the training state.
        number: of the student, from 0.

    Returns:
        Variables of the student network.

    Raises:
        ValueError: there is no such student.
    """
    own = params["cohort"], model_state["cohort"]
    students = len(jax.tree.leaves(own)[0])
    if isinstance(number, int) and not 0 <= number < students:
        raise ValueError(f"number: 0 to {students - 1}, got {number}")
    return Variables(*jax.tree.map(lambda leaf: leaf[number], own))


def mutual_objective(
    student: Model,
    *,
    weight: float = 1.0,
    temperature: float = 1.0,
    loss: Loss = losses.cross_entropy,
) -> Objective:
    r"""Deep mutual learning (DML): students teach each other while they learn.

    .. math:: L_i = \ell(s_i(x), y) + \frac{w}{K - 1} \sum_{j \ne i}
              T^2\, \mathrm{KL}(p_j \,\|\, p_i)

    The peers are constants to each student; all take their step at once (vmapped), from
    what the others were before it. The objective is the sum over students, so that each
    has the gradient of its own loss.

    Args:
        student: network of every student; see :func:`init_cohort`.
        weight: :math:`w \ge 0`.
        temperature: :math:`T > 0`.
        loss: task loss, ``(outputs, labels) -> [batch]``.

    Returns:
        Objective over batches ``{"inputs", "labels" (optional), "where" (optional)}``;
        its metrics are means over students, ``distillation``, ``task_loss``,
        ``accuracy``.

    References:
        Zhang et al., *Deep mutual learning*, CVPR 2018, eqs. 3-6.
    """
    weight, temperature = number(weight), number(temperature)

    def value(
        params: Params,
        frozen: Frozen,
        model_state: ModelState,
        batch: Batch,
        key: jax.Array,
    ) -> tuple[Scalar, tuple[ModelState, Metrics]]:
        del frozen

        def one(own: Params, state: ModelState, key: jax.Array) -> Any:
            output, _, state = student.apply(
                Variables(own, state), batch["inputs"], train=True, key=key
            )
            supervised = task_loss(loss, output, batch) if "labels" in batch else None
            return output, state, supervised

        count = len(jax.tree.leaves(params["cohort"])[0])
        outputs, states, supervised = jax.vmap(one)(
            params["cohort"], model_state["cohort"], jax.random.split(key, count)
        )
        where = batch.get("where")
        mutual = losses.mutual_learning(outputs, temperature=temperature, where=where)
        if where is not None:
            where = jnp.broadcast_to(metrics.cover(where, mutual[0]), mutual.shape)
        together = metrics.mean(mutual, where=where)
        total = weight * count * metrics.value(together)
        measured: Metrics = {}
        if supervised is not None:
            tasks, measured = supervised
            total = jnp.sum(tasks) + total
        measured = {
            name: Mean(jnp.sum(pair.total), jnp.sum(pair.count))
            for name, pair in measured.items()
        }
        state = {**model_state, "cohort": states}
        return total, (state, {**measured, "distillation": together})

    return value


__all__ = ["init_cohort", "mutual_objective", "of_cohort"]
