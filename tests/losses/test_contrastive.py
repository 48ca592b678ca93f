import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxtransfer.losses import contrastive
from tests.losses.case import det


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


# The golden's first step: 40 examples, a batch of 8, five negatives each.
STUDENT, TEACHER = unit(det((8, 12), 7)), unit(det((8, 12), 9))
INDICES = 5 * np.arange(8)
NEGATIVES = (INDICES[:, None] + 7 * np.arange(1, 6)) % 40
ROWS = unit(det((40, 12), 13)), unit(det((40, 12), 14))
GOLDEN, GOLDEN_NORM, GOLDEN_Z = 16.0226476686, 5.022480375, (4968.9, 45023.0)


def memory(rows=ROWS, log_normalizers=(-np.inf, -np.inf)):
    return contrastive.ContrastiveMemory(
        *(jnp.asarray(row) for row in rows), jnp.asarray(log_normalizers)
    )


_loss = jax.jit(
    contrastive.contrastive_representation_distillation,
    static_argnames=("epsilon", "normalize"),
)
_update = jax.jit(contrastive.update_contrastive_memory)


def compiled(*arrays, **options):
    return _loss(*jax.tree.map(jnp.asarray, arrays), **options)


def write(*arrays, **options):
    return _update(*jax.tree.map(jnp.asarray, arrays), **options)


def distill(student, teacher=TEACHER, state=None, *, fn=compiled, **options):
    state = memory() if state is None else state
    return fn(student, teacher, INDICES, NEGATIVES, state, **options)


def update(
    state, student=STUDENT, teacher=TEACHER, indices=INDICES, *, fn=write, **options
):
    return fn(student, teacher, indices, NEGATIVES, state, **options)


def wrong(*args, **options):
    return distill(
        *args, fn=contrastive.contrastive_representation_distillation, **options
    )


def wrong_update(**options):
    return update(memory(), fn=contrastive.update_contrastive_memory, **options)


def test_golden(float64):
    def total(student):
        return distill(student, epsilon=1e-7, normalize=False).mean()

    value, gradient = jax.value_and_grad(total)(jnp.asarray(STUDENT))
    np.testing.assert_allclose(value, GOLDEN, rtol=1e-11)
    np.testing.assert_allclose(np.linalg.norm(gradient), GOLDEN_NORM, rtol=1e-9)
    normalizers = np.exp(update(memory()).log_normalizers)
    np.testing.assert_allclose(normalizers, GOLDEN_Z, rtol=2e-5)


def test_golden_in_float32():
    def total(student):
        state = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), memory())
        teacher = jnp.asarray(TEACHER, jnp.float32)
        return distill(student, teacher, state, epsilon=1e-7, normalize=False).mean()

    student = jnp.asarray(STUDENT, jnp.float32)
    value, gradient = jax.value_and_grad(total)(student)
    np.testing.assert_allclose(value, GOLDEN, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(gradient), GOLDEN_NORM, rtol=1e-5)


def test_gradient_of_embeddings_of_any_length(float64):
    """The norm is that of the reference through its own scaling to length 1."""

    def total(student, teacher):
        return distill(student, teacher, epsilon=1e-7).mean()

    value, gradient = jax.value_and_grad(total)(
        jnp.asarray(det((8, 12), 7)), jnp.asarray(det((8, 12), 9))
    )
    np.testing.assert_allclose(value, GOLDEN, rtol=1e-11)
    np.testing.assert_allclose(np.linalg.norm(gradient), 2.442024377110452, rtol=1e-9)


def test_no_epsilon_is_needed(float64):
    value = distill(STUDENT).mean()
    np.testing.assert_allclose(value, 16.022638586816637, rtol=1e-11)
    assert abs(value / GOLDEN - 1) < 1e-6


def slow(state, temperature, epsilon, indices=INDICES, negatives=NEGATIVES):
    """One example, one direction and one row after the other."""
    losses = np.zeros(len(indices))
    examples, count = len(state.student), negatives.shape[1]
    share = count / examples
    for embeddings, rows, log_z in zip(
        (STUDENT, TEACHER),
        (state.teacher, state.student),
        state.log_normalizers,
        strict=True,
    ):
        for i, z in enumerate(embeddings[: len(indices)]):
            x = np.exp(np.asarray(rows) @ z / temperature - log_z)
            own = x[indices[i]]
            losses[i] -= np.log(own / (own + share + epsilon))
            for k in negatives[i]:
                losses[i] -= np.log(share / (x[k] + share + epsilon))
    return losses


