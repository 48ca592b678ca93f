import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtransfer import losses, tree
from jaxtransfer.methods import finetune
from jaxtransfer.model import from_linen
from jaxtransfer.train import metrics
from jaxtransfer.typing import Variables
from tests import digits
from tests.twins import KINDS, jitted, network, same

KEY = jax.random.key(0)
BATCH = {
    "inputs": jax.random.normal(KEY, (5, 6)),
    "labels": jnp.array([0, 2, 1, 1, 0]),
}


@pytest.fixture(scope="module", params=KINDS)
def net(request):
    model = network(request.param)
    return model, jitted(model).init(KEY, BATCH["inputs"])


def cross_entropy(logits, labels):
    logits = np.asarray(logits, np.float64)
    normalizer = np.log(np.exp(logits).sum(-1))
    return normalizer - logits[np.arange(len(labels)), labels]


def value(task, params, frozen, state, batch=BATCH, key=KEY):
    return jax.jit(task)(params, frozen, state, batch, key)


def test_the_objective_is_the_mean_cross_entropy(net):
    model, start = net
    loss, (_, measured) = value(finetune.objective(model), *start[:1], {}, {})
    logits = model.apply(start, BATCH["inputs"])[0]
    expected = cross_entropy(logits, BATCH["labels"])
    np.testing.assert_allclose(loss, expected.mean(), rtol=1e-5)
    final = metrics.finalize(measured)
    assert set(final) == {"task_loss", "accuracy"}
    right = np.argmax(logits, -1) == BATCH["labels"]
    np.testing.assert_allclose(final["accuracy"], right.mean(), rtol=1e-6)


def test_rows_that_do_not_count(net):
    model, start = net
    where = jnp.array([True, False, True, True, False])
    task = finetune.objective(model)
    loss, (_, measured) = value(task, start.params, {}, {}, {**BATCH, "where": where})
    rows = jax.tree.map(lambda leaf: leaf[where], BATCH)
    expected, _ = value(task, start.params, {}, {}, rows)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert float(measured["task_loss"].count) == 3
    none = {**BATCH, "where": jnp.zeros(5, bool)}
    assert float(value(task, start.params, {}, {}, none)[0]) == 0.0


def test_the_start_point_draws_what_is_trained(net):
    model, start = net
    trained, frozen = finetune.split(start, ["head", "blocks_1"])
    anchor = jax.tree.map(lambda leaf: leaf - 0.5, trained.params)
    frozen = {**frozen, "anchor": anchor}

    def penalty(params, frozen):
        return 0.2 * losses.l2_sp(params, frozen["anchor"])

    plain = jax.jit(jax.grad(finetune.objective(model), has_aux=True))
    with_it = finetune.objective(model, regularizer=penalty)
    drawn = jax.jit(jax.grad(with_it, has_aux=True))
    arguments = trained.params, frozen, {}, BATCH, KEY
    difference = jax.tree.map(jnp.subtract, drawn(*arguments)[0], plain(*arguments)[0])
    for leaf in jax.tree.leaves(difference):
        np.testing.assert_allclose(leaf, 0.1, atol=1e-6)
    extra = (
        value(with_it, *arguments[:3])[0]
        - value(finetune.objective(model), *arguments[:3])[0]
    )
    expected = 0.2 * 0.5 * 0.25 * tree.size(trained.params)
    np.testing.assert_allclose(extra, expected, rtol=1e-4)


def test_another_loss_and_targets_that_are_no_classes(net):
    model, start = net
    targets = jnp.ones((5, 3))
    task = finetune.objective(model, loss=losses.mean_squared_error)
    loss, (_, measured) = value(
        task, start.params, {}, {}, {**BATCH, "labels": targets}
    )
    output = model.apply(start, BATCH["inputs"])[0]
    np.testing.assert_allclose(loss, np.mean((output - targets) ** 2), rtol=1e-5)
    assert set(measured) == {"task_loss"}


@pytest.mark.parametrize(
    "labels", [jnp.ones((5, 3), int), jnp.arange(30, 35)], ids=["several", "numbers"]
)
def test_integers_that_are_no_classes_have_no_accuracy(labels):
    """Several labels an example, and numbers that one output tells."""
    outputs = labels.shape[1] if labels.ndim == 2 else 1
    model = network("linen", outputs=outputs)
    start = jitted(model).init(KEY, BATCH["inputs"])

    def loss(outputs, labels):
        return jnp.sum((outputs - labels.reshape(outputs.shape)) ** 2, axis=-1)

    task = finetune.objective(model, loss=loss)
    batch = {**BATCH, "labels": labels}
    _, (_, measured) = task(start.params, {}, {}, batch, KEY)
    assert set(measured) == {"task_loss"}


