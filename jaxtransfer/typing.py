"""The vocabulary: what every part of the library hands to the next."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jaxtyping import Array, Float, Key, PyTree, Shaped

AnyArray = Array | np.ndarray
"""What a caller may pass: on the device or not yet."""

Params = Mapping[str, Any]
"""Nested dict of arrays with string keys: what the gradient is taken of."""

ModelState = Mapping[str, Any]
"""Nested dict of arrays by collection, e.g. ``{"batch_stats": …}``; ``{}`` if none."""

Frozen = Mapping[str, Any]
"""What is given, by role: ``{"params": …, "teacher": …, "anchor": …}``."""

Batch = Any
"""Pytree of arrays: ``{"inputs", "labels"}``, ``{"source", "target"}`` or ``{"support",
"query"}`` for the methods here; the training step takes any."""

Inputs = Any
Output = Any
Features = dict[str, Any]
Scalar = Float[Array, ""]


class Mean(NamedTuple):
    """A metric as the pair (sum, count), so that merging it is exact.

    Attributes:
        total: sum of the values, ``[]``, or one a class ``[classes]``.
        count: how many values (or which weight) went into it, of the same shape.
    """

    total: Shaped[Array, "..."] | float
    count: Shaped[Array, "..."] | float


Metrics = dict[str, Any]
"""Metrics by name: :class:`Mean` pairs, or scalars that stand for one value."""


class Variables(NamedTuple):
    """What a network holds: plain nested dicts of arrays.

    Attributes:
        params: learned arrays.
        model_state: what the forward pass updates (running statistics), by
            collection; ``{}`` if there is none.
    """

    params: Params
    model_state: ModelState = {}  # noqa: RUF012 - never mutated


class Apply(Protocol):
    """The signature of :attr:`Model.apply`."""

    def __call__(
        self,
        variables: Variables,
        inputs: Inputs,
        *,
        train: bool = False,
        key: jax.Array | None = None,
        taps: tuple[str, ...] = (),
        held: tuple[str, ...] = (),
    ) -> tuple[Output, Features, ModelState]:
        """Run the network; see :class:`Model`."""
        ...


class Model(NamedTuple):
    """A network as a pair of pure functions.

    Attributes:
        init: ``(key, inputs) -> Variables``.
        apply: ``(variables, inputs, *, train=False, key=None, taps=(), held=())
            -> (output, features, model_state)``. ``taps`` names the modules whose
            output is returned in ``features``; modules under a path in ``held`` run
            as in evaluation whatever ``train`` says: running statistics are used
            and left alone, nothing is dropped.
    """

    init: Callable[[jax.Array, Inputs], Variables]
    apply: Apply


Objective = Callable[
    [Any, Any, Any, Any, jax.Array], tuple[Any, tuple[ModelState, Metrics]]
]
"""``(params, frozen, model_state, batch, key) -> (loss, (model_state, metrics))``."""

Step = Callable[[Any, Batch], tuple[Any, dict[str, Mean]]]
"""``(train_state, batch) -> (train_state, metrics)``."""

Predict = Callable[[Any, Any, Any, Inputs], Output]
"""``(params, frozen, model_state, inputs) -> output`` in evaluation mode."""

__all__ = [
    "Apply",
    "Array",
    "Batch",
    "Features",
    "Float",
    "Frozen",
    "Inputs",
    "Key",
    "Mean",
    "Metrics",
    "Model",
    "ModelState",
    "Objective",
    "Output",
    "Params",
    "Predict",
    "PyTree",
    "Scalar",
    "Shaped",
    "Step",
    "Variables",
]
