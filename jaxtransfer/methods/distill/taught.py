"""What a cached teacher says, looked up in training: on the host or on the device."""

import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Integer

from jaxtransfer.losses import cached_knowledge_distillation
from jaxtransfer.losses.reduction import integers
from jaxtransfer.methods.distill.augmentation import Augmentation, Variant
from jaxtransfer.methods.distill.cache_files import KINDS, difference
from jaxtransfer.methods.distill.terms import Term
from jaxtransfer.train.record import position_of, set_position
from jaxtransfer.typing import AnyArray

TOP_K = ("top_k/log_probabilities", "top_k/classes")
"""Paths of a teacher's likeliest classes, for the ``teacher`` of a
:class:`~jaxtransfer.methods.distill.Term`; see :meth:`TeacherCache.term`."""


class TeacherCache:
    """What a teacher says of every example, in arrays mapped from the disk.

    Made by :func:`~jaxtransfer.methods.distill.cache_teacher` or
    :func:`~jaxtransfer.methods.distill.open_cache`.

    Attributes:
        folder: where it lies.
        arrays: ``[variants, examples, ...]`` by path, read only; ``""`` is the output.
        augmentation: that of the inputs it was computed from.
        batch_size: how many examples the teacher saw at once.
        temperature: with which the likeliest classes were softened; None without them.
        classes: how many there are if the likeliest are kept; None without them.
        identity: what it is of, as its manifest has it: teacher, data set,
            augmentation and content.
        fingerprint: of the teacher's variables.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        arrays: Mapping[str, np.ndarray],
        augmentation: Augmentation,
        manifest: Mapping[str, Any],
    ):
        self.folder, self.arrays, self.augmentation = folder, arrays, augmentation
        self.batch_size: int = manifest["content"]["batch_size"]
        self.temperature: float | None = manifest["content"]["temperature"]
        self.classes: int | None = manifest["content"]["classes"]
        self.identity: dict[str, Any] = {part: manifest[part] for part in KINDS}
        self.fingerprint: str = manifest["teacher"]
        self.variants: int = manifest["augmentation"]["variants"]
        self.examples: int = manifest["examples"]["number"]

    def __repr__(self) -> str:
        return (
            f"TeacherCache({str(self.folder)!r}: {self.examples} examples, "
            f"{self.variants} variants, {sorted(self.arrays)})"
        )

    def lookup(
        self, indices: Integer[AnyArray, " batch"], variant: Variant = 0
    ) -> dict[str, np.ndarray]:
        """What the teacher says of some examples.

        Args:
            indices: their places in the data set.
            variant: one for all or one an example.

        Returns:
            ``[batch, ...]`` by path, floats as float32: ``batch["teacher"]`` of
            :func:`~jaxtransfer.methods.distill.objective`.

        Raises:
            ValueError: an index or a variant is out of range.
        """
        indices, variant = np.asarray(indices), np.asarray(variant)
        for name, values, size in (
            ("indices", indices, self.examples),
            ("variant", variant, self.variants),
        ):
            wrong = (values < 0) | (values >= size)
            if np.any(wrong):
                raise ValueError(
                    f"{name}: got {np.ravel(values)[np.ravel(wrong)][:5].tolist()}, "
                    f"but the cache has 0 … {size - 1}; indices are places in the data "
                    "set that was cached"
                )
        found = {path: array[variant, indices] for path, array in self.arrays.items()}
        return {path: _widened(np.asarray(rows)) for path, rows in found.items()}

    def on_device(self) -> "DeviceCache":
        """All of it on the device, to be looked up inside a compiled step.

        Give it to the step as an argument, not by closing over it: for example as
        ``frozen={"cache": cache.on_device()}`` of the training state, whose checkpoints
        then refuse another cache.
        """
        return DeviceCache({path: jnp.asarray(x) for path, x in self.arrays.items()})

    def term(
        self, *, tail: Literal["renormalize", "bucket"] = "bucket", **of_term: Any
    ) -> Term:
        """The term that learns the likeliest classes, softened as they were kept.

        Args:
            tail: what becomes of the other classes; see
                :func:`~jaxtransfer.losses.cached_knowledge_distillation`.
            **of_term: other fields of :class:`~jaxtransfer.methods.distill.Term`, such
                as the ``weight``.

        Returns:
            The term. A student of another number of classes is refused when it is
            first evaluated.

        Raises:
            ValueError: this cache keeps all logits, which any loss takes as the
                teacher's output.
        """
        if self.classes is None:
            raise ValueError(
                "this cache keeps all logits, not the likeliest classes: take "
                "distill.Term(loss=losses.knowledge_distillation), or write it with "
                "top_k="
            )
        options = {
            "temperature": self.temperature,
            "tail": tail,
            "classes": self.classes,
        }
        return Term(
            loss=cached_knowledge_distillation,
            teacher=TOP_K,
            options=options,
            **of_term,
        )

    def batches(
        self,
        data: Iterable[Any],
        *,
        examples: int | None = None,
        name: str | None = None,
    ) -> "TaughtBatches":
        """Add to batches what the teacher says of them, and augment their inputs.

        Example number *n* of the stream is of epoch ``n // examples``, which says its
        variant; the position is saved with that of ``data`` and with what the cache is
        of, so that a run does not go on with another one.

        Of several teachers, each has a cache and a name, and the batches of one are the
        data of the next: ``b.batches(a.batches(data, name="a"), name="b")``. They are
        of one augmentation, by which the inputs are augmented once.

        Args:
            data: batches with ``"inputs"`` and ``"index"``, the examples' places in the
                data set, as of :func:`~jaxtransfer.data.batches` of arrays with a
                column ``"index": np.arange(n)``.
            examples: of one epoch of ``data``, those of the cache by default; those of
                this process if ``data`` is a shard. Batches of another cache have
                theirs.
            name: of the teacher, where the objective has several by name.

        Returns:
            An iterator over the batches with ``"teacher"``, as :meth:`lookup` gives it
            or, with a name, that under the name, and ``"variant"`` ``[batch]``, for
            :func:`~jaxtransfer.train.fit`.

        Raises:
            ValueError: batches of another cache have no name, this one or another
                augmentation, or ``examples`` is given again; (at a batch) it has no
                ``"index"``, or a ``"teacher"`` that is not of another cache.
        """
        return TaughtBatches(self, data, examples, name)


def _widened(rows: Any) -> Any:
    """Half precision as single, any index as int32: what losses take."""
    if jnp.issubdtype(rows.dtype, jnp.unsignedinteger):
        return rows.astype(np.int32)
    return rows.astype(np.float32) if rows.dtype == np.float16 else rows


class DeviceCache(struct.PyTreeNode):
    """A teacher cache on the device: a pytree, to be given to a compiled function.

    Attributes:
        arrays: ``[variants, examples, ...]`` by path.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> cache = DeviceCache({"": jnp.arange(12.0).reshape(2, 3, 2)})
        >>> look = jax.jit(lambda cache, indices: cache.lookup(indices, 1))
        >>> look(cache, jnp.array([2, 0]))[""].tolist()
        [[10.0, 11.0], [6.0, 7.0]]
    """

    arrays: Any

    def lookup(
        self, indices: Integer[AnyArray, " batch"], variant: Variant = 0
    ) -> dict[str, jax.Array]:
        """As :meth:`TeacherCache.lookup`; traceable.

        An index or a variant out of range, which can't be seen here, gives
        not-a-number; -1 where integers are kept.
        """
        indices = integers(indices)
        variant = jnp.broadcast_to(jnp.asarray(variant), indices.shape)

        def rows(array: jax.Array) -> jax.Array:
            variants, examples, *shape = array.shape
            known = (indices >= 0) & (indices < examples)
            known &= (variant >= 0) & (variant < variants)
            found = _widened(array[variant, indices])
            nothing = np.nan if jnp.issubdtype(found.dtype, jnp.inexact) else -1
            return jnp.where(known.reshape(-1, *[1] * len(shape)), found, nothing)

        return {path: rows(array) for path, array in self.arrays.items()}


class TaughtBatches(Iterator[Any]):
    """Batches with what a cached teacher says; see :meth:`TeacherCache.batches`."""

    def __init__(
        self,
        cache: TeacherCache,
        data: Iterable[Any],
        examples: int | None,
        name: str | None = None,
    ):
        self._cache, self._data, self._seen = cache, iter(data), 0
        self._examples = cache.examples if examples is None else examples
        self._name, self._names = name, {name}
        self._chained = isinstance(self._data, TaughtBatches)
        if isinstance(self._data, TaughtBatches):
            self._names |= self._data._names
            _check_chain(cache, self._data, examples, name)
        self._augment = jax.jit(cache.augmentation.__call__)

    def __next__(self) -> dict[str, Any]:
        batch = next(self._data)
        if "index" not in batch:
            raise ValueError(
                f"the batch has {sorted(batch)}, but no 'index' to look up; add a "
                "column 'index': np.arange(n) to the arrays of the data set"
            )
        indices = np.asarray(batch["index"])
        others: Mapping[str, Any] = {}
        if self._chained:  # The other cache has augmented the inputs.
            inputs, variant, others = (
                batch["inputs"],
                batch["variant"],
                batch["teacher"],
            )
        else:
            inputs, variant = self._begin(batch, indices)
        taught: dict[str, Any] = self._cache.lookup(indices, variant)
        if self._name is not None:
            taught = {**others, self._name: taught}
        self._seen += len(indices)
        return {**batch, "inputs": inputs, "variant": variant, "teacher": taught}

    def _begin(self, batch: Mapping[str, Any], indices: np.ndarray) -> tuple[Any, Any]:
        """Inputs and variants of a batch that no cache has seen."""
        if "teacher" in batch:
            raise ValueError(
                "the batch has 'teacher' already; leave it out or, if it is of another "
                "cache, give that one's batches as they are: "
                "b.batches(a.batches(data, name='a'), name='b')"
            )
        epochs = (self._seen + np.arange(len(indices))) // self._examples
        variant = self._cache.augmentation.variant(epochs).astype(np.int32)
        inputs = batch["inputs"]
        if self._cache.augmentation.augment is not None:
            inputs = self._augment(inputs, indices, variant)
        return inputs, variant

    def get_state(self) -> dict[str, Any]:
        """The position and what the cache is of, for a checkpoint."""
        return {
            "seen": self._seen,
            "cache": self._cache.identity,
            "name": self._name,
            "data": position_of(self._data),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go to a position that :meth:`get_state` returned.

        Raises:
            ValueError: the run read no cache, one of something else or of a teacher of
                another name, or the data can't be set to a position.
        """
        if "cache" not in state:
            raise ValueError(
                "data: the run read batches without a teacher cache; give those to go "
                "on, or begin a run of its own"
            )
        if other := difference(self._cache.identity, state["cache"]):
            raise ValueError(
                f"the run read a cache of another {other.kind}: its {other.name} was "
                f"{other.wanted}, that of the cache in {str(self._cache.folder)!r} is "
                f"{other.found}; open that one to go on, or begin a run of its own"
            )
        if (before := state.get("name", self._name)) != self._name:
            raise ValueError(
                f"name: the run read this cache as {before!r}, not as {self._name!r}; "
                "give the same name to go on, or begin a run of its own"
            )
        if state["data"] is None or not hasattr(self._data, "set_state"):
            raise ValueError(
                "data: these batches have no get_state and set_state, so a run can't "
                "go on in their middle; take those of jaxtransfer.data.batches"
            )
        set_position(self._data, state["data"])
        self._seen = state["seen"]


def _check_chain(
    cache: TeacherCache,
    inner: TaughtBatches,
    examples: int | None,
    name: str | None,
) -> None:
    """Raises ValueError if a cache can't be read beside that of these batches."""
    names = inner._names
    if name is None or None in names or name in names:
        raise ValueError(
            f"name: got {name!r} for batches of another cache, {list(names)}; give "
            "each teacher a name of its own: "
            "b.batches(a.batches(data, name='a'), name='b')"
        )
    if examples is not None:
        raise ValueError(
            f"examples: got {examples} for batches of another cache, which say the "
            "epoch; give it to that one alone"
        )
    part = "augmentation"
    wanted = {part: inner._cache.identity[part]}
    if other := difference(cache.identity, wanted):
        raise ValueError(
            f"the batches are of a cache of another {other.kind}: its {other.name} is "
            f"{other.wanted}, that of the cache in {str(cache.folder)!r} is "
            f"{other.found}; the inputs are augmented once, so write both with the "
            "same augmentation"
        )


__all__ = ["TOP_K", "DeviceCache", "TaughtBatches", "TeacherCache"]
