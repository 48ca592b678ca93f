import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import cifar
from jaxtransfer import pretrained
from jaxtransfer.train import init_state
from jaxtransfer.typing import Variables

CONFIG = cifar.CifarConfig(weights="random", filters=4, batch_size=8)


def test_what_is_looked_up_is_what_the_teacher_says(key):
    """Of the image and of its mirror image, for any number of images."""
    model = cifar.resnet(CONFIG, 8)
    inputs = jax.random.normal(key, (3, 32, 32, 3))
    variables = jax.jit(model.init)(key, inputs)
    found = cifar.look(model, variables, inputs, ("layer1_0",))
    for number, images in enumerate((inputs, inputs[:, :, ::-1])):
        output, features, _ = model.apply(variables, images, taps=("layer1_0",))
        np.testing.assert_allclose(found[""][number], output, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            found["layer1_0"][number], features["layer1_0"], rtol=1e-4, atol=1e-4
        )


def test_images_differ_between_seeds_and_roots():
    labels = jnp.arange(100) % 10
    drawn = {
        cifar.subset(labels, 3, *given).tobytes() for given in ((0,), (1,), (0, 1))
    }
    assert len(drawn) == 3
    same = cifar.subset(labels, 3, 0), cifar.subset(labels, 3, 0, 0)
    np.testing.assert_array_equal(*same)


def test_a_batch_is_mirrored_as_the_teacher_saw_it(key):
    """The teacher's values of a batch are those of the images in it."""
    images = cifar.Images(
        jax.random.normal(key, (5, 4, 4, 1)), jnp.arange(5, dtype=jnp.int32)
    )
    both = jnp.stack([images.inputs, images.inputs[:, :, ::-1]])
    taught = {"": both.reshape(2, 5, -1)}
    state = init_state(key, Variables({"w": jnp.zeros(())}), optax.sgd(0.1))
    batch = cifar.sample(CONFIG, state, images, taught)
    np.testing.assert_array_equal(
        batch["inputs"].reshape(CONFIG.batch_size, -1), batch["teacher"][""]
    )
    np.testing.assert_array_equal(batch["labels"], batch["index"])


def test_as_many_images_of_each_class(key):
    labels = jnp.arange(50) % 10
    chosen = cifar.subset(labels, 3, seed=1)
    assert np.bincount(labels[chosen]).tolist() == [3] * 10
    assert len(set(chosen.tolist())) == 30
    assert (chosen != cifar.subset(labels, 3, seed=2)).any()
    with pytest.raises(ValueError, match="per_class: got 6, but a class has 5 images"):
        cifar.subset(labels, 6, seed=1)


def test_the_teacher_s_file(tmp_path, key):
    config = dataclasses.replace(
        CONFIG, weights="small.safetensors", data_dir=str(tmp_path)
    )
    with pytest.raises(FileNotFoundError, match="no file 'small.*--weights"):
        cifar.read_teacher(config, cifar.resnet(config, 8))
    model = cifar.resnet(config, 8)
    variables = jax.jit(model.init)(key, jnp.ones((1, 32, 32, 3)))
    (tmp_path / "weights").mkdir()
    pretrained.save(tmp_path / "weights" / "small.safetensors", variables)
    found = cifar.read_teacher(config, model)
    jax.tree.map(np.testing.assert_array_equal, found, variables)