def test_held_layers_give_the_same_output_and_gradient(net):
    model, start = net
    trained, frozen = finetune.split(start, "head")
    gradient = jax.jit(jax.grad(finetune.objective(model), has_aux=True))
    part, _ = gradient(trained.params, frozen, {}, BATCH, KEY)
    whole, _ = gradient(start.params, {}, {}, BATCH, KEY)
    assert set(part) == {"head"}
    for one, other in zip(
        *map(jax.tree.leaves, (part["head"], whole["head"])), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)
    outputs = jax.jit(finetune.predict(model))(
        trained.params, frozen, {}, BATCH["inputs"]
    )
    np.testing.assert_allclose(
        outputs, model.apply(start, BATCH["inputs"])[0], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("kind", KINDS)
def test_held_layers_drop_nothing_and_keep_their_statistics(kind):
    model = network(kind, rate=0.5, normalized=True)
    start = jitted(model).init(KEY, BATCH["inputs"])
    keys = jax.random.key(1), jax.random.key(2)

    def run(rules, train=True):
        trained, frozen = finetune.split(start, rules)
        task = jax.jit(finetune.objective(model, train=train))
        return [
            task(trained.params, frozen, start.model_state, BATCH, key) for key in keys
        ]

    (one, (state, _)), (other, _) = run("head")
    assert float(one) == float(other)
    assert same(state, start.model_state)
    (one, (state, _)), (other, _) = run(["head", "blocks_1"])
    assert float(one) != float(other)
    before, after = start.model_state["batch_stats"], state["batch_stats"]
    assert same(before["blocks_0"], after["blocks_0"])
    assert not same(before["blocks_1"], after["blocks_1"])
    (one, (state, _)), (other, _) = run(".*", train=False)
    assert float(one) == float(other)
    assert same(state, start.model_state)


class _Plain(nn.Module):
    """A normalisation without parameters between two layers."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Dense(4, name="stem")(x))
        bare = {"use_scale": False, "use_bias": False}
        x = nn.BatchNorm(not train, momentum=0.5, **bare, name="norm")(x)
        return nn.Dense(3, name="head")(x)


@pytest.mark.parametrize(("rules", "held"), [("head", True), (["head", "norm"], False)])
def test_statistics_without_parameters_are_held_unless_a_rule_says_so(rules, held):
    model = from_linen(_Plain())
    start = model.init(KEY, BATCH["inputs"])
    trained, frozen = finetune.split(start, rules)
    assert sorted(trained.params) == ["head"]
    task = finetune.objective(model)
    run = jax.jit(lambda frozen: task(trained.params, frozen, start[1], BATCH, KEY))
    _, (state, _) = run(frozen)
    assert same(state, start.model_state) is held
    whole = tree.combine(trained.params, frozen["params"])
    assert same(whole, start.params)


@pytest.mark.parametrize("kind", KINDS)
def test_it_beats_training_from_scratch_on_few_labels(kind):
    """One label a class of the shifted digits, a start from the plain ones."""
    train, test = digits.digits()
    target, held_out = digits.few(digits.shifted(train), 1), digits.shifted(test)
    model = network(kind, inputs=64, outputs=10, widths=(64, 32))
    task, predict = finetune.objective(model), finetune.predict(model)
    fresh = jitted(model).init(KEY, jnp.ones((1, 64)))
    # The source is shown in both polarities, so that its features carry over.
    both = jax.tree.map(
        lambda a, b: np.concatenate([a, b]),
        train,
        {**train, "inputs": 1 - train["inputs"]},
    )
    source = digits.learn(
        task, optax.adam(3e-3), fresh, digits.batches(both, 64), steps=300
    )

    def tuned(start, rules=".*"):
        variables, frozen = finetune.split(start, rules)
        state = digits.learn(
            task,
            optax.adam(1e-3),
            variables,
            digits.batches(target, 20),
            steps=150,
            frozen=frozen,
        )
        return digits.accuracy(predict, state, held_out)

    scratch = tuned(fresh)
    pretrained = Variables(source.params, source.model_state)
    assert tuned(pretrained) > scratch + 0.05
    assert tuned(pretrained, ["head", "blocks_1"]) > scratch + 0.05
