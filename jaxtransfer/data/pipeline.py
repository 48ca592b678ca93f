"""Batches from a source or from arrays, with grain: shuffled, augmented, resumable."""

from collections.abc import Callable, Mapping
from typing import Any

import grain
import jax.numpy as jnp
import numpy as np
from absl import flags

from jaxtransfer.data.arrays import check_arrays, check_finite, top_of
from jaxtransfer.data.records import Example, Source

Augment = Callable[[Example, np.random.Generator], Example]
Data = Source | Mapping[str, np.ndarray]


def batches(
    data: Data,
    *,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    repeat: bool = True,
    augment: Augment | None = None,
    shard: tuple[int, int] = (0, 1),
    drop_remainder: bool = True,
    threads: int | None = None,
) -> grain.DatasetIterator:
    """Iterate over training batches.

    The order of every epoch and every random augmentation are functions of `seed` and
    of the position alone: the same seed gives the same batches, and an iterator that
    was set to a saved state goes on as the one that saved it. Each epoch has an order
    of its own; with `repeat`, batches run across its end and nothing is dropped. All
    shards of one seed together see every example of an epoch once, up to the remainder
    of n / count: others in each epoch, or always the last ones without `shuffle`.

    Args:
        data: a `Source`, or arrays `[n, ...]` by name.
        batch_size: examples a batch, of this shard.
        seed: 0 .. 2**32 - 1.
        shuffle: a new order for each epoch; False keeps the stored order.
        repeat: go on for ever; False is one epoch.
        augment: `(example, numpy Generator) -> example` on single examples, as stored
            (images of a `Source` are uint8 then); a copy, which it may change.
        shard: (index, count) of this process, as `(jax.process_index(),
            jax.process_count())`.
        drop_remainder: leave out a last batch that is not full (only without `repeat`).
        threads: readers ahead of the consumer; default 4 for a source, 0 for arrays.

    Returns:
        A grain iterator over dicts of arrays `[batch_size, ...]`, with `get_state` and
        `set_state`, which refuses the position in batches of another number of
        examples, `batch_size` of all shards, `seed`, `shuffle` or `repeat` (that the
        examples and `augment` are the same it can't see). Images of integers, `inputs`
        and `teacher_inputs` `[batch_size, height, width, ...]` of uint8 or uint16, come
        out as float32 in `[0, 1]`; everything else as it is.

    Raises:
        ValueError: an argument out of range, arrays of unequal length or with values
            that are not finite, fewer examples than one batch takes, or, from `next`,
            `augment` returned no example or those of a batch differ in shape.

    Example:
        >>> import numpy as np
        >>> numbers = {"inputs": np.arange(6.0)}
        >>> iterator = batches(numbers, batch_size=4, seed=0, shuffle=False)
        >>> next(iterator)["inputs"].tolist(), next(iterator)["inputs"].tolist()
        ([0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 0.0, 1.0])
    """
    index, count = _check_shard(shard)
    _check_batch_size(batch_size)
    data, length = _checked(data)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} must lie in 0..2**32 - 1")
    if length < count:
        raise ValueError(f"{length} examples can't be shared by {count} shards")
    own = length // count
    if not repeat and drop_remainder and own < batch_size:
        raise ValueError(
            f"batch_size={batch_size} is more than the {own} examples of the shard, "
            "so that one pass holds no batch; lower it or set drop_remainder=False"
        )
    _mark_flags_parsed()
    positions = grain.MapDataset.range(length).seed(seed)
    if shuffle:
        positions = positions.shuffle()
    if augment is not None:
        read = positions.map(_ReadOne(data)).random_map(_Augment(augment))
    else:
        read = positions
    read = read[index : own * count : count]
    if repeat:
        read = read.repeat()
    read = read.batch(batch_size, drop_remainder=drop_remainder)
    read = read.map(_scale if augment is not None else _ReadMany(data))
    about = {
        "examples": length,
        "batch_size of all shards": int(batch_size * count),
        "seed": int(seed),
        "shuffle": bool(shuffle),
        "repeat": bool(repeat),
    }
    return _Batches(iter(read.to_iter_dataset(_read_options(data, threads))), about)


