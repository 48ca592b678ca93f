"""Residual networks for photographs, in Linen, as torchvision and timm have them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax

from jaxtransfer.ops.patches import max_pool
from jaxtransfer.typing import AnyArray

_STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
_INITIAL = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
_conv = partial(nn.Conv, use_bias=False, kernel_init=_INITIAL)
_AROUND = ((1, 1), (1, 1))


class _Block(nn.Module):
    filters: int
    stride: int
    bottleneck: bool
    norm: Callable[..., Any]

    @nn.compact
    def __call__(self, inputs: AnyArray, train: bool = False) -> jax.Array:
        norm = partial(self.norm, use_running_average=not train, momentum=0.9)
        strides = (self.stride, self.stride)
        outer = self.filters * (4 if self.bottleneck else 1)
        if self.bottleneck:
            # The stride is that of the 3x3 convolution ("ResNet v1.5").
            layers = [(self.filters, 1, 1), (self.filters, 3, self.stride)]
            layers += [(outer, 1, 1)]
        else:
            layers = [(outer, 3, self.stride), (outer, 3, 1)]
        x = inputs
        for number, (filters, size, stride) in enumerate(layers, 1):
            x = _conv(
                filters,
                (size, size),
                strides=(stride, stride),
                padding=_AROUND if size == 3 else "VALID",
                name=f"conv{number}",
            )(x)
            x = norm(name=f"bn{number}")(x)
            x = nn.relu(x) if number < len(layers) else x
        shortcut = inputs
        if self.stride != 1 or inputs.shape[-1] != outer:
            shortcut = _conv(
                outer, (1, 1), strides=strides, padding="VALID", name="downsample_0"
            )(inputs)
            shortcut = norm(name="downsample_1")(shortcut)
        return nn.relu(x + shortcut)


class ImageNetResNet(nn.Module):
    """ResNet-18, -34 or -50 for photographs, with projection shortcuts (option B).

    Modules carry the names of torchvision and timm: ``conv1``, ``bn1``,
    ``layer1_0/conv1``, ``layer2_0/downsample_0``, …; the head is ``fc``. Padding is
    symmetric, as in torch; in ResNet-50 the 3x3 convolutions have the stride. For
    32x32 images there is :class:`~jaxtransfer.nets.ResNet`.

    Attributes:
        outputs: classes.
        depth: 18, 34 (two 3x3 convolutions a block) or 50 (bottlenecks).
        filters: filters of the first stage; doubled in each of the next.
        stages: blocks of each stage; by default those of the depth.
        norm: batch normalisation, or what takes its place with its parameters, as
            :class:`~jaxtransfer.nets.StochNorm`.

    Raises:
        ValueError: (in init) an unknown depth.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> net = ImageNetResNet(5, depth=50, filters=4, stages=(1, 1))
        >>> outputs, variables = jax.eval_shape(
        ...     net.init_with_output, jax.random.key(0), jnp.ones((2, 32, 32, 3)))
        >>> outputs.shape, variables["params"]["fc"]["kernel"].shape
        ((2, 5), (32, 5))

    References:
        He et al., *Deep residual learning for image recognition*, CVPR 2016.
    """

    outputs: int
    depth: int = 18
    filters: int = 64
    stages: tuple[int, ...] | None = None
    norm: Callable[..., Any] = nn.BatchNorm

    @nn.compact
    def __call__(self, inputs: AnyArray, train: bool = False) -> jax.Array:
        """Map images ``[batch, height, width, channels]`` to ``[batch, outputs]``."""
        if self.depth not in _STAGES:
            raise ValueError(f"depth: got {self.depth}; choose 18, 34 or 50")
        x = _conv(
            self.filters,
            (7, 7),
            strides=(2, 2),
            padding=((3, 3), (3, 3)),
            name="conv1",
        )(inputs)
        x = self.norm(use_running_average=not train, momentum=0.9, name="bn1")(x)
        x = max_pool(nn.relu(x), window=3, strides=2, padding=1)
        for stage, blocks in enumerate(self.stages or _STAGES[self.depth]):
            for number in range(blocks):
                block = _Block(
                    self.filters * 2**stage,
                    2 if stage and not number else 1,
                    self.depth >= 50,
                    self.norm,
                    name=f"layer{stage + 1}_{number}",
                )
                x = block(x, train=train)
        return nn.Dense(self.outputs, name="fc")(x.mean(axis=(1, 2)))


__all__ = ["ImageNetResNet"]
