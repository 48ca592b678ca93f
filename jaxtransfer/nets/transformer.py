"""Encoder–decoder Transformer for sequences of tokens, in Linen, and its decoding."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxtransfer.typing import AnyArray, Variables


def sinusoids(length: int, width: int) -> np.ndarray:
    """Fixed encoding of positions ``[length, width]``: all sines, then all cosines."""
    rates = 10_000.0 ** (-np.arange(0, width, 2) / width)
    angles = np.arange(length)[:, None] * rates
    both = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    return both[:, :width].astype(np.float32)


class _Attention(nn.Module):
    width: int
    heads: int

    def setup(self) -> None:
        self.query, self.key, self.value, self.out = (
            nn.Dense(self.width, kernel_init=nn.initializers.xavier_uniform())
            for _ in range(4)
        )

    def _split(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], self.heads, self.width // self.heads)

    def memory(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values ``[batch, tokens, heads, width / heads]``."""
        return self._split(self.key(x)), self._split(self.value(x))

    def attend(
        self, x: jax.Array, memory: tuple[jax.Array, jax.Array], mask: jax.Array
    ) -> jax.Array:
        query = self._split(self.query(x))
        x = nn.dot_product_attention(query, *memory, mask=mask)
        return self.out(x.reshape(*x.shape[:-2], self.width))

    def __call__(self, x: jax.Array, source: jax.Array, mask: jax.Array) -> jax.Array:
        return self.attend(x, self.memory(source), mask)


