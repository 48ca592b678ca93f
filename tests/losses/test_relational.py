import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer.losses import channels, relational
from tests.losses.case import det


def _maps(shape, seed):
    """The golden maps, which are numbered with channels second."""
    return np.moveaxis(det(shape, seed), 1, -1)


STUDENT, TEACHER = det((8, 12), 7), det((8, 20), 8)
NARROW, WIDE = det((8, 12), 7), det((8, 12), 9)
FOUR, SIX = _maps((8, 4, 4, 4), 5), _maps((8, 6, 4, 4), 4)
FLOW = (
    _maps((8, 6, 4, 4), 3),
    _maps((8, 5, 4, 4), 11),
    SIX,
    _maps((8, 5, 4, 4), 12),
)


def _mean(loss):
    return lambda *arrays: jnp.mean(loss(*arrays))


def _unit(rows):
    return rows / (rows**2).sum(axis=1, keepdims=True) ** 0.5


def _flow(form):
    return _mean(functools.partial(channels.flow_of_solution_procedure, form=form))


GOLDEN = {
    "similarity": (
        relational.similarity_preserving,
        (FOUR, SIX),
        0.0231718005014,
        0.01459585737,
    ),
    "congruence, code": (
        functools.partial(relational.correlation_congruence, form="code"),
        (NARROW, WIDE),
        5.14805639742,
        1.891992745,
    ),
    "congruence, paper": (
        relational.correlation_congruence,
        (_unit(NARROW), _unit(WIDE)),
        0.022068513825902504,
        None,
    ),
    "distance": (
        relational.relational_distance,
        (STUDENT, TEACHER),
        0.23128393296 / 25,
        None,
    ),
    "angle": (
        relational.relational_angle,
        (STUDENT, TEACHER),
        0.612769253409 / 50,
        None,
    ),
    "relational": (
        relational.relational_knowledge_distillation,
        (STUDENT, TEACHER),
        0.844053186369,
        0.8641234274,
    ),
    "neighbours": (
        relational.probabilistic_knowledge_transfer,
        (STUDENT, TEACHER),
        0.00406542586043,
        0.004036489437,
    ),
    "distance, unit length": (
        lambda s, t: 25.0 * relational.relational_distance(_unit(s), _unit(t)),
        (STUDENT, TEACHER),
        0.257347053093,
        0.2207687985,
    ),
    "flow": (_flow("paper"), FLOW, 0.0149514305256, 0.002390332276),
    "flow, norms": (_flow("norms"), FLOW, 1.43650092229, 0.1174107897),
    "selectivity": (
        _mean(channels.neuron_selectivity_transfer),
        (FOUR, SIX),
        0.360538929318,
        0.04169225522,
    ),
    "channels": (
        # The peer's value is divided by the number of examples once more.
        lambda s, t: _mean(channels.inter_channel_correlation)(s, t) / len(s),
        (_maps((8, 6, 4, 4), 3), SIX),
        0.0635565780558,
        0.0154549069479,
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(float64, name):
    loss, arrays, golden, length = GOLDEN[name]
    of = jax.jit(jax.value_and_grad(loss))
    for dtype, tolerance in ((jnp.float64, 1e-9), (jnp.float32, 1e-5)):
        value, gradient = of(*(jnp.asarray(array, dtype) for array in arrays))
        np.testing.assert_allclose(value, golden, rtol=tolerance)
        if length is not None:
            size = jnp.linalg.norm(gradient)
            np.testing.assert_allclose(size, length, rtol=tolerance)


def _at(dtype, loss, *arrays, **masks):
    """The value and the gradient, of float32 inputs as numbers of a dtype."""
    with jax.enable_x64(dtype == "float64"):
        given = (jnp.asarray(np.float32(array), dtype) for array in arrays)
        value, gradient = jax.jit(jax.value_and_grad(loss))(*given, **masks)
        return np.asarray(value), np.asarray(gradient)


def _assert_as_exact(got, exact, rtol, of_gradient):
    np.testing.assert_allclose(got[0], exact[0], rtol=rtol, atol=1e-7)
    largest = np.abs(exact[1]).max()
    np.testing.assert_allclose(got[1], exact[1], atol=of_gradient * largest)


BY_PAIRS = [relational.relational_distance, relational.relational_angle]


@pytest.mark.parametrize("loss", BY_PAIRS)
@pytest.mark.parametrize("bias", [0.0, 5.0])
def test_equal_rows_in_float32(loss, bias):
    clusters = np.repeat(det((4, 512), 31, 2.0), 16, axis=0) + bias
    rows = det((64, 96), 32)
    for pair in ((clusters, rows), (rows, clusters), (clusters, clusters[::-1, :300])):
        got, exact = (_at(dtype, loss, *pair) for dtype in ("float32", "float64"))
        _assert_as_exact(got, exact, 1e-5, 1e-4)


@pytest.mark.parametrize("loss", BY_PAIRS)
def test_nearly_equal_rows_in_float32(loss):
    clusters = np.repeat(det((4, 512), 31, 2.0), 16, axis=0)
    rows = det((64, 96), 32)
    noise = det((64, 512), 33, 2.0)
    # Distances of 0.3% of those from the mean: just told apart, to a few digits.
    near = clusters + 2e-3 * noise
    got, exact = (_at(dtype, loss, near, rows) for dtype in ("float32", "float64"))
    _assert_as_exact(got, exact, 2e-3, 0.2)
    # Nearer ones are equal: of the clusters' value, and still.
    near = clusters + 5e-4 * noise
    value, gradient = _at("float32", loss, near, rows)
    exact, direction = _at("float64", loss, clusters, rows)
    np.testing.assert_allclose(value, exact, rtol=2e-3)
    np.testing.assert_allclose(gradient, direction, atol=2e-2 * abs(direction).max())


@pytest.mark.parametrize("loss", BY_PAIRS)
@pytest.mark.parametrize("scale", [1e-9, 1e15])
def test_relations_do_not_depend_on_the_scale(loss, scale):
    value, gradient = _at("float32", loss, STUDENT, TEACHER)
    scaled, slope = _at("float32", loss, scale * STUDENT, TEACHER)
    _assert_as_exact((scaled, slope * np.float64(scale)), (value, gradient), 1e-5, 1e-5)


@pytest.mark.parametrize("loss", BY_PAIRS)
def test_rows_far_from_zero_beside_masked_ones(loss):
    student, teacher = STUDENT + 3000.0, TEACHER + 3000.0
    where = np.arange(8) % 2 == 0
    value, gradient = _at("float32", loss, student, teacher, where=where)
    exact, slope = _at("float64", loss, student[where], teacher[where])
    _assert_as_exact((value, gradient[where]), (exact, slope), 1e-5, 1e-5)


def test_a_weight_of_zero_leaves_its_part_out():
    pair = jnp.asarray(STUDENT, jnp.float32), jnp.asarray(TEACHER, jnp.float32)
    both = relational.relational_knowledge_distillation
    distance = 3.0 * relational.relational_distance(*pair)
    assert both(*pair, distance_weight=3.0, angle_weight=0.0) == distance
    angle = 3.0 * relational.relational_angle(*pair)
    assert both(*pair, distance_weight=0.0, angle_weight=3.0) == angle
    assert both(*pair, distance_weight=0.0, angle_weight=0.0) == 0.0


def test_says_what_is_wrong(types_unchecked):
    with pytest.raises(ValueError, match="of the same examples"):
        relational.similarity_preserving(jnp.ones((2, 3)), jnp.ones((3, 3)))
    with pytest.raises(ValueError, match="needs embeddings of one width"):
        relational.correlation_congruence(
            jnp.ones((2, 3)), jnp.ones((2, 4)), form="code"
        )
    maps = jnp.ones((2, 4, 4, 3))
    with pytest.raises(ValueError, match="two stages of the student must agree"):
        channels.flow_of_solution_procedure(maps, maps[:, :2], maps, maps)
    with pytest.raises(ValueError, match="must agree in batch, height and width"):
        channels.neuron_selectivity_transfer(maps, maps[:, :2])
    for wrong in (maps[..., :2], maps[:1], jnp.ones((2, 3))):
        with pytest.raises(ValueError, match="of the same batch and channels"):
            channels.inter_channel_correlation(maps, wrong)
