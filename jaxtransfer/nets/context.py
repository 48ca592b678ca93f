"""A context: a few parameters that tell a network which task it is in (CAVIA)."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class Context(nn.Module):
    """Modulate features by a context vector that is a parameter of its own.

    ``x * (1 + A c + a) + B c + b`` channel by channel (FiLM), with ``c`` the parameter
    ``value``; ``c``, ``a`` and ``b`` are 0 in the beginning.

    Attributes:
        size: numbers of the context.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = Context(3)
        >>> x, variables = layer.init_with_output(jax.random.key(0), jnp.ones((2, 4)))
        >>> x.tolist() == jnp.ones((2, 4)).tolist(), variables["params"]["value"].shape
        (True, (3,))

    References:
        Zintgraf et al., *Fast context adaptation via meta-learning*, ICML 2019,
        section 3.2; FiLM: Perez et al., AAAI 2018.
    """

    size: int

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Map ``[..., channels]`` to the same shape."""
        zeros = nn.initializers.zeros
        context = self.param("value", zeros, (self.size,), jnp.float32)
        channels = inputs.shape[-1]
        scale = nn.Dense(channels, name="scale")(context)
        shift = nn.Dense(channels, name="shift")(context)
        every = tuple(range(inputs.ndim - 1))
        scale, shift = (jnp.expand_dims(one, every) for one in (scale, shift))
        return inputs * (1 + scale) + shift


class ConcatenatedContext(nn.Module):
    """Append a context vector that is a parameter of its own to every row.

    Attributes:
        size: numbers of the context.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = ConcatenatedContext(3)
        >>> layer.init_with_output(jax.random.key(0), jnp.ones((2, 4)))[0].shape
        (2, 7)

    References:
        Zintgraf et al., ICML 2019, section 3.2, eq. 6.
    """

    size: int

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Map ``[rows, features]`` to ``[rows, features + size]``.

        Of integers the result is in the context's dtype, which they would cut to 0.
        """
        zeros = nn.initializers.zeros
        context = self.param("value", zeros, (self.size,), jnp.float32)
        rows = jnp.broadcast_to(context, (*inputs.shape[:-1], self.size))
        real = jnp.issubdtype(inputs.dtype, jnp.inexact)
        dtype = inputs.dtype if real else rows.dtype
        return jnp.concatenate([inputs.astype(dtype), rows.astype(dtype)], axis=-1)


__all__ = ["ConcatenatedContext", "Context"]
