"""Names of families of networks that differ from those of the modules here.

:class:`~jaxtransfer.nets.MobileNetV2` and :class:`~jaxtransfer.nets.ViT` carry timm's
names, which :func:`~jaxtransfer.pretrained.torch` reads; here are those of torchvision,
of Keras and of the vision transformers released with JAX.
"""

import re
from collections.abc import Sequence

import numpy as np

from jaxtransfer.pretrained.names import Entry, Leaf, Naming, flax, torch

_BLOCKS = (1, 2, 3, 4, 3, 3, 1)  # of MobileNetV2, by stage


def _counted(path: str, blocks: Sequence[int]) -> tuple[int, str, str] | None:
    """Number of a block among all, its layer's name and the rest of the path."""
    found = re.fullmatch(r"blocks_(\d+)_(\d+)/(\w+)/(\w+)", path)
    if found is None:
        return None
    stage, number, layer, rest = found.groups()
    return sum(blocks[: int(stage)]) + int(number), layer, rest


def torchvision_mobilenet_v2(*, blocks: Sequence[int] = _BLOCKS) -> Naming:
    """Torchvision's names of :class:`~jaxtransfer.nets.MobileNetV2`.

    Args:
        blocks: blocks of each stage.

    Returns:
        The naming.

    Example:
        >>> leaf = Leaf("params", "blocks_1_0/conv_dw/kernel", (3, 3, 1, 96))
        >>> torchvision_mobilenet_v2()(leaf).names
        ('features.2.conv.1.0.weight',)
    """
    last = 1 + sum(blocks)
    outer = {
        "conv_stem": "features.0.0",
        "bn1": "features.0.1",
        "conv_head": f"features.{last}.0",
        "bn2": f"features.{last}.1",
        "classifier": "classifier.1",
    }
    simple = {"conv_dw": "0.0", "bn1": "0.1", "conv_pw": "1", "bn2": "2"}
    full = {"conv_pw": "0.0", "bn1": "0.1", "conv_dw": "1.0", "bn2": "1.1"}
    full |= {"conv_pwl": "2", "bn3": "3"}

    def naming(leaf: Leaf) -> Entry:
        block = _counted(leaf.path, blocks)
        if block is None:
            module = leaf.path.split("/")[0]
            name = outer.get(module, module)
        else:
            number, layer, _ = block
            table = full if number else simple  # only the first does not expand
            name = f"features.{1 + number}.conv.{table.get(layer, layer)}"
        return torch(rename=[(r"^.*(?=\.\w+$)", name)])(leaf)

    return naming


def keras_mobilenet_v2(*, blocks: Sequence[int] = _BLOCKS) -> Naming:
    """Names of Keras, and its layout, of a MobileNetV2 whose normalisation is folded.

    For ``MobileNetV2(1001, padding="same", batch_norm=False)``: kernels and biases
    ``Conv1``, ``expanded_conv_depthwise``, ``block_1_expand``, …, ``Conv_1``, and
    ``Logits``, a 1x1 convolution. Kernels are ``[height, width, in, out]``, those of
    depthwise convolutions ``[height, width, 1, channels]``.

    Args:
        blocks: blocks of each stage.

    Returns:
        The naming.

    Example:
        >>> leaf = Leaf("params", "blocks_1_0/conv_pwl/bias", (24,))
        >>> keras_mobilenet_v2()(leaf).names
        ('block_1_project/bias',)
    """
    outer = {"conv_stem": "Conv1", "conv_head": "Conv_1", "classifier": "Logits"}
    simple = {"conv_dw": "depthwise", "conv_pw": "project"}
    full = {"conv_pw": "expand", "conv_dw": "depthwise", "conv_pwl": "project"}

    def naming(leaf: Leaf) -> Entry:
        block = _counted(leaf.path, blocks)
        module, _, rest = leaf.path.partition("/")
        if block is None:
            name = f"{outer.get(module, module)}/{rest}"
        else:
            number, layer, rest = block
            table = full if number else simple
            name = f"block_{number}" if number else "expanded_conv"
            name = f"{name}_{table.get(layer, layer)}/{rest}"
        if name != "Logits/kernel":
            return _same(name)
        return Entry((name,), _without_ones, lambda kernel: (kernel[None, None],))

    return naming


def torchvision_vit() -> Naming:
    """Torchvision's names of :class:`~jaxtransfer.nets.ViT`, as of version 0.13.

    Returns:
        The naming.

    Example:
        >>> leaf = Leaf("params", "blocks_2/attn/qkv/kernel", (192, 576))
        >>> torchvision_vit()(leaf).names
        ('encoder.layers.encoder_layer_2.self_attention.in_proj_weight',)
    """
    return torch(
        rename=[
            (r"^cls_token$", "class_token"),
            (r"^pos_embed$", "encoder.pos_embedding"),
            (r"^patch_embed\.proj\.", "conv_proj."),
            (r"^norm\.", "encoder.ln."),
            (r"^head\.", "heads.head."),
            (r"^blocks\.(\d+)\.", r"encoder.layers.encoder_layer_\1."),
            (r"\.norm([12])\.", r".ln_\1."),
            (r"\.attn\.qkv\.", ".self_attention.in_proj_"),
            (r"\.attn\.proj\.", ".self_attention.out_proj."),
            (r"\.mlp\.fc1\.", ".mlp.0."),
            (r"\.mlp\.fc2\.", ".mlp.3."),
        ]
    )


