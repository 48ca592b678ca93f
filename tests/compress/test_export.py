"""Exported students run in a process that has neither this library nor Flax."""

import json
import os
import re
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import compress, nets, pretrained
from jaxtransfer.methods import distill
from jaxtransfer.model import from_linen, with_head
from tests.twins import jitted, network

# The other process, too, must have what agrees to the last bit.
pytestmark = pytest.mark.present_code
KEY = jax.random.key(0)
ROWS = jax.random.normal(KEY, (4, 6))
IMAGES = jax.random.normal(KEY, (4, 16, 16, 3))
DIGITS = jax.random.normal(KEY, (4, 28, 28, 1))

# Runs the code of each README as it stands, and saves what comes out.
_ELSEWHERE = """
import json, os, sys
for name in ("jaxtransfer", "flax", "qwix", "optax"):
    sys.modules[name] = None
import jax
import numpy as np
jax.config.update("jax_num_cpu_devices", 8)  # they share the cores, as in the tests
for folder, blocks in json.loads(sys.argv[1]).items():
    os.chdir(folder)
    for size in (4, 3):
        inputs = np.load("inputs.npy")[:size]
        for number, block in enumerate(blocks):
            found = {"inputs": inputs}
            exec(block, found)
            np.save(f"outputs_{size}_{number}.npy", found["outputs"])
"""


