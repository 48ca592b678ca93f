"""Convolutions by patches, for Linen and NNX: drop-ins for the layers of Flax."""

from collections.abc import Sequence
from typing import Any

from flax import linen as nn
from flax import nnx

from jaxtransfer.ops.depthwise import depthwise_conv
from jaxtransfer.ops.patches import conv


def conv_general_dilated(
    inputs,
    kernel,
    strides,
    padding,
    *,
    lhs_dilation=None,
    rhs_dilation=None,
    dimension_numbers=None,
    feature_group_count=1,
    precision=None,
    **others,
):
    """What Flax's layers call in place of `jax.lax.conv_general_dilated`.

    By its name `compress.quantized` knows it.
    """
    del dimension_numbers  # Flax layers are always channels last.
    dilated = any(d != 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ())))
    channels, groups = inputs.shape[-1], feature_group_count
    depthwise = 1 < groups == channels == kernel.shape[-1]
    if dilated or not (groups == 1 or depthwise):
        raise ValueError(
            "PatchConv has no dilation, and one group or, with as many features as "
            f"channels, one a channel; got input_dilation={lhs_dilation}, "
            f"kernel_dilation={rhs_dilation}, feature_group_count={groups} of "
            f"{channels} channels; use the Conv of Flax for those."
        )
    given = {name: value for name, value in others.items() if value is not None}
    if given:
        raise ValueError(
            f"PatchConv has no {', '.join(given)}, got {given}; use the Conv of Flax."
        )
    if depthwise:  # sums of products, of full precision
        return depthwise_conv(inputs, kernel, strides=strides, padding=padding)
    return conv(inputs, kernel, strides=strides, padding=padding, precision=precision)


def PatchConv(
    features: int,
    kernel_size: int | Sequence[int],
    strides: int | Sequence[int] | None = 1,
    **options: Any,
) -> nn.Conv:
    """`flax.linen.Conv` computed by `jaxtransfer.ops.conv` or ``.depthwise_conv``.

    The same options, parameters (``kernel``, ``bias``), names, initial values and
    outputs; fast under ``vmap`` over parameters, as MAML needs it, and on a CPU where
    each channel is a group of its own.

    Args:
        features: Channels of the output.
        kernel_size: Size of the window per spatial axis.
        strides: Step of the window, one for all or one per spatial axis.
        **options: The other fields of `flax.linen.Conv`: ``padding``, ``use_bias``,
            ``name``, ... No dilation, and no groups but one a channel with as many
            features as channels.

    Returns:
        The module.

    Raises:
        ValueError: When called on inputs, if it has dilation or other groups.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = PatchConv(features=8, kernel_size=(3, 3), strides=2)
        >>> outputs, variables = layer.init_with_output(
        ...     jax.random.key(0), jnp.ones((1, 4, 4, 3)))
        >>> outputs.shape, sorted(variables["params"])
        ((1, 2, 2, 8), ['bias', 'kernel'])
    """
    options["conv_general_dilated"] = conv_general_dilated
    return nn.Conv(features, kernel_size, strides, **options)


def NNXPatchConv(
    in_features: int,
    out_features: int,
    kernel_size: int | Sequence[int],
    strides: int | Sequence[int] = 1,
    *,
    rngs: nnx.Rngs,
    **options: Any,
) -> nnx.Conv:
    """`flax.nnx.Conv` computed by `jaxtransfer.ops.conv` or ``.depthwise_conv``.

    The same options, attributes (``kernel``, ``bias``), initial values and outputs;
    fast under ``vmap`` over parameters, as MAML needs it, and on a CPU where each
    channel is a group of its own.

    Args:
        in_features: Channels of the input.
        out_features: Channels of the output.
        kernel_size: Size of the window per spatial axis.
        strides: Step of the window, one for all or one per spatial axis.
        rngs: Where the initial values come from.
        **options: The other arguments of `flax.nnx.Conv`: ``padding``, ``use_bias``,
            ... No dilation, no ``preferred_element_type``, and no groups but one a
            channel with as many features as channels.

    Returns:
        The module.

    Raises:
        ValueError: When called on inputs, if it has one of those.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> layer = NNXPatchConv(3, 8, kernel_size=(3, 3), strides=2, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((1, 4, 4, 3))).shape
        (1, 2, 2, 8)
    """
    options["conv_general_dilated"] = conv_general_dilated
    return nnx.Conv(
        in_features, out_features, kernel_size, strides, rngs=rngs, **options
    )
