"""Stochastic normalisation, for Linen and NNX: drop-ins for batch normalisation."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx


class StochNorm(nn.BatchNorm):
    """Stochastic normalisation (StochNorm): a `flax.linen.BatchNorm` for fine-tuning.

    In training every channel is normalised by the batch with probability p, else by the
    running statistics as they were before this batch, so that a small batch can't
    disturb all channels. 1 is batch normalisation, 0 the frozen statistics; both are
    exact and draw nothing. Running statistics are updated and evaluation is run as by
    batch normalisation, and parameters and state have the same names and shapes: those
    of a pretrained `flax.linen.BatchNorm` fit.

    Meta-learners with ``statistics="support"``, their default, refuse a network with
    such a layer: what the layers behind it see depends on the running statistics, which
    are to be replaced there. Choose ``"transductive"`` or ``"running"``, or 1 as p.

    Attributes:
        probability: p, in [0, 1].
        key_stream: The random stream it draws from; by default that of dropout, which
            `jaxtransfer.model.from_linen` fills from its ``key``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = StochNorm(momentum=0.9)
        >>> x = jnp.arange(8.0).reshape(4, 2)
        >>> variables = layer.init(jax.random.key(0), x, use_running_average=True)
        >>> outputs, state = layer.apply(
        ...     variables, x, use_running_average=False, mutable=["batch_stats"],
        ...     rngs={"dropout": jax.random.key(1)})
        >>> outputs.shape, sorted(state["batch_stats"])
        ((4, 2), ['mean', 'var'])

    Reference:
        Kou et al., "Stochastic Normalization", NeurIPS 2020.
    """

    probability: float = 0.5
    key_stream: str = "dropout"

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Normalise the input.

        Args:
            x: Values with the channels along ``axis``.
            use_running_average: Whether to run as in evaluation; here or as a field.
            mask: Which values the batch's statistics are of; broadcasts to ``x``.

        Returns:
            Values of the shape of ``x``.

        Raises:
            ValueError: If ``probability`` is not in [0, 1].
        """
        _check(self.probability)
        mean = self.get_variable("batch_stats", "mean")  # before they are updated
        var = self.get_variable("batch_stats", "var")
        by_batch = super().__call__(x, use_running_average, mask=mask)
        evaluates = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        if evaluates or mean is None or self.probability == 1:
            return by_batch
        scale = self.get_variable("params", "scale")
        bias = self.get_variable("params", "bias")
        by_running = _normalize(x, mean, var, scale, bias, self.axis, self.epsilon)
        by_running = by_running.astype(by_batch.dtype)
        if self.probability == 0:
            return by_running
        return _choose(
            self.make_rng(self.key_stream),
            self.probability,
            by_batch,
            by_running,
            self.axis,
        )


class NNXStochNorm(nnx.BatchNorm):
    """Stochastic normalisation (StochNorm): a `flax.nnx.BatchNorm` for fine-tuning.

    As `StochNorm`, for NNX; meta-learners refuse it under the same conditions.

    Args:
        num_features: Channels.
        probability: Of normalisation by the batch, in [0, 1].
        key_stream: The random stream it draws from; `jaxtransfer.model.from_nnx` fills
            it from its ``key``.
        rngs: Where the initial values and the random stream come from.
        **options: The other arguments of `flax.nnx.BatchNorm`.

    Raises:
        ValueError: If ``probability`` is not in [0, 1].

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> layer = NNXStochNorm(2, momentum=0.9, rngs=nnx.Rngs(0))
        >>> layer(jnp.arange(8.0).reshape(4, 2)).shape
        (4, 2)

    Reference:
        Kou et al., "Stochastic Normalization", NeurIPS 2020.
    """

    def __init__(
        self,
        num_features: int,
        *,
        probability: float = 0.5,
        key_stream: str = "dropout",
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(num_features, rngs=rngs, **options)
        _check(probability)
        self.probability = probability
        self.rngs = rngs[key_stream].fork()

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Normalise the input.

        Args:
            x: Values with the channels along ``axis``.
            use_running_average: Whether to run as in evaluation; here or as a field.
            mask: Which values the batch's statistics are of; broadcasts to ``x``.

        Returns:
            Values of the shape of ``x``.
        """
        evaluates = (
            self.use_running_average
            if use_running_average is None
            else use_running_average
        )
        if evaluates or self.probability == 1:
            return super().__call__(x, use_running_average, mask=mask)
        by_running = super().__call__(x, True)  # before the statistics are updated
        by_batch = super().__call__(x, use_running_average, mask=mask)
        if self.probability == 0:
            return by_running
        return _choose(self.rngs(), self.probability, by_batch, by_running, self.axis)


def _check(probability):
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"probability must be in [0, 1], got {probability}.")


def _channels(x, axis):
    """The shape that broadcasts a value per channel to ``x``."""
    axes = {a % x.ndim for a in ((axis,) if isinstance(axis, int) else axis)}
    return tuple(size if i in axes else 1 for i, size in enumerate(x.shape))


def _normalize(x, mean, var, scale, bias, axis, epsilon):
    shape = _channels(x, axis)
    factor = jax.lax.rsqrt(var.reshape(shape) + epsilon)
    if scale is not None:
        factor = factor * scale.reshape(shape)
    outputs = (x - mean.reshape(shape)) * factor
    return outputs if bias is None else outputs + bias.reshape(shape)


def _choose(key, probability, by_batch, by_running, axis):
    chosen = jax.random.bernoulli(key, probability, _channels(by_batch, axis))
    return jnp.where(chosen, by_batch, by_running)
