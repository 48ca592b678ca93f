"""Early exits, knowledge review, generations, distillation without data."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtransfer import losses, nets
from jaxtransfer.methods import distill
from jaxtransfer.model import from_linen
from jaxtransfer.ops.pooling import adaptive_average_pool
from jaxtransfer.train import init_state, train_step
from jaxtransfer.train.metrics import finalize
from jaxtransfer.typing import Variables
from tests.twins import jitted, network

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (4, 16, 16, 3))
Y = jnp.array([0, 1, 2, 1])
SMALL = from_linen(nets.ResNet(3, depth=8, filters=2))
LARGE = from_linen(nets.ResNet(3, depth=8, filters=4))
STAGES = ("layer1_0", "layer2_0", "layer3_0")


@pytest.fixture(scope="module")
def given():
    return jax.jit(SMALL.init)(KEY, X), jax.jit(LARGE.init)(jax.random.key(1), X)


def begin(terms, given, teacher=LARGE):
    student, variables = given
    return distill.start(
        KEY,
        SMALL,
        teacher,
        terms,
        student_variables=student,
        teacher_variables=variables if teacher is not None else None,
        inputs=X,
    )


# --- early exits ----------------------------------------------------------------------


def test_an_exit_learns_from_labels_and_from_the_last_head(given):
    terms = distill.early_exits(STAGES[:2], alpha=0.3, temperature=3.0)
    begun = begin(terms, given, teacher=None)
    task = distill.objective(SMALL, terms=terms)
    batch = {"inputs": X, "labels": Y}
    total, (_, measured) = jax.jit(task)(
        begun.params, {}, begun.model_state, batch, KEY
    )
    output, features, _ = SMALL.apply(given[0], X, train=True, taps=STAGES[:2])
    expected = losses.cross_entropy(output, Y).mean()
    for path in STAGES[:2]:
        head = begun.params["bridges"][f"exit {path}"]["linear"]
        logits = features[path].mean((1, 2)) @ head["kernel"] + head["bias"]
        value = 0.7 * losses.cross_entropy(
            logits, Y
        ) + 0.3 * losses.knowledge_distillation(logits, output, temperature=3.0)
        found = measured[f"exit {path}"]
        np.testing.assert_allclose(found.total / 4, value.mean(), rtol=1e-4)
        expected += value.mean()
    np.testing.assert_allclose(total, expected, rtol=1e-4)


def test_exits_are_run_and_cost_less(given):
    begun = begin(distill.early_exits(STAGES[:2]), given, teacher=None)

    def run(params, state, which):
        found = distill.exit_logits(SMALL, params, state, X, STAGES[:2])
        return found[which]

    flops = {}
    for which in ("layer1_0", "layer2_0", ""):
        compiled = jax.jit(run, static_argnums=2).lower(*begun, which).compile()
        flops[which] = compiled.cost_analysis()["flops"]
    assert flops["layer1_0"] < flops["layer2_0"] < flops[""]
    plain = SMALL.apply(given[0], X)[0]
    np.testing.assert_allclose(run(*begun, ""), plain, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="no exit at 'layer3_0'"):
        distill.exit_logits(SMALL, *begun, X, STAGES)


@pytest.mark.parametrize(
    "wrong",
    [{"paths": []}, {"paths": ["a", "a"]}, {"alpha": 2.0}, {"temperature": 0.0}],
)
def test_exits_that_make_no_sense(wrong):
    options = {"paths": ["a"], **wrong}
    with pytest.raises(ValueError, match=next(iter(wrong))):
        distill.early_exits(options.pop("paths"), **options)


# --- knowledge review -----------------------------------------------------------------


def batch_norm(x):
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    return (x - mean) / np.sqrt(variance + 1e-5)


def test_review_fuses_from_the_deepest_stage(given):
    """A twin in NumPy of 1x1 convolutions, attention and enlarging."""
    term = distill.review(STAGES, STAGES, width=5)
    begun = begin({"review": term}, given)
    task = distill.objective(SMALL, LARGE, terms={"review": term}, task_weight=0.0)
    batch = {"inputs": X, "labels": Y}
    total, _ = jax.jit(task)(
        begun.params, {"teacher": given[1]}, begun.model_state, batch, KEY
    )
    own = SMALL.apply(given[0], X, train=True, taps=STAGES)[1]
    taught = LARGE.apply(given[1], X, taps=STAGES)[1]
    weights = jax.tree.map(np.asarray, begun.params["bridges"]["review"])
    expected, deeper = 0.0, None
    for number in (2, 1, 0):
        x = np.asarray(own[STAGES[number]]) @ weights[f"inner{number}"]["kernel"][0, 0]
        x = batch_norm(x)
        if deeper is not None:
            deeper = deeper.repeat(2, 1).repeat(2, 2)
            attention = weights[f"attention{number}"]
            both = np.concatenate([x, deeper], -1)
            shares = both @ attention["kernel"][0, 0] + attention["bias"]
            shares = 1 / (1 + np.exp(-shares))
            x = x * shares[..., :1] + deeper * shares[..., 1:]
        deeper = x
        kernel = weights[f"outer{number}"]["kernel"]
        around = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        height, width = x.shape[1:3]
        x = sum(
            around[:, i : i + height, j : j + width] @ kernel[i, j]
            for i in range(3)
            for j in range(3)
        )
        difference = batch_norm(x) - np.asarray(taught[STAGES[number]])
        value, parts, share = (difference**2).mean(), 1.0, 1.0
        for level in (4, 2, 1):
            if level < height:
                share /= 2
                pooled = adaptive_average_pool(jnp.asarray(difference), (level, level))
                value += share * float((pooled**2).mean())
                parts += share
        expected += value / parts
    np.testing.assert_allclose(total, expected, rtol=2e-3)


def test_review_trains_its_fusion(given):
    term = distill.review(STAGES, STAGES)
    begun = begin({"review": term}, given)
    task = distill.objective(SMALL, LARGE, terms={"review": term})
    batch = {"inputs": X, "labels": Y}
    slopes = jax.jit(
        jax.grad(
            lambda p: task(p, {"teacher": given[1]}, begun.model_state, batch, KEY)[0]
        )
    )(begun.params)
    fused = slopes["bridges"]["review"]
    assert all(
        jnp.any(leaf != 0)
        for name, leaf in fused.items()
        for leaf in jax.tree.leaves(leaf)
    )


def test_reviews_that_make_no_sense():
    with pytest.raises(ValueError, match="give as many of each, two or more"):
        distill.review(("a",), ("b",))
    with pytest.raises(ValueError, match="fusion: as many layers"):
        distill.fusion()(((1, 2),), ((1, 2),))


# --- generations ----------------------------------------------------------------------


NET = jitted(network("linen", inputs=6, widths=(4,)))


def test_each_generation_is_taught_by_the_one_before():
    seen, keys = [], []

    def train(key, student, teacher, variables):
        seen.append((student, teacher, float(variables.params["w"])))
        keys.append(jax.random.key_data(key).tolist())
        return Variables({"w": variables.params["w"] + 1}, {})

    first = Variables({"w": jnp.array(0.0)}, {})
    found = distill.generations(KEY, NET, first, [LARGE, SMALL], train)
    assert seen == [(LARGE, NET, 0.0), (SMALL, LARGE, 1.0)]
    assert keys[0] != keys[1]
    assert [float(one.params["w"]) for one in found] == [1.0, 2.0]
    with pytest.raises(ValueError, match="one network a generation"):
        distill.generations(KEY, NET, first, [], train)


# --- without data ---------------------------------------------------------------------

MAKER = jitted(network("linen", inputs=5, outputs=6, widths=(7,), normalized=True))


def without_data(**options):
    student, teacher, maker = (
        model.init(jax.random.key(n), jnp.ones((2, size)))
        for n, (model, size) in enumerate(((NET, 6), (NET, 6), (MAKER, 5)))
    )
    task = distill.data_free_objective(
        NET, NET, MAKER, examples=12, noise=5, tap="blocks_0", **options
    )
    return task, distill.with_generator(student, maker), {"teacher": teacher}


def test_generator_and_student_have_losses_of_their_own():
    """No gradient of the student's loss reaches the generator, nor the other way."""
    task, begun, frozen = without_data(sure=0.0, diverse=0.0, active=0.0)
    slope = jax.jit(jax.grad(lambda p: task(p, frozen, begun.model_state, {}, KEY)[0]))
    found = slope(begun.params)
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(found["generator"]))
    assert any(jnp.any(leaf) for leaf in jax.tree.leaves(found["student"]))
    task, *_ = without_data()
    slope = jax.jit(jax.grad(lambda p: task(p, frozen, begun.model_state, {}, KEY)[0]))
    both = slope(begun.params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        both["student"],
        found["student"],
    )
    assert any(jnp.any(leaf) for leaf in jax.tree.leaves(both["generator"]))


def test_what_is_invented_is_sure_and_of_all_classes():
    task, begun, frozen = without_data(active=0.0)
    optimizer = optax.adam(1e-2)
    step = jax.jit(train_step(task, optimizer))
    state = init_state(KEY, begun, optimizer, frozen=frozen)
    seen = []
    for _ in range(150):
        state, measured = step(state, {})
        seen.append(finalize(measured))
    first, last = seen[0], seen[-1]
    assert last["sure"] < 0.8 * first["sure"]
    assert last["diverse"] < 0.9 * -np.log(3)
    assert last["distillation"] < first["distillation"]
    with pytest.raises(ValueError, match="examples and noise: got 0"):
        distill.data_free_objective(NET, NET, MAKER, examples=0)
