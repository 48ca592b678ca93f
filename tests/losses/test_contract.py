"""What is promised of every loss, tried on every loss; see `tests/losses/case.py`."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import losses
from tests.losses.cases import CASES, WITHOUT

every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)

OF_A_NETWORK = {
    losses.fisher_information,
    losses.gradient_penalty,
    losses.virtual_adversarial,
}
"""Their programs hold a network, whose products are its own affair."""


def having(condition):
    """The cases that a promise applies to."""
    cases = [case for case in CASES if condition(case)]
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def _is_float(leaf):
    return np.issubdtype(np.asarray(leaf).dtype, np.floating)


def _cast(arrays, dtype):
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf, dtype if _is_float(leaf) else None), arrays
    )


def _floats(change, arrays, positions=None):
    """``change`` applied to every float leaf, of some positions or of all."""
    return tuple(
        jax.tree.map(lambda leaf: change(leaf) if _is_float(leaf) else leaf, argument)
        if positions is None or i in positions
        else argument
        for i, argument in enumerate(arrays)
    )


def _both(case, **masks):
    """The result, its sum's gradient by what is differentiable or stopped."""
    positions = tuple(sorted({*case.differentiable, *case.stopped}))

    def run(*arrays):
        def total(*given):
            result = case.function(*given, **case.options, **masks)
            weights = jax.tree.map(_weights, result)
            terms = jax.tree.map(lambda w, v: jnp.sum(w * v), weights, result)
            return sum(jax.tree.leaves(terms)), result

        if not positions:
            return total(*arrays)[1], ()
        gradient, result = jax.grad(total, positions, has_aux=True)(*arrays)
        return result, gradient

    return run


def _weights(values):
    """Different weights for the examples, so that none can hide behind another."""
    return 1.0 + jnp.arange(values.size).reshape(values.shape) / 7.0


@functools.cache
def _jitted(index):
    return jax.jit(_both(CASES[index]))


@functools.cache
def _masked(index):
    return jax.jit(lambda masks, *arrays: _both(CASES[index], **masks)(*arrays))


def _run(case, arrays):
    return _jitted(CASES.index(case))(*_cast(arrays, jnp.float32))


def _close(got, expected, rtol, atol):
    jax.tree.map(
        lambda g, e: np.testing.assert_allclose(g, e, rtol=rtol, atol=atol),
        got,
        expected,
    )


def _scale(tree):
    values = [np.abs(leaf).max() for leaf in jax.tree.leaves(tree) if np.size(leaf)]
    return max(values, default=1.0) or 1.0


def _products(jaxpr):
    """The matrix products of a program and of all within it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for inner in jax.tree.leaves(
            equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")
        ):
            if hasattr(inner, "eqns"):
                yield from _products(getattr(inner, "jaxpr", inner))


def _assert_finite(case, arrays):
    for leaf in jax.tree.leaves(_run(case, arrays)):
        assert np.isfinite(leaf).all()


def test_every_public_loss_has_a_case():
    tried = {case.function for case in CASES}
    missing = {
        name
        for name in losses.__all__
        if inspect.isfunction(inspect.unwrap(getattr(losses, name)))
        and getattr(losses, name) not in tried
    }
    assert missing == set(WITHOUT)


@every
def test_result_has_its_shape_and_dtype(case):
    result, _ = _run(case, case.arrays)
    for leaf in jax.tree.leaves(result):
        assert leaf.dtype == jnp.float32 and np.isfinite(leaf).all()
    if case.per_example:
        assert result.shape == (len(case.arrays[0]),)


@having(lambda case: case.function not in OF_A_NETWORK)
def test_products_have_all_digits_on_every_device(case):
    """An accelerator drops some of float32's unless it is told otherwise."""
    arrays = _cast(case.arrays, jnp.float32)
    program = _jitted(CASES.index(case)).trace(*arrays).jaxpr
    for equation in _products(program.jaxpr):
        precision = equation.params["precision"]
        assert precision is not None, equation
        assert set(precision) == {jax.lax.Precision.HIGHEST}, equation


@every
def test_agrees_eager_jit_vmap_and_pmap(case):
    arrays = _cast(case.arrays, jnp.float32)
    run = _both(case)
    expected = _run(case, case.arrays)
    atol = 2e-6 * _scale(expected)
    value = case.function(*arrays, **case.options)  # as typed into a prompt
    _close(value, expected[0], 1e-5, atol)
    # One program for both, for most of the time is compiling. One GPU can't pmap.
    if jax.local_device_count() > 1:
        transformed, lanes = jax.pmap(jax.vmap(run)), (2, 2)
    else:
        transformed, lanes = jax.jit(jax.vmap(run)), (2,)
    several = jax.tree.map(
        lambda leaf: np.broadcast_to(leaf, (*lanes, *leaf.shape)), arrays
    )
    last = (-1,) * len(lanes)
    got = jax.tree.map(lambda leaf: np.asarray(leaf)[last], transformed(*several))
    _close(got, expected, 2e-5, atol)


