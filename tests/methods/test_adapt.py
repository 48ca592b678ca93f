import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtransfer import losses, ops, tree
from jaxtransfer.methods import adapt, finetune
from jaxtransfer.model import from_linen
from jaxtransfer.train import init_state, metrics, train_step
from jaxtransfer.typing import Variables
from tests import digits
from tests.twins import KINDS, jitted, network, same

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (6, 6))
SOURCE = {"inputs": X, "labels": jnp.array([0, 2, 1, 1, 0, 2])}
TARGET = {"inputs": 0.5 * X[:4] + 1}
PAIR = {"source": SOURCE, "target": TARGET}
CRITIC = network("nnx", inputs=5, outputs=1, widths=(4,))


@pytest.fixture(scope="module", params=KINDS)
def net(request):
    model = network(request.param)
    return model, jitted(model).init(KEY, X)


def begin(net, critic=None, updates=0):
    started = adapt.init(KEY, *net, X, critic=critic, tap="blocks_1")
    started.model_state["updates"] = jnp.array(updates, jnp.int32)
    return started


def value(task, started, pair=PAIR):
    return jax.jit(task)(started.params, {}, started.model_state, pair, KEY)


def tapped(net, inputs, tap="blocks_1"):
    model, start = net
    return model.apply(start, inputs, taps=(tap,))[1][tap]


def test_without_terms_it_is_the_source_loss(net):
    loss, (state, measured) = value(adapt.objective(net[0]), begin(net))
    expected, _ = finetune.objective(net[0])(net[1].params, {}, {}, SOURCE, KEY)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert set(measured) == {"task_loss", "accuracy"}
    assert int(state["updates"]) == 1


@pytest.mark.parametrize(
    ("outputs", "loss", "source"),
    [
        (3, losses.cross_entropy, {"classes": jnp.array([True, False, True])}),
        (3, losses.cross_entropy, {"labels": [0, 2, 1, 1, 0, 2]}),
        (1, lambda z, y: (z - y)[:, 0] ** 2, {"labels": jnp.arange(6)[:, None]}),
        (1, lambda z, y: (z[:, 0] - y) ** 2, {"labels": jnp.arange(6)}),
    ],
    ids=["classes", "list", "numbers", "flat numbers"],
)
def test_the_source_is_learned_as_in_finetuning(outputs, loss, source):
    model, source = from_linen(nn.Dense(outputs)), {**SOURCE, **source}
    start = model.init(KEY, X)
    one = adapt.objective(model, loss=loss)(
        {"model": start.params},
        {},
        adapt.init(KEY, model, start, X).model_state,
        {"source": source, "target": TARGET},
        KEY,
    )
    other = finetune.objective(model, loss=loss)(start.params, {}, {}, source, KEY)
    assert float(one[0]) == float(other[0])
    assert same(one[1][1], other[1][1])


def test_inputs_of_several_arrays():
    class Sum(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool = False):
            return nn.Dense(3, name="head")(x["a"] + x["b"])

    def halves(batch):
        return {**batch, "inputs": {"a": batch["inputs"] / 2, "b": batch["inputs"] / 2}}

    model = from_linen(Sum())
    params = model.init(KEY, halves(SOURCE)["inputs"]).params
    term = adapt.align(losses.coral, tap="head")
    batch = {"source": halves(SOURCE), "target": halves(TARGET)}
    started = {"model": params}, {}, {"model": {}, "updates": 0}, batch, KEY
    found = [
        adapt.objective(model, *terms, joint=joint)(*started)[0]
        for terms, joint in (((), True), ((term,), True), ((term,), False))
    ]
    logits = X @ params["head"]["kernel"]
    other = TARGET["inputs"] @ params["head"]["kernel"]
    task = losses.cross_entropy(logits, SOURCE["labels"]).mean()
    both = task + losses.coral(logits, other)
    np.testing.assert_allclose(found, [task, both, both], rtol=1e-5)


@pytest.mark.parametrize("distance", [losses.mmd, losses.coral])
def test_alignment_is_the_weighted_distance_of_the_taps(net, distance):
    source_only, _ = value(adapt.objective(net[0]), begin(net))
    for tap in ("blocks_0", "blocks_1"):
        term = adapt.align(distance, tap=tap, weight=0.3, name="distance")
        loss, (_, measured) = value(adapt.objective(net[0], term), begin(net))
        expected = distance(tapped(net, X, tap), tapped(net, TARGET["inputs"], tap))
        np.testing.assert_allclose(measured["distance"], expected, rtol=1e-4)
        np.testing.assert_allclose(loss, source_only + 0.3 * expected, rtol=1e-4)


