"""Vision transformer, in Linen, as timm has it."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtransfer.typing import AnyArray

_INITIAL = nn.initializers.truncated_normal(0.02)


class _Attention(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, inputs: AnyArray) -> jax.Array:
        batch, tokens, width = inputs.shape
        qkv = nn.Dense(3 * width, kernel_init=_INITIAL, name="qkv")(inputs)
        qkv = qkv.reshape(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = jnp.moveaxis(qkv, 2, 0)
        x = nn.dot_product_attention(query, key, value)
        x = x.reshape(batch, tokens, width)
        return nn.Dense(width, kernel_init=_INITIAL, name="proj")(x)


class _Perceptron(nn.Module):
    width: int
    activation: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, inputs: AnyArray) -> jax.Array:
        x = nn.Dense(self.width, kernel_init=_INITIAL, name="fc1")(inputs)
        x = self.activation(x)
        return nn.Dense(inputs.shape[-1], kernel_init=_INITIAL, name="fc2")(x)


class _Block(nn.Module):
    heads: int
    width: int
    epsilon: float
    activation: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, inputs: AnyArray) -> jax.Array:
        norm = partial(nn.LayerNorm, epsilon=self.epsilon)
        x = jnp.asarray(inputs)
        x = x + _Attention(self.heads, name="attn")(norm(name="norm1")(x))
        perceptron = _Perceptron(self.width, self.activation, name="mlp")
        return x + perceptron(norm(name="norm2")(x))


class ViT(nn.Module):
    """Vision transformer with a class token and learned position embeddings.

    Modules and parameters carry timm's names: ``cls_token``, ``pos_embed`` (the class
    token's first), ``patch_embed/proj``, ``blocks_0/attn/qkv``, …, ``norm``; the head
    is ``head``. ``qkv`` is one layer whose outputs are all queries, then all keys, then
    all values, each head by head.

    | | width | depth | heads |
    |---|---|---|---|
    | Ti | 192 | 12 | 3 |
    | S | 384 | 12 | 6 |
    | B | 768 | 12 | 12 |

    Attributes:
        outputs: classes.
        width: width of a token.
        depth: blocks.
        heads: heads of attention; they divide the width.
        patch: height and width of a patch in pixels.
        expansion: width of the perceptrons, in widths of a token.
        epsilon: of layer normalisation.
        activation: of the perceptrons; by default GELU by the error function. Weights
            trained with JAX are usually of the approximation by the hyperbolic tangent,
            ``jax.nn.gelu``.

    Raises:
        ValueError: (in init) heads that don't divide the width, or patches that don't
            divide the image.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> net = ViT(5, width=8, depth=1, heads=2, patch=8)
        >>> outputs, variables = jax.eval_shape(
        ...     net.init_with_output, jax.random.key(0), jnp.ones((2, 16, 24, 3)))
        >>> outputs.shape, variables["params"]["pos_embed"].shape
        ((2, 5), (1, 7, 8))

    References:
        Dosovitskiy et al., *An image is worth 16x16 words*, ICLR 2021, section 3.1; Ti
        and S: Touvron et al., *Training data-efficient image transformers*, ICML 2021.
    """

    outputs: int
    width: int = 192
    depth: int = 12
    heads: int = 3
    patch: int = 16
    expansion: int = 4
    epsilon: float = 1e-6
    activation: Callable[[jax.Array], jax.Array] = partial(
        jax.nn.gelu, approximate=False
    )

    @nn.compact
    def __call__(self, inputs: AnyArray) -> jax.Array:
        """Map images ``[batch, height, width, channels]`` to ``[batch, outputs]``."""
        if self.width % self.heads:
            raise ValueError(
                f"heads: got {self.heads}; they must divide the width, {self.width}"
            )
        if inputs.shape[1] % self.patch or inputs.shape[2] % self.patch:
            raise ValueError(
                f"patch: got {self.patch}; it must divide height and width of the "
                f"images, {inputs.shape[1:3]}"
            )
        x = _Patches(self.width, self.patch, name="patch_embed")(inputs)
        token = self.param(
            "cls_token", nn.initializers.normal(1e-6), (1, 1, self.width), jnp.float32
        )
        tokens = jnp.broadcast_to(token, (x.shape[0], 1, self.width))
        x = jnp.concatenate([tokens, x], axis=1)
        places = (1, *x.shape[1:])
        x = x + self.param("pos_embed", _INITIAL, places, jnp.float32)
        for number in range(self.depth):
            x = _Block(
                self.heads,
                self.expansion * self.width,
                self.epsilon,
                self.activation,
                name=f"blocks_{number}",
            )(x)
        x = nn.LayerNorm(epsilon=self.epsilon, name="norm")(x)
        return nn.Dense(self.outputs, kernel_init=_INITIAL, name="head")(x[:, 0])


class _Patches(nn.Module):
    width: int
    patch: int

    @nn.compact
    def __call__(self, inputs: AnyArray) -> jax.Array:
        """Map ``[batch, height, width, channels]`` to ``[batch, patches, width]``."""
        size = (self.patch, self.patch)
        x = nn.Conv(self.width, size, strides=size, padding="VALID", name="proj")(
            inputs
        )
        return x.reshape(x.shape[0], -1, self.width)


__all__ = ["ViT"]
