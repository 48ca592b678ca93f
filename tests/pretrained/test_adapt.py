"""Other input channels, resolutions and classes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxtransfer import nets, pretrained
from jaxtransfer.model import from_linen
from tests.pretrained.golden import FOLDER, NETWORKS, Golden
from tests.twins import same

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def embeddings():
    with np.load(FOLDER / "pretrained_resampled.npz") as stored:
        return {name: stored[name] for name in stored.files}


@pytest.mark.parametrize("channels", [1, 6])
def test_grey_images_give_what_they_gave_as_colour(channels, tmp_path):
    golden, (net, _) = Golden("resnet18"), NETWORKS["resnet18"]
    grey = golden.inputs[..., :1]
    wanted = np.repeat(grey, channels, axis=-1)
    model = from_linen(net)
    variables, report = pretrained.load(
        golden.write(tmp_path),
        model,
        wanted,
        adapt={"conv1/kernel": pretrained.input_channels},
    )
    assert report.adapted == ("conv1/kernel",)
    colour, _ = pretrained.load(golden.write(tmp_path), model, golden.inputs)
    expected, _, _ = model.apply(colour, np.repeat(grey, 3, axis=-1))
    output, _, _ = model.apply(variables, wanted)
    np.testing.assert_allclose(output, expected, atol=1e-5)


def test_channels_are_repeated_in_turn_and_scaled():
    kernel = np.arange(3.0, dtype=np.float32).reshape(1, 1, 3, 1)
    five = pretrained.input_channels(kernel, (1, 1, 5, 1))
    np.testing.assert_allclose(five.ravel(), 0.6 * np.array([0, 1, 2, 0, 1]), 1e-6)
    assert pretrained.input_channels(kernel, (1, 1, 1, 1)).item() == 3.0
    assert pretrained.input_channels(kernel, (1, 1, 3, 1)) is kernel
    with pytest.raises(ValueError, match="only the last axis but one may differ"):
        pretrained.input_channels(kernel, (1, 1, 3, 2))


@pytest.mark.parametrize("grid", [(9, 9), (4, 4), (3, 8)])
def test_position_embeddings_are_resampled_as_by_pytorch(embeddings, grid):
    shape = (1, 1 + grid[0] * grid[1], 4)
    given = None if grid[0] == grid[1] else grid
    adapter = pretrained.position_embeddings(grid=given)
    here = adapter(embeddings["embeddings"], shape)
    there = embeddings[f"{grid[0]}x{grid[1]}"]
    np.testing.assert_allclose(here, there, atol=2e-6)
    np.testing.assert_array_equal(here[:, 0], embeddings["embeddings"][:, 0])


def test_a_transformer_of_another_resolution(tmp_path):
    golden, (net, _) = Golden("vit"), NETWORKS["vit"]
    file, model = golden.write(tmp_path), from_linen(net)
    larger = np.repeat(np.repeat(golden.inputs, 2, axis=1), 2, axis=2)
    with pytest.raises(ValueError, match=r"'pos_embed': \(1, 25, 12\) in the file"):
        pretrained.load(file, model, larger)
    resample = pretrained.position_embeddings(old_grid=(4, 6), grid=(8, 12))
    variables, _ = pretrained.load(file, model, larger, adapt={"pos_embed": resample})
    assert variables.params["pos_embed"].shape == (1, 97, 12)
    assert jnp.isfinite(model.apply(variables, larger)[0]).all()
    same, _ = pretrained.load(
        file,
        model,
        golden.inputs,
        adapt={
            "pos_embed": pretrained.position_embeddings(old_grid=(4, 6), grid=(4, 6))
        },
    )
    np.testing.assert_array_equal(same.params["pos_embed"], golden.weights["pos_embed"])


def test_grids_that_do_not_fit_are_errors():
    values, shape = np.ones((1, 1 + 24, 4), np.float32), (1, 1 + 36, 4)
    with pytest.raises(ValueError, match="old_grid: got None, but there are 24 patch"):
        pretrained.position_embeddings()(values, shape)
    with pytest.raises(ValueError, match=r"grid: got \(5, 5\), but there are 36"):
        pretrained.position_embeddings(old_grid=(4, 6), grid=(5, 5))(values, shape)
    with pytest.raises(ValueError, match="of one width"):
        pretrained.position_embeddings()(values, (1, 25, 8))


def test_a_map_that_pytorch_flattened(tmp_path):
    """The rows of a LeNet's dense layer, put in place one by one."""
    model, images = from_linen(nets.LeNet(3, (2, 3), 6)), np.ones((1, 28, 32, 1))
    ours, file = jax.jit(model.init)(KEY, images), tmp_path / "lenet.safetensors"
    pretrained.save(file, ours)
    weights = pretrained.read(file)
    here = weights["features.dense.weight"]
    there = np.zeros_like(here)
    for h, w, c in np.ndindex(4, 5, 3):
        there[:, (c * 4 + h) * 5 + w] = here[:, (h * 5 + w) * 3 + c]
    save_file(weights | {"features.dense.weight": there}, file)
    adapt = {"features/dense": pretrained.flattened((4, 5))}
    found, _ = pretrained.load(file, model, images, adapt=adapt)
    assert same(found, ours)
    for grid, shape in (((4, 4), (60, 6)), ((4, 5), (60, 6, 1)), ((0, 5), (60, 6))):
        with pytest.raises(ValueError, match=r"flattened: got the grid \(.*give \(he"):
            pretrained.flattened(grid)(np.ones(shape), shape)


def test_a_head_of_some_of_the_classes(tmp_path):
    golden = Golden("resnet18")
    file, options = golden.write(tmp_path), {"filters": 3, "stages": (2, 1, 2, 1)}
    chosen = pretrained.classes([4, 1])
    model = from_linen(nets.ImageNetResNet(2, **options))
    adapt = {"fc": chosen}
    variables, report = pretrained.load(file, model, golden.inputs, adapt=adapt)
    assert report.adapted == ("fc/bias", "fc/kernel")
    output, _, _ = model.apply(variables, golden.inputs)
    np.testing.assert_allclose(output, golden.stages["fc"][:, [4, 1]], atol=1e-5)
    with pytest.raises(ValueError, match="got 5; the file has 0 … 4"):
        pretrained.classes([0, 5])(np.ones(5), (2,))
    with pytest.raises(ValueError, match=r"'fc/kernel': \(24, 3\) in the file"):
        wrong = {"fc": pretrained.classes([0, 1, 2])}
        pretrained.load(file, model, golden.inputs, adapt=wrong)
