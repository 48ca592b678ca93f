"""Real trained networks keep their scores."""

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import data, nets, pretrained
from jaxtransfer.model import from_linen

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def weights(data_dir):
    """Folder of the trained networks."""
    for part in data_dir.split(os.pathsep):
        if (folder := pathlib.Path(part, "weights")).is_dir():
            return folder
    return pytest.skip("no folder weights in JAXTRANSFER_DATA_DIR")


def loaded(file, net, size, **options):
    if not file.is_file():
        pytest.skip(f"no trained network {file.name} in JAXTRANSFER_DATA_DIR")
    example = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return pretrained.load(file, from_linen(net), example, **options)


@pytest.mark.data
def test_a_cifar_network_scores_what_it_scores(weights, data_dir):
    """91.73 % on the 10,000 test images; of the first 500, 453."""
    if data.find_prepared("cifar10", data_dir=data_dir) is None:
        pytest.skip("no prepared cifar10 in JAXTRANSFER_DATA_DIR")
    net = nets.ResNet(10, depth=20)
    variables, _ = loaded(weights / "cifar10_resnet20.safetensors", net, 32)
    test = data.as_arrays(data.load("cifar10", "test[:500]", data_dir=data_dir))
    inputs = (test["inputs"] - np.float32(MEAN)) / np.float32(STD)
    apply = jax.jit(lambda variables, x: from_linen(net).apply(variables, x)[0])
    predicted = np.asarray(apply(variables, inputs)).argmax(axis=1)
    assert abs(int(np.sum(predicted == test["labels"])) - 453) <= 1


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "net", "size", "names"),
    [
        ("cifar10_resnet20.safetensors", nets.ResNet(10, depth=20), 32, None),
        ("cifar10_resnet56.safetensors", nets.ResNet(10, depth=56), 32, None),
        (
            "imagenet_mobilenet_v2_1.0_224.npz",
            nets.MobileNetV2(1001, padding="same", batch_norm=False),
            224,
            pretrained.keras_mobilenet_v2(),
        ),
    ],
)
def test_a_file_is_matched_whole_and_comes_back(
    weights, tmp_path, name, net, size, names
):
    variables, report = loaded(weights / name, net, size, names=names)
    assert report.fits and not report.unused
    again = tmp_path / name
    pretrained.save(again, variables, names=names, like=weights / name)
    before, after = pretrained.read(weights / name), pretrained.read(again)
    assert list(before) == list(after)
    for key, value in before.items():
        assert after[key].dtype == value.dtype
        np.testing.assert_array_equal(after[key], value)
