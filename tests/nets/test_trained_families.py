"""The networks that have trained weights: sizes, modes and errors."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from jaxtransfer import nets, tree
from jaxtransfer.model import from_linen

KEY = jax.random.key(0)
SMALL = {
    "resnet": nets.ImageNetResNet(4, filters=4, stages=(1, 1)),
    "bottleneck": nets.ImageNetResNet(4, depth=50, filters=4, stages=(1, 1)),
    "vgg": nets.VGG(4, depth=11, filters=2, width=8, batch_norm=True),
    "mobilenet": nets.MobileNetV2(
        4, width=0.25, stages=((1, 16, 1, 1), (6, 24, 2, 2)), last=16, dropout=0.5
    ),
}


# Numbers of parameters that torchvision and timm report.
@pytest.mark.parametrize(
    ("net", "size", "numbers"),
    [
        (nets.ImageNetResNet(1000, depth=18), 224, 11_689_512),
        (nets.ImageNetResNet(1000, depth=34), 224, 21_797_672),
        (nets.ImageNetResNet(1000, depth=50), 224, 25_557_032),
        (nets.VGG(1000, depth=11), 224, 132_863_336),
        (nets.VGG(1000, depth=16), 224, 138_357_544),
        (nets.VGG(1000, depth=16, batch_norm=True), 224, 138_365_992),
        (nets.MobileNetV2(1000), 224, 3_504_872),
        (nets.MobileNetV2(1000, width=1.4), 224, 6_108_776),
        (nets.ViT(1000), 224, 5_717_416),
        (nets.ViT(1000, width=384, heads=6), 224, 22_050_664),
        (nets.ViT(1000, width=768, heads=12), 224, 86_567_656),
    ],
)
def test_networks_have_their_published_sizes(net, size, numbers):
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(from_linen(net).init, KEY, images)
    assert tree.size(variables.params) == numbers


@pytest.mark.parametrize("name", SMALL)
def test_training_moves_the_statistics_by_a_tenth(name):
    model = from_linen(SMALL[name])
    images = 3 + jax.random.normal(KEY, (4, 32, 32, 3))
    variables = jax.jit(model.init)(KEY, images)
    apply = jax.jit(partial(model.apply, train=True))
    _, _, state = apply(variables, images, key=KEY)
    before = tree.flatten(variables.model_state)
    for path, value in tree.flatten(state).items():
        assert not jnp.array_equal(value, before[path]), path
        if path.endswith("/var"):  # 1 in the beginning
            assert jnp.all(value >= 0.9 - 1e-6), path
    _, _, same = jax.jit(model.apply)(variables, images)
    assert tree.fingerprint(same) == tree.fingerprint(variables.model_state)


def test_dropout_is_drawn_in_training_only():
    model = from_linen(SMALL["mobilenet"].clone(dropout=0.5))
    images = jax.random.normal(KEY, (2, 32, 32, 3))
    variables = jax.jit(model.init)(KEY, images)
    apply = jax.jit(partial(model.apply, train=True))
    one, other = (apply(variables, images, key=jax.random.key(n))[0] for n in range(2))
    assert not jnp.allclose(one, other)


def test_another_normalisation_takes_the_same_parameters():
    net = SMALL["resnet"]
    images = jax.random.normal(KEY, (2, 32, 32, 3))
    variables = jax.jit(from_linen(net).init)(KEY, images)
    model = from_linen(net.clone(norm=nets.StochNorm))
    expected = from_linen(net).apply(variables, images)[0]
    assert jnp.allclose(model.apply(variables, images)[0], expected, atol=1e-6)


def test_a_vgg_takes_other_sizes():
    model = from_linen(SMALL["vgg"])
    variables = jax.jit(model.init)(KEY, jnp.ones((1, 32, 32, 3)))
    output, _, _ = jax.jit(model.apply)(variables, jnp.ones((2, 70, 40, 3)))
    assert output.shape == (2, 4)


@pytest.mark.parametrize(
    ("net", "size", "message"),
    [
        (nets.ImageNetResNet(2, depth=20), 32, "depth: got 20; choose 18, 34 or 50"),
        (nets.VGG(2, depth=12), 32, "depth: got 12; choose 11, 13, 16 or 19"),
        (nets.VGG(2), 28, "inputs: got images of .28, 28. pixels"),
        (nets.ViT(2, heads=5), 32, "heads: got 5; they must divide the width, 192"),
        (nets.ViT(2, patch=7), 32, "patch: got 7; it must divide height and width"),
    ],
)
def test_errors_name_the_argument(net, size, message):
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(from_linen(net).init, KEY, images)


def test_an_unknown_padding_is_an_error(types_unchecked):
    net = nets.MobileNetV2(2, padding="valid")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="padding: got 'valid'; choose"):
        jax.eval_shape(from_linen(net).init, KEY, jnp.ones((1, 32, 32, 3)))
