"""What the terms of distillation look at: every network run once."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.methods.distill.student import of_student
from jaxtransfer.methods.distill.terms import Term, paths, taps
from jaxtransfer.typing import (
    Batch,
    Features,
    Frozen,
    Model,
    ModelState,
    Params,
    Variables,
)

TEACHER, STUDENT, AVERAGE = "teacher", "student", "average"
Teacher = Model | Mapping[str, Model] | None
Terms = Mapping[str, Term]


class Views:
    """What the terms look at, each network run once."""

    def __init__(self, student: Model, teacher: Teacher, terms: Terms):
        several = {} if teacher is None else teacher
        if isinstance(several, Model):
            several = {TEACHER: several}
        if taken := sorted({STUDENT, AVERAGE} & set(several)):
            raise ValueError(
                f"teacher: {taken[0]!r} is the name of the student's own side; choose "
                "another"
            )
        self.alone = isinstance(teacher, Model)
        self.student, self.terms = student, terms
        self.models = {**several, AVERAGE: student}
        for name, term in terms.items():
            unknown = set(term.teachers) - {*self.models, STUDENT}
            if unknown:
                raise ValueError(
                    f"term {name!r}: no teacher {sorted(unknown)[0]!r}; there are "
                    f"{sorted(several)}, and 'student' and 'average'"
                )

    def _paths(self, teacher: str) -> list[str]:
        return [
            path
            for term in self.terms.values()
            if teacher in term.teachers
            for path in paths(term.teacher)
        ]

    def of_student(
        self, params: Params, model_state: ModelState, batch: Batch, key: jax.Array
    ) -> tuple[Features, ModelState]:
        """Output (under ``""``) and features of the student, and its new state."""
        wanted = [path for t in self.terms.values() for path in paths(t.student)]
        output, features, state = self.student.apply(
            of_student(params, model_state),
            batch["inputs"],
            train=True,
            key=key,
            taps=taps([*wanted, *self._paths(STUDENT)]),
        )
        return {**features, "": output}, state

    def of_teachers(
        self, own: Features, frozen: Frozen, model_state: ModelState, batch: Batch
    ) -> dict[str, Features]:
        """The same of every teacher that a term needs, from the batch if it is there.

        Raises:
            ValueError: there are no variables for a teacher.
        """
        found: dict[str, Features] = {}
        cached = batch.get("teacher", {})
        if self.alone and cached:
            cached = {TEACHER: cached}
        for name in dict.fromkeys(n for t in self.terms.values() for n in t.teachers):
            wanted = self._paths(name)
            if name == STUDENT:
                found[name] = jax.lax.stop_gradient(own)
                continue
            if name in cached:
                lacking = [path for path in wanted if path not in cached[name]]
                if lacking:
                    raise ValueError(
                        f"teacher {name!r}: the batch has {sorted(cached[name])} of "
                        f"it, but a term needs {lacking[0]!r}; cache that as well"
                    )
                found[name] = cached[name]
                continue
            output, features, _ = self.models[name].apply(
                self._variables(name, frozen, model_state),
                batch.get("teacher_inputs", batch["inputs"]),
                taps=taps(wanted),
            )
            found[name] = jax.lax.stop_gradient({**features, "": output})
        return found

    def _variables(
        self, name: str, frozen: Frozen, model_state: ModelState
    ) -> Variables:
        if name == AVERAGE:
            if AVERAGE not in model_state:
                raise ValueError(
                    "the model state has no 'average'; begin with "
                    "distill.with_average(variables)"
                )
            return Variables(**model_state[AVERAGE])
        if TEACHER not in frozen:
            raise ValueError(
                "frozen: there is no 'teacher'; give its variables to "
                "train.init_state(..., frozen={'teacher': ...})"
            )
        if self.alone:
            return frozen[TEACHER]
        if name not in frozen[TEACHER]:
            raise ValueError(
                f"frozen['teacher'] has {sorted(frozen[TEACHER])}, but a term needs "
                f"{name!r}"
            )
        return frozen[TEACHER][name]


def sides(
    term: Term, own: Features, others: Mapping[str, Features]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What a term compares."""
    here = tuple(own[path] for path in paths(term.student))
    if isinstance(term.of, str):
        there = tuple(others[term.of][path] for path in paths(term.teacher))
    else:
        there = tuple(
            jnp.stack([others[name][path] for name in term.of])
            for path in paths(term.teacher)
        )
    return here, there


def bridge_of(
    name: str, term: Term, own: Features, others: Mapping[str, Features]
) -> tuple[Model | None, Any]:
    """A term's bridge, from the shapes of its two sides, and the student's side.

    One layer to one, or several to as many: the bridge is then made from their shapes
    in tuples, and the student's side is a tuple.
    """
    here, there = paths(term.student), paths(term.teacher)
    if len(here) != len(there):
        raise ValueError(
            f"term {name!r}: a bridge joins as many layers of the student as of the "
            f"teacher, got {term.student!r} and {term.teacher!r}"
        )
    mine = tuple(own[path] for path in here)
    theirs = tuple(others[term.teachers[0]][path] for path in there)
    assert term.bridge is not None
    if len(here) == 1:
        return term.bridge(mine[0].shape, theirs[0].shape), mine[0]
    return term.bridge(
        tuple(x.shape for x in mine), tuple(x.shape for x in theirs)
    ), mine