def evaluation_batches(
    data: Data,
    *,
    batch_size: int,
    shard: tuple[int, int] = (0, 1),
    threads: int | None = None,
) -> grain.DatasetIterator:
    """Iterate once over all examples in batches of one static size.

    Args:
        data: a `Source`, or arrays `[n, ...]` by name.
        batch_size: examples a batch, of this shard.
        shard: (index, count) of this process; every shard gets as many batches.
        threads: readers ahead of the consumer; default 4 for a source, 0 for arrays.

    Returns:
        A grain iterator over dicts of arrays `[batch_size, ...]`, images as of
        `batches`, with `where` `[batch_size]` bool: False marks padding (copies of the
        first example). A `where` of the data keeps its shape and its False.

    Raises:
        ValueError: an argument out of range, arrays of unequal length or with values
            that are not finite, or, from `next`, a `where` of the data that is not
            bool.

    Example:
        >>> import numpy as np
        >>> for batch in evaluation_batches({"inputs": np.arange(5)}, batch_size=3):
        ...     print(batch["inputs"].tolist(), batch["where"].tolist())
        [0, 1, 2] [True, True, True]
        [3, 4, 0] [True, True, False]
    """
    index, count = _check_shard(shard)
    _check_batch_size(batch_size)
    data, length = _checked(data)
    _mark_flags_parsed()
    own = -(-length // (count * batch_size)) * batch_size
    read = grain.MapDataset.range(own * count)[index::count].batch(batch_size)
    read = read.map(_ReadPadded(data, length))
    about = {"examples": length, "batch_size of all shards": int(batch_size * count)}
    return _Batches(iter(read.to_iter_dataset(_read_options(data, threads))), about)


def pairs(
    source: grain.DatasetIterator, target: grain.DatasetIterator
) -> grain.DatasetIterator:
    """Join the batches of two domains.

    Give them different seeds: of one seed and length, they have one order, so that
    every batch would pair the same rows.

    Args:
        source: batches of the source domain.
        target: batches of the target domain.

    Returns:
        A grain iterator over `{"source": batch, "target": batch}` that ends with the
        shorter one. Its state holds the states of both; the two should not be advanced
        on their own any more.

    Raises:
        TypeError: one is no grain iterator, as `batches` returns.

    Example:
        >>> import numpy as np
        >>> def domain(n, seed):
        ...     return batches({"inputs": np.arange(n)}, batch_size=2, seed=seed)
        >>> sorted(next(pairs(domain(4, seed=0), domain(6, seed=1))))
        ['source', 'target']
    """
    for name, domain in (("source", source), ("target", target)):
        if not isinstance(domain, grain.DatasetIterator):
            raise TypeError(
                f"{name}: got {type(domain).__name__}, give what `batches` returns"
            )
    return _Pairs(source, target)


class _Batches(grain.DatasetIterator):
    """Those of grain, whose position says what they are batches of."""

    def __init__(self, batches: grain.DatasetIterator, about: dict[str, Any]):
        super().__init__(batches)
        self._batches, self._about = batches, about

    def __next__(self) -> dict[str, Any]:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        return {"batches": self._batches.get_state(), "of": dict(self._about)}

    def set_state(self, state: dict[str, Any]) -> None:
        _check_position(state, ("batches", "of"))
        before, now = state["of"], self._about
        for name in {**before, **now}:
            if before.get(name) != now.get(name):
                raise ValueError(
                    f"{name}: the run read batches with {before.get(name)!r}, these "
                    f"have {now.get(name)!r}; give the same to go on, or begin a run "
                    "of its own"
                )
        self._batches.set_state(state["batches"])


def _check_position(state: Any, parts: tuple[str, ...]) -> None:
    """Raises ValueError if a position is one in batches of another kind."""
    found = sorted(state) if isinstance(state, Mapping) else type(state).__name__
    if found != sorted(parts):
        raise ValueError(
            f"data: the run read other batches: their position has {found}, that of "
            f"these {sorted(parts)}; give batches made by the same functions (batches, "
            "pairs, those of a teacher cache) to go on, or begin a run of its own"
        )


class _Pairs(grain.DatasetIterator):
    def __init__(self, source: grain.DatasetIterator, target: grain.DatasetIterator):
        super().__init__((source, target))
        self._source, self._target = source, target

    def __next__(self) -> dict[str, Any]:
        return {"source": next(self._source), "target": next(self._target)}

    def get_state(self) -> dict[str, Any]:
        return {
            "source": self._source.get_state(),
            "target": self._target.get_state(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        _check_position(state, ("source", "target"))
        self._source.set_state(state["source"])
        self._target.set_state(state["target"])


class _ReadOne:
    """Position to example."""

    def __init__(self, data: Data):
        self.data = data

    def __call__(self, position: int) -> Example:
        if isinstance(self.data, Source):
            example = self.data[position]
        else:
            example = {name: array[position] for name, array in self.data.items()}
        return {name: np.array(value) for name, value in example.items()}


class _Augment:
    """Example to a changed one; grain would pass over None, for ever."""

    def __init__(self, augment: Augment):
        self.augment = augment

    def __call__(
        self, example: Example, generator: np.random.Generator
    ) -> Mapping[str, Any]:
        changed = self.augment(example, generator)
        if not isinstance(changed, Mapping):
            raise ValueError(
                f"augment returned {type(changed).__name__}; return the example, a dict"
            )
        return changed


class _ReadMany:
    """Positions of a batch to the batch."""

    def __init__(self, data: Data):
        self.data = data

    def __call__(self, positions: np.ndarray) -> Example:
        if isinstance(self.data, Source):
            examples = self.data.__getitems__(positions)
            batch = {name: _stack(name, examples, self.data) for name in examples[0]}
        else:
            batch = {name: array[positions] for name, array in self.data.items()}
        return _scale(batch)


def _stack(name: str, examples: list[Example], source: Source) -> np.ndarray:
    values = [example[name] for example in examples]
    shapes = {np.shape(value) for value in values}
    if len(shapes) != 1:
        raise ValueError(
            f"{name} of {source.name!r} have shapes {sorted(shapes)[:4]}; give the "
            "arrays of as_arrays(source, size=...), or an augment that makes them alike"
        )
    return np.stack(values)


class _ReadPadded:
    """Positions of a batch, some past the end, to the batch with `where`."""

    def __init__(self, data: Data, length: int):
        self.read, self.length = _ReadMany(data), length

    def __call__(self, positions: np.ndarray) -> Example:
        where = positions < self.length
        batch = self.read(np.where(where, positions, 0))
        own = batch.get("where", where)
        if own.dtype != bool:
            raise ValueError(
                f"where of the data must be bool, got {own.dtype}; use `where > 0`"
            )
        where = where.reshape(-1, *(1,) * (own.ndim - 1))
        return {**batch, "where": where & own}


def _scale(batch: Mapping[str, np.ndarray]) -> Example:
    """Images of uint8 or uint16 to `[0, 1]`; flat rows may be anything else."""
    batch = dict(batch)
    for name in ("inputs", "teacher_inputs"):
        images = batch.get(name, np.empty(0))
        if images.ndim > 2 and images.dtype in (np.uint8, np.uint16):
            batch[name] = images.astype(np.float32) / top_of(images.dtype)
    return batch


def _checked(data: Data) -> tuple[Data, int]:
    """The data, arrays being NumPy and finite, and the number of examples."""
    if isinstance(data, Source):
        return data, len(data)
    for name, array in data.items():
        if isinstance(array, tuple | Mapping):
            raise ValueError(
                f"{name} must be one array [n, ...], got a {type(array).__name__}; "
                "give each of its arrays a name of its own"
            )
    arrays = {name: np.asarray(array) for name, array in data.items()}
    for name, array in arrays.items():
        if array.dtype.kind in "USO":
            raise ValueError(
                f"{name} can't go into batches, for no device takes text or objects; "
                "leave it out"
            )
    length = check_arrays(arrays)
    for name, array in arrays.items():
        if jnp.issubdtype(array.dtype, jnp.inexact):  # NumPy's doesn't know bfloat16
            check_finite(array, name)
    return arrays, length


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")


def _check_shard(shard: tuple[int, int]) -> tuple[int, int]:
    index, count = shard
    if count < 1 or not 0 <= index < count:
        raise ValueError(f"shard={shard} must be (index, count), 0 <= index < count")
    return index, count


def _read_options(data: Data, threads: int | None) -> grain.ReadOptions:
    if threads is None:
        threads = 4 if isinstance(data, Source) else 0
    return grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=4 * threads if threads else 0
    )


def _mark_flags_parsed() -> None:
    """Grain reads absl flags, which are unparsed unless absl started the program."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
