"""Small reference networks for images and vectors, in Linen.

Each but ``ResNet`` ends in a module ``head`` on a module ``features``, whose output
is the tap that transfer usually reads.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtransfer.nets.context import ConcatenatedContext, Context
from jaxtransfer.nets.folding import FoldedBatchNorm, folding_pays
from jaxtransfer.nets.layers import PatchConv
from jaxtransfer.nets.task_norm import TaskNorm
from jaxtransfer.ops import max_pool
from jaxtransfer.typing import AnyArray


class _DenseFeatures(nn.Module):
    widths: tuple[int, ...]
    activation: Callable[[jax.Array], jax.Array]
    dropout: float

    @nn.compact
    def __call__(self, inputs: AnyArray, train: bool = False) -> jax.Array:
        x = jnp.reshape(inputs, (inputs.shape[0], -1))
        for number, width in enumerate(self.widths):
            x = self.activation(nn.Dense(width, name=f"dense_{number}")(x))
            if self.dropout:
                x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return x


class MLP(nn.Module):
    """Fully connected network: ``features/dense_0 …``, then ``head``.

    Attributes:
        outputs: width of the head (classes).
        widths: widths of the hidden layers.
        activation: after each hidden layer.
        dropout: rate after each hidden layer, 0 … 1.
        context: numbers of a context appended to the inputs, for
            :func:`~jaxtransfer.methods.meta.cavia`; 0 is none.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> net = MLP(10, widths=(32,))
        >>> net.init_with_output(jax.random.key(0), jnp.ones((2, 8, 8, 1)))[0].shape
        (2, 10)
    """

    outputs: int
    widths: tuple[int, ...] = (64, 64)
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    dropout: float = 0.0
    context: int = 0

    @nn.compact
    def __call__(self, inputs: AnyArray, train: bool = False) -> jax.Array:
        """Map ``[batch, ...]`` to ``[batch, outputs]``."""
        x = jnp.reshape(inputs, (inputs.shape[0], -1))
        if self.context:
            x = ConcatenatedContext(self.context, name="context")(x)
        x = _DenseFeatures(self.widths, self.activation, self.dropout, name="features")(
            x, train=train
        )
        return nn.Dense(self.outputs, name="head")(x)


class Critic(nn.Module):
    """Domain critic: features ``[rows, features]`` to one logit ``[rows, 1]``.

    Attributes:
        widths: widths of the hidden layers.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> Critic((8,)).init_with_output(jax.random.key(0), jnp.ones((2, 4)))[0].shape
        (2, 1)
    """

    widths: tuple[int, ...] = (128, 128)

    @nn.compact
    def __call__(self, inputs: AnyArray) -> jax.Array:
        """Map ``[rows, features]`` to ``[rows, 1]``."""
        return MLP(1, self.widths, name="critic")(inputs)


class _LeNetFeatures(nn.Module):
    filters: tuple[int, int]
    width: int
    dropout: float
    batch_norm: bool
    conv: Callable[..., Any]

    @nn.compact
    def __call__(self, inputs: AnyArray, train: bool = False) -> jax.Array:
        x = inputs
        for number, filters in enumerate(self.filters):
            x = self.conv(filters, (5, 5), padding="VALID", name=f"conv_{number}")(x)
            if self.batch_norm:
                x = nn.BatchNorm(
                    use_running_average=not train, momentum=0.9, name=f"norm_{number}"
                )(x)
            x = max_pool(nn.relu(x))
        x = nn.Dense(self.width, name="dense")(x.reshape(x.shape[0], -1))
        x = nn.relu(x)
        if self.dropout:
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return x


class LeNet(nn.Module):
    """LeNet of the digit-adaptation literature: two 5x5 convolutions, one dense layer.

    Attributes:
        outputs: classes.
        filters: filters of the two convolutions.
        width: width of the representation.
        dropout: rate on the representation, 0 … 1.
        batch_norm: normalise after each convolution.
        conv: convolution layer; ``PatchConv`` is several times faster on CPU inside a
            scan or under ``vmap`` over parameters.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> net = LeNet(10)
        >>> x = jnp.ones((2, 28, 28, 1))
        >>> jax.eval_shape(net.init_with_output, jax.random.key(0), x)[0].shape
        (2, 10)

    References:
        LeCun et al., *Gradient-based learning applied to document recognition*, 1998;
        the widths are those of Long et al., *Deep adaptation networks*' digit code.
    """

    outputs: int
    filters: tuple[int, int] = (20, 50)
    width: int = 500
    dropout: float = 0.0
    batch_norm: bool = False
    conv: Callable[..., Any] = nn.Conv

    @nn.compact
    def __call__(self, inputs: AnyArray, train: bool = False) -> jax.Array:
        """Map images ``[batch, height, width, channels]`` to ``[batch, outputs]``."""
        x = _LeNetFeatures(
            self.filters,
            self.width,
            self.dropout,
            self.batch_norm,
            self.conv,
            name="features",
        )(inputs, train=train)
        return nn.Dense(self.outputs, name="head")(x)


Norm = Literal["batch", "group", "layer", "task", "none"]


def _normalized(norm: Norm, inputs: jax.Array, train: bool) -> jax.Array:
    """One of the normalisations of :class:`Conv4`, called ``norm``."""
    if norm == "batch":
        # Momentum 0: the running statistics are those of the last batch in training
        # mode, so a task's query can be normalised by its support.
        layer = nn.BatchNorm(use_running_average=not train, momentum=0.0, name="norm")
    elif norm == "task":
        layer = TaskNorm(use_running_average=not train, name="norm")
    elif norm == "group":
        layer = nn.GroupNorm(math.gcd(8, inputs.shape[-1]), name="norm")
    elif norm == "layer":
        layer = nn.GroupNorm(1, name="norm")
    elif norm == "none":
        return inputs
    else:
        raise ValueError(
            f'norm: got {norm!r}; choose "batch", "group", "layer", "task" or "none"'
        )
    return layer(inputs)


class _Conv4Block(nn.Module):
    filters: int
    strided: bool
    norm: Norm
    conv: Callable[..., Any]

    @nn.compact
    def __call__(self, inputs: AnyArray, train: bool = False) -> jax.Array:
        strides = (2, 2) if self.strided else (1, 1)
        conv = self.conv(self.filters, (3, 3), strides=strides, name="conv")
        if self._folds(inputs):
            if self.is_initializing() or self.is_mutable_collection("intermediates"):
                conv(inputs)  # makes the parameters, or is tapped
            x = FoldedBatchNorm(not train, momentum=0.0, name="norm")(inputs, conv)
        else:
            x = _normalized(self.norm, conv(inputs), train)
        x = nn.relu(x)
        return x if self.strided else max_pool(x)

    def _folds(self, inputs: AnyArray) -> bool:
        patches = self.conv is PatchConv
        return self.norm == "batch" and patches and folding_pays(inputs, (3, 3))


class _Conv4Features(nn.Module):
    filters: int
    strided: bool
    pooled: bool
    norm: Norm
    context: int
    conv: Callable[..., Any]

    @nn.compact
    def __call__(self, inputs: AnyArray, train: bool = False) -> jax.Array:
        x = jnp.asarray(inputs)
        for number in range(4):
            block = _Conv4Block(
                self.filters, self.strided, self.norm, self.conv, name=f"block_{number}"
            )
            x = block(x, train=train)
            if number == 2 and self.context:
                x = Context(self.context, name="context")(x)
        return x.mean(axis=(1, 2)) if self.pooled else x.reshape(x.shape[0], -1)


class Conv4(nn.Module):
    """Four 3x3 convolutions with batch normalisation, the few-shot standard.

    Attributes:
        outputs: classes (ways).
        filters: filters of each convolution.
        strided: stride 2 (Omniglot) or 2x2 max pooling (mini-ImageNet).
        pooled: mean over the last positions (the reference's Omniglot network) or all
            of them.
        norm: normalisation after each convolution: over the batch, over each of 8
            groups of an image's channels (of as many as divide both 8 and the
            filters), over all channels of an image, :class:`TaskNorm`, or none.
        context: numbers of a context that modulates the third block's output, for
            :func:`~jaxtransfer.methods.meta.cavia`; 0 is none.
        conv: convolution layer; the default is fast when every task has kernels of
            its own.

    Raises:
        ValueError: (in init) an unknown normalisation.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> net = Conv4(5, filters=8)
        >>> x = jnp.ones((2, 28, 28, 1))
        >>> jax.eval_shape(net.init_with_output, jax.random.key(0), x)[0].shape
        (2, 5)

    References:
        Vinyals et al., *Matching networks*, NeurIPS 2016; strides: Finn et al., 2017;
        context after the third block: Zintgraf et al., 2019.
    """

    outputs: int
    filters: int = 64
    strided: bool = True
    pooled: bool = True
    norm: Norm = "batch"
    context: int = 0
    conv: Callable[..., Any] = PatchConv

    @nn.compact
    def __call__(self, inputs: AnyArray, train: bool = False) -> jax.Array:
        """Map images ``[batch, height, width, channels]`` to ``[batch, outputs]``."""
        x = _Conv4Features(
            self.filters,
            self.strided,
            self.pooled,
            self.norm,
            self.context,
            self.conv,
            name="features",
        )(inputs, train=train)
        return nn.Dense(self.outputs, name="head")(x)


class _ResidualBlock(nn.Module):
    filters: int
    stride: int
    conv: Callable[..., Any]

    @nn.compact
    def __call__(self, inputs: AnyArray, train: bool = False) -> jax.Array:
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        conv = partial(self.conv, padding=((1, 1), (1, 1)), use_bias=False)
        strides = (self.stride, self.stride)
        x = conv(self.filters, (3, 3), strides=strides, name="conv1")(inputs)
        x = nn.relu(norm(name="bn1")(x))
        x = conv(self.filters, (3, 3), name="conv2")(x)
        x = norm(name="bn2")(x)
        shortcut = inputs[:, :: self.stride, :: self.stride]
        more = self.filters - inputs.shape[-1]
        if more:
            widen = (more // 2, more - more // 2)
            shortcut = jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), widen))
        return nn.relu(x + shortcut)


class ResNet(nn.Module):
    """CIFAR ResNet of depth 6n + 2 with parameter-free shortcuts (option A).

    Modules carry torch's names: ``conv1``, ``bn1``, ``layer1_0/conv1``, …; the head is
    ``linear``. Padding is symmetric, as in torch.

    Attributes:
        outputs: classes.
        depth: 8, 14, 20, 32, 44, 56 or 110.
        filters: filters of the first stage; doubled in the next two.
        conv: convolution layer; ``PatchConv`` is several times faster on CPU under
            ``vmap`` over parameters, as in a cohort of students.

    Raises:
        ValueError: (in init) the depth is not 6n + 2.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> net = ResNet(10, depth=8, filters=4)
        >>> x = jnp.ones((2, 16, 16, 3))
        >>> jax.eval_shape(net.init_with_output, jax.random.key(0), x)[0].shape
        (2, 10)

    References:
        He et al., *Deep residual learning for image recognition*, CVPR 2016, sec. 4.2.
    """

    outputs: int
    depth: int = 20
    filters: int = 16
    conv: Callable[..., Any] = nn.Conv

    @nn.compact
    def __call__(self, inputs: AnyArray, train: bool = False) -> jax.Array:
        """Map images ``[batch, height, width, channels]`` to ``[batch, outputs]``."""
        if (self.depth - 2) % 6 or self.depth < 8:
            raise ValueError(f"depth: got {self.depth}; it must be 6n + 2, e.g. 20")
        x = self.conv(
            self.filters, (3, 3), padding=((1, 1), (1, 1)), use_bias=False, name="conv1"
        )(inputs)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="bn1")(x)
        x = nn.relu(x)
        for stage in range(3):
            for number in range((self.depth - 2) // 6):
                block = _ResidualBlock(
                    self.filters * 2**stage,
                    2 if stage and not number else 1,
                    self.conv,
                    name=f"layer{stage + 1}_{number}",
                )
                x = block(x, train=train)
        return nn.Dense(self.outputs, name="linear")(x.mean(axis=(1, 2)))


__all__ = ["Conv4", "Critic", "LeNet", "MLP", "ResNet"]
