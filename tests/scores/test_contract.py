"""What is promised of every score, tried on all; see `tests/scores/cases.py`."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import scores
from tests.scores.cases import CASES, LABELS, WITHOUT

every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def having(condition):
    cases = [case for case in CASES if condition(case)]
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def is_float(array):
    return np.issubdtype(array.dtype, np.floating)


def cast(arrays, dtype=jnp.float32):
    return [jnp.asarray(a, dtype if is_float(np.asarray(a)) else None) for a in arrays]


def run(case, arrays, **masks):
    return jax.jit(lambda *given: case.function(*given, **case.options, **masks))(
        *cast(arrays)
    )


def close(got, expected, rtol=1e-5, atol=1e-5):
    jax.tree.map(
        lambda g, e: np.testing.assert_allclose(g, e, rtol=rtol, atol=atol),
        got,
        expected,
    )


def assert_finite(result):
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result))


def test_every_public_score_has_a_case():
    tried = {case.function for case in CASES}
    missing = {n for n in scores.__all__ if getattr(scores, n) not in tried}
    assert missing == set(WITHOUT)


@every
def test_agrees_eager_jit_and_vmap(case):
    arrays = cast(case.arrays)
    expected = run(case, case.arrays)
    for leaf in jax.tree.leaves(expected):
        assert leaf.dtype == jnp.float32 and np.isfinite(leaf).all()
    close(case.function(*arrays, **case.options), expected)
    others = [a[::-1] if is_float(a) else a for a in arrays]
    stacked = [jnp.stack(pair) for pair in zip(others, arrays, strict=True)]
    both = jax.vmap(lambda *given: case.function(*given, **case.options))(*stacked)
    close(jax.tree.map(lambda leaf: leaf[1], both), expected)
    close(jax.tree.map(lambda leaf: leaf[0], both), run(case, others))


@every
def test_finite_at_zero_and_at_equal_rows(case):
    zeros = [np.zeros_like(a) if is_float(a) else a for a in case.arrays]
    assert_finite(run(case, zeros))
    equal = [np.broadcast_to(a[:1], a.shape) if is_float(a) else a for a in case.arrays]
    assert_finite(run(case, equal))


@having(lambda case: case.at_extremes)
def test_finite_at_extreme_logits(case):
    def extreme(i, array):
        return 1e4 * np.sign(array) if i in case.at_extremes else array

    arrays = [extreme(*pair) for pair in enumerate(case.arrays)]
    assert_finite(run(case, arrays))
    assert_finite(run(case, [-arrays[0], *arrays[1:]]))


@having(lambda case: case.more)
def test_finite_at_further_inputs(case):
    for name, arrays in case.more.items():
        for leaf in jax.tree.leaves(run(case, arrays)):
            assert np.isfinite(leaf).all(), name


@every
def test_half_precision_is_accumulated_in_float32(case):
    half = cast(case.arrays, jnp.bfloat16)
    result = jax.jit(lambda *given: case.function(*given, **case.options))(*half)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(result))
    close(result, run(case, cast(half)))


@every
def test_masked_rows_may_hold_anything_and_change_nothing(case):
    """Rows between the others, so that no place is special."""
    places = [0, 4]

    def spread(array):
        filler = np.nan if is_float(array) else 0
        return np.insert(array, places, filler, axis=0)

    masked = {i for positions in case.masks.values() for i in positions}
    arrays = [spread(a) if i in masked else a for i, a in enumerate(case.arrays)]
    counts = {
        name: np.insert(np.ones(len(case.arrays[at[0]]), bool), places, False)
        for name, at in case.masks.items()
    }
    got = run(case, arrays, **counts)
    sides = list(counts.values())
    if case.per_example or isinstance(got, tuple):
        leaves = jax.tree.leaves(got)
        for leaf, where in zip(leaves, sides, strict=True):
            np.testing.assert_array_equal(leaf[~where], 0.0)
        kept = [leaf[where] for leaf, where in zip(leaves, sides, strict=True)]
        got = tuple(kept) if isinstance(got, tuple) else kept[0]
    close(got, run(case, case.arrays))


@every
def test_finite_when_nothing_counts(case):
    nothing = {
        name: np.zeros(len(case.arrays[positions[0]]), bool)
        for name, positions in case.masks.items()
    }
    result = run(case, case.arrays, **nothing)
    assert all(not leaf.any() for leaf in jax.tree.leaves(result))
    (name, none), *_ = nothing.items()
    assert_finite(run(case, case.arrays, **{name: none}))


ORDERED = (scores.density_ratio, scores.held_out_domain_logits)


@having(lambda case: case.function not in ORDERED)
def test_the_order_of_rows_does_not_matter(case):
    rng = np.random.default_rng(0)
    orders = {len(a): rng.permutation(len(a)) for a in case.arrays}
    moved = [a[orders[len(a)]] for a in case.arrays]
    close(run(case, moved), run(case, case.arrays))


@having(lambda case: "classes" in case.options)
def test_the_names_of_classes_do_not_matter(case):
    names = np.array([3, 0, 1, 2])
    renamed = [*case.arrays[:-1], names[LABELS]]
    close(run(case, renamed), run(case, case.arrays))


@having(lambda case: "classes" in case.options)
def test_classes_are_read_from_labels_that_can_be_seen(case):
    options = {k: v for k, v in case.options.items() if not k.endswith("classes")}
    value = case.function(*cast(case.arrays), **options)
    close(value, run(case, case.arrays))
    with pytest.raises(ValueError, match="can't be read from traced .*classes="):
        jax.jit(lambda *given: case.function(*given, **options))(*cast(case.arrays))


@having(lambda case: "classes" in case.options)
def test_labels_out_of_range(case):
    """An error where they can be seen, not-a-number where they are traced."""
    for wrong in (-1, 4):
        labels = np.where(np.arange(9) == 5, wrong, LABELS)
        arrays = [*case.arrays[:-1], labels]
        with pytest.raises(ValueError, match=rf"labels must be in \[0, 4\), .*{wrong}"):
            case.function(*cast(arrays), **case.options)
        assert np.isnan(run(case, arrays))


@having(lambda case: case.function is not scores.nce)
def test_not_a_number_is_not_taken_for_a_good_score(case):
    """Not-a-number, or no better than what is true of the finite rows."""
    first = np.array(case.arrays[0])
    first[2] = np.nan
    result = run(case, [first, *case.arrays[1:]])
    good = run(case, case.arrays)
    for leaf, finite in zip(
        jax.tree.leaves(result), jax.tree.leaves(good), strict=True
    ):
        assert np.isnan(leaf).any() or (leaf <= finite + 1e-6).all()


def test_masks_are_called_alike():
    for case in CASES:
        parameters = inspect.signature(case.function).parameters
        masks = {name for name in parameters if name.endswith("where")}
        assert masks == set(case.masks), case.name
