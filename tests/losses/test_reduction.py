import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import losses


def test_mean_over_a_mask_is_the_mean_of_the_subset(transform):
    values = jnp.array([1.0, -2.0, 4.0, 100.0])
    where = jnp.array([True, True, True, False])
    masked = transform(lambda v, w: losses.mean(v, where=w))(values, where)
    np.testing.assert_allclose(masked, 1.0)


def test_values_outside_the_mask_reach_nothing():
    values = jnp.array([1.0, jnp.nan, jnp.inf])
    where = jnp.array([True, False, False])
    value, gradient = jax.value_and_grad(lambda v: losses.mean(v, where=where))(values)
    assert value == 1.0
    np.testing.assert_array_equal(gradient, [1.0, 0.0, 0.0])


def test_empty_mask_and_empty_values_give_zero():
    values = jnp.array([1.0, jnp.nan])
    where = jnp.zeros(2, bool)
    value, gradient = jax.value_and_grad(lambda v: losses.mean(v, where=where))(values)
    assert value == 0.0
    np.testing.assert_array_equal(gradient, 0.0)
    assert losses.mean(jnp.zeros((0, 3))) == 0.0


def test_half_precision_is_summed_in_float32():
    values = jnp.full(4096, 1.01, jnp.bfloat16)
    result = losses.mean(values)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, float(values[0]), rtol=1e-6)


def test_mask_broadcasts_and_bad_masks_say_so():
    where = jnp.array([[True], [False]])
    assert losses.mean(jnp.array([[1.0, 3.0], [9.0, 9.0]]), where=where) == 2.0
    mean = inspect.unwrap(losses.mean)
    with pytest.raises(ValueError, match="where of shape .3,. does not fit"):
        mean(jnp.ones(2), where=jnp.ones(3, bool))
    with pytest.raises(ValueError, match="where must be boolean, got float32"):
        mean(jnp.ones(2), where=jnp.ones(2))


BY_EXAMPLE = {
    "cross_entropy": lambda s, t, y, w: losses.cross_entropy(s, y, where=w),
    "entropy": lambda s, t, y, w: losses.entropy(s, where=w),
    "logit_matching": lambda s, t, y, w: losses.logit_matching(s, t, where=w),
    "hidden_matching": lambda s, t, y, w: losses.hidden_matching(s, t, where=w),
    "token": lambda s, t, y, w: losses.token_distillation(s, t, where=w),
    "decoupled": lambda s, t, y, w: losses.decoupled_knowledge_distillation(
        s, t, y, where=w
    ),
    "temperatures": lambda s, t, y, w: losses.knowledge_distillation(
        s, t, temperature=jnp.arange(1.0, 4.0), where=w
    ),
    "mutual": lambda s, t, y, w: jnp.sum(
        losses.mutual_learning(jnp.stack([s, t]), where=w), axis=0
    ),
    "teachers": lambda s, t, y, w: losses.multi_teacher_distillation(
        s, jnp.stack([t, -t]), weights=jnp.array([[1.0, 2.0, 0.5]] * 2), where=w
    ),
}


@pytest.mark.parametrize("name", BY_EXAMPLE)
def test_a_mask_of_fewer_axes_is_of_the_first(name, types_unchecked):
    """Of the examples, even where these hold as many tokens."""
    keys = jax.random.split(jax.random.key(0), 2)
    student, teacher = (jax.random.normal(key, (3, 3, 4)) for key in keys)
    labels, where = jnp.arange(9).reshape(3, 3) % 4, jnp.array([True, False, True])
    run = BY_EXAMPLE[name]
    got = run(student, teacher, labels, where)
    assert got.shape == (3, 3)
    everywhere = jnp.broadcast_to(where[:, None], (3, 3))
    np.testing.assert_array_equal(got, run(student, teacher, labels, everywhere))
    np.testing.assert_array_equal(got[1], 0.0)
    assert (got[0] != 0).all()
    if name == "temperatures":
        alone = losses.knowledge_distillation(student[2], teacher[2], temperature=3.0)
        np.testing.assert_allclose(got[2], alone, rtol=1e-6)
