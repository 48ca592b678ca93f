"""Students that learn together, and objectives that follow one another."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer import losses
from jaxtransfer.methods._supervised import Loss, task_loss
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
    """
    own = params["cohort"], model_state["cohort"]
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
            task, measured = jnp.zeros(()), {}
            if "labels" in batch:
                task, measured = task_loss(loss, output, batch)
            return output, state, task, measured

        count = len(jax.tree.leaves(params["cohort"])[0])
        outputs, states, tasks, measured = jax.vmap(one)(
            params["cohort"], model_state["cohort"], jax.random.split(key, count)
        )
        where = batch.get("where")
        mutual = losses.mutual_learning(outputs, temperature=temperature, where=where)
        rows = where if where is None else jnp.broadcast_to(where, mutual.shape)
        together = metrics.mean(mutual, where=rows)
        total = jnp.sum(tasks) + weight * count * metrics.value(together)
        measured = {
            name: Mean(jnp.sum(pair.total), jnp.sum(pair.count))
            for name, pair in measured.items()
        }
        state = {**model_state, "cohort": states}
        return total, (state, {**measured, "distillation": together})

    return value


def stages(*parts: tuple[int | None, Objective]) -> Objective:
    """One objective after the other: hints first, then distillation.

    The stage follows the count of updates, so a run that is resumed is in the right
    one. Only the stage's objective is computed (``lax.switch``; under ``vmap`` over
    runs, all of them).

    Args:
        *parts: (updates, objective), in turn; None for the last, which has no end. All
            return a model state of the same structure, which is that of the variables.

    Returns:
        Objective over variables of :func:`~jaxtransfer.methods.distill.counted`. Its
        metrics are those of all stages; what a stage does not measure counts nothing.

    Raises:
        ValueError: no parts, a number of updates below 1, or None before the last; (at
            the first call) nobody counts.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> def pull(to):
        ...     def objective(params, frozen, model_state, batch, key):
        ...         return (params["w"] - to) ** 2, (model_state, {})
        ...     return objective
        >>> both = stages((2, pull(0.0)), (None, pull(1.0)))
        >>> def loss(updates):
        ...     state = {"updates": jnp.array(updates)}
        ...     start = {"w": jnp.array(3.0)}
        ...     return float(both(start, {}, state, {}, jax.random.key(0))[0])
        >>> loss(1), loss(2)
        (9.0, 4.0)
    """
    lengths = [length for length, _ in parts]
    if (
        not parts
        or None in lengths[:-1]
        or any(n is not None and n < 1 for n in lengths)
    ):
        raise ValueError(
            f"stages: got lengths {lengths}; give (updates, objective) for each, 1 or "
            "more, and None for the last alone"
        )
    ends = _ends(lengths)

    def value(
        params: Params,
        frozen: Frozen,
        model_state: ModelState,
        batch: Batch,
        key: jax.Array,
    ) -> tuple[Scalar, tuple[ModelState, Metrics]]:
        if "updates" not in model_state:
            raise ValueError(
                "stages follow the number of updates, which the model state lacks; "
                "start from distill.counted(variables)"
            )
        given = params, frozen, model_state, batch, key
        names: dict[str, Mean] = {}
        for _, objective in parts:
            measured = jax.eval_shape(_promoted(objective), *given)[1][1]
            names |= {name: Mean(0.0, 0.0) for name in measured}

        def branch(objective: Objective) -> Callable[..., Any]:
            def run(*given: Any) -> Any:
                loss, (state, measured) = _promoted(objective)(*given)
                every = {name: measured.get(name, none) for name, none in names.items()}
                every = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), every)
                state = {**state, "updates": model_state["updates"] + 1}
                return jnp.asarray(loss, jnp.float32), (state, every)

            return run

        number = jnp.searchsorted(
            jnp.asarray(ends), model_state["updates"], side="right"
        )
        return jax.lax.switch(number, [branch(part) for _, part in parts], *given)

    return value


def _ends(lengths: Sequence[int | None]) -> list[int]:
    """Numbers of updates at which the next stage begins."""
    ends, total = [], 0
    for length in lengths[:-1]:
        total += length or 0
        ends.append(total)
    return ends


def _promoted(objective: Objective) -> Objective:
    def run(*given: Any) -> Any:
        loss, (state, measured) = objective(*given)
        return loss, (state, metrics.promote(measured))

    return run


__all__ = ["init_cohort", "mutual_objective", "of_cohort", "stages"]