def test_several_terms_add_up(net):
    terms = [
        adapt.align(losses.mmd, tap="blocks_0", weight=0.3, name="mmd"),
        adapt.align(losses.coral, tap="blocks_1", weight=2.0, name="coral"),
    ]
    loss, (_, measured) = value(adapt.objective(net[0], *terms), begin(net))
    parts = measured["task_loss"].total / 6, measured["mmd"], measured["coral"]
    np.testing.assert_allclose(
        loss, parts[0] + 0.3 * parts[1] + 2.0 * parts[2], rtol=1e-5
    )


def test_a_term_may_see_classes_and_predictions(net):
    model, start = net
    terms = {
        "local": adapt.compare(
            lambda source, target: losses.local_maximum_mean_discrepancy(
                source.features,
                target.features,
                source.labels,
                jax.nn.softmax(target.outputs),
            ),
            tap="blocks_1",
            name="local",
        ),
        "joint": adapt.compare(
            lambda source, target: losses.joint_maximum_mean_discrepancy(
                source.features, target.features
            ),
            tap=("blocks_0", "blocks_1"),
            name="joint",
            weight=0.5,
        ),
        "confusion": adapt.compare(
            lambda _, target: losses.minimum_class_confusion(target.outputs),
            name="confusion",
        ),
        "unseen": adapt.compare(
            lambda _, target: jnp.float32(target.labels is None), name="unseen"
        ),
    }
    loss, (_, measured) = value(adapt.objective(model, *terms.values()), begin(net))
    both = X, TARGET["inputs"]
    low, high = ([tapped(net, x, f"blocks_{n}") for x in both] for n in (0, 1))
    theirs = model.apply(start, TARGET["inputs"])[0]
    expected = {
        "local": losses.local_maximum_mean_discrepancy(
            *high, SOURCE["labels"], jax.nn.softmax(theirs)
        ),
        "joint": losses.joint_maximum_mean_discrepancy(*zip(low, high, strict=True)),
        "confusion": losses.minimum_class_confusion(theirs),
        "unseen": 1.0,
    }
    for name, number in expected.items():
        np.testing.assert_allclose(measured[name], number, rtol=1e-4, atol=1e-6)
    plain = value(adapt.objective(model), begin(net))[0]
    total = sum(terms[name].weight * number for name, number in expected.items())
    np.testing.assert_allclose(loss, plain + total, rtol=1e-5)


@pytest.mark.parametrize("entropy", [False, True])
def test_the_critic_of_cdan_sees_features_times_predictions(net, entropy):
    model, start = net
    critic = network("linen", inputs=15, outputs=1, widths=(4,))
    started = adapt.init(
        KEY, model, start, X, critic=critic, tap="blocks_1", conditional=True
    )
    term = adapt.cdan(critic, tap="blocks_1", entropy=entropy, reversal=0.7)
    given = {}, started.model_state, PAIR, KEY

    def gradient(*terms):
        task = adapt.objective(model, *terms)
        return jax.jit(jax.grad(task, has_aux=True))(started.params, *given)

    def by_hand(params):
        logits, outputs = [], []
        for x in (X, TARGET["inputs"]):
            out, found, _ = model.apply(
                Variables(params["model"]), x, taps=("blocks_1",)
            )
            odds = jax.lax.stop_gradient(jax.nn.softmax(out))
            seen = (odds[:, :, None] * found["blocks_1"][:, None]).reshape(len(x), -1)
            logits.append(critic.apply(Variables(params["critic"]), seen)[0])
            outputs.append(out)
        weights = losses.entropy_weights(*outputs) if entropy else (None, None)
        return losses.domain_adversarial(
            *logits, source_weights=weights[0], target_weights=weights[1]
        )

    total, (_, measured) = gradient(term)
    slopes = jax.grad(by_hand)(started.params)
    moved = jax.tree.map(jnp.subtract, total["model"], gradient()[0]["model"])
    for one, other in zip(*map(jax.tree.leaves, (moved, slopes["model"])), strict=True):
        np.testing.assert_allclose(one, -0.7 * other, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(measured["domain"], by_hand(started.params), rtol=1e-5)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6),
        total["critic"],
        slopes["critic"],
    )


