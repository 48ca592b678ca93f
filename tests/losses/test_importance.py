import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxtransfer.losses import importance, regularizers
from tests.losses.case import det

PARAMS = {"bias": det((3,), 51), "kernel": det((2, 3), 52)}
INPUTS, LABELS = det((7, 2), 53, 2.0), np.array([0, 2, 1, 2, 0, 1, 1])


def log_probabilities(params, x):
    return jax.nn.log_softmax(x @ params["kernel"] + params["bias"])


def fisher(params=PARAMS, inputs=INPUTS, function=log_probabilities, **options):
    return importance.fisher_information(params, inputs, function, **options)


def probabilities():
    logits = INPUTS @ PARAMS["kernel"] + PARAMS["bias"]
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def close(got, expected, **options):
    jax.tree.map(
        lambda g, e: np.testing.assert_allclose(g, e, **options), got, expected
    )


def test_of_softmax_regression_is_p_times_one_minus_p(float64):
    """E_y (1[y = c] - p_c)^2 = p_c (1 - p_c), times x^2."""
    p = probabilities()
    expected = {
        "bias": (p * (1 - p)).mean(axis=0),
        "kernel": (INPUTS**2).T @ (p * (1 - p)) / len(INPUTS),
    }
    close(fisher(), expected, rtol=1e-12)


def test_of_logistic_regression_is_the_diagonal_of_the_hessian(float64):
    """F = X^T diag(p (1 - p)) X / n; its diagonal, whatever the labels are."""
    weight, x = jnp.asarray(det((4,), 60)), jnp.asarray(det((9, 4), 61))

    def function(weight, x):
        return jax.nn.log_softmax(jnp.stack([0.0, x @ weight]))

    def loss(weight):
        return -jnp.mean(jax.vmap(lambda row: function(weight, row)[0])(x))

    expected = jnp.diag(jax.hessian(loss)(weight))
    close(fisher(weight, x, function), expected, rtol=1e-12)


def test_empirical_is_the_mean_of_squared_gradients(float64):
    residuals = np.eye(3)[LABELS] - probabilities()
    expected = {
        "bias": (residuals**2).mean(axis=0),
        "kernel": (INPUTS**2).T @ residuals**2 / len(INPUTS),
    }
    close(fisher(labels=LABELS), expected, rtol=1e-12)


@pytest.mark.parametrize("kind", ["exact", "empirical", "sampled"])
@pytest.mark.parametrize("chunk_size", [1, 3, 7, 50])
def test_independent_of_the_chunks(kind, chunk_size):
    given = {
        "exact": {},
        "empirical": {"labels": LABELS},
        "sampled": {"key": jax.random.key(1)},
    }[kind]
    whole = fisher(**given, chunk_size=None)
    close(fisher(**given, chunk_size=chunk_size), whole, rtol=1e-5)


def test_independent_of_the_batch_size():
    """Not 1/B of it, as the square of a batch's mean gradient is."""
    for labels in (None, LABELS):
        once = fisher(labels=labels)
        repeated = fisher(
            inputs=np.tile(INPUTS, (16, 1)),
            labels=None if labels is None else np.tile(labels, 16),
        )
        close(repeated, once, rtol=1e-5)


def test_sampling_estimates_the_exact():
    inputs = np.tile(INPUTS, (400, 1))
    drawn = fisher(inputs=inputs, key=jax.random.key(2), chunk_size=700)
    close(drawn, fisher(), rtol=0.15)
    other = fisher(inputs=inputs, key=jax.random.key(3), chunk_size=700)
    assert not np.array_equal(drawn["bias"], other["bias"])


def test_memory_does_not_grow_with_the_examples():
    params = {"bias": np.zeros(30), "kernel": np.zeros((20, 30))}

    def temporary(count):
        inputs = np.zeros((count, 20), np.float32)
        run = jax.jit(lambda p, x: fisher(p, x, chunk_size=4))
        memory = run.lower(params, inputs).compile().memory_analysis()
        return memory.temp_size_in_bytes - 2 * inputs.nbytes

    assert temporary(4096) < 1.5 * temporary(64)


def test_inputs_may_be_a_tree(float64):
    inputs = {"left": INPUTS[:, :1], "right": INPUTS[:, 1:]}

    def function(params, x):
        return log_probabilities(params, jnp.concatenate([x["left"], x["right"]]))

    close(fisher(inputs=inputs, function=function), fisher(), rtol=1e-12)


def test_half_precision_parameters_are_summed_in_float32():
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), PARAMS)
    result = fisher(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(result)} == {jnp.dtype("float32")}
    close(result, fisher(), rtol=0.1, atol=0.01)


