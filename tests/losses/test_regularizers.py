import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import losses
from jaxtransfer.losses import regularizers
from tests.losses.case import det

PARAMS = {
    "body": {"kernel": np.arange(6.0).reshape(2, 3), "bias": np.array([1.0, -2.0])},
    "head": {"kernel": np.ones((3, 2))},
}
ANCHOR = {"body": {"kernel": np.ones((2, 3)), "bias": np.zeros(2)}}


def _arrays(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def test_l2_value_and_gradient(transform):
    value, gradient = transform(jax.value_and_grad(losses.l2))(_arrays(PARAMS))
    np.testing.assert_allclose(value, (55 + 5 + 6) / 2)
    jax.tree.map(np.testing.assert_allclose, gradient, PARAMS)


def test_l2_sp_value_and_gradient(transform):
    value, (gradient, to_anchor) = transform(
        jax.value_and_grad(losses.l2_sp, argnums=(0, 1))
    )(_arrays(PARAMS), _arrays(ANCHOR))
    np.testing.assert_allclose(value, (1 + 0 + 1 + 4 + 9 + 16 + 5) / 2)
    expected = {
        "body": jax.tree.map(np.subtract, PARAMS["body"], ANCHOR["body"]),
        "head": {"kernel": np.zeros((3, 2))},
    }
    jax.tree.map(np.testing.assert_allclose, gradient, expected)
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0.0), to_anchor)


def test_zero_and_without_gradient_at_the_anchor():
    anchor = _arrays(ANCHOR)
    value, gradient = jax.value_and_grad(losses.l2_sp)(anchor, anchor)
    assert value == 0.0
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0.0), gradient)


def test_half_precision_is_summed_in_float32():
    params = {"w": jnp.full(4096, 1.0, jnp.bfloat16)}
    result = losses.l2_sp(params, {"w": jnp.zeros(4096, jnp.bfloat16)})
    assert result.dtype == losses.l2(params).dtype == jnp.float32
    assert result == losses.l2(params) == 2048.0


def test_l2_of_nothing_is_zero():
    assert losses.l2({}) == 0.0


def test_says_what_is_wrong():
    params = _arrays(PARAMS)
    with pytest.raises(ValueError, match="anchor has no arrays"):
        losses.l2_sp(params, {})
    with pytest.raises(ValueError, match="anchor has 'boby/bias', which params lack"):
        losses.l2_sp(params, {"boby": {"bias": jnp.zeros(2)}})
    with pytest.raises(ValueError, match=r"'head/kernel': \(3, 5\) and \(3, 2\)"):
        losses.l2_sp(params, {"head": {"kernel": jnp.zeros((3, 5))}})


IMPORTANCE = {
    "body": {"kernel": np.arange(6.0).reshape(2, 3) / 4, "bias": np.array([0.0, 2.0])}
}


def test_l1_sp_value_and_gradient():
    value, gradient = jax.value_and_grad(regularizers.l1_sp)(
        _arrays(PARAMS), _arrays(ANCHOR)
    )
    assert value == 1 + 0 + 1 + 2 + 3 + 4 + 1 + 2
    expected = jax.tree.map(
        lambda w, start: np.sign(w - start), PARAMS["body"], ANCHOR["body"]
    )
    jax.tree.map(np.testing.assert_array_equal, gradient["body"], expected)
    assert gradient["head"]["kernel"].sum() == 0.0


def test_elastic_weight_consolidation_value_and_gradient():
    def penalty(params):
        return regularizers.elastic_weight_consolidation(
            params, _arrays(ANCHOR), _arrays(IMPORTANCE)
        )

    value, gradient = jax.value_and_grad(penalty)(_arrays(PARAMS))
    expected = jax.tree.map(
        lambda w, start, weight: weight * (w - start),
        PARAMS["body"],
        ANCHOR["body"],
        IMPORTANCE["body"],
    )
    jax.tree.map(np.testing.assert_allclose, gradient["body"], expected)
    assert gradient["head"]["kernel"].sum() == 0.0
    kernel = (0 * 1 + 1 * 0 + 2 * 1 + 3 * 4 + 4 * 9 + 5 * 16) / 4
    np.testing.assert_allclose(value, 0.5 * (kernel + 2 * 4))


def test_importance_of_one_is_l2_sp_bit_for_bit():
    params, anchor = (
        {"w": jnp.asarray(det((50,), 1))},
        {"w": jnp.asarray(det((50,), 2))},
    )
    ones = jax.tree.map(jnp.ones_like, anchor)
    both = [
        jax.value_and_grad(lambda p: losses.l2_sp(p, anchor))(params),
        jax.value_and_grad(
            lambda p: regularizers.elastic_weight_consolidation(p, anchor, ones)
        )(params),
    ]
    jax.tree.map(np.testing.assert_array_equal, *both)


@pytest.mark.parametrize(
    "penalty",
    [
        losses.l2_sp,
        regularizers.l1_sp,
        lambda p, a: regularizers.elastic_weight_consolidation(p, a, a),
    ],
    ids=["l2_sp", "l1_sp", "elastic_weight_consolidation"],
)
def test_weight_zero_is_no_penalty_bit_for_bit(penalty):
    params, anchor = {"w": jnp.asarray(det((9,), 3))}, {"w": jnp.asarray(det((9,), 4))}

    def task(p):
        return jnp.sum(jnp.sin(p["w"]) ** 2)

    with_term = jax.value_and_grad(lambda p: task(p) + 0.0 * penalty(p, anchor))
    jax.tree.map(
        np.testing.assert_array_equal,
        with_term(params),
        jax.value_and_grad(task)(params),
    )


@pytest.mark.parametrize(
    ("importance", "match"),
    [
        ({}, "anchor has 'w', which importance lacks"),
        ({"w": np.ones(2), "v": np.ones(2)}, "importance has 'v', which anchor lacks"),
        ({"w": np.ones(3)}, r"shape at 'w': \(3,\) and \(2,\)"),
    ],
)
def test_importance_says_what_is_wrong(importance, match):
    anchor = {"w": jnp.zeros(2)}
    with pytest.raises(ValueError, match=match):
        regularizers.elastic_weight_consolidation(anchor, anchor, importance)


def test_l1_sp_says_what_is_wrong():
    with pytest.raises(ValueError, match="anchor has no arrays"):
        regularizers.l1_sp(_arrays(PARAMS), {})