@pytest.mark.parametrize("updates", [0, 3, 10, 20])
def test_a_ramp_follows_the_updates(net, updates):
    term = adapt.align(tap="blocks_1", weight=lambda progress: 2.0 * progress)
    task = adapt.objective(net[0], term, steps=10)
    loss, (state, measured) = value(task, begin(net, updates=updates))
    expected = 2.0 * min(updates / 10, 1.0) * measured["alignment"]
    np.testing.assert_allclose(
        loss - measured["task_loss"].total / 6, expected, rtol=1e-4, atol=1e-6
    )
    assert int(state["updates"]) == updates + 1


def test_the_training_step_counts_the_updates(net):
    term = adapt.align(tap="blocks_1", weight=lambda progress: progress)
    optimizer = optax.sgd(0.1)
    step = jax.jit(train_step(adapt.objective(net[0], term, steps=4), optimizer))
    state = init_state(KEY, begin(net), optimizer)
    for _ in range(3):
        state, _ = step(state, PAIR)
    assert int(state.model_state["updates"]) == 3


def test_labels_of_the_target_are_not_read(net):
    term = adapt.align(tap="blocks_1")
    task = adapt.objective(net[0], term)
    plain, _ = value(task, begin(net))
    labelled = {**PAIR, "target": {**TARGET, "labels": jnp.full(4, -7)}}
    assert float(plain) == float(value(task, begin(net), labelled)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("joint", [True, False])
def test_held_layers_stay_and_run_as_in_evaluation(kind, joint):
    model = network(kind, normalized=True, rate=0.5)
    started = adapt.init(
        KEY, model, jitted(model).init(KEY, X), X, critic=CRITIC, tap="blocks_1"
    )
    rules = ("model/blocks_1", "model/head", "critic")
    trained, frozen = finetune.split(started, rules)
    terms = adapt.align(tap="blocks_0"), adapt.dann(CRITIC, tap="blocks_1")
    task = adapt.objective(model, *terms, steps=5, joint=joint)
    optimizer = optax.sgd(0.1)
    state = init_state(KEY, trained, optimizer, frozen=frozen)
    after, measured = jax.jit(train_step(task, optimizer))(state, PAIR)
    before = started.model_state["model"]["batch_stats"]
    now = after.model_state["model"]["batch_stats"]
    assert same(now["blocks_0"], before["blocks_0"])
    assert not same(now["blocks_1"], before["blocks_1"])
    assert set(after.params["model"]) == {"blocks_1", "head"}
    found = [
        model.apply(of_network(started), inputs, taps=("blocks_0",))[1]["blocks_0"]
        for inputs in (X, TARGET["inputs"])
    ]
    np.testing.assert_allclose(
        metrics.value(measured["alignment"]), losses.mmd(*found), rtol=1e-4
    )
    outputs = adapt.predict(model)(after.params, frozen, after.model_state, X)
    whole = tree.combine(after.params["model"], frozen["params"]["model"])
    given = Variables(whole, after.model_state["model"])
    assert same(outputs, model.apply(given, X)[0])


def of_network(started):
    return Variables(started.params["model"], started.model_state["model"])


def test_what_is_held_is_of_the_network(net):
    trained, frozen = finetune.split(net[1], "head")
    task = adapt.objective(net[0])
    started = adapt.init(KEY, net[0], trained, X)
    with pytest.raises(ValueError, match="got 'blocks_0'; split what adapt.init retu"):
        task(started.params, frozen, started.model_state, PAIR, KEY)


def test_a_mask_of_pixels_is_the_task_loss_s():
    net, x = from_linen(nn.Dense(3)), jax.random.normal(KEY, (4, 2, 5))
    where = jnp.arange(8).reshape(4, 2) % 3 > 0
    source = {"inputs": x, "labels": jnp.arange(8).reshape(4, 2) % 3, "where": where}
    pair = {"source": source, "target": {"inputs": x}}
    started = adapt.init(KEY, net, net.init(KEY, x), x)
    _, (_, measured) = value(adapt.objective(net), started, pair)
    each = losses.cross_entropy(net.apply(of_network(started), x)[0], source["labels"])
    pair = measured["task_loss"]
    np.testing.assert_allclose(metrics.value(pair), each[where].mean(), rtol=1e-5)


@pytest.mark.parametrize("progress", [0.25, 1.0])
def test_the_critic_learns_and_the_features_are_turned_against_it(net, progress):
    """d/d critic = +gradient of its loss, d/d features = -ramp times it."""
    model, _ = net
    started = begin(net, CRITIC, updates=int(20 * progress))
    term = adapt.dann(CRITIC, tap="blocks_1")

    def gradient(*terms):
        task = adapt.objective(model, *terms, steps=20)
        arguments = {}, started.model_state, PAIR, KEY
        return jax.jit(jax.grad(task, has_aux=True))(started.params, *arguments)[0]

    def critics_loss(params):
        rows = [
            model.apply(Variables(params["model"]), inputs, taps=("blocks_1",))[1]
            for inputs in (X, TARGET["inputs"])
        ]
        own = Variables(params["critic"])
        logits = [CRITIC.apply(own, row["blocks_1"])[0] for row in rows]
        return losses.domain_adversarial(*logits)

    total, plain = gradient(term), gradient()
    unreversed = jax.jit(jax.grad(critics_loss))(started.params)
    strength = 2 / (1 + np.exp(-10 * progress)) - 1
    np.testing.assert_allclose(ops.dann(progress), strength, rtol=1e-5)
    adversarial = jax.tree.map(jnp.subtract, total, plain)
    expected = {
        "critic": unreversed["critic"],
        "model": jax.tree.map(lambda g: -strength * g, unreversed["model"]),
    }
    for one, other in zip(*map(jax.tree.leaves, (adversarial, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)
    assert any(jnp.abs(g).max() > 1e-3 for g in jax.tree.leaves(expected["model"]))


def test_a_critic_of_another_shape_names_the_remedy():
    net, critic = network("linen"), network("linen", inputs=5, outputs=1, widths=(4,))
    started = adapt.init(KEY, net, net.init(KEY, X), X, critic=critic, tap="blocks_1")
    task = adapt.objective(net, adapt.cdan(critic, tap="blocks_1", reversal=1.0))
    with pytest.raises(Exception, match=r"\(5, 4\)|\(15, 4\)") as raised:
        value(task, started)
    assert any("(10, 15); adapt.init" in note for note in raised.value.__notes__)


def test_metrics_of_the_critic(net):
    term = adapt.dann(CRITIC, tap="blocks_1", weight=0.5, reversal=1.0)
    loss, (_, measured) = value(adapt.objective(net[0], term), begin(net, CRITIC))
    assert set(measured) == {"task_loss", "accuracy", "domain", "domain_accuracy"}
    assert 0.0 <= float(measured["domain_accuracy"]) <= 1.0
    np.testing.assert_allclose(
        loss, measured["task_loss"].total / 6 + 0.5 * measured["domain"], rtol=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_both_domains_share_one_batch_of_statistics(kind):
    model = network(kind, normalized=True)
    start = jitted(model).init(KEY, X)
    task = adapt.objective(model, adapt.align(tap="blocks_1"))
    started = adapt.init(KEY, model, start, X)
    _, (state, _) = value(task, started)
    both = jnp.concatenate([X, TARGET["inputs"]])
    _, _, expected = jitted(model).apply(start, both, train=True)
    for one, other in zip(
        *map(jax.tree.leaves, (state["model"], expected)), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_each_domain_by_its_own_statistics(kind):
    """The running ones are then the target's."""
    model = network(kind, normalized=True)
    start = jitted(model).init(KEY, X)
    term = adapt.align(losses.mmd, tap="blocks_1", name="distance")
    task = adapt.objective(model, term, joint=False)
    started = adapt.init(KEY, model, start, X)
    loss, (state, measured) = value(task, started)

    def alone(inputs):
        return jitted(model).apply(start, inputs, train=True, taps=("blocks_1",))

    outputs, of_source, _ = alone(X)
    _, of_target, expected = alone(TARGET["inputs"])
    for one, other in zip(
        *map(jax.tree.leaves, (state["model"], expected)), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    distance = losses.mmd(of_source["blocks_1"], of_target["blocks_1"])
    np.testing.assert_allclose(measured["distance"], distance, rtol=1e-4)
    of_labels = losses.cross_entropy(outputs, SOURCE["labels"]).mean()
    np.testing.assert_allclose(loss, of_labels + distance, rtol=1e-4)


def test_terms_that_can_not_work_are_refused(net):
    with pytest.raises(ValueError, match="steps: term 'domain' follows a ramp"):
        adapt.objective(
            net[0], adapt.dann(CRITIC, tap="blocks_1", weight=ops.dann, reversal=1.0)
        )
    with pytest.raises(ValueError, match="'task_loss' is the objective's own"):
        adapt.objective(net[0], adapt.align(tap="blocks_1", name="task_loss"))
    with pytest.raises(ValueError, match="'gradient_norm' is the objective's own"):
        adapt.objective(net[0], adapt.align(tap="blocks_1", name="gradient_norm"))
    judges = [adapt.dann(CRITIC, tap="blocks_1", name=name) for name in "ab"]
    with pytest.raises(ValueError, match=r"\['a', 'b'\] would share one critic"):
        adapt.objective(net[0], *judges, steps=9)
    gathers = functools.partial(losses.mmd, axis_name="data")
    term = adapt.align(gathers, tap="blocks_1")
    with pytest.raises(ValueError, match="'alignment': .* gathered twice; leave it"):
        value(adapt.objective(net[0], term, axis_name="data"), begin(net))
    for call in (
        lambda: adapt.objective(net[0])(net[1].params, {}, {}, PAIR, KEY),
        lambda: adapt.predict(net[0])(net[1].params, {}, {}, X),
    ):
        with pytest.raises(ValueError, match=r"params: got .* no 'model'; .*init\("):
            call()
    task = adapt.objective(net[0], adapt.dann(CRITIC, tap="blocks_1"), steps=9)
    with pytest.raises(ValueError, match=r"critic: .* adapt.init"):
        value(task, begin(net))
    masked = {**PAIR, "source": {**SOURCE, "where": jnp.ones(6, bool)}}
    with pytest.raises(ValueError, match="source: got 'where'"):
        value(adapt.objective(net[0]), begin(net), masked)

    accuracy = adapt.align(tap="blocks_1", name="domain_accuracy")
    critic = adapt.dann(CRITIC, tap="blocks_1", reversal=1.0)
    twice = adapt.objective(net[0], critic, accuracy)
    begun = adapt.init(KEY, *net, SOURCE["inputs"], critic=CRITIC, tap="blocks_1")
    with pytest.raises(ValueError, match="two give a metric 'domain_accuracy'; give"):
        value(twice, begun)
    empty = {**PAIR, "target": {"inputs": PAIR["target"]["inputs"][:0]}}
    with pytest.raises(ValueError, match="target: got no examples"):
        value(adapt.objective(net[0], accuracy), begin(net), empty)


def test_predict_is_the_network(net):
    started = begin(net, CRITIC)
    outputs = adapt.predict(net[0])(started.params, {}, started.model_state, X)
    np.testing.assert_allclose(outputs, net[0].apply(net[1], X)[0], rtol=1e-6)


def moved(batch):
    """Fainter, on grey paper, a pixel to the right."""
    images = batch["inputs"].reshape(-1, 8, 8)
    images = 0.2 + 0.6 * np.roll(images, 1, axis=2)
    return {**batch, "inputs": images.reshape(-1, 64).astype(np.float32)}


@pytest.mark.parametrize("kind", KINDS)
def test_alignment_beats_source_only_under_a_shift(kind):
    train, test = digits.digits()
    pool = {"source": train, "target": {"inputs": moved(train)["inputs"]}}
    model = network(kind, inputs=64, outputs=10, widths=(64, 32))
    fresh = jitted(model).init(KEY, jnp.ones((1, 64)))
    ways = {
        "source only": [],
        "mmd": [adapt.align(losses.mmd, tap="blocks_1")],
        "coral": [adapt.align(losses.coral, tap="blocks_1", weight=10.0)],
    }
    scores = {}
    for name, terms in ways.items():
        started = adapt.init(KEY, model, fresh, jnp.ones((1, 64)))
        state = digits.learn(
            adapt.objective(model, *terms, steps=400),
            optax.adam(2e-3),
            started,
            digits.batches(pool, 64),
            steps=400,
        )
        scores[name] = digits.accuracy(adapt.predict(model), state, moved(test))
    baseline = scores.pop("source only")
    assert min(scores.values()) > baseline + 0.05, (baseline, scores)
