"""Batch normalisation folded into the convolution before it."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from jaxtransfer.ops.dtypes import common_dtype
from jaxtransfer.ops.patches import extract_patches
from jaxtransfer.typing import AnyArray

_COLUMNS, _PART = 32, 32


def folding_pays(inputs: AnyArray, window: Sequence[int]) -> bool:
    """Whether `FoldedBatchNorm` is faster than convolution and `flax.linen.BatchNorm`.

    On a CPU, where the kernel has few rows, as that of a first layer: the statistics
    then come from a small matrix instead of large maps.

    Args:
        inputs: [..., channels], of the convolution.
        window: Its size.

    Returns:
        Whether it pays.
    """
    columns = inputs.shape[-1] * math.prod(window)
    return columns <= _COLUMNS and jax.default_backend() == "cpu"


class FoldedBatchNorm(nn.Module):
    r"""Batch normalisation of a convolution, as a convolution by another kernel.

    .. math:: \mathrm{BN}(P W + b) = P\,W f + \beta - \bar p^\top W f, \qquad
              f = \gamma \big/ \sqrt{\mathrm{diag}(W^\top C W) + \epsilon}

    with the patches :math:`P` [positions, columns] of the inputs, their mean
    :math:`\bar p` and covariance :math:`C`. Mean and variance of the outputs are exact,
    and no pass over them, forwards or backwards, is needed. In evaluation mode those of
    the state take their place.

    Equal to `flax.linen.BatchNorm` (statistics in float32 at least) after the
    convolution, up to rounding, with the same parameters and state.

    Attributes:
        use_running_average: Evaluation mode.
        momentum: Share of the old running statistics that is kept, in [0, 1].
        epsilon: Added to the variance.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> from jaxtransfer.nets import PatchConv
        >>> class Layer(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, inputs):
        ...         conv = PatchConv(8, (3, 3), name="conv")
        ...         conv(inputs)  # makes its parameters
        ...         return FoldedBatchNorm(use_running_average=False)(inputs, conv)
        >>> outputs, _ = Layer().init_with_output(
        ...     jax.random.key(0), jnp.arange(32.0).reshape(2, 4, 4, 1))
        >>> outputs.shape, bool(jnp.allclose(outputs.mean((0, 1, 2)), 0.0, atol=1e-5))
        ((2, 4, 4, 8), True)

    Reference:
        Ioffe and Szegedy, "Batch normalization", ICML 2015, algorithm 1.
    """

    use_running_average: bool
    momentum: float = 0.99
    epsilon: float = 1e-5

    @nn.compact
    def __call__(
        self, inputs: Float[AnyArray, "... channels"], conv: nn.Conv
    ) -> Float[Array, "... features"]:
        """Convolve and normalise.

        Args:
            inputs: [batch, *spatial, channels], of the convolution.
            conv: The convolution, with parameters, zeros as padding ("SAME", "VALID",
                widths) and without dilation or groups.

        Returns:
            [batch, *spatial, features].

        Raises:
            ValueError: If the convolution has dilation, groups or another padding.
        """
        dilations = conv.input_dilation, conv.kernel_dilation
        special = conv.padding in ("CIRCULAR", "REFLECT", "CAUSAL")
        grouped = conv.feature_group_count != 1
        if grouped or special or any(_dilates(x) for x in dilations):
            raise ValueError(
                "conv must have no dilation and no groups, and zeros as padding, got "
                f"input_dilation, kernel_dilation={dilations}, feature_group_count="
                f"{conv.feature_group_count}, padding={conv.padding!r}; use "
                "flax.linen.BatchNorm after it."
            )
        given = conv.variables["params"]
        features = conv.features
        own = (features,), jnp.float32  # whatever JAX's default is, as of Flax's layers
        mean = self.variable("batch_stats", "mean", jnp.zeros, *own)
        var = self.variable("batch_stats", "var", jnp.ones, *own)
        scale = self.param("scale", nn.initializers.ones, *own)
        offset = self.param("bias", nn.initializers.zeros, *own)
        kernel = given["kernel"]
        *window, _, _ = kernel.shape
        if conv.mask is not None:
            kernel = kernel * conv.mask
        bias = given["bias"] if conv.use_bias else jnp.zeros(features, kernel.dtype)
        with jax.numpy_dtype_promotion("standard"):
            promoted: Any = conv.promote_dtype(
                jnp.asarray(inputs), kernel, bias, dtype=conv.dtype
            )
        x, kernel, bias = promoted
        patches = extract_patches(
            x, window, strides=conv.strides or 1, padding=conv.padding
        )
        kernel = kernel.reshape(-1, features)
        dtype = common_dtype(patches, kernel, scale)
        with jax.numpy_dtype_promotion("standard"):  # statistics may be wider
            if self.use_running_average:
                shift, variance = bias - mean.value, var.value
            else:
                center, variance = _moments(patches, kernel)
                shift = -center  # the bias cancels
                if not self.is_initializing():
                    keep = self.momentum
                    mean.value = keep * mean.value + (1 - keep) * (center + bias)
                    var.value = keep * var.value + (1 - keep) * variance
            factor = scale * jax.lax.rsqrt(variance + self.epsilon)
            kernel = (kernel * factor[None]).astype(dtype)
            shift = (shift * factor + offset).astype(dtype)
            outputs = jnp.matmul(patches, kernel, precision=conv.precision)
        return outputs + shift.reshape((1,) * (outputs.ndim - 1) + (-1,))


def _dilates(dilation: int | Sequence[int] | None) -> bool:
    steps = (dilation,) if isinstance(dilation, int) else tuple(dilation or ())
    return any(step != 1 for step in steps)


def _moments(
    patches: Float[Array, "... columns"], kernel: Float[Array, "columns features"]
) -> tuple[Float[Array, " features"], Float[Array, " features"]]:
    """Mean and variance of the products of patches and kernel, in float32 at least."""
    dtype = common_dtype(patches, kernel, jnp.float32)
    rows = patches.reshape(-1, patches.shape[-1]).astype(dtype)
    kernel = kernel.astype(dtype)
    mean = jnp.mean(rows, axis=0)
    # One product over all rows would round five times as much as batch normalisation.
    parts = jnp.pad(rows - mean[None], ((0, -len(rows) % _PART), (0, 0)))
    parts = parts.reshape(-1, _PART, rows.shape[1])
    exactly = jax.lax.Precision.HIGHEST
    squares = jnp.matmul(parts.swapaxes(1, 2), parts, precision=exactly)
    covariance = jnp.sum(squares, axis=0) / len(rows)
    turned = jnp.matmul(covariance, kernel, precision=exactly)
    return jnp.matmul(mean, kernel, precision=exactly), jnp.sum(kernel * turned, axis=0)


__all__ = ["FoldedBatchNorm", "folding_pays"]
