import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.linear_model import LogisticRegression

from jaxtransfer.methods import features, finetune
from jaxtransfer.model import from_linen
from jaxtransfer.train import metrics
from jaxtransfer.typing import Variables
from tests import digits
from tests.twins import KINDS, jitted, network, same

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (7, 6))
LABELS = jnp.array([0, 2, 1, 1, 0, 2, 0])


@pytest.fixture(scope="module", params=KINDS)
def source(request):
    model = network(request.param, rate=0.5, normalized=True)
    return model, jitted(model).init(KEY, X)


@pytest.fixture(scope="module", params=KINDS)
def head(request):
    model = network(request.param, inputs=8, widths=(4,))
    return model, jitted(model).init(KEY, jnp.ones((2, 8)))


def test_features_are_the_tapped_layer_in_evaluation(source):
    model, given = source
    expected = jitted(model).apply(given, X, taps=("blocks_1",))[1]["blocks_1"]
    found = jax.jit(features.extract(model, tap="blocks_1"))(given, X)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("batch_size", [2, 7, 100])
def test_features_of_a_whole_set_in_batches_of_any_size(source, batch_size):
    model, given = source
    whole = features.extract(model, tap="blocks_0")(given, X)
    parts = features.extract_all(
        model, given, np.asarray(X), tap="blocks_0", batch_size=batch_size
    )
    assert parts.shape == whole.shape
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-6)


class _Pair(nn.Module):
    """A layer of two inputs and two outputs."""

    @nn.compact
    def __call__(self, one, other):
        return _Both(name="both")(one, other)[0]


class _Both(nn.Module):
    @nn.compact
    def __call__(self, one, other):
        return nn.Dense(2)(one), other


def test_layers_of_several_inputs_and_outputs():
    model, inputs = from_linen(_Pair()), (jnp.ones((5, 3)), jnp.arange(5.0))
    given = model.init(KEY, inputs)
    one, other = features.extract_all(model, given, inputs, tap="both", batch_size=2)
    assert one.shape == (5, 2)
    np.testing.assert_array_equal(other, inputs[1])
    uneven = (inputs[0], inputs[1][:4])
    with pytest.raises(ValueError, match=r"inputs: arrays of \[4, 5\] examples"):
        features.extract_all(model, given, uneven, tap="both")


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batches_have_a_row_at_least(source, batch_size):
    with pytest.raises(ValueError, match=f"batch_size: got {batch_size}; it must be"):
        features.extract_all(*source, X, tap="blocks_0", batch_size=batch_size)


def test_the_objective_is_the_head_s_loss_on_features(source, head):
    model, given = source
    task_model, start = head
    task = jax.jit(features.objective(model, task_model, tap="blocks_0"))
    frozen = {"source": given}
    where = jnp.arange(7) < 5
    batch = {"inputs": X, "labels": LABELS, "where": where}
    loss, (_, measured) = task(start.params, frozen, {}, batch, KEY)
    inner = features.extract(model, tap="blocks_0")(given, X[:5])
    expected, (_, plain) = finetune.objective(task_model)(
        start.params, {}, {}, {"inputs": inner, "labels": LABELS[:5]}, KEY
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(
        metrics.finalize(measured)["accuracy"], metrics.finalize(plain)["accuracy"]
    )
    outputs = jax.jit(features.predict(model, task_model, tap="blocks_0"))(
        start.params, frozen, {}, X[:5]
    )
    np.testing.assert_allclose(
        outputs, task_model.apply(start, inner)[0], rtol=1e-5, atol=1e-6
    )


def test_a_source_that_was_not_given_is_named(source, head):
    task = features.objective(source[0], head[0], tap="blocks_1")
    batch = {"inputs": X, "labels": LABELS}
    with pytest.raises(ValueError, match=r"frozen: got \['teacher'\], but no 'source'"):
        task(head[1].params, {"teacher": source[1]}, {}, batch, KEY)


def test_nothing_flows_into_the_source(source, head):
    model, given = source
    task_model, start = head
    task = features.objective(model, task_model, tap="blocks_0")
    batch = {"inputs": X, "labels": LABELS}

    def loss(params, given):
        return task(params, {"source": given}, {}, batch, KEY)[0]

    own, others = jax.jit(jax.grad(loss, argnums=(0, 1)))(start.params, given)
    assert any(jnp.any(leaf != 0) for leaf in jax.tree.leaves(own))
    assert not any(jnp.any(leaf != 0) for leaf in jax.tree.leaves(others))


def standardized(x):
    x = np.asarray(x, np.float64)
    centre, scale = x.mean(0), x.std(0)
    scale = np.where(scale > 0, scale, 1.0)
    return (x - centre) / scale, centre, scale


@pytest.mark.parametrize("l2", [1e-2, 1.0])
def test_the_probe_is_that_of_scikit_learn(l2):
    train, _ = digits.digits()
    x, labels = train["inputs"][:300, 16:48], train["labels"][:300] % 4
    probe = features.logistic_regression(
        jnp.asarray(x), jnp.asarray(labels), classes=4, l2=l2
    )
    inputs, centre, scale = standardized(x)
    solver = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-8, max_iter=5000)
    solver.fit(inputs, labels)
    kernel = solver.coef_.T / scale[:, None]
    bias = solver.intercept_ - centre @ kernel
    np.testing.assert_allclose(
        jax.nn.softmax(x @ probe["kernel"] + probe["bias"]),
        jax.nn.softmax(x @ kernel + bias),
        atol=1e-3,
    )
    np.testing.assert_allclose(
        probe["kernel"] * scale[:, None], solver.coef_.T, atol=1e-3
    )


