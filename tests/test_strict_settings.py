"""Losses, scores and operations under JAX's strict settings, which stop a trace.

Programs are traced and not run: what they compute is the same under all settings.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import losses, nets, ops, scores
from jaxtransfer.losses import softened
from jaxtransfer.model import from_linen
from tests.losses.cases import CASES as OF_LOSSES
from tests.scores.cases import CASES as OF_SCORES

CASES = [*OF_LOSSES, *OF_SCORES]

OF_A_NETWORK = {losses.gradient_penalty, losses.virtual_adversarial}
"""Their case holds a network, of one dtype whatever the inputs are."""

OF_INTEGERS = {scores.negative_conditional_entropy}
"""No float goes in, so what comes out is of JAX's default dtype."""

BY_LBFGS = {scores.held_out_domain_logits}
"""With float64 as the default, optax's own line search mixes it with float32."""


def having(condition):
    cases = [case for case in CASES if condition(case)]
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def _cast(tree, dtype):
    """Arrays, floats in a dtype and integers in 32 bits; what else there is stays."""
    dtypes = {"f": dtype, "i": jnp.int32}

    def cast(leaf):
        if not isinstance(leaf, np.ndarray):
            return leaf
        return jnp.asarray(leaf, dtypes.get(leaf.dtype.kind))

    return jax.tree.map(cast, tree)


def _traced(case, dtype, *, masked=False):
    """Shapes and dtypes of the result and of its gradient."""
    options = _cast(dict(case.options), dtype)
    if masked:
        for name, positions in case.masks.items():
            rows = jax.tree.leaves(case.arrays[positions[0]])[0]
            options[name] = jnp.arange(len(rows)) > 0

    def total(*arrays):
        result = case.function(*arrays, **options)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(result)), result

    def both(*arrays):
        if not case.differentiable:
            return total(*arrays)[1], ()
        gradient, result = jax.grad(total, case.differentiable, has_aux=True)(*arrays)
        return result, gradient

    return jax.eval_shape(both, *_cast(case.arrays, dtype))


@pytest.fixture
def strict():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


@having(lambda case: case.half and case.function not in OF_A_NETWORK)
def test_nothing_is_promoted_in_half_precision_and_with_masks(case, strict):
    _traced(case, jnp.bfloat16, masked=True)


@having(lambda case: case.function not in OF_A_NETWORK | BY_LBFGS)
def test_nothing_is_promoted_where_float64_is_the_default(case, strict):
    with jax.enable_x64(True):
        traced = _traced(case, jnp.float32)
    if case.function not in OF_INTEGERS:
        for leaf in jax.tree.leaves(traced):
            assert leaf.dtype == jnp.float32 and not leaf.weak_type


@having(lambda case: not case.half or case.function in OF_A_NETWORK | BY_LBFGS)
def test_nothing_is_promoted_in_float32(case, strict):
    """Of those that the other two leave out."""
    for masked in [False, True] if case.masks else [False]:
        _traced(case, jnp.float32, masked=masked)


HALF = jnp.ones((5, 3), jnp.bfloat16)
IMAGES = jnp.ones((2, 9, 9, 3), jnp.bfloat16)
TOKENS = jnp.ones((2, 5), jnp.int32)


def _chunked():
    def loss(weight, batch):
        return jnp.mean((weight[None] * batch) ** 2), {}

    return jax.grad(ops.chunked_mean(loss, 1), has_aux=True)(HALF[0], HALF)


def _depthwise():
    def total(*given):
        return jnp.sum(ops.depthwise_conv(*given, strides=2), dtype=jnp.float32)

    kernel = jnp.ones((3, 3, 1, IMAGES.shape[-1]), jnp.float32)
    return jax.grad(total, argnums=(0, 1))(IMAGES, kernel)


def _kernels(**options):
    def total(x):
        return ops.gaussian_kernel_sum(x, HALF, **options)

    return jax.grad(total)(HALF)


