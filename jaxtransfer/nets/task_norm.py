"""Task normalisation: statistics of the support blended with an example's own."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtransfer.ops.dtypes import common_dtype


class TaskNorm(nn.Module):
    r"""Task normalisation (TaskNorm-I) of images.

    .. math:: \mu = \alpha \mu_S + (1-\alpha) \mu_x, \qquad
              \sigma^2 = \alpha (\sigma_S^2 + (\mu_S - \mu)^2)
                       + (1-\alpha) (\sigma_x^2 + (\mu_x - \mu)^2)

    with :math:`\mu_S, \sigma_S^2` a channel's moments over the support set,
    :math:`\mu_x, \sigma_x^2` over the positions of one image, and
    :math:`\alpha = \mathrm{sigmoid}(a |S| + b)` learned. In training mode the batch is
    the support set and its moments are kept in the state; in evaluation mode those of
    the state are used, so an image is judged alone. Moments are in float32 at least.

    Attributes:
        use_running_average: evaluation mode.
        epsilon: added to the variance.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = TaskNorm(use_running_average=False)
        >>> x = jnp.arange(32.0).reshape(2, 2, 2, 4)
        >>> outputs, variables = layer.init_with_output(jax.random.key(0), x)
        >>> outputs.shape, sorted(variables["batch_stats"])
        ((2, 2, 2, 4), ['mean', 'size', 'var'])

    References:
        Bronskill et al., *TaskNorm: Rethinking batch normalization for meta-learning*,
        ICML 2020, section 4.
    """

    use_running_average: bool
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Normalise ``[batch, height, width, channels]``."""
        channels = inputs.shape[-1]
        dtype = common_dtype(inputs.dtype, jnp.float32)
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), dtype)
        var = self.variable("batch_stats", "var", jnp.ones, (channels,), dtype)
        size = self.variable("batch_stats", "size", jnp.ones, (), dtype)
        if self.use_running_average:
            of_set, spread, rows = mean.value, var.value, size.value
        else:
            of_set = jnp.mean(inputs, axis=(0, 1, 2), dtype=dtype)
            spread = jnp.var(inputs, axis=(0, 1, 2), dtype=dtype)
            rows = jnp.asarray(len(inputs), dtype)
            if not self.is_initializing():
                mean.value, var.value, size.value = of_set, spread, rows
        own = jnp.mean(inputs, axis=(1, 2), keepdims=True, dtype=dtype)
        own_spread = jnp.var(inputs, axis=(1, 2), keepdims=True, dtype=dtype)
        slope = self.param("blend_slope", zeros, (), jnp.float32)
        offset = self.param("blend_offset", zeros, (), jnp.float32)
        scale = self.param("scale", ones, (channels,), jnp.float32)
        bias = self.param("bias", zeros, (channels,), jnp.float32)
        with jax.numpy_dtype_promotion("standard"):  # inputs may be narrower
            blend = jax.nn.sigmoid(slope * rows + offset)
            of_set, spread = _per_channel(of_set), _per_channel(spread)
            centre = blend * of_set + (1 - blend) * own
            variance = blend * (spread + (of_set - centre) ** 2)
            variance += (1 - blend) * (own_spread + (own - centre) ** 2)
            factor = jax.lax.rsqrt(variance + self.epsilon) * _per_channel(scale)
            outputs = (inputs - centre) * factor + _per_channel(bias)
        return outputs.astype(common_dtype(inputs, scale, bias))


def _per_channel(values):
    """[channels] for images [batch, height, width, channels]."""
    return values[None, None, None]


__all__ = ["TaskNorm"]
