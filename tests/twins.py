"""One small network written twice, in Linen and in NNX, with the same paths."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from jaxtransfer.model import from_linen, from_nnx
from jaxtransfer.typing import Model


class LinenBlock(nn.Module):
    width: int
    rate: float
    normalized: bool

    def setup(self):
        self.dense = nn.Dense(self.width)
        if self.normalized:
            self.norm = nn.BatchNorm(momentum=0.9)
        self.dropout = nn.Dropout(self.rate)

    def __call__(self, x, train=False):
        x = self.dense(x)
        if self.normalized:
            x = self.norm(x, use_running_average=not train)
        return self.dropout(nn.relu(x), deterministic=not train)


class LinenNet(nn.Module):
    outputs: int
    widths: tuple[int, ...]
    rate: float = 0.0
    normalized: bool = False

    def setup(self):
        self.blocks = [LinenBlock(w, self.rate, self.normalized) for w in self.widths]
        self.head = nn.Dense(self.outputs)

    def __call__(self, inputs, train=False):
        x = inputs.reshape(len(inputs), -1)
        for block in self.blocks:
            x = block(x, train=train)
        return self.head(x)


class NNXBlock(nnx.Module):
    def __init__(self, inputs, width, rate, normalized, rngs):
        self.dense = nnx.Linear(inputs, width, rngs=rngs)
        if normalized:
            self.norm = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.normalized = normalized
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x):
        x = self.dense(x)
        if self.normalized:
            x = self.norm(x)
        return self.dropout(nnx.relu(x))


class NNXNet(nnx.Module):
    def __init__(self, inputs, outputs, widths, rate, normalized, rngs):
        sizes = (inputs, *widths)
        self.blocks = nnx.List(
            [
                NNXBlock(below, width, rate, normalized, rngs)
                for below, width in zip(sizes[:-1], widths, strict=True)
            ]
        )
        self.head = nnx.Linear(sizes[-1], outputs, rngs=rngs)

    def __call__(self, inputs):
        x = inputs.reshape(len(inputs), -1)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


KINDS = ("linen", "nnx")


def network(
    kind: str,
    *,
    inputs: int = 6,
    outputs: int = 3,
    widths: tuple[int, ...] = (8, 5),
    rate: float = 0.0,
    normalized: bool = False,
) -> Model:
    """``blocks_0/{dense,norm,dropout} …``, then ``head``: inputs flattened first."""
    if kind == "linen":
        return from_linen(LinenNet(outputs, widths, rate, normalized))
    return from_nnx(
        lambda rngs: NNXNet(inputs, outputs, widths, rate, normalized, rngs)
    )


def jitted(model: Model) -> Model:
    """The same model, compiled: a test that calls it often is quicker."""
    static = ("train", "taps", "held")
    return Model(jax.jit(model.init), jax.jit(model.apply, static_argnames=static))


def same(first, second) -> bool:
    """Whether two trees are equal to the last bit."""
    if jax.tree.structure(first) != jax.tree.structure(second):
        return False
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return all(bool(jnp.array_equal(a, b)) for a, b in pairs)
