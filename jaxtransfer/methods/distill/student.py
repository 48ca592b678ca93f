"""The student in a training state, and its moving average."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer import tree
from jaxtransfer.losses.reduction import widen
from jaxtransfer.ops.dtypes import number
from jaxtransfer.train.state import TrainState
from jaxtransfer.typing import (
    Frozen,
    Inputs,
    Model,
    ModelState,
    Params,
    Predict,
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


def of_student(params: Params, model_state: ModelState) -> Variables:
    """The student alone: what is saved, exported or used as the next teacher.

    Args:
        params: of the training state.
        model_state: of the training state.

    Returns:
        Variables of the student network, without bridges.

    Raises:
        ValueError: there is no student.
    """
    if "student" not in params:
        raise ValueError(
            f"params: got {sorted(params)}, but no 'student'; begin with "
            "distill.init(variables) or distill.start(...)"
        )
    return Variables(params["student"], model_state["student"])


def check_whole(params: Params, frozen: Frozen) -> None:
    """A student is trained as a whole, unlike a network that is fine-tuned.

    Raises:
        ValueError: some of its parameters are held, in ``frozen["params"]`` alone.
    """
    held = (frozen or {}).get("params")
    held = held.get("student") if isinstance(held, Mapping) else None
    if not isinstance(held, Mapping):
        return
    trained = tree.flatten(params.get("student", {}))
    if lacking := sorted(set(tree.flatten(held)) - set(trained)):
        raise ValueError(
            f"frozen['params'] holds {'student/' + lacking[0]!r} (one of "
            f"{len(lacking)}), but a student is trained as a whole; leave "
            "finetune.split out, and hold layers in the optimizer: "
            "optax.multi_transform with optax.set_to_zero()"
        )


def predict(student: Model) -> Predict:
    """Outputs of the student.

    Args:
        student: the network given to the objective.

    Returns:
        ``(params, frozen, model_state, inputs) -> outputs`` in evaluation mode.

    Raises:
        ValueError: (at the call) layers of the student are held.
    """

    def run(
        params: Params, frozen: Frozen, model_state: ModelState, inputs: Inputs
    ) -> Any:
        check_whole(params, frozen)
        return student.apply(of_student(params, model_state), inputs)[0]

    return run


def with_average(variables: Variables) -> Variables:
    """Begin the student's moving average at the student.

    Args:
        variables: from :func:`init` or :func:`~jaxtransfer.methods.distill.start`.

    Returns:
        Variables whose model state has ``"average"``: the teacher of that name in a
        :class:`~jaxtransfer.methods.distill.Term`. It is kept (and teaches) in float32
        at least: in bfloat16 0.999 is 1, and it would never follow.

    Raises:
        ValueError: there is no student.
    """
    own = of_student(variables.params, variables.model_state)._asdict()

    def wide(leaf: Any) -> jax.Array:
        leaf = jnp.asarray(leaf)
        return widen(leaf) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf

    state = {**variables.model_state, "average": jax.tree.map(wide, own)}
    return Variables(variables.params, state)


def moving_average(decay: float) -> Callable[[TrainState], TrainState]:
    r"""The mean teacher: a moving average of the student, statistics included.

    .. math:: \bar\theta \leftarrow d\,\bar\theta + (1 - d)\,\theta

    Args:
        decay: :math:`d`, 0 … 1.

    Returns:
        ``after_update`` for :func:`~jaxtransfer.train.train_step`, of a state that
        began with :func:`with_average`.

    Raises:
        ValueError: ``decay`` is not in 0 … 1; (at the call) there is no average.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from jaxtransfer.train import init_state
        >>> begun = with_average(init(Variables({"w": jnp.array(1.0)})))
        >>> state = init_state(jax.random.key(0), begun, optax.sgd(0.1))
        >>> state = state.replace(params={"student": {"w": jnp.array(3.0)}})
        >>> state = moving_average(0.5)(state)
        >>> float(state.model_state["average"]["params"]["w"])
        2.0

    References:
        Tarvainen, Valpola, *Mean teachers are better role models*, NeurIPS 2017, eq. 2.
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay: got {decay}; it must lie in 0 … 1")
    decay = number(decay)

    def follow(state: TrainState) -> TrainState:
        if "average" not in state.model_state:
            raise ValueError(
                "the model state has no 'average'; begin with "
                "distill.with_average(variables)"
            )
        own = of_student(state.params, state.model_state)._asdict()

        def move(old: jax.Array, new: jax.Array) -> jax.Array:
            if not jnp.issubdtype(new.dtype, jnp.inexact):
                return new
            return decay * old + (1 - decay) * new.astype(old.dtype)

        average = jax.tree.map(move, state.model_state["average"], own)
        return state.replace(model_state={**state.model_state, "average": average})

    return follow


__all__ = ["init", "moving_average", "of_student", "predict", "with_average"]
