import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer.train import evaluate_batches, metrics
from jaxtransfer.typing import Mean


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.bool_])
def test_mean_sums_in_float32_or_wider(dtype):
    values = jnp.ones(1000, dtype)
    pair = metrics.mean(values)
    assert pair.total.dtype == pair.count.dtype == jnp.float32
    assert (float(pair.total), float(pair.count)) == (1000.0, 1000.0)


def test_rows_that_do_not_count_may_hold_anything():
    values = jnp.array([1.0, jnp.nan, 3.0, jnp.inf])
    pair = metrics.mean(values, where=jnp.array([True, False, True, False]))
    assert (float(pair.total), float(pair.count)) == (4.0, 2.0)


def test_the_gradient_of_rows_that_do_not_count_is_zero():
    where = jnp.array([True, False])
    gradient = jax.grad(lambda x: metrics.mean(jnp.log(x), where=where).total)(
        jnp.array([2.0, 3.0])
    )
    np.testing.assert_allclose(gradient, [0.5, 0.0])


def test_a_mask_of_examples_covers_their_values():
    values = jnp.arange(6.0).reshape(3, 2)
    pair = metrics.mean(values, where=jnp.array([True, True, False])[:, None])
    assert (float(pair.total), float(pair.count)) == (6.0, 4.0)
    # The first axes are the examples, also where the last is as long.
    pair = metrics.mean(values[:2], where=jnp.array([True, False]))
    assert (float(pair.total), float(pair.count)) == (1.0, 2.0)


@pytest.mark.parametrize("where", [np.full(3, 0.5, np.float32), np.ones(3, np.uint8)])
def test_numbers_are_no_mask(where):
    with pytest.raises(ValueError, match="where: must be boolean, got .*where > 0"):
        metrics.mean(jnp.arange(3.0), where=where)


def test_counts_below_one_are_weights():
    assert float(metrics.value(Mean(0.25, 0.5))) == 0.5
    assert float(metrics.value(Mean(0.0, 0.0))) == 0.0


def test_scalars_count_as_one_value():
    promoted = metrics.promote({"a": jnp.array(2.0), "b": Mean(3.0, 4.0), "c": 5})
    assert [tuple(map(float, promoted[n])) for n in "abc"] == [(2, 1), (3, 4), (5, 1)]


def test_merging_is_exact_and_keeps_names():
    first = {"a": Mean(1.0, 1.0), "only": Mean(2.0, 4.0)}
    second = {"a": Mean(3.0, 7.0), "other": Mean(1.0, 1.0)}
    before = dict(first)
    merged = metrics.merge(first, second)
    assert first == before
    assert metrics.finalize(merged) == {"a": 0.5, "only": 0.5, "other": 1.0}
    assert metrics.merge({}, first) == first


def test_finalize_of_nothing_is_not_a_number():
    final = metrics.finalize({"a": Mean(jnp.array(0.0), jnp.array(0.0))})
    assert np.isnan(final["a"]) and isinstance(final["a"], float)


def test_classification_counts_rows_that_count():
    logits = jnp.array([[2.0, 0.0], [0.0, 2.0], [0.0, 2.0], [9.0, 9.0]])

    def predict(params, frozen, model_state, inputs):
        return inputs * params

    measure = metrics.classification(predict)
    batch = {
        "inputs": logits,
        "labels": jnp.array([0, 1, 0, 0]),
        "where": jnp.array([True, True, True, False]),
    }
    final = metrics.finalize(jax.jit(measure)(1.0, {}, {}, batch))
    right, wrong = np.log1p(np.exp(-2)), np.log1p(np.exp(2))
    np.testing.assert_allclose(final["accuracy"], 2 / 3, rtol=1e-6)
    np.testing.assert_allclose(
        final["cross_entropy"], (2 * right + wrong) / 3, rtol=1e-5
    )
    batch["labels"] = jnp.array([0, 1, 0, -1])  # as padding often has it
    assert metrics.finalize(measure(1.0, {}, {}, batch)) == final


def test_classes_that_a_task_lacks_are_not_predicted():
    measure = metrics.classification(lambda *given: given[-1])
    batch = {
        "inputs": jnp.array([[1.0, 0.0, 3.0], [0.0, 1.0, 3.0]]),
        "labels": jnp.array([0, 1]),
        "classes": jnp.array([True, True, False]),
    }
    assert metrics.finalize(measure({}, {}, {}, batch))["accuracy"] == 1.0


def test_numbers_of_classes_add_up_and_arrays_without_counts_are_refused():
    def measure(state, labels):
        right = labels % 2 == 0
        kinds = jax.nn.one_hot(labels, 4)
        return {"accuracy": Mean(right @ kinds, kinds.sum(0))}

    batches = [jnp.array([0, 1, 1]), jnp.array([0, 2])]
    found = evaluate_batches(measure, None, batches)["accuracy"]
    np.testing.assert_array_equal(found, [1.0, 0.0, 1.0, np.nan])
    with pytest.raises(ValueError, match=r"'a' has shape \(2,\); give metrics.mean"):
        metrics.promote({"a": jnp.ones(2)})


@pytest.mark.parametrize("tokens", [2, 3])
def test_classes_of_each_example_leave_its_places_out(tokens):
    """As many places as examples, or more."""
    logits = jnp.zeros((2, tokens, 3))
    present = jnp.array([[True, True, False], [False, True, True]])
    outputs, _ = metrics.counted(
        logits, {"labels": jnp.ones((2, tokens), int), "classes": present}
    )
    expected = np.where(np.asarray(present)[:, None], 0.0, metrics.ABSENT)
    np.testing.assert_array_equal(outputs, np.broadcast_to(expected, logits.shape))