class _Perceptron(nn.Module):
    hidden: int
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        initial = nn.initializers.xavier_uniform()
        width = x.shape[-1]
        x = nn.relu(nn.Dense(self.hidden, kernel_init=initial, name="inner")(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(width, kernel_init=initial, name="outer")(x)


class _EncoderLayer(nn.Module):
    width: int
    heads: int
    hidden: int
    dropout: float

    def setup(self) -> None:
        self.attention = _Attention(self.width, self.heads)
        self.perceptron = _Perceptron(self.hidden, self.dropout)
        self.norm1, self.norm2 = nn.LayerNorm(), nn.LayerNorm()
        self.drop = nn.Dropout(self.dropout)

    def __call__(self, x: jax.Array, mask: jax.Array, train: bool = False) -> jax.Array:
        normed = self.norm1(x)
        x = x + self.drop(self.attention(normed, normed, mask), not train)
        return x + self.drop(self.perceptron(self.norm2(x), train), not train)


class _DecoderLayer(nn.Module):
    width: int
    heads: int
    hidden: int
    dropout: float

    def setup(self) -> None:
        self.attention = _Attention(self.width, self.heads)
        self.cross = _Attention(self.width, self.heads)
        self.perceptron = _Perceptron(self.hidden, self.dropout)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm() for _ in range(3))
        self.drop = nn.Dropout(self.dropout)

    def _rest(
        self,
        x: jax.Array,
        memory: tuple[jax.Array, jax.Array],
        seen: jax.Array,
        train: bool,
    ) -> jax.Array:
        crossed = self.cross.attend(self.norm2(x), memory, seen)
        x = x + self.drop(crossed, not train)
        return x + self.drop(self.perceptron(self.norm3(x), train), not train)

    def __call__(
        self,
        x: jax.Array,
        source: jax.Array,
        past: jax.Array,
        seen: jax.Array,
        train: bool = False,
    ) -> jax.Array:
        normed = self.norm1(x)
        x = x + self.drop(self.attention(normed, normed, past), not train)
        return self._rest(x, self.cross.memory(source), seen, train)

    def step(
        self,
        x: jax.Array,
        cache: tuple[jax.Array, jax.Array],
        position: jax.Array,
        memory: tuple[jax.Array, jax.Array],
        seen: jax.Array,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """One more token of every row: x ``[rows, width]``."""
        normed = self.norm1(x)[:, None]
        places = jnp.arange(cache[0].shape[1])[None]
        here = (places == position[:, None])[..., None, None]
        cache = jax.tree.map(
            lambda old, new: jnp.where(here, new, old),
            cache,
            self.attention.memory(normed),
        )
        past = (places <= position[:, None])[:, None, None]
        x = x + self.attention.attend(normed, cache, past)[:, 0]
        # The rows of one source are so many queries of its memory.
        rows = x.reshape(len(memory[0]), -1, self.width)
        return self._rest(rows, memory, seen, False).reshape(x.shape), cache


class Transformer(nn.Module):
    """Encoder–decoder Transformer with normalisation before each layer.

    Source and target share one vocabulary and one matrix of embeddings, which is the
    output matrix too; positions are sinusoids. Padding of the source is attended by
    none, unless the source is nothing else. A token of the target attends to itself and
    all before it, padding or not: there padding must come last.
    Modules: ``encoder_0/attention``, …, ``decoder_0/cross``, …, ``encoder_norm``,
    ``decoder_norm``, ``embedding``.

    Attributes:
        vocabulary: how many tokens there are.
        width: width of a token.
        heads: heads of attention; they divide the width.
        hidden: width inside the perceptrons.
        encoder_layers: layers of the encoder.
        decoder_layers: layers of the decoder.
        dropout: share of the values that training drops, of embeddings and inside and
            after every layer.
        padding: the token that is none.

    Raises:
        ValueError: (in init) heads that don't divide the width.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> net = Transformer(11, width=8, heads=2, hidden=16)
        >>> inputs = {"source": jnp.ones((2, 5), int), "target": jnp.ones((2, 3), int)}
        >>> logits, variables = jax.eval_shape(
        ...     net.init_with_output, jax.random.key(0), inputs)
        >>> logits.shape
        (2, 3, 11)

    References:
        Vaswani et al., *Attention is all you need*, NeurIPS 2017. Deviations: the
        normalisation comes first (Xiong et al., *On layer normalization in the
        Transformer architecture*, ICML 2020); sines and cosines are not interleaved.
    """

    vocabulary: int
    width: int = 256
    heads: int = 4
    hidden: int = 512
    encoder_layers: int = 3
    decoder_layers: int = 3
    dropout: float = 0.0
    padding: int = 0

    def setup(self) -> None:
        """Make the layers."""
        if self.width % self.heads:
            raise ValueError(
                f"heads: got {self.heads}; they must divide the width, {self.width}"
            )
        options = (self.width, self.heads, self.hidden, self.dropout)
        scale = nn.initializers.normal(self.width**-0.5)
        self.embedding = nn.Embed(self.vocabulary, self.width, embedding_init=scale)
        self.encoder = [_EncoderLayer(*options) for _ in range(self.encoder_layers)]
        self.decoder = [_DecoderLayer(*options) for _ in range(self.decoder_layers)]
        self.encoder_norm, self.decoder_norm = nn.LayerNorm(), nn.LayerNorm()
        self.drop = nn.Dropout(self.dropout)

    def _embed(self, tokens: AnyArray, train: bool) -> jax.Array:
        x = self.embedding(tokens) * self.width**0.5
        places = sinusoids(tokens.shape[-1], self.width)[None]
        return self.drop(x + places, not train)

    def encode(
        self, source: Int[AnyArray, "batch source"], train: bool = False
    ) -> tuple[Float[Array, "batch source width"], Bool[Array, "batch 1 1 source"]]:
        """States of the source, and the mask of those that are no padding."""
        seen = (jnp.asarray(source) != self.padding)[:, None, None]
        x = self._embed(source, train)
        for layer in self.encoder:
            x = layer(x, seen, train)
        return self.encoder_norm(x), seen

    def __call__(
        self, inputs: Mapping[str, Int[AnyArray, "batch _"]], train: bool = False
    ) -> Float[Array, "batch target vocabulary"]:
        """Logits of the token after each of the target's.

        Args:
            inputs: "source" ``[batch, source]`` and "target" ``[batch, target]``: the
                token that begins, then the sequence without its last token.
            train: whether to drop values.

        Returns:
            Logits ``[batch, target, vocabulary]``.
        """
        memory, seen = self.encode(inputs["source"], train)
        target = jnp.asarray(inputs["target"])
        past = nn.make_causal_mask(target, dtype=bool)
        x = self._embed(target, train)
        for layer in self.decoder:
            x = layer(x, memory, past, seen, train)
        return self.embedding.attend(self.decoder_norm(x))

    def remember(self, source: AnyArray) -> tuple[Any, jax.Array]:
        """Keys and values of the source for every layer of the decoder, and the mask.

        Returns:
            A list of pairs ``[batch, source, heads, width / heads]``, and the mask.
        """
        memory, seen = self.encode(source)
        return [layer.cross.memory(memory) for layer in self.decoder], seen

    def step(
        self, tokens: jax.Array, cache: Any, memory: tuple[Any, jax.Array]
    ) -> tuple[jax.Array, Any]:
        """Logits ``[rows, vocabulary]`` after one more token of each row."""
        keys_and_values, seen = memory
        position = cache["position"]
        table = jnp.asarray(sinusoids(cache["layers"][0][0].shape[1], self.width))
        places = table.at[position].get(mode="fill", fill_value=jnp.nan)
        x = self.embedding(tokens) * self.width**0.5 + places
        layers = []
        for layer, own, remembered in zip(
            self.decoder, cache["layers"], keys_and_values, strict=True
        ):
            x, own = layer.step(x, own, position, remembered, seen)
            layers.append(own)
        logits = self.embedding.attend(self.decoder_norm(x))
        return logits, {"position": position + 1, "layers": layers}


Decoder = Callable[[Any, jax.Array], tuple[jax.Array, Any]]


def decoding(
    module: Transformer,
    variables: Variables,
    source: Int[AnyArray, "batch source"],
    *,
    length: int,
) -> tuple[Decoder, Any]:
    """What a search needs to write one token after the other.

    Keys and values of what has been written are kept, so that a token costs one token;
    those of the source are computed once, whatever the number of beams.

    Args:
        module: the network.
        variables: its variables.
        source: tokens ``[batch, source]``.
        length: the most tokens that will be written.

    Returns:
        ``step(cache, tokens [rows]) -> (logits [rows, vocabulary], cache)``, where rows
        are a multiple of the batch (the beams of a source follow each other), and the
        cache of ``batch`` rows to begin with. For
        :func:`~jaxtransfer.ops.beam_search`, which refuses to write more than
        ``step.length`` tokens; logits of later ones are not-a-number.

    Raises:
        ValueError: the network has no decoder layers, so nothing of what is written
            to keep.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxtransfer import ops
        >>> from jaxtransfer.model import from_linen
        >>> net, source = Transformer(11, width=8, heads=2), jnp.ones((2, 5), int)
        >>> variables = from_linen(net).init(
        ...     jax.random.key(0), {"source": source, "target": source})
        >>> step, cache = decoding(net, variables, source, length=4)
        >>> beams = ops.beam_search(
        ...     step, cache, jnp.ones(2, int), beams=3, length=4, end=2)
        >>> beams.tokens.shape
        (2, 3, 4)
    """
    if module.decoder_layers < 1:
        raise ValueError(
            f"decoder_layers: got {module.decoder_layers}; decoding needs one at least"
        )
    collections = {"params": variables.params, **variables.model_state}
    memory = module.apply(collections, source, method="remember")
    shape = (len(source), length, module.heads, module.width // module.heads)
    # As wide as the embeddings: the cache follows the variables' precision.
    dtype = jax.tree.leaves(memory[0])[0].dtype
    empty = jnp.zeros(shape, dtype)
    cache = {
        "position": jnp.zeros(len(source), int),
        "layers": [(empty, empty)] * module.decoder_layers,
    }

    def step(cache: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
        found = module.apply(collections, tokens, cache, memory, method="step")
        return found  # pyright: ignore[reportReturnType]

    step.length = length  # pyright: ignore[reportFunctionMemberAccess]
    return step, cache


__all__ = ["Transformer", "decoding"]
