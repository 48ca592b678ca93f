import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import tree

PARAMS = {
    "stem": {"kernel": np.ones((2, 3)), "bias": np.zeros(3)},
    "blocks_0": {"norm": {"scale": np.ones(3)}, "dense": {"kernel": np.ones((3, 3))}},
    "blocks_1": {"norm": {"scale": np.ones(3)}, "dense": {"kernel": np.ones((3, 3))}},
    "blocks_10": {"dense": {"kernel": np.ones((3, 3))}},
    "head": {"kernel": np.ones((3, 2)), "bias": np.zeros(2)},
}
PATHS = list(tree.flatten(PARAMS))


def equal(first, second):
    return jax.tree.structure(first) == jax.tree.structure(second) and all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    )


def test_flatten_and_unflatten_are_inverse():
    leaves = tree.flatten(PARAMS)
    assert PATHS == sorted(PATHS)
    assert leaves["blocks_0/norm/scale"] is PARAMS["blocks_0"]["norm"]["scale"]
    assert equal(tree.unflatten(leaves), PARAMS)


def test_empty_dicts_vanish():
    assert tree.flatten({"a": {}, "b": {"c": 1}}) == {"b/c": 1}


def test_a_list_is_no_tree(types_unchecked):
    with pytest.raises(
        TypeError, match="tree: got a list; parameters are nested dicts"
    ):
        tree.flatten([{"a": 1}])


@pytest.mark.parametrize("names", [(0, 1), (0, "b")])
def test_a_key_that_is_no_string_is_an_error(names):
    with pytest.raises(TypeError, match="keys must be strings, got 0 under 'a/list'"):
        tree.flatten({"a": {"list": dict.fromkeys(names, {"w": 1})}})


@pytest.mark.parametrize(
    ("rules", "chosen"),
    [
        ("head", {"head/kernel", "head/bias"}),
        ("head/.*", {"head/kernel", "head/bias"}),
        ("head/bias", {"head/bias"}),
        (["head/bias", "stem/bias"], {"head/bias", "stem/bias"}),
        (".*/bias", {"head/bias", "stem/bias"}),
        ("blocks_1", {"blocks_1/norm/scale", "blocks_1/dense/kernel"}),
        (r"blocks_\d+/norm", {"blocks_0/norm/scale", "blocks_1/norm/scale"}),
        ("stem/bias|head/bias", {"head/bias", "stem/bias"}),
        (".*", set(PATHS)),
        ((), set()),
    ],
)
def test_rules_match_whole_paths_or_whole_leading_parts(rules, chosen):
    assert tree.match(rules, PATHS) == chosen


@pytest.mark.parametrize("rule", ["hea", "ead", "kernel", "block", "head/kern"])
def test_rules_do_not_match_parts_of_names(rule):
    with pytest.raises(ValueError, match="matches no parameter"):
        tree.match(rule, PATHS)


def test_one_of_several_rules_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"rule 'hed/bias'.*nearest: 'head/bias'"):
        tree.match(["stem", "hed/bias"], PATHS)


def test_a_rule_that_is_no_expression_is_an_error():
    with pytest.raises(ValueError, match=r"rule '\*' is not a regular expression"):
        tree.match("*", PATHS)


@pytest.mark.parametrize("rules", ["head", (), ".*", ["stem/bias", "blocks_.*"]])
def test_partition_then_combine_is_the_identity(rules):
    trained, held = tree.partition(PARAMS, rules)
    assert set(tree.flatten(trained)) == tree.match(rules, PATHS)
    assert not set(tree.flatten(trained)) & set(tree.flatten(held))
    assert equal(tree.combine(trained, held), PARAMS)


def test_combine_refuses_a_leaf_that_is_in_both():
    with pytest.raises(ValueError, match="'head/bias' is both trained and held"):
        tree.combine(PARAMS, {"head": {"bias": np.zeros(2)}})


def test_combine_refuses_a_leaf_where_another_tree_has_a_branch():
    with pytest.raises(ValueError, match="path 'head' is a leaf"):
        tree.combine({"head": np.zeros(2)}, {"head": {"bias": np.zeros(2)}})


@pytest.mark.parametrize(
    ("rules", "held"),
    [
        ("head", ("blocks_0", "blocks_1", "blocks_10", "stem")),
        (["head", "blocks_1"], ("blocks_0", "blocks_10", "stem")),
        (
            ["head", "blocks_1/norm"],
            ("blocks_0", "blocks_1/dense", "blocks_10", "stem"),
        ),
        (".*/norm", ("blocks_0/dense", "blocks_1/dense", "blocks_10", "head", "stem")),
        (".*", ()),
        ((), ("",)),
    ],
)
def test_held_modules_are_the_topmost_without_anything_trained(rules, held):
    assert tree.held_modules(*tree.partition(PARAMS, rules)) == held


def test_a_module_that_trains_one_of_its_own_leaves_is_not_held():
    assert "stem" not in tree.held_modules(*tree.partition(PARAMS, "stem/bias"))


def test_size_counts_numbers():
    assert tree.size(PARAMS) == 6 + 3 + 3 * 9 + 2 * 3 + 6 + 2


def test_report_names_every_leaf_and_sums_up():
    lines = tree.report(*tree.partition(PARAMS, "head")).splitlines()
    assert len(lines) == len(PATHS) + 2
    for line, path in zip(lines[1:-1], PATHS, strict=True):
        assert line.startswith(path)
        assert line.endswith("trained" if path.startswith("head") else "held")
    assert lines[-1] == "trained 8 of 50 numbers (16.00 %)"


def test_fingerprint_sees_values_paths_shapes_and_types():
    base = {"a": np.arange(4.0), "b": np.ones(2)}
    others = [
        {"a": np.arange(4.0), "b": np.ones(2) + 1e-15},
        {"a": np.arange(4.0).reshape(2, 2), "b": np.ones(2)},
        {"a": np.arange(4.0).astype(np.float32), "b": np.ones(2)},
        {"c": np.arange(4.0), "b": np.ones(2)},
    ]
    prints = [tree.fingerprint(other) for other in (base, *others)]
    assert len(set(prints)) == len(prints)
    assert tree.fingerprint({"b": np.ones(2), "a": np.arange(4.0)}) == prints[0]


def test_fingerprint_takes_keys_and_narrow_types():
    one = {"key": jax.random.key(0), "w": jnp.ones(3, jnp.bfloat16)}
    other = {"key": jax.random.key(1), "w": jnp.ones(3, jnp.bfloat16)}
    assert tree.fingerprint(one) != tree.fingerprint(other)
    assert tree.fingerprint(one) == tree.fingerprint(dict(one))


def test_map_with_path_gives_every_path():
    named = tree.map_with_path(lambda path, leaf: path, PARAMS)
    assert tree.flatten(named) == {path: path for path in PATHS}


def test_nearest_falls_back_to_something_that_exists():
    assert tree.nearest("qqqqqqq", PATHS, most=2).count("'") == 4
    assert tree.nearest("x", []) == "none"
