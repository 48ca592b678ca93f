"""What a student begins with: its bridges, memories and a count of updates."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer import prng
from jaxtransfer.methods._counting import counted
from jaxtransfer.methods.distill.student import init
from jaxtransfer.methods.distill.views import Teacher, Terms, Views, bridge_of
from jaxtransfer.typing import Inputs, Model, Variables


def start(
    key: jax.Array,
    student: Model,
    teacher: Teacher,
    terms: Terms,
    *,
    student_variables: Variables,
    teacher_variables: Any = None,
    inputs: Inputs,
    teacher_inputs: Inputs | None = None,
) -> Variables:
    """A student with what its terms need: bridges, memories, a count of updates.

    The shapes of bridges are inferred; no network is run.

    Args:
        key: of the bridges' first values.
        student: the network.
        teacher: as for :func:`objective`.
        terms: as for :func:`objective`.
        student_variables: of the student.
        teacher_variables: ``frozen["teacher"]``; may be left out if no term has a
            bridge.
        inputs: a batch of inputs, of which only the shapes matter.
        teacher_inputs: those of the teacher, if others.

    Returns:
        Variables for :func:`~jaxtransfer.train.init_state`. The count is always there,
        for ``task_weight`` may follow it even where no term does.

    Raises:
        ValueError: an unknown teacher; features that no bridge can bring together.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from jaxtransfer import losses, nets
        >>> from jaxtransfer.methods import distill
        >>> from jaxtransfer.model import from_linen
        >>> small = from_linen(nets.MLP(3, widths=(4,)))
        >>> large = from_linen(nets.MLP(3, widths=(8,)))
        >>> x, key = jnp.ones((5, 2)), jax.random.key(0)
        >>> terms = {"hint": distill.Term(loss=losses.hint, student="features",
        ...     teacher="features", bridge=distill.match())}
        >>> begun = distill.start(
        ...     key, small, large, terms, inputs=x,
        ...     student_variables=small.init(key, x),
        ...     teacher_variables=large.init(key, x))
        >>> begun.params["bridges"]["hint"]["channels"]["kernel"].shape
        (4, 8)
    """
    terms = {name: term for name, term in terms.items() if not term.absent}
    begun = init(student_variables)
    params, state = dict(begun.params), dict(begun.model_state)
    bridged = {name: term for name, term in terms.items() if term.bridge}
    if bridged:
        seen = Views(student, teacher, bridged)

        def views(own: Variables, given: Any, inputs: Any, others: Any) -> Any:
            frozen = {} if given is None else {"teacher": given}
            batch = {"inputs": inputs}
            if others is not None:
                batch["teacher_inputs"] = others
            role = init(own)
            found, _ = seen.of_student(
                role.params, role.model_state, batch, jax.random.key(0)
            )
            return found, seen.of_teachers(found, frozen, role.model_state, batch)

        own, others = jax.eval_shape(
            views, student_variables, teacher_variables, inputs, teacher_inputs
        )
        bridges = {}
        for name, term in bridged.items():
            model, here = bridge_of(name, term, own, others)
            if model is None:
                continue
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), here)
            bridges[name] = jax.jit(model.init)(prng.stream(key, name), zeros)
        params["bridges"] = {name: made.params for name, made in bridges.items()}
        state["bridges"] = {name: made.model_state for name, made in bridges.items()}
    carried = {n: term.state for n, term in terms.items() if term.state is not None}
    if carried:
        state["terms"] = carried
    return counted(Variables(params, state))


__all__ = ["start"]
