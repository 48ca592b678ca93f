"""What a source is: random access to examples as dicts of NumPy arrays."""

import io
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import numpy as np

Example = dict[str, np.ndarray]


@runtime_checkable
class _Records(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


@dataclass(frozen=True)
class Source:
    """A random-access split of a data set.

    `source[i]` is a dict of NumPy arrays: `inputs` (images are `uint8`
    `[height, width, channels]`), `labels` (`int32` scalar), and every other feature
    of the data set under its own name (Omniglot: `alphabet`, `alphabet_char_id`).

    Attributes:
        name: name of the data set.
        split: the split that was asked for, slices included.
        classes: number of classes, or None where the labels are not classes.
    """

    name: str
    split: str
    classes: int | None
    _records: _Records = field(repr=False)
    _decode: Callable[[Any], Example] = field(repr=False)

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._records)

    def __getitem__(self, index: SupportsIndex) -> Example:
        """The example at `index`; negative ones count from the end."""
        return self._decode(self._records[self._place(index)])

    def __iter__(self) -> Iterator[Example]:
        """All examples in their stored order."""
        return (self[index] for index in range(len(self)))

    def __getitems__(self, indices: Iterable[SupportsIndex]) -> list[Example]:
        """The examples at `indices`, read in one go where the storage can."""
        indices = [self._place(index) for index in indices]
        many = getattr(self._records, "__getitems__", None)
        records = many(indices) if many else [self._records[i] for i in indices]
        return [self._decode(record) for record in records]

    def _place(self, index: SupportsIndex) -> int:
        place, length = operator.index(index), len(self)
        if not -length <= place < length:
            raise IndexError(
                f"index {place} is outside of the {length} examples of {self.name!r}"
            )
        return place % length


@dataclass(frozen=True)
class Decoder:
    """Feature names to `inputs` and `labels`, encoded images to arrays.

    Attributes:
        names: the project's name by the data set's.
        images: number of channels by name of the features that are encoded images.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    images: Mapping[str, int] = field(default_factory=dict)

    def __call__(self, record: Mapping[str, Any]) -> Example:
        """Turn a stored record into an example."""
        example = {}
        for key, value in record.items():
            if key in self.images:
                value = _decode_image(value, self.images[key])
            example[self.names.get(key, key)] = np.asarray(value)
        if "labels" in example and np.issubdtype(example["labels"].dtype, np.integer):
            example["labels"] = to_int32(example["labels"], "labels")
        return example


def to_int32(values: np.ndarray, name: str) -> np.ndarray:
    """Integers `[...]` as int32; a ValueError that names them if they don't fit."""
    for value in (values.min(), values.max()) if values.size else ():
        if not -(2**31) <= value < 2**31:
            raise ValueError(
                f"{name} has the value {value}, which int32 can't hold; number its "
                "values anew from 0"
            )
    return values.astype(np.int32)


def _decode_image(encoded: bytes, channels: int | None) -> np.ndarray:
    from PIL import Image

    image = Image.open(io.BytesIO(encoded))
    mode = {1: "L", 3: "RGB", 4: "RGBA"}.get(channels or 0, image.mode)
    array = np.asarray(image if image.mode == mode else image.convert(mode))
    return array[..., None] if array.ndim == 2 else array


class ArrayRecords:
    """Rows of a dict of arrays as records."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self.arrays = dict(arrays)

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, index: SupportsIndex) -> Example:
        return {name: array[index] for name, array in self.arrays.items()}
