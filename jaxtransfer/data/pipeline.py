"""Batches from a source or from arrays, with grain: shuffled, augmented, resumable."""

from collections.abc import Callable, Mapping
from typing import Any

import grain
import numpy as np
from absl import flags

from jaxtransfer.data.arrays import check_arrays, check_finite
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
            (images of a `Source` are uint8 then).
        shard: (index, count) of this process, as `(jax.process_index(),
            jax.process_count())`.
        drop_remainder: leave out a last batch that is not full (only without `repeat`).
        threads: readers ahead of the consumer; default 4 for a source, 0 for arrays.

    Returns:
        A grain iterator over dicts of arrays `[batch_size, ...]`, with `get_state` and
        `set_state`, which refuses the position in batches of other arguments; uint8
        images come out as float32 in `[0, 1]`.

    Raises:
        ValueError: an argument out of range, arrays of unequal length or with NaN, or
            fewer examples than one batch takes.

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
        read = positions.map(_ReadOne(data)).random_map(augment)
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
        A grain iterator over dicts of arrays `[batch_size, ...]` with `where`
        `[batch_size]` bool: False marks padding (copies of the first example).

    Raises:
        ValueError: an argument out of range, or arrays of unequal length or with NaN.

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

    Args:
        source: batches of the source domain.
        target: batches of the target domain.

    Returns:
        A grain iterator over `{"source": batch, "target": batch}` that ends with the
        shorter one. Its state holds the states of both; the two should not be advanced
        on their own any more.

    Example:
        >>> import numpy as np
        >>> def domain(n):
        ...     return batches({"inputs": np.arange(n)}, batch_size=2, seed=0)
        >>> sorted(next(pairs(domain(4), domain(6))))
        ['source', 'target']
    """
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
            return self.data[position]
        return {name: np.array(array[position]) for name, array in self.data.items()}


class _ReadMany:
    """Positions of a batch to the batch."""

    def __init__(self, data: Data):
        self.data = data

    def __call__(self, positions: np.ndarray) -> Example:
        if isinstance(self.data, Source):
            examples = self.data.__getitems__(positions)
            names = examples[0]
            batch = {name: np.stack([e[name] for e in examples]) for name in names}
        else:
            batch = {name: array[positions] for name, array in self.data.items()}
        return _scale(batch)


class _ReadPadded:
    """Positions of a batch, some past the end, to the batch with `where`."""

    def __init__(self, data: Data, length: int):
        self.read, self.length = _ReadMany(data), length

    def __call__(self, positions: np.ndarray) -> Example:
        where = positions < self.length
        return {**self.read(np.where(where, positions, 0)), "where": where}


def _scale(batch: Mapping[str, np.ndarray]) -> Example:
    batch = dict(batch)
    inputs = batch.get("inputs")
    if inputs is not None and inputs.dtype == np.uint8:
        batch["inputs"] = inputs.astype(np.float32) / np.float32(255)
    return batch


def _checked(data: Data) -> tuple[Data, int]:
    """The data, arrays being NumPy and finite, and the number of examples."""
    if isinstance(data, Source):
        return data, len(data)
    arrays = {name: np.asarray(array) for name, array in data.items()}
    for name, array in arrays.items():
        if np.issubdtype(array.dtype, np.floating):
            check_finite(array, name)
    return arrays, check_arrays(arrays)


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
