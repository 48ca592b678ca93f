import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import compress, tree

SPARSITIES = (0, 0.1, 0.5, 0.83, 0.999, 1)
# Many ties, signs, a 0 and a layer that is smaller than the other as a whole.
RANDOM = np.random.default_rng(0)
PARAMS = {
    "conv": {
        "kernel": RANDOM.integers(-6, 7, (3, 3, 2, 5)).astype(np.float32) / 4,
        "bias": np.zeros(5, np.float32),
    },
    "head": {"kernel": RANDOM.integers(-6, 7, (7, 3)).astype(np.float32) / 40},
}


def kept(sizes, sparsity):
    """What is kept of numbers in a row: a stable sort, the slow way."""
    pruned = np.argsort(sizes, kind="stable")[: round(sparsity * len(sizes))]
    found = np.ones(len(sizes), bool)
    found[pruned] = False
    return found


def sizes(array, structure):
    array = np.abs(array)
    if structure is None:
        return array.ravel()
    # The mean of float32 as XLA sums it; no two channels are so near.
    return array.reshape(-1, array.shape[-1]).astype(np.float64).mean(0)


@pytest.mark.parametrize("structure", [None, "channel"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_smallest_are_pruned_exactly_so_many(scope, structure):
    options = {"scope": scope, "structure": structure}
    traced = jax.jit(lambda share: compress.masks(PARAMS, share, **options))
    rows = {
        path: sizes(PARAMS[path.split("/")[0]]["kernel"], structure)
        for path in ("conv/kernel", "head/kernel")
    }
    for share in SPARSITIES:
        expected = {path: kept(row, share) for path, row in rows.items()}
        if scope == "global":
            joined = kept(np.concatenate(list(rows.values())), share)
            first = len(rows["conv/kernel"])
            expected = {"conv/kernel": joined[:first], "head/kernel": joined[first:]}
        for found in (compress.masks(PARAMS, share, **options), traced(float(share))):
            found = tree.flatten(found)
            assert set(found) == set(expected)
            for path, mask in found.items():
                np.testing.assert_array_equal(
                    mask.ravel(), expected[path], err_msg=path
                )


def test_of_equal_weights_the_first_are_pruned():
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        params = {"kernel": -jnp.ones((2, 5), dtype)}
        found = jax.jit(compress.masks)(params, 0.7)["kernel"]
        assert found.ravel().tolist() == [False] * 7 + [True] * 3


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_weights_own_precision_ranks_them(scope):
    """In float32 all of these are equal."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        fine = 1 + jnp.array([1e-9, 0.0, 2e-9, 3e-9], jnp.float64)
        coarse = jnp.full(4, 2, jnp.bfloat16)
        params = {"a": {"kernel": coarse}, "kernel": fine}
        share = {"layer": 0.25, "global": 0.125}[scope]
        found = jax.jit(compress.masks, static_argnames="scope")(
            params, share, scope=scope
        )
        assert found["kernel"].tolist() == [True, False, True, True]


def test_scales_of_integers_are_no_weights():
    array = {"qvalue": jnp.array([[0, 3]], jnp.int8), "scale": jnp.ones((1, 2))}
    params = {"head": {"kernel": {"array": array}, "bias": jnp.ones(2)}}
    assert float(compress.sparsity(params)) == 0.5


def test_a_sparsity_may_be_a_number_of_numpy():
    for share in (np.float32(0.25), np.float16(0.5), np.float64(0.7), np.int32(1)):
        found = tree.flatten(compress.masks(PARAMS, share))
        expected = tree.flatten(compress.masks(PARAMS, float(share)))
        for path, mask in found.items():
            np.testing.assert_array_equal(mask, expected[path], err_msg=path)


def test_a_channel_goes_as_a_whole():
    found = compress.masks(PARAMS, 0.4, rules="conv/kernel", structure="channel")
    assert found["conv"]["kernel"].shape == (1, 1, 1, 5)
    cut = compress.apply_masks(PARAMS, found)["conv"]["kernel"].reshape(-1, 5)
    gone = (cut == 0).all(0)
    assert gone.tolist() == (~found["conv"]["kernel"]).ravel().tolist()
    assert gone.sum() == 2
    weak = np.abs(PARAMS["conv"]["kernel"]).mean((0, 1, 2))
    assert max(weak[gone]) <= min(weak[~gone])


def test_masks_leave_the_rest_as_it_is():
    params = {**PARAMS, "bridges": {}}
    found = compress.apply_masks(params, compress.masks(params, 0.5))
    assert jax.tree.structure(found) == jax.tree.structure(params)
    assert found["conv"]["bias"] is params["conv"]["bias"]
    assert float(compress.sparsity(found, rules="conv/kernel")) == 0.5
    assert float(compress.sparsity({"a": {"kernel": jnp.zeros(3)}})) == 1.0


def test_pruned_is_zero_whatever_stood_there():
    params = {"kernel": jnp.array([jnp.nan, -jnp.inf, -1.0, 2.0])}
    masks = {"kernel": jnp.array([False, False, False, True])}
    found = compress.apply_masks(params, masks)["kernel"]
    assert found.tolist() == [0.0, 0.0, 0.0, 2.0]
    assert not jnp.signbit(found).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rules": "heed/.*"}, "matches no parameter; nearest: 'head/kernel'"),
        ({"sparsity": 1.01}, "sparsity: got 1.01; a share of weights is in 0 … 1"),
        ({"sparsity": -1}, "sparsity: got -1"),
        ({"sparsity": np.float32(1.5)}, "sparsity: got 1.5; a share of"),
        ({"sparsity": jnp.float32(1.5)}, "sparsity: got 1.5; a share of"),
        ({"sparsity": np.int64(50)}, "sparsity: got 50; a share of"),
        ({"scope": "block"}, 'scope: got \'block\'; choose "layer" or "global"'),
        ({"structure": "row"}, "structure: got 'row'; choose None"),
    ],
)
def test_what_can_t_be_is_refused(types_unchecked, options, message):
    with pytest.raises(ValueError, match=message):
        compress.masks(PARAMS, **{"sparsity": 0.5, **options})


def test_masks_of_another_network_are_refused():
    masks = {"head": {"kernels": jnp.ones((7, 3), bool)}}
    with pytest.raises(ValueError, match="masks: 'head/kernels' is no parameter; near"):
        compress.apply_masks(PARAMS, masks)
    with pytest.raises(ValueError, match="rule 'stem' matches no parameter"):
        compress.sparsity(PARAMS, rules="stem")