def jax_vit(*, heads: int = 3) -> Naming:
    """Names of the vision transformers released with JAX, of :class:`nets.ViT`.

    Their ``.npz`` files have names such as ``Transformer/encoderblock_0/LayerNorm_0``;
    query, key and value are arrays of their own, ``[width, heads, width of a head]``,
    and are joined here. They were trained with the approximate GELU,
    ``ViT(…, activation=jax.nn.gelu)``.

    Args:
        heads: heads of attention of the network and of its file; another number than
            the file's is a ``ValueError`` when it is loaded.

    Returns:
        The naming.

    Example:
        >>> leaf = Leaf("params", "blocks_0/attn/qkv/bias", (576,))
        >>> for name in jax_vit()(leaf).names:
        ...     print(name)
        Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/bias
        Transformer/encoderblock_0/MultiHeadDotProductAttention_1/key/bias
        Transformer/encoderblock_0/MultiHeadDotProductAttention_1/value/bias
    """
    outer = {
        "cls_token": "cls",
        "pos_embed": "Transformer/posembed_input/pos_embedding",
        "patch_embed/proj": "embedding",
        "norm": "Transformer/encoder_norm",
    }
    inner = {
        "norm1": "LayerNorm_0",
        "norm2": "LayerNorm_2",
        "mlp/fc1": "MlpBlock_3/Dense_0",
        "mlp/fc2": "MlpBlock_3/Dense_1",
        "attn/proj": "MultiHeadDotProductAttention_1/out",
    }

    def naming(leaf: Leaf) -> Entry:
        found = re.fullmatch(r"blocks_(\d+)/(.+)/(\w+)", leaf.path)
        if found is None:
            module, _, last = leaf.path.rpartition("/")
            if not module:
                return _same(outer.get(last, last))
            return _same(f"{outer.get(module, module)}/{last}")
        number, module, last = found.groups()
        block = f"Transformer/encoderblock_{number}"
        if module == "attn/qkv":
            attention = f"{block}/MultiHeadDotProductAttention_1"
            parts = tuple(f"{attention}/{p}/{last}" for p in ("query", "key", "value"))
            return Entry(
                parts,
                lambda *given: _joined(*(_of_heads(x, -2, heads) for x in given)),
                lambda joined: _parted(joined, heads),
            )
        name = f"{block}/{inner.get(module, module)}/{last}"
        if module == "attn/proj" and last == "kernel":
            return Entry(
                (name,),
                lambda kernel: _flat(_of_heads(kernel, 0, heads)),
                lambda kernel: (kernel.reshape(heads, -1, kernel.shape[-1]),),
            )
        return _same(name)

    return naming


def _same(name: str) -> Entry:
    return flax(collections=False)(Leaf("params", name, ()))


def _without_ones(kernel: np.ndarray) -> np.ndarray:
    """``[1, 1, in, out]`` → ``[in, out]``."""
    return kernel[0, 0] if kernel.shape[:-2] == (1, 1) else kernel


def _of_heads(part: np.ndarray, axis: int, heads: int) -> np.ndarray:
    """The array, whose axis of heads has as many as were said.

    Raises:
        ValueError: it has another number.
    """
    if part.ndim < 2 or part.shape[axis] != heads:
        raise ValueError(
            f"heads: got {heads}, but attention in the file has the shape {part.shape}"
            + (f"; give jax_vit(heads={part.shape[axis]})" if part.ndim > 1 else "")
        )
    return part


def _joined(*parts: np.ndarray) -> np.ndarray:
    """Three ``[…, heads, width of a head]`` → ``[…, 3 * width]``."""
    flat = [part.reshape(*part.shape[:-2], -1) for part in parts]
    return np.concatenate(flat, axis=-1)


def _flat(kernel: np.ndarray) -> np.ndarray:
    """``[heads, width of a head, out]`` → ``[width, out]``."""
    return kernel.reshape(-1, kernel.shape[-1])


def _parted(joined: np.ndarray, heads: int) -> tuple[np.ndarray, ...]:
    parts = np.split(joined, 3, axis=-1)
    return tuple(part.reshape(*part.shape[:-1], heads, -1) for part in parts)


__all__ = [
    "jax_vit",
    "keras_mobilenet_v2",
    "torchvision_mobilenet_v2",
    "torchvision_vit",
]
