"""One loss under test: what it is called with, and what must hold of it anyhow.

Every public function of `jaxtransfer.losses` has a `Case` in a file of
`tests/losses/cases/` (or is listed there as one that can't have one); the tests of
`tests/losses/test_contract.py` hold all of them to the same promises.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


def det(shape, seed, amplitude=1.0):
    """Numbers in [-amplitude, amplitude) from integer hashing: the same anywhere."""
    i = np.arange(int(np.prod(shape)), dtype=np.uint64)
    step = (i + np.uint64(1)) * np.uint64(seed) * np.uint64(320744257)
    u = (i * i * np.uint64(2654435761) + step) % np.uint64(2**32)
    u = (u ^ (u >> np.uint64(15))) * np.uint64(2246822519) % np.uint64(2**32)
    return (amplitude * (2 * (u.astype(np.float64) / 2**32) - 1)).reshape(shape)


@dataclass(frozen=True, eq=False)
class Case:
    """A call of a loss, and which of its promises apply.

    Attributes:
        function: The loss. It is called as ``function(*arrays, **options)``.
        arrays: Pytrees of NumPy arrays (float64, integers, booleans), one a positional
            argument: ordinary input of the smallest size that is not degenerate.
        options: Keyword arguments, not transformed. Random functions get their
            ``key=jax.random.key(0)`` here.
        label: Tells two cases of one function apart.
        differentiable: Positions whose gradient must be right (finite differences in
            float64) and finite at every input.
        stopped: Positions of targets: their gradient is exactly 0.
        masks: Which positions a mask covers along their leading axis, by its keyword:
            ``{"where": (0, 1)}``. Rows appended with mask False, holding anything, must
            change nothing.
        per_example: Whether the result is one value per leading row of argument 0.
        at_zero: Whether all-zero floats are legal input (finite value and gradient).
        at_equal_rows: Whether equal rows everywhere are legal input.
        at_extremes: Positions of logits or scores that may be as large as 1e4.
        smooth: False where finite differences are no test (kinks, rounding).
        half: Whether bfloat16 inputs must give what their float32 values give.
        more: Further legal inputs by name, for finite value and gradient.
    """

    function: Callable[..., Any]
    arrays: tuple[Any, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    differentiable: tuple[int, ...] = (0,)
    stopped: tuple[int, ...] = ()
    masks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    per_example: bool = False
    at_zero: bool = True
    at_equal_rows: bool = True
    at_extremes: tuple[int, ...] = ()
    smooth: bool = True
    half: bool = True
    more: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The function's name, with the label if there is one."""
        name = self.function.__name__
        return f"{name}-{self.label}" if self.label else name
