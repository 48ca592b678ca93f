"""Networks compute what PyTorch computes with the same weights, stage by stage."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import nets, pretrained
from jaxtransfer.model import from_linen
from tests.pretrained.golden import NETWORKS, Golden, error

TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _exact():
    with jax.default_matmul_precision("highest"):
        yield


def stages(name, folder, net=None):
    """Outputs by stage, beside PyTorch's."""
    golden, (usual, names) = Golden(name), NETWORKS[name]
    model = from_linen(net or usual)
    file = golden.write(folder)
    variables, report = pretrained.load(file, model, golden.inputs, names=names)
    assert report.fits and not report.fresh and not report.unused
    taps = tuple(golden.stages)
    apply = jax.jit(partial(model.apply, taps=taps))
    output, features, _ = apply(variables, golden.inputs)
    np.testing.assert_array_equal(output, features[taps[-1]])
    return features, golden.stages


@pytest.mark.parametrize("name", NETWORKS)
def test_every_stage_is_that_of_pytorch(name, tmp_path):
    here, there = stages(name, tmp_path)
    assert len(here) == len(there) >= 5
    for stage, values in there.items():
        assert here[stage].shape == values.shape
        assert error(here[stage], values) <= TOLERANCE, stage


@pytest.mark.parametrize("name", NETWORKS)
def test_the_sizes_are_even_so_that_padding_is_seen(name):
    height, width, _ = Golden(name).inputs.shape[1:]
    assert height % 16 == width % 16 == 0


def _mistaken(name, **fields):
    return NETWORKS[name][0].clone(**fields)


@pytest.mark.parametrize(
    ("name", "net"),
    [
        ("vit", _mistaken("vit", activation=jax.nn.gelu)),
        ("vit", _mistaken("vit", epsilon=1e-3)),
        ("mobilenet_v2", _mistaken("mobilenet_v2", epsilon=1e-3)),
        ("mobilenet_v2", _mistaken("mobilenet_v2", padding="same")),
        ("resnet18", _mistaken("resnet18", norm=partial(nn.BatchNorm, epsilon=1e-3))),
    ],
)
def test_the_classic_mistakes_are_seen(name, net, tmp_path):
    here, there = stages(name, tmp_path, net)
    last = list(there)[-1]
    assert error(here[last], there[last]) > 2 * TOLERANCE


def test_same_padding_and_folded_normalisation_agree_where_they_must(tmp_path):
    """Where all sizes are odd the two paddings are one."""
    golden = Golden("mobilenet_v2")
    net, names = NETWORKS["mobilenet_v2"]
    images = np.random.default_rng(0).normal(size=(2, 33, 33, 3)).astype(np.float32)
    model = from_linen(net)
    normed, _ = pretrained.load(golden.write(tmp_path), model, images, names=names)
    file = tmp_path / "folded.npz"
    np.savez(file, **_folded(normed, blocks=(1, 2, 1)))
    folded_model = from_linen(net.clone(padding="same", batch_norm=False))
    keras = pretrained.keras_mobilenet_v2(blocks=(1, 2, 1))
    folded, _ = pretrained.load(file, folded_model, images, names=keras)
    outputs, _, _ = model.apply(normed, images)
    others, _, _ = folded_model.apply(folded, images)
    assert error(others, np.asarray(outputs)) <= TOLERANCE


def _folded(variables, blocks):
    """Keras' names of kernels and biases into which the normalisation is folded."""
    arrays = {}

    def fold(name, modules, conv, norm):
        kernel = np.asarray(modules[0][conv]["kernel"])
        scale = modules[0][norm]["scale"] / np.sqrt(modules[1][norm]["var"] + 1e-5)
        shift = modules[0][norm]["bias"] - modules[1][norm]["mean"] * scale
        arrays[f"{name}/kernel"] = kernel * np.asarray(scale)
        arrays[f"{name}/bias"] = np.asarray(shift)

    params, state = variables.params, variables.model_state["batch_stats"]
    fold("Conv1", (params, state), "conv_stem", "bn1")
    number = 0
    for stage, count in enumerate(blocks):
        for block in (f"blocks_{stage}_{n}" for n in range(count)):
            modules = params[block], state[block]
            if number == 0:
                fold("expanded_conv_depthwise", modules, "conv_dw", "bn1")
                fold("expanded_conv_project", modules, "conv_pw", "bn2")
            else:
                fold(f"block_{number}_expand", modules, "conv_pw", "bn1")
                fold(f"block_{number}_depthwise", modules, "conv_dw", "bn2")
                fold(f"block_{number}_project", modules, "conv_pwl", "bn3")
            number += 1
    fold("Conv_1", (params, state), "conv_head", "bn2")
    arrays["Logits/kernel"] = np.asarray(params["classifier"]["kernel"])[None, None]
    arrays["Logits/bias"] = np.asarray(params["classifier"]["bias"])
    return arrays


def test_attention_of_jax_files_is_that_of_flax(tmp_path):
    """Query, key and value of their own, joined, attend as Flax's layer does."""
    net = nets.ViT(5, width=12, depth=1, heads=3, patch=8)
    model, images = from_linen(net), jnp.ones((1, 16, 16, 3))
    source = jax.tree.map(lambda x: x + 0.1, model.init(jax.random.key(0), images))
    file, names = tmp_path / "vit.npz", pretrained.jax_vit(heads=3)
    pretrained.save(file, source, names=names)
    stored = pretrained.read(file)
    where = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1"
    params = {
        part: {leaf: stored[f"{where}/{part}/{leaf}"] for leaf in ("kernel", "bias")}
        for part in ("query", "key", "value", "out")
    }
    assert params["query"]["kernel"].shape == (12, 3, 4)
    assert params["out"]["kernel"].shape == (3, 4, 12)
    taps = ("blocks_0/norm1", "blocks_0/attn")
    rng = np.random.default_rng(0)
    images = rng.normal(size=(1, 16, 16, 3)).astype(np.float32)
    _, features, _ = model.apply(source, images, taps=taps)
    layer = nn.MultiHeadDotProductAttention(num_heads=3)
    expected = layer.apply({"params": params}, features["blocks_0/norm1"])
    assert error(features["blocks_0/attn"], np.asarray(expected)) <= TOLERANCE
    back, _ = pretrained.load(file, model, images, names=names)
    jax.tree.map(np.testing.assert_array_equal, back, source)
    with pytest.raises(ValueError, match="heads: got 2, .* give jax_vit.heads=3"):
        pretrained.load(file, model, images, names=pretrained.jax_vit(heads=2))