def _written():
    net = nets.Transformer(11, width=8, heads=2)
    inputs = {"source": TOKENS, "target": TOKENS}
    variables = from_linen(net).init(jax.random.key(0), inputs)
    step, cache = nets.decoding(net, variables, TOKENS, length=3)
    begin = TOKENS[:, 0]
    found = ops.beam_search(step, cache, begin, length=3, end=2, beams=2)
    drawn = ops.sample_tokens(step, cache, begin, jax.random.key(0), length=3, end=2)
    return found, drawn


def _applied(layer, inputs):
    return layer.init_with_output(jax.random.key(0), inputs)


OPERATIONS = {
    "adaptive_average_pool": lambda: ops.adaptive_average_pool(IMAGES, (2, 2)),
    "chunked_mean": _chunked,
    "conv": lambda: ops.conv(IMAGES, jnp.ones((3, 3, 3, 4))),
    "decoding": _written,
    "depthwise_conv": _depthwise,
    "gaussian_kernel_sum": _kernels,
    "gaussian_kernel_sum, tiles": lambda: _kernels(tile=2),
    "max_pool": lambda: ops.max_pool(IMAGES, window=3, strides=2, padding=1),
    "mean_squared_distance": lambda: ops.mean_squared_distance(HALF, HALF),
    "squared_distances": lambda: ops.squared_distances(HALF, HALF),
    "Context": lambda: _applied(nets.Context(4), IMAGES.astype(jnp.float32)),
    "TaskNorm": lambda: _applied(nets.TaskNorm(use_running_average=False), IMAGES),
    "TaskNorm, running": lambda: _applied(nets.TaskNorm(True), IMAGES),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_promote_nothing(name, strict):
    jax.eval_shape(OPERATIONS[name])


X, Y, LABELS = jnp.eye(4, 3), jnp.ones((4, 3)), jnp.arange(4) % 3
MEMORY = losses.ContrastiveMemory(X, Y, jnp.zeros(2))
TRACED = {
    "relational distance": (
        lambda w: losses.relational_knowledge_distillation(X, Y, distance_weight=w),
        25.0,
    ),
    "relational angle": (
        lambda w: losses.relational_knowledge_distillation(X, Y, angle_weight=w),
        0.0,
    ),
    "variational": (
        lambda v: losses.variational_information_distillation(
            X, Y, Y[0], least_variance=v
        ),
        1e-5,
    ),
    "contrastive": (
        lambda e: losses.contrastive_representation_distillation(
            X, Y, LABELS, LABELS[:, None], MEMORY, epsilon=e
        ),
        1e-3,
    ),
    "virtual teacher": (
        lambda a: losses.virtual_teacher_distillation(X, LABELS, correct_probability=a),
        0.9,
    ),
}


@pytest.mark.parametrize("name", TRACED)
def test_a_hyper_parameter_may_be_traced(name):
    function, value = TRACED[name]
    np.testing.assert_allclose(jax.jit(function)(value), function(value), rtol=1e-6)


def test_a_virtual_teacher_that_is_never_wrong_has_a_slope_in_the_temperature():
    """It is ``-T^2 log softmax(z / T)_y``, whose slope is written out here."""
    logits, temperature = np.array([1.0, 0.5, -0.3]), 2.0

    def loss(temperature):
        return losses.virtual_teacher_distillation(
            jnp.array(logits),
            np.array(0),
            correct_probability=1.0,
            temperature=temperature,
        )

    z = logits / temperature
    p = np.exp(z) / np.exp(z).sum()
    slope = -2 * temperature * math.log(p[0]) + temperature * (z[0] - p @ z)
    np.testing.assert_allclose(jax.grad(loss)(temperature), slope, rtol=1e-5)


def test_a_class_that_both_lack_makes_no_nan_on_the_way():
    """Two classes, so that only one is left besides the label's."""
    student, teacher = jnp.eye(2), jnp.ones((2, 2))

    def total(student):
        loss = losses.nontarget_class_distillation(student, teacher, LABELS[:2])
        return jnp.sum(loss)

    lacking = jnp.array([0.0, -jnp.inf])
    with jax.debug_nans(True):
        np.testing.assert_array_equal(jax.grad(total)(student), 0.0)
        assert softened.kl_divergence(lacking, lacking) == 0.0