@having(lambda case: case.smooth and case.differentiable)
def test_gradient_is_that_of_finite_differences(case, float64):
    """Along three directions, by central differences."""
    arrays = list(_cast(case.arrays, jnp.float64))

    @jax.jit
    @jax.value_and_grad
    def of(some):
        given = dict(zip(case.differentiable, some, strict=True))
        filled = [given.get(i, array) for i, array in enumerate(arrays)]
        result = case.function(*filled, **case.options)
        terms = jax.tree.map(lambda leaf: jnp.sum(_weights(leaf) * leaf), result)
        return sum(jax.tree.leaves(terms))

    some = jax.tree.map(np.asarray, tuple(arrays[i] for i in case.differentiable))
    _, gradient = of(some)
    for seed in range(3):
        direction = _random(some, seed)
        slope = sum(jax.tree.leaves(jax.tree.map(np.vdot, gradient, direction)))
        ahead, behind = (of(_moved(some, direction, step))[0] for step in (1e-5, -1e-5))
        np.testing.assert_allclose(slope, (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-6)


def _random(arrays, seed):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: random.normal(size=leaf.shape), arrays)


def _moved(arrays, direction, step):
    return jax.tree.map(lambda leaf, v: leaf + step * v, arrays, direction)


@having(lambda case: case.stopped)
def test_targets_get_no_gradient(case):
    _, gradient = _run(case, case.arrays)
    positions = sorted({*case.differentiable, *case.stopped})
    for position, leaves in zip(positions, gradient, strict=True):
        largest = _scale(leaves) if _any(leaves) else 0.0
        assert (largest == 0.0) == (position in case.stopped), position


def _any(leaves):
    return any(np.any(leaf) for leaf in jax.tree.leaves(leaves))


@having(lambda case: case.at_zero)
def test_finite_at_zero(case):
    _assert_finite(case, _floats(np.zeros_like, case.arrays))


@having(lambda case: case.at_equal_rows)
def test_finite_at_equal_rows(case):
    def equal(leaf):
        return np.broadcast_to(leaf[:1], leaf.shape) if leaf.ndim else leaf

    _assert_finite(case, _floats(equal, case.arrays))


@having(lambda case: case.at_extremes)
def test_finite_at_extreme_logits(case):
    def extreme(leaf):
        return 1e4 * np.sign(leaf)

    _assert_finite(case, _floats(extreme, case.arrays, case.at_extremes))
    apart = [extreme, lambda leaf: -extreme(leaf)]
    for turn, position in enumerate(case.at_extremes):
        one = _floats(apart[turn % 2], case.arrays, (position,))
        _assert_finite(case, one)


@having(lambda case: case.more)
def test_finite_at_further_inputs(case):
    for name, arrays in case.more.items():
        run = jax.jit(_both(case))
        for leaf in jax.tree.leaves(run(*_cast(arrays, jnp.float32))):
            assert np.isfinite(leaf).all(), name


@having(lambda case: case.half)
def test_half_precision_is_accumulated_in_float32(case):
    half = _cast(case.arrays, jnp.bfloat16)
    widened = _cast(half, jnp.float32)
    result = jax.jit(lambda *a: case.function(*a, **case.options))(*half)
    expected, _ = _jitted(CASES.index(case))(*widened)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(result))
    _close(result, expected, 1e-5, 1e-6 * _scale(expected))


def _padded(case):
    """Two rows of anything appended, and the masks that leave them out."""
    masked = {i for positions in case.masks.values() for i in positions}
    masks = {}
    for name, positions in case.masks.items():
        rows = len(jax.tree.leaves(case.arrays[positions[0]])[0])
        masks[name] = np.arange(rows + 2) < rows

    def padded(leaf):
        filler = np.full((2, *leaf.shape[1:]), np.nan if _is_float(leaf) else 0)
        return np.concatenate([leaf, filler.astype(leaf.dtype)])

    arrays = tuple(
        jax.tree.map(padded, argument) if i in masked else argument
        for i, argument in enumerate(case.arrays)
    )
    return masked, masks, _cast(arrays, jnp.float32)


@having(lambda case: case.masks)
def test_masked_rows_may_hold_anything_and_change_nothing(case):
    expected = _run(case, case.arrays)
    masked, masks, arrays = _padded(case)
    run = _masked(CASES.index(case))
    got, gradient = jax.tree.map(np.asarray, run(masks, *arrays))
    atol = 2e-6 * _scale(expected)
    if case.per_example:
        np.testing.assert_array_equal(got[-2:], 0.0)
        got = got[:-2]
    _close(got, expected[0], 1e-5, atol)
    positions = sorted({*case.differentiable, *case.stopped})
    for position, given, wanted in zip(positions, gradient, expected[1], strict=True):
        if position in masked:
            for leaf in jax.tree.leaves(given):
                np.testing.assert_array_equal(leaf[-2:], 0.0)
            given = jax.tree.map(lambda leaf: leaf[:-2], given)
        _close(given, wanted, 2e-5, atol)


@having(lambda case: case.masks)
def test_finite_when_nothing_counts(case):
    _, masks, arrays = _padded(case)
    nothing = {name: np.zeros_like(mask) for name, mask in masks.items()}
    for leaf in jax.tree.leaves(_masked(CASES.index(case))(nothing, *arrays)):
        assert np.isfinite(leaf).all()