def test_rows_that_do_not_count_for_the_probe():
    train, _ = digits.digits()
    x, labels = jnp.asarray(train["inputs"][:60]), jnp.asarray(train["labels"][:60] % 3)
    some = features.logistic_regression(x[:40], labels[:40], classes=3, l2=0.1)
    masked = features.logistic_regression(
        x.at[40:].set(jnp.nan),
        labels.at[40:].set(-1),
        classes=3,
        l2=0.1,
        where=jnp.arange(60) < 40,
    )
    np.testing.assert_allclose(some["kernel"], masked["kernel"], atol=1e-3)
    np.testing.assert_allclose(some["bias"], masked["bias"], atol=1e-3)


def test_the_probe_of_small_features_is_that_of_large_ones():
    train, _ = digits.digits()
    x, labels = jnp.asarray(train["inputs"][:60]), jnp.asarray(train["labels"][:60] % 3)
    large, small = (
        features.logistic_regression(scale * x, labels, classes=3, l2=0.1)
        for scale in (1.0, 1e-6)
    )
    np.testing.assert_allclose(1e-6 * small["kernel"], large["kernel"], atol=1e-3)


def test_the_probe_says_that_maps_are_to_be_pooled(types_unchecked):
    maps = np.ones((7, 2, 2, 3), np.float32)
    with pytest.raises(ValueError, match=r"\(7, 2, 2, 3\), needs \[batch, dim\]; pool"):
        features.logistic_regression(maps, LABELS, classes=3)


def test_the_probe_wants_a_label_a_row(types_unchecked):
    with pytest.raises(ValueError, match=r"labels: got shape \(5,\) for .* 7 rows"):
        features.logistic_regression(jnp.ones((7, 2)), jnp.zeros(5, int), classes=2)


def test_the_probe_refuses_a_negative_penalty_and_labels_of_no_class():
    x, labels = jnp.arange(6.0).reshape(3, 2), jnp.array([0, 1, 2])
    with pytest.raises(ValueError, match="l2: got -0.1, needs 0 or more"):
        features.logistic_regression(x, labels, classes=3, l2=-0.1)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 2\).*got \[2\]"):
        features.logistic_regression(x, labels, classes=2)


def test_the_probe_may_be_vmapped_over_its_penalty():
    train, _ = digits.digits()
    x, labels = jnp.asarray(train["inputs"][:60]), jnp.asarray(train["labels"][:60] % 3)

    def fit(l2):
        return features.logistic_regression(x, labels, classes=3, l2=l2)

    many = jax.vmap(fit)(jnp.array([0.01, 1.0]))
    for number, l2 in enumerate((0.01, 1.0)):
        np.testing.assert_allclose(many["kernel"][number], fit(l2)["kernel"], atol=2e-3)
    assert not same(many["kernel"][0], many["kernel"][1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_probe_on_features_beats_one_on_pixels(kind):
    """Two labels a class; the source has learned the digits of the other images."""
    train, test = digits.digits()
    pool, rest = (
        jax.tree.map(lambda leaf, p=p: leaf[p], train)
        for p in (slice(0, 700), slice(700, None))
    )
    model = network(kind, inputs=64, outputs=10, widths=(64, 32))
    fresh = jitted(model).init(KEY, jnp.ones((1, 64)))
    state = digits.learn(
        finetune.objective(model),
        optax.adam(3e-3),
        fresh,
        digits.batches(pool, 64),
        steps=200,
    )
    given = Variables(state.params, state.model_state)
    target = digits.few(rest, 2)

    def score(extract):
        probe = features.logistic_regression(
            extract(target["inputs"]), jnp.asarray(target["labels"]), classes=10
        )
        outputs = extract(test["inputs"]) @ probe["kernel"] + probe["bias"]
        return float((outputs.argmax(-1) == test["labels"]).mean())

    def extracted(inputs):
        return features.extract_all(model, given, inputs, tap="blocks_1")

    assert score(extracted) > score(jnp.asarray) + 0.05


def test_images_as_stored_are_refused(source):
    images = np.zeros((3, 4, 4, 1), np.uint8)
    with pytest.raises(ValueError, match=r"inputs: got uint8 .* so divide by 255"):
        features.extract_all(source[0], source[1], images, tap="blocks_0")
