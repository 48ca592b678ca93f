"""What the terms of distillation look at: every network run once."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer import tree
from jaxtransfer.methods.distill.student import of_student
from jaxtransfer.methods.distill.taught import TOP_K
from jaxtransfer.methods.distill.terms import Term, paths, tapped
from jaxtransfer.typing import (
    Batch,
    Features,
    Frozen,
    Inputs,
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
        self.named = () if self.alone else tuple(several)
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
            taps=tapped([*wanted, *self._paths(STUDENT)]),
        )
        return {**features, "": output}, state

    def of_teachers(
        self, own: Features, frozen: Frozen, model_state: ModelState, batch: Batch
    ) -> dict[str, Features]:
        """The same of every teacher that a term needs, from the batch if it is there.

        Raises:
            ValueError: there are no variables for a teacher, the batch lacks what only
                a cache has, or it has something else as "teacher".
        """
        found: dict[str, Features] = {}
        cached = self._cached(batch)
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
            if likeliest := [path for path in wanted if path in TOP_K]:
                raise ValueError(
                    f"teacher {name!r}: a term needs {likeliest[0]!r}, which only a "
                    "cache has, but the batch has no 'teacher' with it; take batches "
                    "from distill.cache_teacher(..., top_k=...).batches(data"
                    + (")" if self.alone else f", name={name!r})")
                )
            output, features, _ = self.models[name].apply(
                self._variables(name, frozen, model_state),
                batch.get("teacher_inputs", batch["inputs"]),
                taps=tapped(wanted),
            )
            found[name] = jax.lax.stop_gradient({**features, "": output})
        return found

    def _cached(self, batch: Batch) -> Mapping[str, Any]:
        """What the batch says of teachers, by name.

        Raises:
            ValueError: it is not of that form, or of nobody here.
        """
        given, path = batch.get("teacher", {}), "{'': outputs, path: features}"
        if not isinstance(given, Mapping):
            form = path if self.alone else f"{{name: {path}}}"
            raise ValueError(
                f"batch['teacher'] is no mapping; give {form}, for outputs alone "
                f"{form.replace(', path: features', '')}"
            )
        if self.alone:
            return {TEACHER: given} if given else {}
        if not self.named:
            return {}
        if unknown := sorted(set(given) - set(self.named)):
            raise ValueError(
                f"batch['teacher'] has {sorted(given)}, but {unknown[0]!r} is none of "
                f"the teachers {sorted(self.named)}; give {{name: {path}}}, with a "
                "cache by cache.batches(data, name=...)"
            )
        for name, of_one in given.items():
            if not isinstance(of_one, Mapping):
                raise ValueError(
                    f"batch['teacher'][{name!r}] is no mapping; give {path}"
                )
        return given

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
        if not isinstance(frozen[TEACHER], Mapping):
            raise ValueError(
                f"frozen['teacher']: got {type(frozen[TEACHER]).__name__}, but the "
                f"teachers have names; give {{{name!r}: its variables}}"
            )
        if name not in frozen[TEACHER]:
            raise ValueError(
                f"frozen['teacher'] has {sorted(frozen[TEACHER])}, but a term needs "
                f"{name!r}"
            )
        return frozen[TEACHER][name]


def sides(
    name: str, term: Term, own: Features, others: Mapping[str, Features]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What a term compares.

    Raises:
        ValueError: several teachers of unlike shapes.
    """
    here = tuple(own[path] for path in paths(term.student))
    if isinstance(term.of, str):
        there = tuple(others[term.of][path] for path in paths(term.teacher))
    else:
        there = tuple(
            _stacked(name, term.of, path, others) for path in paths(term.teacher)
        )
    return here, there


def _stacked(
    name: str, teachers: tuple[str, ...], path: str, others: Mapping[str, Features]
) -> jax.Array:
    """What several teachers have at a path."""
    found = [others[teacher][path] for teacher in teachers]
    shapes = [x.shape for x in found]
    if len(set(shapes)) > 1:
        raise ValueError(
            f"term {name!r}: its teachers have unlike shapes at {path!r}, "
            f"{dict(zip(teachers, shapes, strict=True))}, which can't be stacked; make "
            "a term of each teacher"
        )
    return jnp.stack(found)


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


def taps(
    model: Model, rules: tree.Rules, variables: Variables, inputs: Inputs
) -> tuple[str, ...]:
    r"""Paths of the modules that rules match, for the terms of several layers.

    A rule is a regular expression that must match a module's whole path: ``"blocks_."``
    is the blocks without what lies in them. Modules without parameters are not looked
    for; give their path as it is.

    Args:
        model: the network.
        rules: one or several.
        variables: of the network.
        inputs: a batch of inputs, of which only the shapes matter.

    Returns:
        Paths that ``apply`` can tap, each once: those of the first rule first, and of
        one rule by name and number (``blocks_2`` before ``blocks_10``).

    Raises:
        ValueError: a rule matches nothing (the message names the nearest paths), or is
            not a regular expression.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from jaxtransfer import losses
        >>> from jaxtransfer.methods import distill
        >>> from jaxtransfer.model import from_linen
        >>> x, key = jnp.ones((5, 4)), jax.random.key(0)
        >>> small = from_linen(nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(4)]))
        >>> large = from_linen(nn.Sequential([nn.Dense(4), nn.Dense(4), nn.Dense(4)]))
        >>> own = distill.taps(small, r"layers_\d", small.init(key, x), x)
        >>> taught = distill.taps(large, r"layers_[02]", large.init(key, x), x)
        >>> terms = {
        ...     path: distill.Term(loss=losses.hint, student=path, teacher=other)
        ...     for path, other in zip(own, taught, strict=True)}
        >>> {path: term.teacher for path, term in terms.items()}
        {'layers_0': 'layers_0', 'layers_2': 'layers_2'}
    """
    parents = {path.rpartition("/")[0] for path in tree.flatten(variables.params)}
    every = {
        "/".join(path.split("/")[:depth])
        for path in parents - {""}
        for depth in range(1, path.count("/") + 2)
    }
    known = sorted(every, key=_numbered)

    def run(*paths: str) -> None:
        def call(variables: Variables, inputs: Inputs) -> None:
            model.apply(variables, inputs, taps=paths)

        jax.eval_shape(call, variables, inputs)

    def there(*paths: str) -> bool:
        try:
            run(*paths)
        except ValueError:
            return False
        return True

    run()  # What is wrong with the inputs is no matter of taps.
    found: list[str] = []
    for rule in [rules] if isinstance(rules, str) else rules:
        try:
            hits = [path for path in known if re.fullmatch(rule, path)]
        except re.error as error:
            raise ValueError(
                f"rule {rule!r} is not a regular expression: {error}. Rules are "
                "matched against whole paths of modules such as 'block1/conv'."
            ) from error
        if not there(*hits):  # Some are lists of modules, or are not called as such.
            hits = [path for path in hits if there(path)]
        if not hits:
            raise ValueError(
                f"rule {rule!r} matches no module with parameters that can be tapped; "
                f"nearest: {tree.nearest(rule, known)}"
            )
        found += hits
    return tuple(dict.fromkeys(found))


def _numbered(path: str) -> list[str | int]:
    """Sorts by the numbers in a path, not by their digits."""
    parts = re.split(r"(\d+)", path)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]
