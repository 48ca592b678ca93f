"""Names of the families, against names written out by hand."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import nets, pretrained, tree
from jaxtransfer.model import from_linen
from jaxtransfer.pretrained import Leaf

IMAGE = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
VIT = {
    "cls_token": ("cls_token", "class_token", "cls"),
    "pos_embed": (
        "pos_embed",
        "encoder.pos_embedding",
        "Transformer/posembed_input/pos_embedding",
    ),
    "patch_embed/proj/kernel": (
        "patch_embed.proj.weight",
        "conv_proj.weight",
        "embedding/kernel",
    ),
    "blocks_1/norm1/scale": (
        "blocks.1.norm1.weight",
        "encoder.layers.encoder_layer_1.ln_1.weight",
        "Transformer/encoderblock_1/LayerNorm_0/scale",
    ),
    "blocks_1/attn/qkv/bias": (
        "blocks.1.attn.qkv.bias",
        "encoder.layers.encoder_layer_1.self_attention.in_proj_bias",
        "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/query/bias",
    ),
    "blocks_1/attn/proj/kernel": (
        "blocks.1.attn.proj.weight",
        "encoder.layers.encoder_layer_1.self_attention.out_proj.weight",
        "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/out/kernel",
    ),
    "blocks_1/norm2/bias": (
        "blocks.1.norm2.bias",
        "encoder.layers.encoder_layer_1.ln_2.bias",
        "Transformer/encoderblock_1/LayerNorm_2/bias",
    ),
    "blocks_1/mlp/fc1/kernel": (
        "blocks.1.mlp.fc1.weight",
        "encoder.layers.encoder_layer_1.mlp.0.weight",
        "Transformer/encoderblock_1/MlpBlock_3/Dense_0/kernel",
    ),
    "blocks_1/mlp/fc2/bias": (
        "blocks.1.mlp.fc2.bias",
        "encoder.layers.encoder_layer_1.mlp.3.bias",
        "Transformer/encoderblock_1/MlpBlock_3/Dense_1/bias",
    ),
    "norm/bias": ("norm.bias", "encoder.ln.bias", "Transformer/encoder_norm/bias"),
    "head/kernel": ("head.weight", "heads.head.weight", "head/kernel"),
}
MOBILE = {
    "conv_stem/kernel": ("conv_stem.weight", "features.0.0.weight", "Conv1/kernel"),
    "bn1/mean": ("bn1.running_mean", "features.0.1.running_mean", None),
    "blocks_0_0/conv_dw/kernel": (
        "blocks.0.0.conv_dw.weight",
        "features.1.conv.0.0.weight",
        "expanded_conv_depthwise/kernel",
    ),
    "blocks_0_0/conv_pw/kernel": (
        "blocks.0.0.conv_pw.weight",
        "features.1.conv.1.weight",
        "expanded_conv_project/kernel",
    ),
    "blocks_0_0/bn2/var": (
        "blocks.0.0.bn2.running_var",
        "features.1.conv.2.running_var",
        None,
    ),
    "blocks_3_2/conv_pw/bias": (
        "blocks.3.2.conv_pw.bias",
        "features.9.conv.0.0.bias",
        "block_8_expand/bias",
    ),
    "blocks_6_0/conv_pwl/kernel": (
        "blocks.6.0.conv_pwl.weight",
        "features.17.conv.2.weight",
        "block_16_project/kernel",
    ),
    "blocks_6_0/bn3/scale": (
        "blocks.6.0.bn3.weight",
        "features.17.conv.3.weight",
        None,
    ),
    "conv_head/kernel": ("conv_head.weight", "features.18.0.weight", "Conv_1/kernel"),
    "bn2/bias": ("bn2.bias", "features.18.1.bias", None),
    "classifier/bias": ("classifier.bias", "classifier.1.bias", "Logits/bias"),
}


@pytest.mark.parametrize(
    ("table", "namings"),
    [
        (VIT, ("torch", "torchvision_vit", "jax_vit")),
        (MOBILE, ("torch", "torchvision_mobilenet_v2", "keras_mobilenet_v2")),
    ],
)
def test_leaves_have_the_names_of_each_family(table, namings):
    for path, expected in table.items():
        for naming, name in zip(namings, expected, strict=True):
            entry = getattr(pretrained, naming)()(Leaf("params", path, ()))
            assert name is None or entry.names[0] == name


@pytest.mark.parametrize(
    ("net", "naming"),
    [
        (nets.ViT(10, depth=2, patch=8), "torch"),
        (nets.ViT(10, depth=2, patch=8), "torchvision_vit"),
        (nets.ViT(10, depth=2, patch=8), "jax_vit"),
        (nets.MobileNetV2(10), "torch"),
        (nets.MobileNetV2(10), "torchvision_mobilenet_v2"),
        (nets.MobileNetV2(10, batch_norm=False), "keras_mobilenet_v2"),
        (nets.VGG(10, depth=16, batch_norm=True, width=8), "torch"),
        (nets.ImageNetResNet(10, depth=50), "torch"),
    ],
)
def test_names_are_distinct_and_written_values_read_back(net, naming):
    variables = jax.eval_shape(from_linen(net).init, jax.random.key(0), IMAGE)
    names: list[str] = []
    for collection, part in [
        ("params", variables.params),
        *variables.model_state.items(),
    ]:
        for path, leaf in tree.flatten(part).items():
            entry = getattr(pretrained, naming)()(Leaf(collection, path, leaf.shape))
            names += entry.names
            values = np.arange(leaf.size, dtype=np.float32).reshape(leaf.shape)
            np.testing.assert_array_equal(entry.read(*entry.write(values)), values)
    assert len(names) == len(set(names))


def test_numbers_that_end_a_name_are_those_of_a_list():
    def name(path):
        return pretrained.torch()(Leaf("params", path, ())).names[0]

    assert name("layers_0_10/conv1/kernel") == "layers.0.10.conv1.weight"
    assert name("stage_a/fc_1x/bias") == "stage_a.fc_1x.bias"
    assert name("embed/embedding") == "embed.weight"
    assert re.fullmatch(r"scale_0", name("scale_0"))
