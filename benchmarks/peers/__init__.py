"""What peers compute in PyTorch, written for comparison: one file a family of losses.

Every file has ``ROWS``: by name, a loss of this library and the same quantity in
PyTorch in the manner of the peer that is named, on the same numbers.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np


class Row(NamedTuple):
    """One comparison.

    Attributes:
        loss: of JAX arrays; returns a scalar.
        peer: the same quantity of PyTorch tensors, maps as [batch, channels, ...].
        inputs: NumPy arrays, maps as [batch, height, width, channels].
        wrt: positions of the inputs that the gradient is taken by.
        of: the library or paper whose form the peer's is.
        rtol: how closely the two values must agree; None if they are not the same
            quantity (random parts).
    """

    loss: Callable[..., Any]
    peer: Callable[..., Any]
    inputs: tuple[Any, ...]
    wrt: tuple[int, ...] = (0,)
    of: str = ""
    rtol: float | None = 1e-3


def normal(*shape: int, seed: int, scale: float = 1.0) -> np.ndarray:
    """Standard normal numbers in float32."""
    numbers = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return np.float32(scale) * numbers


def integers(*shape: int, high: int, seed: int) -> np.ndarray:
    """Integers in [0, high)."""
    return np.random.default_rng(seed).integers(0, high, shape).astype(np.int32)


BATCH, CLASSES, WIDTH = 256, 1000, 512
STUDENT_LOGITS = normal(BATCH, CLASSES, seed=0, scale=3.0)
TEACHER_LOGITS = normal(BATCH, CLASSES, seed=1, scale=3.0)
LABELS = integers(BATCH, high=CLASSES, seed=2)
STUDENT_FEATURES = normal(BATCH, WIDTH, seed=3)
TEACHER_FEATURES = normal(BATCH, WIDTH, seed=4)
STUDENT_MAPS = normal(BATCH, 32, 32, 64, seed=5)
TEACHER_MAPS = normal(BATCH, 32, 32, 64, seed=6)

Rows = Mapping[str, Row]
