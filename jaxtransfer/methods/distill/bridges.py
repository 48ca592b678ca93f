"""Bridges: small networks from a student's features to the shape of a teacher's.

They are trained with the student and left out when it is exported.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtransfer.methods.distill.terms import MakeBridge
from jaxtransfer.model import from_linen
from jaxtransfer.ops.pooling import adaptive_average_pool
from jaxtransfer.typing import Model


class _Match(nn.Module):
    shape: tuple[int, ...]
    norm: bool

    @nn.compact
    def __call__(self, inputs: jax.Array, train: bool = False) -> jax.Array:
        *positions, channels = self.shape
        x = inputs
        if len(positions) == 2 and x.shape[1:3] != tuple(positions):
            x = adaptive_average_pool(x, (positions[0], positions[1]))
        elif len(positions) == 1 and x.shape[1] != positions[0]:
            x = jax.image.resize(x, (len(x), positions[0], x.shape[-1]), "linear")
        with jax.numpy_dtype_promotion("standard"):  # features may be narrower or wider
            x = nn.Dense(channels, use_bias=not self.norm, name="channels")(x)
            if self.norm:
                x = nn.BatchNorm(not train, momentum=0.9, name="norm")(x)
                x = nn.relu(x)
        return x


def match(*, always: bool = False, norm: bool = False) -> MakeBridge:
    """A linear map of channels, after height and width or length are made equal.

    Maps ``[batch, height, width, channels]`` are averaged or repeated to the teacher's
    size, sequences ``[batch, length, channels]`` interpolated linearly, and the
    channels mapped by a matrix (a 1x1 convolution).

    Args:
        always: also where the shapes are equal, which need no bridge otherwise.
        norm: end with batch normalisation and ReLU, as a hint after ReLU wants.

    Returns:
        ``(student's shape, teacher's shape) -> network``, for ``Term(bridge=...)``.

    Raises:
        ValueError: (at the call) the two have another number of axes, or there are
            several layers.

    Example:
        >>> bridge = match()
        >>> bridge((1, 8, 8, 16), (1, 8, 8, 16)) is None
        True
        >>> import jax, jax.numpy as jnp
        >>> net = bridge((1, 8, 8, 16), (1, 4, 4, 32))
        >>> variables = net.init(jax.random.key(0), jnp.ones((2, 8, 8, 16)))
        >>> net.apply(variables, jnp.ones((2, 8, 8, 16)))[0].shape
        (2, 4, 4, 32)

    References:
        Romero et al., *FitNets: hints for thin deep nets*, ICLR 2015, section 2.2.
    """

    def make(student: tuple[Any, ...], teacher: tuple[Any, ...]) -> Model | None:
        if any(isinstance(size, tuple) for size in student):
            raise ValueError(
                "bridge: match joins one layer to one; make a term of each pair"
            )
        if len(student) != len(teacher):
            raise ValueError(
                f"bridge: the student's features are {student}, the teacher's "
                f"{teacher}; tap layers with as many axes, or write a bridge for them"
            )
        if student[1:] == teacher[1:] and not always:
            return None
        return from_linen(_Match(tuple(teacher[1:]), norm))

    return make


class _Variational(nn.Module):
    channels: int

    @nn.compact
    def __call__(self, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = inputs
        with jax.numpy_dtype_promotion("standard"):  # features may be narrower or wider
            for n in range(2):
                dense = nn.Dense(self.channels, use_bias=False, name=f"hidden_{n}")
                x = nn.relu(dense(x))
            mean = nn.Dense(self.channels, use_bias=False, name="mean")(x)
        # The variance begins at 5.
        first = nn.initializers.constant(jnp.log(jnp.expm1(5.0 - 1e-5)))
        variance = self.param("variance", first, (self.channels,), jnp.float32)
        return mean, variance.astype(mean.dtype)


def variational(student: tuple[int, ...], teacher: tuple[int, ...]) -> Model:
    """The mean and variance of VID: three 1x1 convolutions, a number a channel.

    Its output is a pair; ``lambda guess, maps, **options:
    losses.variational_information_distillation(guess[0], maps, guess[1], **options)``
    is the loss of such a term.

    Args:
        student: shape of the student's maps.
        teacher: shape of the teacher's maps.

    Returns:
        The network, for ``Term(bridge=variational)``.

    References:
        Ahn et al., *Variational information distillation for knowledge transfer*, CVPR
        2019, section 3.
    """
    del student
    return from_linen(_Variational(teacher[-1]))


__all__ = ["match", "variational"]
