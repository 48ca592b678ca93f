"""Loading is strict, rules say what may differ, and saving undoes it bit by bit."""

import itertools
import json
import pickle
import struct
import zipfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, serialization
from safetensors.numpy import save_file

from jaxtransfer import nets, pretrained, tree
from jaxtransfer.model import from_linen, from_nnx, with_head
from jaxtransfer.pretrained import files
from jaxtransfer.typing import Variables
from tests.pretrained.golden import NETWORKS, Golden
from tests.twins import jitted, network, same

KEY = jax.random.key(0)
IMAGE = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)


def resnet(outputs=5, **options):
    options = {"filters": 3, "stages": (2, 1, 2, 1)} | options
    return from_linen(nets.ImageNetResNet(outputs, **options))


@pytest.fixture(scope="module")
def golden():
    return Golden("resnet18")


@pytest.fixture(scope="module")
def file(golden, tmp_path_factory):
    return golden.write(tmp_path_factory.mktemp("weights"))


def rewritten(golden, folder, change):
    weights = dict(golden.weights)
    change(weights)
    file = folder / "changed.safetensors"
    save_file(weights, file)
    return file


# --- strictness ----------------------------------------------------------------------


def test_every_value_is_where_it_belongs(golden, file):
    variables, report = pretrained.load(file, resnet(), IMAGE)
    weights, params = golden.weights, variables.params
    stats = variables.model_state["batch_stats"]
    kernel = weights["layer2.0.downsample.0.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(params["layer2_0"]["downsample_0"]["kernel"], kernel)
    np.testing.assert_array_equal(params["fc"]["kernel"], weights["fc.weight"].T)
    for there, here in {
        "weight": params["layer1_0"]["bn2"]["scale"],
        "bias": params["layer1_0"]["bn2"]["bias"],
        "running_mean": stats["layer1_0"]["bn2"]["mean"],
        "running_var": stats["layer1_0"]["bn2"]["var"],
    }.items():
        np.testing.assert_array_equal(here, weights[f"layer1.0.bn2.{there}"])
    counters = sum("num_batches_tracked" in name for name in weights)
    assert len(report.matched) == len(weights) - counters
    assert report.matched["layer1_0/bn2/var"] == ("layer1.0.bn2.running_var",)
    expected = jax.eval_shape(resnet().init, KEY, IMAGE)
    assert jax.tree.structure(variables) == jax.tree.structure(expected)


def test_missing_unexpected_and_wrong_shapes_are_all_named(golden, tmp_path):
    def change(weights):
        weights["linear.weight"] = weights.pop("fc.weight")
        weights["conv1.weight"] = weights["conv1.weight"][:, :1]

    file = rewritten(golden, tmp_path, change)
    with pytest.raises(ValueError) as caught:
        pretrained.load(file, resnet(), IMAGE)
    message = str(caught.value)
    assert "missing 1, unexpected 1, wrong shape 1" in message
    assert "'fc/kernel': looked for 'fc.weight' (nearest: 'linear.weight')" in message
    assert "'conv1/kernel': (7, 7, 1, 3) in the file, (7, 7, 3, 3) in the" in message
    assert all(remedy in message for remedy in ("fresh=", "unused=", "adapt="))


def test_missing_statistics_are_an_error(golden, tmp_path):
    file = rewritten(golden, tmp_path, lambda w: w.pop("bn1.running_var"))
    with pytest.raises(ValueError, match="'bn1/var': looked for 'bn1.running_var'"):
        pretrained.load(file, resnet(), IMAGE)


def test_arrays_of_other_ranks_are_wrong_shapes(golden, tmp_path):
    def change(weights):
        weights["fc.weight"] = weights["fc.weight"][..., None, None]

    file = rewritten(golden, tmp_path, change)
    with pytest.raises(ValueError, match=r"'fc/kernel': \(1, 1, 24, 5\) in the file"):
        pretrained.load(file, resnet(), IMAGE)


def test_names_that_fit_nothing_are_explained(file):
    with pytest.raises(ValueError, match="nothing matches: names= says how"):
        pretrained.load(file, resnet(), IMAGE, names=pretrained.flax())


def test_a_long_list_is_cut(file):
    with pytest.raises(ValueError, match=r"… and \d+ more"):
        pretrained.load(file, resnet(), IMAGE, names=pretrained.flax())


@pytest.mark.parametrize(
    ("kind", "words"),
    [(np.int8, "integers"), (np.complex64, "complex numbers"), (bool, "bool")],
)
def test_numbers_of_another_kind_are_not_cast(kind, words, golden, tmp_path):
    """Such as the codes of quantized weights, which are no weights."""
    path = tmp_path / "codes.npz"
    codes = (100 * golden.weights["fc.weight"]).astype(kind)
    np.savez(path, **{**golden.weights, "fc.weight": codes})
    message = rf"'fc/kernel' is of fractions .*'fc.weight'\] of the file are {words}"
    with pytest.raises(ValueError, match=message):
        pretrained.load(path, resnet(), IMAGE, names=pretrained.torch())

    def scaled(value, shape):
        return value.real.astype(np.float32) / 100

    variables, _ = pretrained.load(
        path,
        resnet(),
        IMAGE,
        names=pretrained.torch(),
        adapt={"fc/kernel": scaled},
    )
    assert variables.params["fc"]["kernel"].dtype == jnp.float32


def test_what_is_saved_are_variables(tmp_path, types_unchecked):
    with pytest.raises(TypeError, match=r"got a dict, no Variables; give Variables\("):
        pretrained.save(tmp_path / "z.npz", {"fc": {"kernel": jnp.ones((4, 2))}})


# --- rules ---------------------------------------------------------------------------


def test_a_fresh_head_of_other_classes(golden, file):
    model = resnet(7)
    variables, report = pretrained.load(file, model, IMAGE, fresh="fc", key=KEY)
    initial = model.init(KEY, jnp.zeros(IMAGE.shape))
    head = variables.params["fc"]
    np.testing.assert_allclose(head["kernel"], initial.params["fc"]["kernel"], 1e-6)
    assert head["kernel"].shape == (24, 7)
    assert report.fresh == ("fc/bias", "fc/kernel")
    assert report.unused == ("fc.bias", "fc.weight")
    stem = golden.weights["conv1.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(variables.params["conv1"]["kernel"], stem)


def test_fresh_covers_parameters_and_statistics(file):
    variables, report = pretrained.load(file, resnet(), IMAGE, fresh="bn1", key=KEY)
    assert len(report.fresh) == 4
    assert jnp.all(variables.model_state["batch_stats"]["bn1"]["var"] == 1)
    assert jnp.all(variables.params["bn1"]["scale"] == 1)


def test_entries_are_passed_over_by_a_rule_on_their_names(golden, tmp_path):
    def change(weights):
        weights["aux.conv.weight"] = weights["aux.fc.bias"] = np.ones(3, np.float32)

    file = rewritten(golden, tmp_path, change)
    with pytest.raises(ValueError, match="unexpected 2"):
        pretrained.load(file, resnet(), IMAGE)
    _, report = pretrained.load(file, resnet(), IMAGE, unused="aux")
    assert report.unused == ("aux.conv.weight", "aux.fc.bias")
    with pytest.raises(ValueError, match="unexpected 1"):
        pretrained.load(file, resnet(), IMAGE, unused="aux/conv")


@pytest.mark.parametrize(
    "rules",
    [
        {"fresh": "hed", "key": KEY},
        {"unused": "aux"},
        {"adapt": {"convv1": pretrained.input_channels}},
    ],
)
def test_a_rule_that_matches_nothing_is_an_error(file, rules):
    with pytest.raises(ValueError, match="matches no parameter"):
        pretrained.load(file, resnet(), IMAGE, **rules)


def test_fresh_needs_a_key(file):
    with pytest.raises(ValueError, match="key: fresh leaves need one"):
        pretrained.load(file, resnet(), IMAGE, fresh="fc")


def test_two_adapters_of_one_leaf_are_an_error(file):
    adapt = {"conv1": pretrained.input_channels}
    adapt |= {".*/kernel": pretrained.input_channels}
    with pytest.raises(ValueError, match="'conv1/kernel' is matched by two rules"):
        pretrained.load(file, resnet(), IMAGE, adapt=adapt)


def test_a_leaf_is_fresh_or_adapted(file):
    adapt = {"conv1": pretrained.input_channels}
    with pytest.raises(ValueError, match="adapt: 'conv1/kernel' .* rule of fresh= too"):
        pretrained.load(file, resnet(), IMAGE, fresh="conv1", key=KEY, adapt=adapt)


def test_a_rule_on_entries_of_the_network_passes_over_nothing(golden, tmp_path):
    file = rewritten(golden, tmp_path, lambda w: w.update({"aux.fc.bias": np.ones(3)}))
    with pytest.raises(
        ValueError, match=r"unused: rule 'fc' .* as 'fc.bias'; .* here 'aux.fc.bias'"
    ):
        pretrained.load(file, resnet(), IMAGE, unused=["aux", "fc"])
    _, report = pretrained.load(file, resnet(), IMAGE, unused="aux|fc")
    assert report.unused == ("aux.fc.bias",)


def two_layers(tmp_path):
    """Two dense layers, a file with one, and a naming that gives it to both."""
    file = tmp_path / "one.safetensors"
    weights = {"fc.weight": np.eye(4), "fc.bias": np.ones(4)}
    save_file({name: x.astype(np.float32) for name, x in weights.items()}, file)
    model = from_linen(nn.Sequential([nn.Dense(4), nn.Dense(4)]))
    return file, model, pretrained.torch(rename=[(r"^layers\.\d", "fc")])


def test_two_leaves_are_not_read_from_one_entry(tmp_path):
    file, model, names = two_layers(tmp_path)
    rows = jnp.ones((1, 4))
    with pytest.raises(
        ValueError, match="'fc.bias' is the name of 'layers_1/bias' and of 'layers_0/b"
    ):
        pretrained.load(file, model, rows, names=names)
    # Of a fresh leaf nothing is read: the other one has the entry to itself.
    for kept, read in (("layers_0", "layers_1"), ("layers_1", "layers_0")):
        variables, report = pretrained.load(
            file, model, rows, names=names, fresh=kept, key=KEY
        )
        np.testing.assert_array_equal(variables.params[read]["kernel"], np.eye(4))
        assert report.fresh == (f"{kept}/bias", f"{kept}/kernel")
        assert report.unused == ()


def test_a_bare_module_is_to_be_wrapped(file, types_unchecked):
    with pytest.raises(TypeError, match=r"got a Dense, no Model; .*from_linen\(module"):
        pretrained.load(file, nn.Dense(2), IMAGE)


def test_names_are_changed_by_rules(golden, tmp_path):
    file = tmp_path / "parallel.safetensors"
    parallel = {f"module.{name}": value for name, value in golden.weights.items()}
    parallel["module.linear.weight"] = parallel.pop("module.fc.weight")
    parallel["module.linear.bias"] = parallel.pop("module.fc.bias")
    save_file(parallel, file)
    names = pretrained.torch(rename=[("^fc", "linear"), ("^", "module.")])
    variables, _ = pretrained.load(file, resnet(), IMAGE, names=names)
    fc = variables.params["fc"]["kernel"]
    np.testing.assert_array_equal(fc, golden.weights["fc.weight"].T)


def test_a_model_of_nnx_is_loaded_alike(golden, file, tmp_path):
    class Stem(nnx.Module):
        def __init__(self, rngs):
            options = {"strides": 2, "padding": ((3, 3), (3, 3)), "use_bias": False}
            self.conv1 = nnx.Conv(3, 3, (7, 7), rngs=rngs, **options)
            self.bn1 = nnx.BatchNorm(3, rngs=rngs)

        def __call__(self, inputs):
            return self.bn1(self.conv1(inputs))

    model = from_nnx(lambda rngs: Stem(rngs))
    variables, _ = pretrained.load(file, model, IMAGE, unused=("layer.*", "fc"))
    output, _, _ = model.apply(variables, golden.inputs)
    np.testing.assert_allclose(output, golden.stages["bn1"], atol=1e-5)


def test_a_file_of_the_backbone_goes_under_a_new_head(golden, file):
    model = with_head(resnet(), from_linen(nn.Dense(2)))
    names = pretrained.torch(rename=[(r"^backbone\.", "")])
    variables, report = pretrained.load(
        file, model, IMAGE, names=names, fresh="head", key=KEY
    )
    mean = variables.model_state["backbone"]["batch_stats"]["bn1"]["mean"]
    np.testing.assert_array_equal(mean, golden.weights["bn1.running_mean"])
    assert report.fresh == ("head/bias", "head/kernel")


# --- saving --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_file_comes_back_byte_by_byte(name, dtype, tmp_path):
    golden, (net, names) = Golden(name), NETWORKS[name]
    kind = jnp.bfloat16 if dtype == "bfloat16" else dtype
    file, again = golden.write(tmp_path, dtype=kind), tmp_path / "again.safetensors"
    model = from_linen(net)
    variables, _ = pretrained.load(file, model, golden.inputs, names=names)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    pretrained.save(again, variables, names=names, like=file)
    assert file.read_bytes() == again.read_bytes()


def test_what_was_trained_is_in_the_new_file_and_nothing_else_changed(file, tmp_path):
    variables, _ = pretrained.load(file, resnet(), IMAGE)
    params = tree.map_with_path(
        lambda path, leaf: leaf + 1 if path == "fc/kernel" else leaf, variables.params
    )
    again = tmp_path / "again.safetensors"
    pretrained.save(again, variables._replace(params=params), like=file)
    before, after = pretrained.read(file), pretrained.read(again)
    assert list(before) == list(after)
    changed = [name for name in before if not np.array_equal(before[name], after[name])]
    assert changed == ["fc.weight"]
    np.testing.assert_array_equal(after["fc.weight"], before["fc.weight"] + 1)
    assert after["layer1.0.bn1.num_batches_tracked"] == 7


def test_what_a_network_of_fewer_digits_did_not_change_keeps_them(tmp_path):
    thirds = np.arange(1, 7, dtype=np.float32).reshape(2, 3) / 3
    file, again = dense(tmp_path, thirds), tmp_path / "again.safetensors"
    model = from_linen(nn.Dense(3, param_dtype=jnp.bfloat16))
    variables, _ = pretrained.load(file, model, jnp.ones((1, 2)))
    pretrained.save(again, variables, like=file)
    assert file.read_bytes() == again.read_bytes()
    kernel = variables.params["kernel"].at[0, 0].add(1.0)
    changed = variables._replace(params={**variables.params, "kernel": kernel})
    pretrained.save(again, changed, like=file)
    before, after = (pretrained.read(name)["weight"] for name in (file, again))
    assert not np.array_equal(before, after)
    np.testing.assert_array_equal(after, np.float32(kernel).T)


def test_a_random_key_is_no_weight(tmp_path):
    state = {"rngs": {"stream": jax.random.key(0)}}
    with pytest.raises(TypeError, match="'stream' is a random key"):
        pretrained.save(tmp_path / "x.npz", Variables({"w": jnp.ones(2)}, state))


@pytest.mark.parametrize("ending", ["safetensors", "npz", "msgpack"])
def test_every_format_gives_back_what_it_was_given(file, ending, tmp_path):
    variables, _ = pretrained.load(file, resnet(), IMAGE)
    other = tmp_path / f"other.{ending}"
    pretrained.save(other, variables)
    back, report = pretrained.load(other, resnet(), IMAGE)
    assert tree.fingerprint(back) == tree.fingerprint(variables)
    again = tmp_path / f"again.{ending}"
    pretrained.save(again, back, like=other)
    assert again.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("ending", ["safetensors", "npz"])
@pytest.mark.parametrize("normalized", [True, False])
def test_a_network_with_a_head_comes_back(normalized, ending, tmp_path):
    """Both parts with statistics at the same paths; a head without any state."""
    head = network("linen", normalized=True) if normalized else from_linen(nn.Dense(2))
    model = jitted(with_head(network("nnx", normalized=True), head))
    numbers, rows = itertools.count(1), jnp.ones((2, 6))
    variables = jax.tree.map(lambda x: x + next(numbers), model.init(KEY, rows))
    file = tmp_path / f"headed.{ending}"
    pretrained.save(file, variables)
    mean = {
        "safetensors": "backbone.blocks.0.norm.running_mean",
        "npz": "batch_stats/backbone/blocks_0/norm/mean",
    }
    assert mean[ending] in pretrained.read(file)
    back, _ = pretrained.load(file, model, rows)
    assert same(back, variables)
    assert model.apply(back, rows)[0].shape == (2, 3 if normalized else 2)


def test_a_file_may_be_replaced_by_its_like(golden, tmp_path):
    file = golden.write(tmp_path)
    before = file.read_bytes()
    variables, _ = pretrained.load(file, resnet(), IMAGE)
    pretrained.save(file, variables, like=file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_leaves_that_the_file_lacks_are_not_saved_like_it(file, tmp_path):
    variables = Variables({"fc": {"kernel": jnp.ones((24, 5))}, "new": jnp.ones(2)})
    with pytest.raises(ValueError, match="has no 'new'"):
        pretrained.save(tmp_path / "x.safetensors", variables, like=file)


def test_two_leaves_of_one_name_are_an_error(tmp_path):
    variables = Variables({"fc": {"kernel": jnp.ones((2, 2)), "scale": jnp.ones(2)}})
    with pytest.raises(
        ValueError, match="'fc.weight' is the name of 'fc/scale' and of 'fc/kernel'"
    ):
        pretrained.save(tmp_path / "x.safetensors", variables)


@pytest.mark.parametrize("ending", ["safetensors", "npz", "msgpack"])
def test_a_folder_that_is_not_there_is_named(ending, tmp_path):
    variables = Variables({"fc": {"kernel": jnp.ones((2, 2))}})
    with pytest.raises(FileNotFoundError, match="no folder '.*nowhere'; make it"):
        pretrained.save(tmp_path / "nowhere" / f"x.{ending}", variables)
    assert not list(tmp_path.iterdir())


def test_bfloat16_is_refused_where_it_would_be_lost(tmp_path):
    variables = Variables({"fc": {"kernel": jnp.full((2, 3), 1.5, jnp.bfloat16)}})
    with pytest.raises(
        ValueError, match=r"'params/fc/kernel', which is bfloat16.*safetensors or .msg"
    ):
        pretrained.save(tmp_path / "x.npz", variables)
    assert not list(tmp_path.iterdir())
    for ending in ("safetensors", "msgpack"):
        pretrained.save(tmp_path / f"x.{ending}", variables)
        (kernel,) = pretrained.read(tmp_path / f"x.{ending}").values()
        assert kernel.dtype == jnp.bfloat16 and (kernel == 1.5).all()


# --- formats -------------------------------------------------------------------------


def test_a_checkpoint_of_flax_with_and_without_collections(tmp_path):
    net, example = nn.Dense(2), jnp.ones((1, 3))
    variables = net.init(KEY, example)
    kernel = variables["params"]["kernel"]
    whole, bare = tmp_path / "whole.msgpack", tmp_path / "bare.msgpack"
    whole.write_bytes(serialization.to_bytes(variables))
    bare.write_bytes(serialization.to_bytes(variables["params"]))
    for file, collections in ((whole, True), (bare, False)):
        names = pretrained.flax(collections=collections)
        loaded, _ = pretrained.load(file, from_linen(net), example, names=names)
        np.testing.assert_array_equal(loaded.params["kernel"], kernel)
        again = tmp_path / "again.msgpack"
        pretrained.save(again, loaded, names=names, like=file)
        assert serialization.msgpack_restore(again.read_bytes()).keys() == (
            serialization.msgpack_restore(file.read_bytes()).keys()
        )
        before, after = pretrained.read(file), pretrained.read(again)
        assert tree.fingerprint(before) == tree.fingerprint(after)


def test_what_is_no_number_is_read_kept_and_not_missed(tmp_path):
    file, again = tmp_path / "labelled.npz", tmp_path / "again.npz"
    arrays = {"kernel": np.ones((3, 2), np.float32), "bias": np.zeros(2, np.float32)}
    np.savez(file, labels=np.array(["cat", "dog"]), **arrays)
    names, model = pretrained.flax(collections=False), from_linen(nn.Dense(2))
    variables, report = pretrained.load(file, model, jnp.ones((1, 3)), names=names)
    assert report.unused == ()
    pretrained.save(again, variables, names=names, like=file)
    assert pretrained.read(again)["labels"].tolist() == ["cat", "dog"]


def test_files_that_cannot_be_read_are_named(tmp_path, types_unchecked):
    with pytest.raises(FileNotFoundError, match="no file '.*nothing.npz'"):
        pretrained.read(tmp_path / "nothing.npz")
    with pytest.raises(ValueError, match=r"ends in '.pth'.*\.safetensors, \.npz"):
        pretrained.read(tmp_path / "torch.pth")
    for ending in ("safetensors", "npz", "msgpack"):
        damaged = tmp_path / f"damaged.{ending}"
        damaged.write_bytes(b"\xc1 no weights")
        with pytest.raises(ValueError, match=f"can't be read as .{ending}") as e:
            pretrained.read(damaged)
        _says_nothing_of_numpy(e)


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2"])
def test_numbers_of_a_type_that_can_t_be_read_are_named(kind, tmp_path):
    file = tmp_path / "narrow.safetensors"
    entry = {"dtype": kind, "shape": [4], "data_offsets": [0, 4]}
    header = json.dumps({"head.weight": entry}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(ValueError, match=f"'head.weight' as {kind}, a type") as e:
        pretrained.read(file)
    assert "whole" not in str(e.value)


def _says_nothing_of_numpy(caught):
    """Not even where the traceback names what led to the error."""
    assert "allow_pickle" not in str(caught.value)
    assert caught.value.__cause__ is None or "allow_pickle" not in str(
        caught.value.__cause__
    )


def test_a_pickle_inside_an_npz_is_not_opened(tmp_path):
    file = tmp_path / "pickled.npz"
    np.savez(file, weights=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="can't be read.*'weights' holds pickled") as e:
        pretrained.read(file)
    _says_nothing_of_numpy(e)


class Opened:
    def __reduce__(self):
        return pytest.fail, ("the pickle was opened",)


@pytest.mark.parametrize("form", [2, 3, 4, 5, "zip"])
@pytest.mark.parametrize("ending", ["safetensors", "npz", "msgpack"])
def test_a_pickle_by_another_name_is_refused(ending, form, tmp_path):
    file = tmp_path / f"weights.{ending}"
    if form == "zip":  # as torch.save writes it
        with zipfile.ZipFile(file, "w") as opened:
            opened.writestr("archive/data.pkl", pickle.dumps(Opened()))
            opened.writestr("archive/data/0", b"\0" * 8)
            opened.writestr("archive/version", "3\n")
    else:
        file.write_bytes(pickle.dumps(Opened(), protocol=form))
    with pytest.raises(
        ValueError, match="is a pickle.*safetensors.torch.save_file"
    ) as e:
        pretrained.read(file)
    _says_nothing_of_numpy(e)


def test_no_sound_file_is_taken_for_a_pickle(tmp_path):
    """The header's length makes a safetensors file begin with 80 02."""
    file = tmp_path / "weights.safetensors"
    for extra in range(0, 700, 8):
        save_file({"w": np.ones(2, np.float32)}, file, metadata={"a": "b" * extra})
        if file.read_bytes()[:2] == b"\x80\x02":
            break
    assert file.read_bytes()[:2] == b"\x80\x02"
    np.testing.assert_array_equal(pretrained.read(file)["w"], np.ones(2))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="can't be read .* is it whole"):
        pretrained.read(file)
    empty = tmp_path / "empty.msgpack"
    empty.write_bytes(serialization.msgpack_serialize({}))
    assert empty.read_bytes() == b"\x80"
    assert pretrained.read(empty) == {}


@pytest.mark.parametrize("name", ["folder", "folder.npz", "folder.safetensors"])
def test_a_folder_is_told_so(name, tmp_path):
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="is a folder; give the path of a file in it"):
        pretrained.read(tmp_path / name)


def test_without_the_package_the_error_says_what_to_install(file, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    monkeypatch.setitem(__import__("sys").modules, "safetensors.numpy", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        pretrained.read(file)


# --- numbers that a type can't hold ---------------------------------------------------


def dense(tmp_path, kernel, name="dense.safetensors"):
    file = tmp_path / name
    save_file({"weight": kernel.T.copy(), "bias": np.zeros(3, kernel.dtype)}, file)
    return file


def test_weights_made_of_integers_are_not_saved_as_integers(tmp_path):
    file = dense(tmp_path, np.array([[-7, 49, -46], [17, -48, 39]], np.int8))
    model, again = from_linen(nn.Dense(3)), tmp_path / "again.safetensors"
    scale = {"kernel|bias": lambda value, shape: value.astype(np.float32) / 100}
    variables, _ = pretrained.load(file, model, jnp.ones((1, 2)), adapt=scale)
    with pytest.raises(ValueError, match="of integers .int8. in .* leave like= out"):
        pretrained.save(again, variables, like=file)
    assert not again.exists()


def test_numbers_too_large_for_their_type_are_refused_both_ways(tmp_path):
    file = dense(tmp_path, np.ones((2, 3), np.float16))
    model, again = from_linen(nn.Dense(3)), tmp_path / "again.safetensors"
    variables, _ = pretrained.load(file, model, jnp.ones((1, 2)))
    grown = jax.tree.map(lambda leaf: 1e5 * leaf, variables)
    with pytest.raises(ValueError, match="'weight' has numbers up to 1e.05, too large"):
        pretrained.save(again, grown, like=file)
    infinite = jax.tree.map(lambda leaf: jnp.inf * (leaf + 1), variables)
    pretrained.save(again, infinite, like=file)  # nothing is lost
    large = dense(tmp_path, np.full((2, 3), 1e6, np.float32), "large.safetensors")
    half = from_linen(nn.Dense(3, param_dtype=jnp.float16))
    with pytest.raises(ValueError, match="'kernel' has numbers .* large for float16"):
        pretrained.load(large, half, jnp.ones((1, 2)))


# --- more of msgpack ------------------------------------------------------------------


def test_processes_that_save_to_one_file_do_not_meet(tmp_path, monkeypatch):
    rename, parts = files.os.replace, []
    given = Variables({"kernel": np.ones((2, 3))})

    def second(source, target):
        """As if another process saved to it in the middle of the first one's."""
        parts.append(source)
        if len(parts) == 1:
            pretrained.save(target, given)
        rename(source, target)

    monkeypatch.setattr(files.os, "replace", second)
    pretrained.save(tmp_path / "weights.npz", given)
    assert [file.name for file in tmp_path.iterdir()] == ["weights.npz"]


def test_keys_with_a_slash_are_written_as_they_were(tmp_path):
    file, again = tmp_path / "haiku.msgpack", tmp_path / "again.msgpack"
    nested = {"mlp/~/linear_0": {"w": np.ones((2, 3), np.float32), "b": np.zeros(3)}}
    file.write_bytes(serialization.msgpack_serialize(nested))

    def names(leaf):
        last = {"kernel": "w", "bias": "b"}[leaf.path]
        name = (f"mlp/~/linear_0/{last}",)
        return pretrained.Entry(name, lambda array: array, lambda leaf: (leaf,))

    model = from_linen(nn.Dense(3))
    variables, _ = pretrained.load(file, model, jnp.ones((1, 2)), names=names)
    pretrained.save(again, variables, names=names, like=file)
    found = serialization.msgpack_restore(again.read_bytes())
    assert tree.fingerprint(found) == tree.fingerprint(nested)


def test_two_arrays_of_one_name_are_an_error(tmp_path):
    file = tmp_path / "two.msgpack"
    nested = {"a": {"b/c": np.ones(2)}, "a/b": {"c": np.zeros(2)}}
    file.write_bytes(serialization.msgpack_serialize(nested))
    with pytest.raises(ValueError, match="'a/b/c' is the name of two of its arrays"):
        pretrained.read(file)


def test_a_counter_of_the_whole_network_has_its_name(tmp_path):
    variables = Variables({"kernel": jnp.ones(2)}, {"updates": jnp.array(3)})
    file = tmp_path / "counted.npz"
    pretrained.save(file, variables)
    assert sorted(pretrained.read(file)) == ["params/kernel", "updates/updates"]