def test_a_class_of_no_probability_counts_nothing():
    def function(params, x):
        return jnp.append(log_probabilities(params, x), -jnp.inf)

    close(fisher(function=function), fisher(), rtol=1e-6)


def test_means_over_devices_are_the_whole():
    mesh = jax.make_mesh(
        (jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    inputs = np.tile(INPUTS[:4], (4, 1)).astype(np.float32)

    def run(params, inputs):
        return jax.lax.pmean(fisher(params, inputs, chunk_size=1), "data")

    sharded = jax.jit(
        jax.shard_map(run, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    )
    params = jax.tree.map(jnp.float32, PARAMS)
    close(sharded(params, inputs), fisher(params, inputs), rtol=1e-5)


def test_a_traced_label_out_of_range_is_seen():
    result = jax.jit(lambda labels: fisher(labels=labels))(LABELS + 1)
    assert np.isnan(result["bias"]).any()


@pytest.mark.usefixtures("types_unchecked")
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"labels": LABELS, "key": jax.random.key(0)}, "exclude each other"),
        ({"chunk_size": 0}, "chunk_size must be positive or None, got 0"),
        ({"inputs": np.zeros((0, 2))}, "at least 1"),
        ({"labels": LABELS[:3]}, r"labels must be \[7\] as inputs, got \(3,\)"),
        ({"labels": LABELS + 1}, r"labels must be in \[0, 3\), got \[3, 3\]"),
        ({"function": lambda p, x: jnp.zeros((1, 3))}, "drop the axis of the batch"),
        ({"where": np.ones(7)}, "where must be boolean"),
    ],
)
def test_fisher_says_what_is_wrong(options, match):
    with pytest.raises(ValueError, match=match):
        fisher(**options)


def quadratic(params):
    return 0.5 * jnp.sum(jnp.array([1.0, 4.0, 0.0]) * params["w"] ** 2)


def descend(steps, rate):
    """Synaptic intelligence along plain gradient descent."""
    params = {"w": jnp.array([1.0, -2.0, 3.0])}
    state = importance.init_synaptic_intelligence(params)

    def step(carry, _):
        params, state = carry
        gradients = jax.grad(quadratic)(params)
        moved = jax.tree.map(lambda w, g: w - rate * g, params, gradients)
        state = importance.update_synaptic_intelligence(state, params, moved, gradients)
        return (moved, state), None

    return jax.lax.scan(step, (params, state), None, length=steps)[0]


def test_path_adds_up_to_the_fall_of_the_loss(float64):
    params, state = descend(4000, 1e-3)
    fall = quadratic(state.start) - quadratic(params)
    np.testing.assert_allclose(jnp.sum(state.path["w"]), fall, rtol=3e-3)
    np.testing.assert_allclose(state.path["w"][2], 0.0)


def test_importance_recovers_the_curvature(float64):
    """A quadratic a w^2 / 2 descended to 0 from w has path a w^2 / 2."""
    params, state = descend(40000, 1e-3)
    result = importance.synaptic_importance(state, params, damping=1e-9)
    np.testing.assert_allclose(2 * result["w"], [1.0, 4.0, 0.0], rtol=3e-3)
    penalty = regularizers.elastic_weight_consolidation(
        {"w": jnp.array([1.0, 0.0, 5.0])}, params, result
    )
    np.testing.assert_allclose(penalty, 0.25, rtol=3e-3)


def test_forms_differ_in_negative_contributions(float64):
    state = importance.SynapticIntelligence(np.array([0.0, 0.0]), np.array([1.0, -1.0]))
    params = np.array([1.0, 2.0])
    code = importance.synaptic_importance(state, params)
    paper = importance.synaptic_importance(state, params, form="paper")
    np.testing.assert_allclose(code, [1 / 1.1, 0.0], rtol=1e-12)
    np.testing.assert_allclose(paper, [1 / 1.1, -1 / 4.1], rtol=1e-12)


def test_start_outlives_a_step_that_donates_the_parameters():
    params = {"w": jnp.ones(3)}
    state = importance.init_synaptic_intelligence(params)
    optimizer = optax.sgd(1.0)

    def step(params):
        updates, _ = optimizer.update(params, optimizer.init(params))
        return optax.apply_updates(params, updates)

    jax.jit(step, donate_argnums=0)(params)
    np.testing.assert_array_equal(state.start["w"], 1.0)


@pytest.mark.usefixtures("types_unchecked")
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"damping": 0.0}, "damping must be positive, got 0.0"),
        ({"form": "avalanche"}, 'form must be "code" or "paper"'),
    ],
)
def test_synaptic_importance_says_what_is_wrong(options, match):
    state = importance.init_synaptic_intelligence(jnp.ones(2))
    with pytest.raises(ValueError, match=match):
        importance.synaptic_importance(state, jnp.ones(2), **options)
