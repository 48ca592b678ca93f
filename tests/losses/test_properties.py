"""What must hold of losses whatever the numbers: order, padding, absent terms, limits.

Rows in another order, with masked rows anywhere between them, are the same rows: the
contract (`tests/losses/test_contract.py`) only appends masked rows.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import losses
from tests.losses.case import det
from tests.losses.cases import CASES

# What pairs every row with the next that counts.
ORDERED = {"correlation_congruence-code", "mmd_preset-tllib_linear"}
# Blocks, and draws, by the place in the batch: masked rows before them move them.
BY_PLACE = {
    "gradient_penalty",
    "maximum_mean_discrepancy-block",
    "maximum_mean_discrepancy-linear",
    "mmd_preset-pytorch_adapt_linear",
}
# A loss of one example sees no other row; these see the whole set.
OF_SETS = [
    case
    for case in CASES
    if case.masks
    and case.name not in BY_PLACE
    and (not case.per_example or case.name.startswith("dynamic_temperature"))
]


def _count(case, positions):
    return len(jax.tree.leaves(case.arrays[positions[0]])[0])


def _shuffled(case):
    """The arrays with two rows of anything, all in another order; masks; that order."""
    arrays, masks, orders = list(case.arrays), {}, {}
    for turn, (name, positions) in enumerate(case.masks.items()):
        count = _count(case, positions)
        if case.name in ORDERED:  # masked rows between the others, which stay in order
            order = np.insert(np.arange(count), [1, 3], [count, count + 1])
        else:
            order = np.argsort(det((count + 2,), 300 + turn))
        masks[name], orders[name] = jnp.asarray(order < count), order

        def move(leaf, order=order):
            anything = np.nan if np.issubdtype(leaf.dtype, np.floating) else 0
            filler = np.full((2, *leaf.shape[1:]), anything, leaf.dtype)
            return np.concatenate([leaf, filler])[order]

        for position in positions:
            arrays[position] = jax.tree.map(move, arrays[position])
    return arrays, masks, orders


def _narrow(arrays):
    return jax.tree.map(
        lambda leaf: jnp.asarray(
            leaf, jnp.float32 if np.issubdtype(leaf.dtype, np.floating) else None
        ),
        tuple(arrays),
    )


@pytest.mark.parametrize("case", OF_SETS, ids=lambda case: case.name)
def test_order_and_masked_rows_change_nothing(case):
    run = jax.jit(lambda arrays, masks: case.function(*arrays, **case.options, **masks))
    expected = run(_narrow(case.arrays), {})
    arrays, masks, orders = _shuffled(case)
    got = run(_narrow(arrays), masks)
    if case.per_example:
        (order,) = orders.values()
        wanted = np.zeros(len(order))
        wanted[order < len(expected)] = expected[order[order < len(expected)]]
        expected = wanted
    jax.tree.map(
        lambda g, e: np.testing.assert_allclose(
            g, e, rtol=1e-5, atol=3e-6 * np.abs(e).max()
        ),
        got,
        expected,
    )


# Terms of weight 0: the loss with them, and the loss without, of the same logits.

STUDENT, TEACHER = det((8, 10), 1, 3.0), det((8, 10), 2, 4.0)
LABELS = (3 * np.arange(8) + 1) % 10
SOURCE, TARGET = det((6, 4), 31), det((5, 4), 32) + 0.3
OTHERS = det((8, 10), 4, 4.0)


def _loss(name, *others, **options):
    """A loss as a function of its first argument alone."""
    return lambda x: getattr(losses, name)(x, *others, **options)


dkd = functools.partial(
    _loss, "decoupled_knowledge_distillation", TEACHER, LABELS, temperature=2.0
)
rkd = functools.partial(_loss, "relational_knowledge_distillation", TEACHER)
ABSENT = {
    "DKD alpha": (
        dkd(alpha=0.0, beta=1.0),
        _loss("nontarget_class_distillation", TEACHER, LABELS, temperature=2.0),
        STUDENT,
    ),
    "DKD beta": (
        dkd(beta=0.0),
        _loss("target_class_distillation", TEACHER, LABELS, temperature=2.0),
        STUDENT,
    ),
    "RKD angle": (
        rkd(distance_weight=1.0, angle_weight=0.0),
        _loss("relational_distance", TEACHER),
        STUDENT,
    ),
    "RKD distance": (
        rkd(distance_weight=0.0, angle_weight=1.0),
        _loss("relational_angle", TEACHER),
        STUDENT,
    ),
    "a kernel": (
        _loss("mmd", TARGET, bandwidth=(2.0, 5.0), kernel_weights=(1.0, 0.0)),
        _loss("mmd", TARGET, bandwidth=(2.0,), kernel_weights=(1.0,)),
        SOURCE,
    ),
    "generated": (
        _loss("masked_generative", TEACHER, weight=0.0),
        lambda x: jnp.zeros(()),
        STUDENT,
    ),
}


@pytest.mark.present_code
@pytest.mark.parametrize("name", ABSENT)
def test_weight_zero_is_the_term_absent_bit_for_bit(name):
    *both, array = ABSENT[name]
    array = jnp.asarray(array, jnp.float32)

    def run(loss):
        return jax.jit(jax.value_and_grad(lambda x: jnp.sum(loss(x))))(array)

    jax.tree.map(np.testing.assert_array_equal, run(both[0]), run(both[1]))


def test_dist_is_the_sum_of_its_two_relations():
    student, teacher = (jnp.asarray(x, jnp.float32) for x in (STUDENT, TEACHER))

    @jax.jit
    def run(beta, gamma):
        return jax.value_and_grad(
            lambda z: losses.dist(z, teacher, beta=beta, gamma=gamma)
        )(student)

    def close(tree, expected):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
            tree,
            expected,
        )

    between, within = run(1.0, 0.0), run(0.0, 1.0)
    close(jax.tree.map(lambda a, b: 2 * a + 3 * b, between, within), run(2.0, 3.0))
    # Each alone is free of the other to the last bit: it scales exactly.
    for one, other in ((between, run(4.0, 0.0)), (within, run(0.0, 4.0))):
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(4 * a, b), one, other)
    assert jax.tree.leaves(run(0.0, 0.0))[0] == 0.0


# Discrepancies of a set and itself, and on average.


@pytest.mark.parametrize("count", [6, 600])  # all pairs at once, and in tiles
def test_discrepancy_of_a_set_and_itself_is_zero(float64, count):
    rows, order = jnp.asarray(det((count, 4), 31)), np.argsort(det((count,), 32))
    value, gradient = jax.jit(jax.value_and_grad(losses.mmd))(rows, rows[order])
    np.testing.assert_allclose(value, 0.0, atol=1e-13)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-13)


def test_joint_and_local_discrepancies_of_a_set_and_itself_are_zero(float64):
    layers = [SOURCE, STUDENT[:6]]
    value = jax.jit(losses.joint_maximum_mean_discrepancy)(layers, layers)
    np.testing.assert_allclose(value, 0.0, atol=1e-13)
    labels = np.array([0, 1, 2, 0, 1, 2])
    value = jax.jit(losses.local_maximum_mean_discrepancy)(
        SOURCE, SOURCE, labels, np.eye(3)[labels]
    )
    np.testing.assert_allclose(value, 0.0, atol=1e-14)


@pytest.mark.parametrize("estimator", ["unbiased", "linear", "block"])
def test_on_average_it_is_the_discrepancy_of_the_distributions(estimator):
    """Of two normal distributions, under a Gaussian kernel, by their integral."""
    shift, bandwidth, draws = 0.5, 2.0, 4000

    @jax.jit
    @jax.vmap
    def draw(key):
        rows = jax.random.normal(key, (16, 2))
        return losses.mmd(
            rows[:8],
            rows[8:] + shift,
            estimator=estimator,
            bandwidth=(bandwidth,),
            block_size=4,
        )

    values = draw(jax.random.split(jax.random.key(3), draws))
    # A difference of two rows is normal with variance 2, so E exp(-d^2 / b) is this.
    within = 1.0 / (1.0 + 4.0 / bandwidth)
    between = within * np.exp(-2 * shift**2 / (bandwidth + 4.0))
    error = values.std() / np.sqrt(draws)
    assert error < 0.1 * 2 * (within - between)
    assert abs(values.mean() - 2 * (within - between)) < 4 * error


# Limits of sure teachers, and of one teacher given twice.


def test_decoupled_parts_where_the_teacher_is_sure(float64):
    """KD = TCKD + (1 - p_y) NCKD, example by example, at both ends of p_y."""
    student, rows = jnp.asarray(STUDENT), np.arange(8)

    @jax.jit
    def both(teacher):
        def parts(z):
            p_y = jax.nn.softmax(teacher)[rows, LABELS]
            others = losses.nontarget_class_distillation(
                z, teacher, LABELS, temperature=1.0
            )
            target = losses.target_class_distillation(
                z, teacher, LABELS, temperature=1.0
            )
            return target + (1 - p_y) * others

        def whole(z):
            return losses.knowledge_distillation(z, teacher, temperature=1.0)

        return [
            (loss(student), jax.grad(lambda z, loss=loss: loss(z).sum())(student))
            for loss in (parts, whole)
        ]

    for height in (1e4, 30.0, -30.0, -1e4):
        got, expected = both(jnp.asarray(TEACHER).at[rows, LABELS].add(height))
        jax.tree.map(
            lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-9, atol=1e-12),
            got,
            expected,
        )
    sure, _ = both(1e4 * jax.nn.one_hot(LABELS, 10))
    np.testing.assert_allclose(sure[0], losses.cross_entropy(STUDENT, LABELS), 1e-9)


@pytest.mark.parametrize("combine", ["probabilities", "logits", "divergences"])
def test_one_teacher_twice_has_the_gradient_of_one(float64, combine):
    teachers = np.stack([TEACHER, TEACHER])

    def slope(loss):
        return jax.jit(jax.grad(lambda z: loss(z).sum()))(jnp.asarray(STUDENT))

    got = slope(_loss("multi_teacher_distillation", teachers, combine=combine))
    expected = slope(_loss("knowledge_distillation", TEACHER))
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-14)


def test_peers_that_agree_teach_nothing(float64):
    same = jnp.asarray(np.stack([TEACHER] * 3))
    run = jax.jit(jax.value_and_grad(lambda z: losses.mutual_learning(z).sum()))
    for leaf in run(same):
        np.testing.assert_allclose(leaf, 0.0, atol=1e-13)


# Names of the classes: the same permutation of both sides' logits.

OF_CLASSES = {
    "knowledge_distillation": (STUDENT, TEACHER),
    "logit_matching": (STUDENT, TEACHER),
    "distillation_from_stronger_teacher": (STUDENT, TEACHER),
    "classifier_discrepancy": (STUDENT, TEACHER),
    "class_balance": (STUDENT,),
    "entropy": (STUDENT,),
    "batch_nuclear_norm": (STUDENT,),
    "margin_disparity_discrepancy": (STUDENT, TEACHER, OTHERS, OTHERS[::-1]),
    "top_k_knowledge_distillation": (STUDENT, TEACHER),
    "pseudo_label": (STUDENT, 3.0 * TEACHER),
}


@pytest.mark.parametrize("name", OF_CLASSES)
def test_names_of_the_classes_do_not_matter(float64, name):
    order = np.argsort(det((10,), 310))
    options = {"k": 3} if name.startswith("top_k") else {}
    arrays = OF_CLASSES[name]
    run = jax.jit(functools.partial(getattr(losses, name), **options))
    expected, got = run(*arrays), run(*(array[:, order] for array in arrays))
    np.testing.assert_allclose(got, expected, rtol=1e-11)
    assert np.any(np.asarray(expected) != 0.0)