def _networks():
    """Model, variables and inputs by name, normalisation with statistics of its own."""

    def shaken(variables):
        def shift(x):
            if x.dtype == jnp.int8:
                return x
            return x + jnp.abs(jnp.sin(jnp.arange(x.size))).reshape(x.shape) / 4

        return variables._replace(
            model_state=jax.tree.map(shift, variables.model_state)
        )

    resnet = nets.ResNet(5, depth=8, filters=4)
    integers = compress.quantized(resnet, IMAGES).integer
    found = {
        "mlp": (from_linen(nets.MLP(3, widths=(8,))), ROWS),
        "lenet": (from_linen(nets.LeNet(5, (4, 6), 16, batch_norm=True)), DIGITS),
        "resnet": (from_linen(resnet), IMAGES),
        "integers": (integers, IMAGES),
    }
    return {
        name: (model, shaken(jax.jit(model.init)(KEY, inputs)), inputs)
        for name, (model, inputs) in found.items()
    }


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Networks, their files, and what another process made of them."""
    made, jobs = {}, {}
    for name, (model, variables, inputs) in _networks().items():
        folder = tmp_path_factory.mktemp(name)
        files = compress.export_student(folder, model, variables, inputs)
        made[name] = model, variables, inputs, files
        text = files.readme.read_text(encoding="utf-8")
        jobs[str(folder)] = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
        np.save(folder / "inputs.npy", inputs)
    assert all(len(blocks) == 2 for blocks in jobs.values())
    done = subprocess.run(
        [sys.executable, "-c", _ELSEWHERE, json.dumps(jobs)],
        env={name: v for name, v in os.environ.items() if name != "PYTHONPATH"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return made


@pytest.mark.parametrize("name", ["mlp", "lenet", "resnet", "integers"])
def test_the_files_say_the_same_without_the_library(exported, name):
    """To the last bit: the program with its weights inside, and with them apart."""
    model, variables, inputs, files = exported[name]

    def run(variables, inputs):
        return model.apply(variables, inputs)[0]

    inside = jax.jit(lambda inputs: run(variables, inputs))(inputs)
    apart = jax.jit(run)(variables, inputs)
    for number, expected in enumerate((inside, apart)):
        found = np.load(files.student.parent / f"outputs_4_{number}.npy")
        np.testing.assert_array_equal(found, expected)
        assert np.abs(found).max() > 0
        less = np.load(files.student.parent / f"outputs_3_{number}.npy")
        np.testing.assert_allclose(less, expected[:3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_the_weights_are_read_back(exported, name):
    model, variables, inputs, files = exported[name]
    found, _ = pretrained.load(files.weights, model, inputs, names=pretrained.flax())
    assert jax.tree.structure(found) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, found, variables)


def test_weights_of_integers_stay_integers(exported):
    _, variables, _, files = exported["integers"]
    found = pretrained.read(files.weights)
    kernel = variables.params["conv1"]["kernel"]["array"]["qvalue"]
    assert found["params/conv1/kernel/array/qvalue"].dtype == np.int8
    np.testing.assert_array_equal(found["params/conv1/kernel/array/qvalue"], kernel)
    sizes = {key: exported[key][3].weights.stat().st_size for key in exported}
    assert sizes["integers"] < 0.6 * sizes["resnet"]


def test_the_readme_names_shapes_and_platforms(exported):
    text = exported["resnet"][3].readme.read_text(encoding="utf-8")
    assert "inputs: `float32[batch, 16, 16, 3]`" in text
    assert "outputs: `float32[batch, 5]`" in text
    assert "Runs on cpu, cuda, tpu." in text


def test_a_student_leaves_its_bridges_behind(tmp_path):
    student = network("nnx", widths=(8,))
    own = jitted(student).init(KEY, ROWS)
    params = {"student": own.params, "bridges": {"hint": {"kernel": jnp.ones((8, 9))}}}
    kept = distill.of_student(params, {"student": {}, "bridges": {"hint": {}}})
    files = compress.export_student(
        tmp_path / "new" / "folder", student, kept, ROWS, batch=4, platforms=("cpu",)
    )
    names = list(pretrained.read(files.weights))
    assert sorted(names) == [
        "params/blocks_0/dense/bias",
        "params/blocks_0/dense/kernel",
        "params/head/bias",
        "params/head/kernel",
    ]
    program = jax.export.deserialize(bytearray(files.student.read_bytes()))
    expected = jax.jit(lambda x: student.apply(own, x)[0])(ROWS)
    np.testing.assert_array_equal(program.call(ROWS), expected)
    with pytest.raises(ValueError, match="batch|shape|dim"):
        program.call(ROWS[:3])


def test_a_network_with_a_head(tmp_path):
    """The backbone has running statistics, the head has no state at all."""
    model = with_head(network("linen", normalized=True), from_linen(nn.Dense(2)))
    variables = jitted(model).init(KEY, ROWS)
    state = jax.tree.map(lambda x: x + 0.5, variables.model_state)
    variables = variables._replace(model_state=state)
    files = compress.export_student(
        tmp_path, model, variables, ROWS, batch=4, platforms=("cpu",)
    )
    weights = pretrained.read(files.weights)
    assert "batch_stats/backbone/blocks_0/norm/mean" in weights
    inside, apart = (
        jax.export.deserialize(bytearray(file.read_bytes())) for file in files[:2]
    )
    expected = model.apply(variables, ROWS)[0]
    for found in (inside.call(ROWS), apart.call(weights, ROWS)):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


IMAGE_NETWORKS = {
    "ImageNetResNet": (nets.ImageNetResNet(5, filters=2, stages=(1, 1)), 16),
    "Conv4": (nets.Conv4(5, filters=2), 16),
    "MobileNetV2": (nets.MobileNetV2(5, stages=((6, 8, 2, 2),), last=8), 16),
    "ResNet": (nets.ResNet(5, depth=8, filters=2), 16),
    "VGG": (nets.VGG(5, depth=11, filters=2, width=8), 32),
    "ViT": (nets.ViT(5, width=8, depth=1, heads=2, patch=8), 16),
}


@pytest.mark.parametrize("name", IMAGE_NETWORKS)
def test_networks_of_images_take_any_number(name, tmp_path):
    net, size = IMAGE_NETWORKS[name]
    model, images = from_linen(net), jax.random.normal(KEY, (3, size, size, 3))
    variables = jax.jit(model.init)(KEY, images)
    files = compress.export_student(
        tmp_path, model, variables, images[:1], platforms=("cpu",)
    )
    program = jax.export.deserialize(bytearray(files.student.read_bytes()))
    expected = jax.jit(lambda x: model.apply(variables, x)[0])(images)
    np.testing.assert_allclose(program.call(images), expected, rtol=1e-4, atol=1e-5)


def test_networks_that_ask_how_many_there_are(tmp_path):
    """`len(x)` needs a number: the error says so, and `batch=` gives one."""
    model = network("linen")
    variables = jitted(model).init(KEY, ROWS)
    with pytest.raises(ValueError, match=r"batch: .* x.shape\[0\] .* len\(x\)"):
        compress.export_student(tmp_path / "a", model, variables, ROWS)
    assert not (tmp_path / "a").exists()
    compress.export_student(tmp_path / "a", model, variables, ROWS, batch=2)


def test_errors_of_the_network_are_its_own(tmp_path):
    class Broken(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(x) + jnp.ones(3)

    variables = from_linen(nn.Sequential([nn.Dense(2)])).init(KEY, ROWS)
    with pytest.raises((TypeError, ValueError), match="ncompatible shapes"):
        compress.export_student(
            tmp_path,
            from_linen(Broken()),
            variables._replace(params={"Dense_0": variables.params["layers_0"]}),
            ROWS,
            batch=4,
        )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"platforms": "cpu"}, TypeError, r"platforms: got the string 'cpu'.*\('cpu',"),
        ({"batch": 0}, ValueError, "batch: got 0; .* at least 1, or None"),
    ],
)
def test_what_is_no_platform_or_batch_is_refused(
    tmp_path, types_unchecked, options, error, message
):
    model = from_linen(nn.Dense(2))
    with pytest.raises(error, match=message):
        compress.export_student(tmp_path, model, model.init(KEY, ROWS), ROWS, **options)
    assert not list(tmp_path.iterdir())


def test_without_flatbuffers_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    model = from_linen(nn.Dense(2))
    with pytest.raises(ImportError, match=r"package flatbuffers; .*r\[compress\]"):
        compress.export_student(tmp_path, model, model.init(KEY, ROWS), ROWS)
