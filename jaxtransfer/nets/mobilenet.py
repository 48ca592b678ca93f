"""MobileNetV2, in Linen: as PyTorch has it, and as TensorFlow has it."""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtransfer.nets.layers import PatchConv
from jaxtransfer.typing import AnyArray

Stages = tuple[tuple[int, int, int, int], ...]

_STAGES: Stages = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_INITIAL = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def _scaled(filters: int, width: float) -> int:
    """Filters times width, to the nearest multiple of 8 that loses 10 % at most."""
    wanted = filters * width
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * wanted else rounded


class _ConvNorm:
    """Convolution and normalisation, as modules of whoever calls it."""

    def __init__(self, net: "MobileNetV2 | _Block", train: bool):
        self.padding = net.padding
        self.batch_norm = net.batch_norm
        self.epsilon = net.epsilon
        self.train = train

    def __call__(
        self,
        x: Any,
        filters: int,
        names: tuple[str, str],
        *,
        size: int = 1,
        stride: int = 1,
        depthwise: bool = False,
    ) -> jax.Array:
        around = ((size // 2, size // 2),) * 2
        # Parameters and outputs are the same: see `ops.depthwise_conv`.
        on_cpu = jax.default_backend() == "cpu"
        conv = PatchConv if depthwise and on_cpu else nn.Conv
        x = conv(
            filters,
            (size, size),
            strides=(stride, stride),
            padding="SAME" if self.padding == "same" else around,
            feature_group_count=filters if depthwise else 1,
            use_bias=not self.batch_norm,
            kernel_init=_INITIAL,
            name=names[0],
        )(x)
        if not self.batch_norm:
            return x
        return nn.BatchNorm(
            use_running_average=not self.train,
            momentum=0.9,
            epsilon=self.epsilon,
            name=names[1],
        )(x)


class _Block(nn.Module):
    expansion: int
    filters: int
    stride: int
    padding: str
    batch_norm: bool
    epsilon: float

    @nn.compact
    def __call__(self, inputs: AnyArray, train: bool = False) -> jax.Array:
        layer = _ConvNorm(self, train)
        wide = inputs.shape[-1] * self.expansion
        x = jnp.asarray(inputs)
        if self.expansion == 1:
            depthwise, project = ("conv_dw", "bn1"), ("conv_pw", "bn2")
        else:
            x = nn.relu6(layer(x, wide, ("conv_pw", "bn1")))
            depthwise, project = ("conv_dw", "bn2"), ("conv_pwl", "bn3")
        x = layer(x, wide, depthwise, size=3, stride=self.stride, depthwise=True)
        x = layer(nn.relu6(x), self.filters, project)
        if self.stride == 1 and inputs.shape[-1] == self.filters:
            x = x + inputs
        return x


class MobileNetV2(nn.Module):
    """MobileNetV2: inverted residual blocks of depthwise convolutions.

    Modules carry timm's names: ``conv_stem``, ``bn1``, ``blocks_STAGE_NUMBER/conv_pw``,
    ``…/conv_dw``, ``…/conv_pwl``, ``conv_head``, ``bn2``; the head is ``classifier``.
    The defaults are the network of torchvision and timm; TensorFlow's has
    ``padding="same"`` and ``epsilon=1e-3``. At even sizes the paddings differ, and
    weights trained with one are of little use with the other.

    Attributes:
        outputs: classes.
        width: factor of all filters; to multiples of 8.
        padding: ``"symmetric"``, as in torch, or ``"same"``, as in TensorFlow.
        batch_norm: normalise after each convolution; else convolutions have biases, as
            where the normalisation has been folded into them.
        epsilon: of batch normalisation.
        dropout: rate before the head, 0 … 1.
        stages: of each stage (expansion, filters, blocks, stride).
        last: filters of the last convolution.

    Raises:
        ValueError: (in init) an unknown padding.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> net = MobileNetV2(5, width=0.25, stages=((1, 16, 1, 1), (6, 24, 2, 2)))
        >>> outputs, variables = jax.eval_shape(
        ...     net.init_with_output, jax.random.key(0), jnp.ones((2, 32, 32, 3)))
        >>> outputs.shape, sorted(variables["params"]["blocks_1_0"])
        ((2, 5), ['bn1', 'bn2', 'bn3', 'conv_dw', 'conv_pw', 'conv_pwl'])

    References:
        Sandler et al., *MobileNetV2: inverted residuals and linear bottlenecks*, CVPR
        2018, table 2.
    """

    outputs: int
    width: float = 1.0
    padding: Literal["symmetric", "same"] = "symmetric"
    batch_norm: bool = True
    epsilon: float = 1e-5
    dropout: float = 0.0
    stages: Stages = _STAGES
    last: int = 1280

    @nn.compact
    def __call__(self, inputs: AnyArray, train: bool = False) -> jax.Array:
        """Map images ``[batch, height, width, channels]`` to ``[batch, outputs]``."""
        if self.padding not in ("symmetric", "same"):
            raise ValueError(
                f'padding: got {self.padding!r}; choose "symmetric" or "same"'
            )
        layer = _ConvNorm(self, train)
        stem = _scaled(32, self.width)
        x = nn.relu6(layer(inputs, stem, ("conv_stem", "bn1"), size=3, stride=2))
        for stage, (expansion, filters, blocks, stride) in enumerate(self.stages):
            for number in range(blocks):
                block = _Block(
                    expansion,
                    _scaled(filters, self.width),
                    1 if number else stride,
                    self.padding,
                    self.batch_norm,
                    self.epsilon,
                    name=f"blocks_{stage}_{number}",
                )
                x = block(x, train=train)
        last = _scaled(self.last, max(1.0, self.width))
        x = nn.relu6(layer(x, last, ("conv_head", "bn2"))).mean(axis=(1, 2))
        if self.dropout:
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.outputs, name="classifier")(x)


__all__ = ["MobileNetV2"]
