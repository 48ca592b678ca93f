"""VGG networks, in Linen, as torchvision has them."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtransfer.ops.patches import max_pool
from jaxtransfer.ops.pooling import adaptive_average_pool
from jaxtransfer.typing import AnyArray

# Convolutions of each stage; pooling follows a stage.
_STAGES = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
_INITIAL = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class VGG(nn.Module):
    """VGG of 11, 13, 16 or 19 layers, with or without batch normalisation.

    Modules carry torchvision's names: the layer ``features_N`` is number N of its list,
    activations and pooling counted; the fully connected ones are ``classifier_0``,
    ``classifier_3`` and the head ``classifier_6``. The last map is pooled to 7x7
    whatever the image's size, and flattened in torch's order (channels, height, width),
    so that transposed kernels of torch fit. An image is 32 pixels wide or more.

    Attributes:
        outputs: classes.
        depth: 11, 13, 16 or 19.
        batch_norm: normalise after each convolution.
        filters: filters of the first stage; doubled in each of the next three.
        width: width of the fully connected layers.
        dropout: rate after them, 0 … 1.

    Raises:
        ValueError: (in init) an unknown depth, or images that are too small.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> net = VGG(5, depth=11, filters=2, width=8)
        >>> outputs, variables = jax.eval_shape(
        ...     net.init_with_output, jax.random.key(0), jnp.ones((2, 32, 32, 3)))
        >>> outputs.shape, variables["params"]["classifier_0"]["kernel"].shape
        ((2, 5), (784, 8))

    References:
        Simonyan, Zisserman, *Very deep convolutional networks for large-scale image
        recognition*, ICLR 2015, table 1.
    """

    outputs: int
    depth: int = 16
    batch_norm: bool = False
    filters: int = 64
    width: int = 4096
    dropout: float = 0.5

    @nn.compact
    def __call__(self, inputs: AnyArray, train: bool = False) -> jax.Array:
        """Map images ``[batch, height, width, channels]`` to ``[batch, outputs]``."""
        if self.depth not in _STAGES:
            raise ValueError(f"depth: got {self.depth}; choose 11, 13, 16 or 19")
        if min(inputs.shape[1:3]) < 32:
            raise ValueError(
                f"inputs: got images of {inputs.shape[1:3]} pixels; pooled five times "
                "by 2, they need 32 or more"
            )
        x, number = jnp.asarray(inputs), 0
        for stage, layers in enumerate(_STAGES[self.depth]):
            for _ in range(layers):
                x = nn.Conv(
                    self.filters * 2 ** min(stage, 3),
                    (3, 3),
                    padding=((1, 1), (1, 1)),
                    kernel_init=_INITIAL,
                    name=f"features_{number}",
                )(x)
                number += 1
                if self.batch_norm:
                    x = nn.BatchNorm(
                        use_running_average=not train,
                        momentum=0.9,
                        name=f"features_{number}",
                    )(x)
                    number += 1
                x = nn.relu(x)
                number += 1
            x = max_pool(x)
            number += 1
        x = adaptive_average_pool(x, (7, 7))
        x = jnp.moveaxis(x, -1, 1).reshape(x.shape[0], -1)
        for name in ("classifier_0", "classifier_3"):
            x = nn.relu(nn.Dense(self.width, name=name)(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.outputs, name="classifier_6")(x)


__all__ = ["VGG"]