@pytest.mark.parametrize("examples", [40, 400])
@pytest.mark.parametrize("epsilon", [0.0, 0.01])
def test_twin(float64, examples, epsilon):
    """A memory of the size of the choice, and a much larger one."""
    state = memory((det((examples, 12), 1), det((examples, 12), 2)), (5.0, 7.0))
    got = distill(STUDENT, state=state, temperature=0.3, epsilon=epsilon)
    np.testing.assert_allclose(got, slow(state, 0.3, epsilon), rtol=1e-11)


@pytest.mark.parametrize("examples", [40, 400])
def test_gradient_of_both_embeddings(float64, examples):
    state = memory((det((examples, 12), 1), det((examples, 12), 2)), (5.0, 7.0))
    arrays = jnp.asarray(STUDENT), jnp.asarray(TEACHER)
    check_grads(
        lambda *z: distill(*z, state=state, temperature=0.3).sum(),
        arrays,
        order=1,
        modes=["rev"],
        rtol=1e-6,
        atol=1e-6,
    )


def test_memory_gets_no_gradient():
    gradient = jax.grad(lambda state: distill(STUDENT, state=state).sum())(memory())
    assert not any(np.any(leaf) for leaf in gradient)


def test_own_row_near_and_others_far_is_best(float64):
    """Positive and small at the best, and worse in every other direction."""
    rows = unit(np.concatenate([np.ones((40, 1)), np.zeros((40, 1))], axis=1))
    rows[INDICES] *= -1
    embeddings = rows[INDICES]
    state = memory((rows, rows), (15.0, 15.0))

    def loss(embeddings):
        return compiled(embeddings, embeddings, INDICES, np.ones((8, 5), int), state)

    best, worst = loss(embeddings), loss(-embeddings)
    assert np.all(best > 0) and np.all(best < 1.0) and np.all(worst > 20.0)


