"""One student after the other: born-again networks and teacher assistants."""

from collections.abc import Callable, Sequence

import jax

from jaxtransfer import prng
from jaxtransfer.typing import Model, Variables

Train = Callable[[jax.Array, Model, Model, Variables], Variables]
"""``(key, student, teacher, teacher's variables) -> student's variables``."""


def generations(
    key: jax.Array,
    teacher: Model,
    variables: Variables,
    students: Sequence[Model],
    train: Train,
) -> list[Variables]:
    """Students in a row, each taught by the one before it.

    Students of the teacher's own architecture are born-again networks, whose last, or
    all together (several teachers; ``losses.multi_teacher_distillation`` of their
    stacked outputs), is kept. Ever smaller ones are teacher assistants, that bridge a
    gap which is too wide for one step.

    Args:
        key: of all trainings; each gets one of its own.
        teacher: the first teacher.
        variables: of the first teacher.
        students: the networks, in turn.
        train: a whole training of one student, by
            :func:`~jaxtransfer.methods.distill.objective` for example.

    Returns:
        Variables of each student.

    Raises:
        ValueError: there are no students.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxtransfer import model, nets
        >>> net = model.from_linen(nets.MLP(outputs=3))
        >>> def train(key, student, teacher, variables):
        ...     return Variables({"w": variables.params["w"] / 2}, {})
        >>> first = Variables({"w": jnp.array(8.0)}, {})
        >>> found = generations(jax.random.key(0), net, first, [net] * 3, train)
        >>> [float(one.params["w"]) for one in found]
        [4.0, 2.0, 1.0]

    References:
        Furlanello et al., *Born-again neural networks*, ICML 2018; Mirzadeh et al.,
        *Improved knowledge distillation via teacher assistant*, AAAI 2020.
    """
    if not students:
        raise ValueError("students: there are none; give one network a generation")
    found: list[Variables] = []
    for number, student in enumerate(students):
        own = prng.stream(key, f"generation {number}")
        variables = train(own, student, teacher, variables)
        teacher = student
        found.append(variables)
    return found


__all__ = ["Train", "generations"]
