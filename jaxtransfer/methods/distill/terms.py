"""One term of a distillation objective: which two things are compared, and how."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.losses.reduction import check_mask
from jaxtransfer.ops.dtypes import number
from jaxtransfer.train import metrics
from jaxtransfer.typing import Batch, Mean, Model

Scheduled = float | Callable[[jax.Array], Any]
"""A number, or a schedule of it: ``(updates so far) -> number``, as those of optax."""

Path = str | tuple[str, ...]
"""A tapped module, or several, which the loss gets one after the other; ``""`` is the
network's output. :func:`~jaxtransfer.methods.distill.taps` lists those of a rule."""

MakeBridge = Callable[[Any, Any], Model | None]
"""``(student's shape, teacher's shape) -> network between them``, None if none is
needed; shapes with the axis of the batch. For several layers: tuples of shapes, and a
network from as many arguments to as many outputs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Term:
    r"""A loss between something of the student and something of a teacher.

    The objective adds ``weight`` times its mean over the rows that count. The loss is
    called as ``loss(*student, *teacher, *batch, **options)``, every loss of
    :mod:`jaxtransfer.losses` of that form fits as it is.

    Attributes:
        loss: ``-> [batch, ...]`` or a scalar. It is given ``where=`` when not all rows
            count.
        weight: a number or a schedule; a term of weight 0.0 is not computed, and a
            teacher that no term needs is not run.
        student: what of the student; see :data:`Path`.
        teacher: what of the teacher.
        of: name of the teacher, where there are several; names in a tuple give their
            outputs stacked, ``[teachers, ...]``. ``"student"`` is the student itself
            (its own deeper layers), ``"average"`` its moving average; see
            :func:`~jaxtransfer.methods.distill.moving_average`.
        batch: names of arrays of the batch that the loss is given, such as
            ``"labels"``.
        options: keyword arguments of the loss by name, numbers or schedules among them
            (``{"temperature": 4.0}``).
        bridge: makes a network from the student's side to the shape of the teacher's,
            trained with the student and left out of what is exported; see
            :func:`~jaxtransfer.methods.distill.match`.
        state: what the loss carries from step to step (a memory), as it begins. The
            loss is then given ``state=`` and returns ``(value, state)``.
        random: whether the loss is given a ``key=``.
        rows: name of a boolean array ``[batch]`` of the batch: rows this teacher
            teaches.
        where: name of the boolean array of the batch that says what counts, ``[batch]``
            or one of more axes (tokens, pixels) where the loss has them; None if all
            counts. A loss of features has one value an example, and takes no mask of
            pixels.

    Example:
        >>> from jaxtransfer import losses
        >>> Term(loss=losses.attention_transfer, student="stage1", teacher="stage2",
        ...      weight=1000.0).weight
        1000.0
    """

    loss: Callable[..., Any]
    weight: Scheduled = 1.0
    student: Path = ""
    teacher: Path = ""
    of: str | tuple[str, ...] = "teacher"
    batch: tuple[str, ...] = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    bridge: MakeBridge | None = None
    state: Any = None
    random: bool = False
    rows: str | None = None
    where: str | None = "where"

    @property
    def absent(self) -> bool:
        """Whether the weight is the number 0."""
        return not callable(self.weight) and number(self.weight) == 0

    @property
    def teachers(self) -> tuple[str, ...]:
        """The teachers it needs."""
        return (self.of,) if isinstance(self.of, str) else self.of


def paths(path: Path) -> tuple[str, ...]:
    """One or several paths as several."""
    return (path,) if isinstance(path, str) else path


def tapped(found: Any) -> tuple[str, ...]:
    """What must be tapped for paths: each once, without the output."""
    return tuple(dict.fromkeys(path for path in found if path))


def at(updates: jax.Array | None, value: Any, what: str) -> Any:
    """A scheduled value now.

    Raises:
        ValueError: it is scheduled and nobody counts.
    """
    if not callable(value):
        return number(value)
    if updates is None:
        raise ValueError(
            f"{what} follows the number of updates, which the model state lacks; "
            "begin with distill.start(...), which counts them, or with "
            "distill.counted(variables)"
        )
    return value(updates)


def weigh(updates: Any, weight: Scheduled, what: str, value: jax.Array) -> jax.Array:
    """A weight now times a value, in the dtype of the value whatever a schedule's is.

    Raises:
        ValueError: as :func:`at`.
    """
    now = at(updates, weight, what)
    return (jnp.asarray(now, value.dtype) if callable(weight) else now) * value


def counting_rows(term: Term, batch: Batch) -> jax.Array | None:
    """Rows that count for a term, None if all do.

    Raises:
        ValueError: the batch lacks the array that says which, or has no boolean one.
    """
    where = None if term.where is None else batch.get(term.where)
    if where is None and term.where not in (None, "where"):
        raise ValueError(
            f"where: the batch has no {term.where!r}, which says what counts; it has "
            f"{sorted(batch)}"
        )
    if where is not None:
        where = jnp.asarray(where)
    if term.rows is None:
        return where
    if term.rows not in batch:
        raise ValueError(
            f"rows: the batch has no {term.rows!r}, which says whom this teacher "
            f"teaches; it has {sorted(batch)}"
        )
    rows = jnp.asarray(batch[term.rows])
    rows = check_mask(term.rows, rows, rows.shape)
    if where is None:
        return rows
    where = check_mask(term.where, where, where.shape)
    if rows.shape[:1] != where.shape[:1]:
        raise ValueError(
            f"rows: the batch's {term.rows!r} is {rows.shape}, its {term.where!r} "
            f"{where.shape}; give one a row, [batch]"
        )
    # Of tokens, where is [batch, length].
    return metrics.cover(rows, where) & metrics.cover(where, rows)


def evaluate(
    name: str,
    term: Term,
    student: tuple[Any, ...],
    teacher: tuple[Any, ...],
    batch: Batch,
    *,
    updates: jax.Array | None,
    carried: dict[str, Any],
    key: jax.Array,
) -> Mean:
    """A term's mean over the rows that count; what it carries on goes into `carried`.

    Raises:
        ValueError: the batch lacks an array the loss needs, a schedule has no count, or
            what is carried was not begun.
    """
    missing = [given for given in term.batch if given not in batch]
    if missing:
        raise ValueError(
            f"term {name!r}: the batch has no {missing[0]!r}; it has {sorted(batch)}"
        )
    where = counting_rows(term, batch)
    options = {
        option: at(updates, value, f"term {name!r}: {option}")
        for option, value in term.options.items()
    }
    if where is not None:
        options["where"] = where
    if term.random:
        options["key"] = key
    if term.state is not None:
        if name not in carried:
            raise ValueError(
                f"term {name!r} carries a state, which the model state lacks; begin "
                "with distill.start(...)"
            )
        options["state"] = carried[name]
    given = [batch[needed] for needed in term.batch]
    try:
        found = term.loss(*student, *teacher, *given, **options)
    except Exception as error:
        error.add_note(f"This was the loss of the term {name!r}.")
        raise
    if term.state is not None:
        found, after = found
        carried[name] = jax.lax.stop_gradient(after)
    value = jnp.asarray(found)
    if value.ndim == 0:
        return metrics.mean(value)
    return metrics.mean(value, where=where)


__all__ = ["MakeBridge", "Path", "Scheduled", "Term"]