def test_order_of_the_batch_and_of_the_negatives_does_not_matter(float64):
    expected = distill(STUDENT)
    order = np.array([3, 1, 7, 0, 2, 6, 5, 4])
    state = memory()
    got = compiled(
        STUDENT[order],
        TEACHER[order],
        INDICES[order],
        NEGATIVES[order, ::-1],
        state,
    )
    np.testing.assert_allclose(got, expected[order], rtol=1e-12)
    shuffled = write(
        STUDENT[order], TEACHER[order], INDICES[order], NEGATIVES[order], state
    )
    for a, b in zip(shuffled, update(state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_a_traced_index_out_of_range_is_seen():
    @jax.jit
    def both(indices, negatives):
        arguments = STUDENT, TEACHER, indices, negatives, memory()
        return (
            contrastive.contrastive_representation_distillation(*arguments),
            contrastive.update_contrastive_memory(*arguments).student,
        )

    before = np.asarray(memory().student)
    losses, rows = both(INDICES + 5, NEGATIVES)
    np.testing.assert_array_equal(np.isnan(losses), INDICES == 35)
    assert np.sum(np.any(rows != before, axis=1)) == 7
    np.testing.assert_array_equal(rows[INDICES[0]], before[INDICES[0]])
    losses, _ = both(INDICES, np.where(NEGATIVES == 12, -1, NEGATIVES))
    np.testing.assert_array_equal(np.isnan(losses), np.any(NEGATIVES == 12, axis=1))


def test_update_is_that_of_one_row_after_the_other(float64):
    state = memory((det((40, 12), 1), det((40, 12), 2)))
    got = update(state, 3.0 * STUDENT, 2.0 * TEACHER, momentum=0.3)
    for old, new, embeddings in zip(state, got, (STUDENT, TEACHER), strict=False):
        expected = np.array(old)
        for i, z in zip(INDICES, embeddings, strict=True):
            expected[i] = unit(0.3 * expected[i] + 0.7 * z)
        np.testing.assert_allclose(new, expected, rtol=1e-12)


def test_of_one_example_twice_the_last_is_written(transform):
    indices = jnp.array([3, 9, 3, 3, 9, 1, 0, 2])
    where = jnp.array([True, True, True, False, True, True, True, True])

    def twice(student, teacher):
        return update(memory(), student, teacher, indices, where=where)

    rows = jnp.asarray(STUDENT, jnp.float32), jnp.asarray(TEACHER, jnp.float32)
    got = transform(twice)(*rows)
    for new, old, embeddings in zip(got, ROWS, (STUDENT, TEACHER), strict=False):
        expected = old.copy()
        for i in (2, 4, 5, 6, 7):
            place = indices[i]
            expected[place] = unit(0.5 * old[place] + 0.5 * embeddings[i])
        np.testing.assert_allclose(new, expected, atol=1e-6)


def test_masked_rows_are_not_written():
    where = np.arange(8) < 5
    student = np.where(where[:, None], STUDENT, np.nan)
    indices = np.where(where, INDICES, 999)
    before, after = memory(), update(memory(), student, indices=indices, where=where)
    written = np.any(after.student != before.student, axis=1)
    np.testing.assert_array_equal(np.flatnonzero(written), INDICES[:5])
    assert all(np.isfinite(leaf).all() for leaf in after)
    first = write(STUDENT[:5], TEACHER[:5], INDICES[:5], NEGATIVES[:5], memory())
    np.testing.assert_allclose(after.log_normalizers, first.log_normalizers, rtol=1e-6)


def train(state, steps, start=0):
    """Steps of new batches, compiled as they are in training."""

    @jax.jit
    def step(state, number):
        key = jax.random.fold_in(jax.random.key(5), number)
        keys = jax.random.split(key, 4)
        labels = jnp.arange(40) % 4
        indices = jax.random.randint(keys[0], (8,), 0, 40)
        negatives = contrastive.sample_negatives(keys[1], labels, indices, count=6)
        embeddings = [jax.random.normal(key, (8, 12)) for key in keys[2:]]
        arguments = *embeddings, indices, negatives, state
        losses = contrastive.contrastive_representation_distillation(*arguments)
        return contrastive.update_contrastive_memory(*arguments), losses.mean()

    losses = []
    for number in range(start, start + steps):
        state, loss = step(state, number)
        losses.append(loss)
    return state, jnp.stack(losses)


def test_rows_have_length_1_and_normalizers_stay(key):
    state = contrastive.contrastive_memory(key, 40, 12)
    assert not np.isfinite(state.log_normalizers).any()
    state, _ = train(state, 1)
    normalizers = np.asarray(state.log_normalizers)
    assert np.isfinite(normalizers).all()
    state, losses = train(state, 40, start=1)
    assert np.isfinite(losses).all()
    np.testing.assert_array_equal(state.log_normalizers, normalizers)
    for rows in (state.student, state.teacher):
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-6)


def test_resumed_is_bitwise_the_same(key):
    state = contrastive.contrastive_memory(key, 40, 12)
    expected, losses = train(state, 6)
    stored = jax.tree.map(np.asarray, train(state, 3)[0])
    assert len(jax.tree.leaves(stored)) == 3
    got, later = train(jax.tree.map(jnp.asarray, stored), 3, start=3)
    np.testing.assert_array_equal(later, losses[3:])
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_seeds_are_vmapped():
    def run(seed):
        state = contrastive.contrastive_memory(jax.random.key(seed), 40, 12)
        return train(state, 3)

    states, losses = jax.vmap(run)(jnp.arange(3))
    for seed in range(3):
        state, alone = run(seed)
        np.testing.assert_allclose(losses[seed], alone, rtol=1e-5)
        for a, b in zip(states, state, strict=True):
            np.testing.assert_allclose(a[seed], b, rtol=1e-5, atol=1e-6)
    assert np.unique(losses[:, 0]).size == 3


def test_loss_sees_the_normalizers_that_the_update_sets(float64):
    """Before and after the first update the same scores give the same loss."""
    state = memory()
    later = state._replace(log_normalizers=update(state).log_normalizers)
    np.testing.assert_allclose(
        distill(STUDENT, state=state), distill(STUDENT, state=later), rtol=1e-12
    )


def test_an_empty_batch_sets_no_normalizer():
    after = update(memory(), where=np.zeros(8, bool))
    for a, b in zip(after, memory(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_start_of_a_memory(key):
    state = contrastive.contrastive_memory(key, 300, 48)
    bound = 1 / np.sqrt(48 / 3)
    for rows in (state.student, state.teacher):
        assert rows.dtype == jnp.float32 and np.abs(rows).max() <= bound
        np.testing.assert_allclose(rows.mean(), 0.0, atol=5 * bound / 3**0.5 / 120)
        np.testing.assert_allclose((rows**2).sum(axis=1).mean(), 1.0, rtol=0.02)
    assert not np.any(np.asarray(state.student) == np.asarray(state.teacher))


LABELS = np.array([2, 0, 1, 0, 5, 2, 0, 0, 1, 0, 0])


def test_negatives_are_of_other_classes_and_uniform(key, transform):
    indices, count = np.array([1, 0, 4, 10, 8]), 20000

    def draw(labels, indices):
        return contrastive.sample_negatives(key, labels, indices, count=count)

    drawn = transform(draw)(jnp.asarray(LABELS), jnp.asarray(indices))
    assert drawn.shape == (5, count) and jnp.issubdtype(drawn.dtype, jnp.integer)
    for own, row in zip(indices, np.asarray(drawn), strict=True):
        seen = np.bincount(row, minlength=len(LABELS))
        others = LABELS != LABELS[own]
        assert not seen[~others].any()
        expected = count / others.sum()
        chi_square = np.sum((seen[others] - expected) ** 2 / expected)
        # The 0.9999 quantile of nine degrees of freedom, the most there are.
        assert chi_square < 33.7
    # Two rows of one class are not the same draws.
    assert np.any(drawn[0] != drawn[3])


def test_negatives_do_not_depend_on_padding_or_on_who_sorts(key):
    indices = jnp.array([1, 0, 4])
    draw = jax.jit(contrastive.sample_negatives, static_argnames="count")
    expected = draw(key, jnp.asarray(LABELS), indices, count=50)
    padded = draw(
        key,
        jnp.asarray(LABELS),
        jnp.array([1, 0, 4, 999, -1]),
        count=50,
        where=jnp.arange(5) < 3,
    )
    np.testing.assert_array_equal(padded[:3], expected)
    assert np.all((padded >= 0) & (padded < len(LABELS)))
    order = jnp.argsort(jnp.asarray(LABELS))
    ordered = draw(key, jnp.asarray(LABELS), indices, count=50, order=order)
    np.testing.assert_array_equal(ordered, expected)


def test_traced_negatives_that_cannot_be_are_minus_one(key):
    draw = jax.jit(
        lambda labels, indices: contrastive.sample_negatives(
            key, labels, indices, count=4
        )
    )
    assert np.all(draw(jnp.zeros(3, int), jnp.array([0, 2])) == -1)
    drawn = draw(jnp.array([0, 1, 1]), jnp.array([0, 3]))
    assert np.all(drawn[0] > 0) and np.all(drawn[1] == -1)


def slow_in_batch(student, teacher, temperature, labels, symmetric):
    """One anchor and one candidate after the other."""

    def of(anchors, candidates):
        losses = []
        for i, anchor in enumerate(anchors):
            weights = [
                np.exp(unit(anchor) @ unit(candidate) / temperature)
                for j, candidate in enumerate(candidates)
                if j == i or labels is None or labels[i] != labels[j]
            ]
            own = np.exp(unit(anchor) @ unit(candidates[i]) / temperature)
            losses.append(-np.log(own / np.sum(weights)))
        return np.array(losses)

    losses = of(student, teacher)
    return (losses + of(teacher, student)) / 2 if symmetric else losses


CLASSES = np.array([0, 1, 0, 2, 2, 0, 3, 1])
_in_batch = jax.jit(
    contrastive.contrastive_distillation, static_argnames=("symmetric",)
)


def in_batch(*arrays, labels=None, **options):
    labels = None if labels is None else jnp.asarray(labels)
    return _in_batch(*map(jnp.asarray, arrays), labels=labels, **options)


@pytest.mark.parametrize("labels", [None, CLASSES], ids=["all", "others"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("temperature", [0.07, 0.7])
def test_in_batch_twin(float64, labels, symmetric, temperature):
    student, teacher = 3.0 * det((8, 12), 7), det((8, 12), 9)
    got = in_batch(
        student, teacher, labels=labels, symmetric=symmetric, temperature=temperature
    )
    expected = slow_in_batch(student, teacher, temperature, labels, symmetric)
    np.testing.assert_allclose(got, expected, rtol=1e-10)


def test_in_batch_float32(float64):
    expected = slow_in_batch(STUDENT, TEACHER, 0.07, CLASSES, True)
    arrays = jnp.asarray(STUDENT, jnp.float32), jnp.asarray(TEACHER, jnp.float32)
    got = in_batch(*arrays, labels=CLASSES, symmetric=True)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
def test_in_batch_masks_reach_rows_and_sums(float64, symmetric):
    where = np.array([True, False, True, True, False, True, True, True])
    options = {"symmetric": symmetric}
    masked = in_batch(
        np.where(where[:, None], STUDENT, np.nan),
        TEACHER,
        where=where,
        labels=CLASSES,
        **options,
    )
    kept = in_batch(STUDENT[where], TEACHER[where], labels=CLASSES[where], **options)
    np.testing.assert_allclose(masked[where], kept, rtol=1e-12)
    np.testing.assert_array_equal(masked[~where], 0.0)


def test_in_batch_order_does_not_matter(float64):
    order = np.array([3, 1, 7, 0, 2, 6, 5, 4])

    def of(order):
        return in_batch(
            STUDENT[order], TEACHER[order], labels=CLASSES[order], symmetric=True
        )

    np.testing.assert_allclose(of(order), of(np.arange(8))[order], rtol=1e-12)


def test_in_batch_bounds(float64):
    """The logarithm of the batch where all are alike; nothing in a class of its own."""
    ones = np.ones((8, 3))
    alike = in_batch(ones, ones)
    np.testing.assert_allclose(alike, np.log(8), rtol=1e-12)
    alone = in_batch(STUDENT, TEACHER, labels=np.zeros(8, int), symmetric=True)
    np.testing.assert_allclose(alone, 0.0, atol=1e-12)


@pytest.mark.usefixtures("types_unchecked")
@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda: wrong(STUDENT, TEACHER[:, :5]),
            "learned linear layer",
        ),
        (
            lambda: wrong(STUDENT[:, :5], TEACHER[:, :5]),
            "as wide as the memory, 12",
        ),
        (
            lambda: wrong(STUDENT, temperature=0.0),
            "temperature must be positive, got 0.0",
        ),
        (
            lambda: wrong(STUDENT, epsilon=-1.0),
            "epsilon must not be negative, got -1.0",
        ),
        (
            lambda: wrong(STUDENT, where=np.ones(8)),
            "where must be boolean",
        ),
        (
            lambda: wrong_update(indices=INDICES + 5),
            r"indices must be in \[0, 40\), the rows of the memory, got \[40\]",
        ),
        (
            lambda: wrong_update(indices=INDICES[:, None]),
            r"indices must be \[8\], got shape",
        ),
        (
            lambda: wrong_update(momentum=1.0),
            r"momentum must be in \[0, 1\), got 1.0",
        ),
        (
            lambda: contrastive.update_contrastive_memory(
                STUDENT, TEACHER, INDICES, NEGATIVES - 1, memory()
            ),
            r"negatives must be in \[0, 40\)",
        ),
        (
            lambda: contrastive.update_contrastive_memory(
                STUDENT, TEACHER, INDICES, NEGATIVES[:, :0], memory()
            ),
            r"negatives must be \[batch, count\], one or more",
        ),
        (
            lambda: contrastive.contrastive_memory(jax.random.key(0), 0, 8),
            "must be positive, got 0 and 8",
        ),
        (
            lambda: contrastive.sample_negatives(
                jax.random.key(0), np.zeros(4, int), np.array([1])
            ),
            "two classes or more, all are 0",
        ),
        (
            lambda: contrastive.sample_negatives(
                jax.random.key(0), LABELS, np.array([11])
            ),
            r"indices must be in \[0, 11\)",
        ),
        (
            lambda: contrastive.sample_negatives(
                jax.random.key(0), LABELS, np.array([1]), count=0
            ),
            "count must be positive, got 0",
        ),
        (
            lambda: contrastive.sample_negatives(
                jax.random.key(0), LABELS, np.array([1]), order=np.arange(3)
            ),
            "order must be jnp.argsort",
        ),
        (
            lambda: contrastive.sample_negatives(
                jax.random.key(0), LABELS[None], np.array([1])
            ),
            r"labels must be \[examples\]",
        ),
        (
            lambda: contrastive.contrastive_distillation(STUDENT, TEACHER[:4]),
            "must have the same shape",
        ),
        (
            lambda: contrastive.contrastive_distillation(
                STUDENT, TEACHER, labels=CLASSES[:4]
            ),
            "labels must be one a row",
        ),
        (
            lambda: contrastive.contrastive_distillation(
                STUDENT, TEACHER, temperature=-1.0
            ),
            "temperature must be positive, got -1.0",
        ),
    ],
)
def test_says_what_is_wrong(call, match):
    with pytest.raises(ValueError, match=match):
        call()
