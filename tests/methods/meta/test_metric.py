"""Learners that compare, against NumPy, under padding, and learning."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtransfer.methods import meta
from jaxtransfer.methods.meta.embedding import membership
from jaxtransfer.model import from_linen
from jaxtransfer.typing import Variables
from tests.methods.meta import few_shot
from tests.methods.meta.few_shot import KEY, WAYS, complex_step
from tests.twins import network, same

TAP = {"ways": WAYS, "tap": "features"}


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def module():
    """A relation module, linear, and its variables."""
    model = from_linen(nn.Dense(1))
    random = np.random.default_rng(2)
    params = {
        "kernel": random.normal(size=(2 * few_shot.FEATURES, 1)),
        "bias": random.normal(size=1),
    }
    return model, Variables(params, {})


def learners():
    net, _ = few_shot.made()
    relate, first = module()
    sgd = optax.sgd(0.3)
    return {
        "prototypical": meta.prototypical(net, **TAP),
        "prototypical cosine": meta.prototypical(
            net, **TAP, distance="cosine", scale=3.0, learn_scale=True
        ),
        "matching": meta.matching(net, **TAP, scale=2.0),
        "relation": meta.relation(net, relate, start=first, **TAP),
        "relation by mean": meta.relation(
            net, relate, start=first, **TAP, combine="mean", loss="cross_entropy"
        ),
        "ridge": meta.ridge(net, **TAP, strength=0.5, scale=2.0),
        "ridge as released": meta.ridge(net, **TAP, form="released"),
        "proto_maml": meta.proto_maml(net, sgd, steps=1, rules="head"),
    }


def begun(name):
    """Meta-parameters of float64."""
    start = learners()[name].init(Variables(few_shot.made()[1], {}))
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, float), start)


# --- the twins: (network parameters, others, support features, labels, ...) -> loss ---


def parts(params, episode):
    """Features and labels of support and query."""
    net = params.get("network", params)
    return [
        (few_shot.embedded(net, episode[name]["inputs"]), episode[name]["labels"])
        for name in ("support", "query")
    ]


def twin_prototypical(params, episode):
    (z, y), (q, labels) = parts(params, episode)
    return few_shot.cross_entropy(-few_shot.squared(q, few_shot.means(z, y)), labels)


def twin_cosine(params, episode):
    (z, y), (q, labels) = parts(params, episode)
    centres = few_shot.unit(few_shot.means(z, y))
    logits = params["metric"]["scale"] * few_shot.unit(q) @ centres.T
    return few_shot.cross_entropy(logits, labels)


def twin_matching(params, episode):
    (z, y), (q, labels) = parts(params, episode)
    attention = few_shot.softmax(2.0 * few_shot.unit(q) @ few_shot.unit(z).T)
    mass = attention @ np.eye(WAYS)[y]
    return -np.log(mass[np.arange(len(labels)), labels]).mean()


def scores(params, episode, combine):
    (z, y), (q, labels) = parts(params, episode)
    classes = np.stack([combine(z[y == k], axis=0) for k in range(WAYS)])
    kernel = params["relation"]["kernel"]
    width = z.shape[1]
    score = q @ kernel[width:] + (classes @ kernel[:width]).T
    return score + params["relation"]["bias"], labels


def twin_relation(params, episode):
    score, labels = scores(params, episode, np.sum)
    gaps = 1 / (1 + np.exp(-score)) - np.eye(WAYS)[labels]
    return (gaps**2).sum(axis=1).mean()


def twin_relation_by_mean(params, episode):
    return few_shot.cross_entropy(*scores(params, episode, np.mean))


def twin_ridge(params, episode, released=False):
    """The normal equations, as large as the embedding."""
    (z, y), (q, labels) = parts(params, episode)
    targets, metric = np.eye(WAYS)[y], params["metric"]
    if released:
        z, q = (np.concatenate([x, np.ones((len(x), 1))], axis=1) for x in (z, q))
        z, targets = z / np.sqrt(len(z)), targets / np.sqrt(len(y))
    system = z.T @ z + np.exp(metric["log_strength"]) * np.eye(z.shape[1])
    kernel = np.linalg.solve(system, z.T @ targets)
    logits = metric["scale"] * q @ kernel + metric["offset"]
    return few_shot.cross_entropy(logits, labels)


def twin_proto_maml(params, episode):
    """One step of the head, by hand: the gradient is Z^T (P - Y) / n."""
    (z, y), (q, labels) = parts(params, episode)
    centres = few_shot.means(z, y)
    kernel, bias = 2 * centres.T, -(centres**2).sum(axis=1)
    gaps = (few_shot.softmax(z @ kernel + bias) - np.eye(WAYS)[y]) / len(y)
    kernel, bias = kernel - 0.3 * z.T @ gaps, bias - 0.3 * gaps.sum(axis=0)
    return few_shot.cross_entropy(q @ kernel + bias, labels)


TWINS = {
    "prototypical": twin_prototypical,
    "prototypical cosine": twin_cosine,
    "matching": twin_matching,
    "relation": twin_relation,
    "relation by mean": twin_relation_by_mean,
    "ridge": twin_ridge,
    "ridge as released": lambda *given: twin_ridge(*given, released=True),
    "proto_maml": twin_proto_maml,
}


@functools.cache
def program(name):
    return few_shot.compiled(learners()[name])


@pytest.mark.parametrize("name", TWINS)
def test_value_and_gradient_are_the_twin_s_whatever_the_padding(name, float64):
    slopes = few_shot.check_twin(program(name), begun(name), TWINS[name])
    body = slopes.get("network", slopes)["features"]["dense"]["kernel"]
    assert np.abs(body).max() > 1e-3


@pytest.mark.parametrize("name", TWINS)
def test_absent_classes_are_never_predicted(name, float64):
    few_shot.check_absent_classes(program(name), begun(name))


@pytest.mark.parametrize("name", TWINS)
def test_labels_out_of_range_that_are_traced_give_not_a_number(name, float64):
    batch = few_shot.padded(few_shot.episodes())
    batch["support"]["labels"] += 1
    assert np.isnan(program(name)(begun(name), {}, batch)[0])


def test_proto_maml_begins_at_the_prototypes(float64):
    """Before any step it is the prototypical network, in value and gradient."""
    net, params = few_shot.made()
    start = Variables(params)
    run = few_shot.compiled(meta.proto_maml(net, optax.sgd(0.3), steps=0))
    slopes = few_shot.check_twin(run, start, twin_prototypical)
    assert not np.any(slopes["head"]["kernel"])
    learner = meta.proto_maml(net, optax.sgd(0.3), steps=0)
    support = few_shot.task_of(few_shot.episodes(), 0)["support"]
    found = jax.jit(learner.adapt)(params, {}, {}, support, KEY).params["head"]
    z = few_shot.embedded(params, support["inputs"])
    centres = few_shot.means(z, support["labels"])
    np.testing.assert_allclose(found["kernel"], 2 * centres.T, rtol=1e-12)
    np.testing.assert_allclose(found["bias"], -(centres**2).sum(1), rtol=1e-12)


def test_proto_maml_adapts_the_body_and_takes_learned_rates(float64):
    """What its parts are made of: MAML from the head that was set."""
    net, params = few_shot.made()
    support = few_shot.task_of(few_shot.episodes(), 0)["support"]
    centres = few_shot.means(
        few_shot.embedded(params, support["inputs"]), support["labels"]
    )
    head = {"kernel": 2 * centres.T, "bias": -(centres**2).sum(1)}
    sgd = optax.sgd(0.3)
    expected = jax.jit(meta.maml(meta.task(net), sgd, steps=2).adapt)(
        {**params, "head": head}, {}, {}, support, KEY
    )
    for optimizer in (sgd, meta.meta_sgd(0.3)):
        learner = meta.proto_maml(net, optimizer, steps=2)
        begin = learner.init(Variables(params)).params
        found = jax.jit(learner.adapt)(begin, {}, {}, support, KEY)
        few_shot.close(found.params, expected.params)


def test_absent_classes_leave_the_steps_of_proto_maml_alone(float64):
    """Neither decay nor a clipped norm sees them, and they are never predicted."""
    net, params = few_shot.made()
    support = few_shot.task_of(few_shot.episodes(), 0)["support"]
    support = {**support, "where": support["labels"] < WAYS - 1}
    rows = support["where"]
    z = few_shot.embedded(params, support["inputs"])[rows]
    centres = few_shot.means(z, support["labels"][rows])[: WAYS - 1]
    centres = np.concatenate([centres, np.zeros((1, centres.shape[1]))])
    head = {"kernel": 2 * centres.T, "bias": -(centres**2).sum(1)}
    optimizer = optax.chain(
        optax.add_decayed_weights(1e-4), optax.clip_by_global_norm(1.0), optax.sgd(0.1)
    )
    plain = {**support, "classes": np.arange(WAYS) < WAYS - 1}
    expected = jax.jit(meta.maml(meta.task(net), optimizer, steps=2).adapt)(
        {**params, "head": head}, {}, {}, plain, KEY
    ).params
    learner = meta.proto_maml(net, optimizer, steps=2)
    found = jax.jit(learner.adapt)(params, {}, {}, support, KEY).params
    assert found["head"]["bias"][-1] == -1e9
    expected["head"]["bias"] = expected["head"]["bias"].at[-1].set(-1e9)
    few_shot.close(found, expected)


def test_rows_of_a_class_left_out_do_not_take_part_in_the_steps():
    net, params = few_shot.made()
    learner = meta.proto_maml(net, optax.sgd(0.1), steps=1)
    support = few_shot.task_of(few_shot.episodes(), 0)["support"]
    two = jnp.arange(WAYS) < 2
    whole, masked = (
        {**support, "classes": two},
        {**support, "classes": two, "where": support["labels"] < 2},
    )
    adapt = jax.jit(learner.adapt)
    found, expected = (
        adapt(params, {}, {}, part, KEY).params for part in (whole, masked)
    )
    few_shot.close(found, expected, 1e-6)
    assert jnp.abs(found["head"]["kernel"][:, :2]).max() < 1e3


# --- learning -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "prototypical",
        "matching",
        "relation",
        # Without optimisation, XLA's older code gets this program wrong.
        pytest.param("ridge", marks=pytest.mark.present_code),
        "proto_maml",
    ],
)
def test_it_learns_to_learn(name):
    size = few_shot.SIGNAL + few_shot.NUISANCE
    kind = "nnx" if name == "prototypical" else "linen"  # any model will do
    net = network(kind, inputs=size, outputs=WAYS, widths=(8,))
    relate = network("linen", outputs=1, widths=(16,))
    tap = {"ways": WAYS, "tap": "blocks_0"}
    learner = {
        "prototypical": lambda: meta.prototypical(net, **tap),
        "matching": lambda: meta.matching(net, **tap, scale=10.0),
        "relation": lambda: meta.relation(
            net, relate, start=jax.jit(relate.init)(KEY, jnp.ones((1, 16))), **tap
        ),
        "ridge": lambda: meta.ridge(net, **tap, scale=5.0),
        "proto_maml": lambda: meta.proto_maml(
            net, optax.sgd(0.05), steps=2, tap="blocks_0"
        ),
    }[name]()
    start = learner.init(jax.jit(net.init)(KEY, jnp.ones((1, size))))
    before, after = few_shot.learn(learner, start)
    assert after > 0.8 and after > before + 0.15, (before, after)


# --- statistics, visits, errors -------------------------------------------------------

NORMED = network("linen", inputs=5, outputs=WAYS, widths=(6,), normalized=True)
RELATE = network("linen", outputs=1, widths=(4,), normalized=True)


def normed(name, statistics):
    tap = {"ways": WAYS, "tap": "blocks_0", "statistics": statistics}
    if name == "prototypical":
        return meta.prototypical(NORMED, **tap)
    start = jax.jit(RELATE.init)(KEY, jnp.ones((1, 12)))
    return meta.relation(NORMED, RELATE, start=start, **tap)


@pytest.mark.parametrize("name", ["prototypical", "relation"])
def test_whose_statistics_normalise(name):
    batch = few_shot.task_of(few_shot.episodes(), 0)
    support = batch["support"]
    own = support["inputs"].astype(np.float32)
    moved = np.concatenate([own[:1], 3 * own[1:] + 1])
    learners = {
        which: normed(name, which) for which in ("transductive", "support", "running")
    }
    start = learners["support"].init(jax.jit(NORMED.init)(KEY, own))

    @jax.jit
    def run(inputs):
        outputs, losses, states = {}, {}, {}
        query = {"inputs": inputs, "labels": support["labels"]}
        for which, learner in learners.items():
            params, _, _ = adapted = learner.adapt(
                start.params, {}, start.model_state, support, KEY
            )
            outputs[which] = learner.predict(params, {}, adapted.model_state, inputs)
            losses[which], _ = learner.query(
                params, {}, adapted.model_state, query, KEY
            )
            states[which] = adapted.model_state
        return outputs, losses, states

    (first, losses, states), (second, _, _) = run(own), run(moved)
    for which in learners:
        alone = np.allclose(first[which][0], second[which][0], rtol=1e-5, atol=1e-5)
        assert alone == (which != "transductive"), which
    assert same(states["running"], start.model_state)
    assert not np.allclose(first["support"], first["running"], atol=1e-2)
    if name == "prototypical":  # on its own inputs both see the same statistics
        np.testing.assert_allclose(
            first["support"], first["transductive"], rtol=1e-3, atol=1e-4
        )
        for which, loss in losses.items():  # judged by what is predicted
            expected = few_shot.cross_entropy(first[which], support["labels"])
            np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_statistics_of_the_support_can_be_collected():
    learner = normed("prototypical", "running")
    batch = few_shot.episodes(tasks=1)
    inputs = batch["support"]["inputs"][0].astype(np.float32)
    start = jax.jit(NORMED.init)(KEY, inputs)
    task = meta.objective(learner, collect=0.0, chunk=None)
    _, (state, _) = jax.jit(task)(start.params, {}, start.model_state, batch, KEY)
    dense = start.params["blocks_0"]["dense"]
    expected = np.mean(inputs @ dense["kernel"] + dense["bias"], axis=0)
    found = state["batch_stats"]["blocks_0"]["norm"]["mean"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_learner_without_steps_is_looked_at_once():
    net, params = few_shot.made()
    batch = few_shot.episodes()
    follow = jax.jit(meta.trajectory(meta.prototypical(net, **TAP)))
    curves = follow(params, {}, {}, batch, KEY)
    assert curves["loss"].shape == curves["accuracy"].shape == (2, 1)
    expected = [
        twin_prototypical(params, few_shot.task_of(batch, number)) for number in (0, 1)
    ]
    np.testing.assert_allclose(curves["loss"][:, 0], expected, rtol=1e-5)


def test_held_layers_are_not_learned(float64):
    """The body in ``frozen["params"]``: the same value, a gradient of the rest."""
    net, params = few_shot.made()
    run = few_shot.compiled(meta.prototypical(net, ways=WAYS))
    batch = few_shot.episodes()
    held = {"params": {"features": params["features"]}}
    value, slopes, _ = run(Variables({"head": params["head"]}), held, batch)
    whole, others, _ = run(Variables(params), {}, batch)
    few_shot.close((value, slopes), (whole, {"head": others["head"]}))


def test_what_can_be_wrong_is_told():
    net, params = few_shot.made()
    relate, first = module()
    build = {"ways": WAYS}
    for wrong, message in (
        (lambda: meta.prototypical(net, ways=1), "ways: got 1; .*at least 2"),
        (lambda: meta.relation(net, relate, start=first, ways=0), "ways: got 0"),
        (lambda: meta.matching(net, **build, scale=0.0), "scale: got 0.0; .*positive"),
        (lambda: meta.ridge(net, **build, strength=-1.0), "strength: got -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()


def test_parameters_that_no_learner_began_are_told():
    net, params = few_shot.made()
    relate, first = module()
    support = few_shot.task_of(few_shot.episodes(), 0)["support"]
    for learner, needed in (
        (meta.ridge(net, ways=WAYS), "metric"),
        (meta.prototypical(net, ways=WAYS, learn_scale=True), "metric"),
        (meta.relation(net, relate, start=first, ways=WAYS), "relation"),
        (meta.proto_maml(net, meta.meta_sgd(0.1), steps=1), "optimizer"),
    ):
        message = rf"needs \['network', '{needed}'\]; begin with learner.init"
        with pytest.raises(ValueError, match=message):
            learner.adapt(params, {}, {}, support, KEY)


def test_unknown_names_are_told(types_unchecked):
    net, _ = few_shot.made()
    for wrong, message in (
        ({"distance": "l1"}, "distance: got 'l1'; choose \"squared_euclidean\" or"),
        ({"statistics": "own"}, 'statistics: got \'own\'; choose "transductive", "s'),
    ):
        with pytest.raises(ValueError, match=message):
            meta.prototypical(net, ways=WAYS, **wrong)


@pytest.mark.parametrize("wrong", [-1, WAYS])
def test_a_relation_to_no_class_is_not_a_number(float64, wrong):
    learner, (start, state) = learners()["relation"], begun("relation")
    task = few_shot.task_of(few_shot.episodes(), 0)
    labels = task["query"]["labels"].copy()
    labels[0] = wrong

    @jax.jit
    def loss(labels):
        adapted = learner.adapt(start, {}, state, task["support"], KEY)
        query = {**task["query"], "labels": labels}
        return learner.query(adapted.params, {}, adapted.model_state, query, KEY)[0]

    assert np.isfinite(loss(task["query"]["labels"])) and np.isnan(loss(labels))


def test_bad_labels_are_told():
    net, params = few_shot.made()
    support = few_shot.task_of(few_shot.episodes(), 0)["support"]
    learner = meta.prototypical(net, **TAP)
    wrong = {**support, "labels": np.array([0, 1, 2, 3, 5, 0, 1])}
    for given, message in (
        (wrong, r"labels: got \[3, 5\] with ways=3; .*from 0, raise ways"),
        (
            {**support, "labels": support["labels"].astype(np.float32)},
            r"integers of classes \[rows\], got float32\[7\]",
        ),
        ({name: leaf[:0] for name, leaf in support.items()}, "no examples to adapt on"),
    ):
        with pytest.raises(ValueError, match=message):
            learner.adapt(params, {}, {}, given, KEY)
    counts = np.array([True, True, True, False, False, True, True])
    member = membership({**wrong, "where": counts}, WAYS)
    assert member.sum(axis=1).tolist() == counts.tolist()
    with pytest.raises(ValueError, match="where: must be boolean, got int"):
        membership({**wrong, "where": counts.astype(int)}, WAYS)


@pytest.mark.parametrize(("kind", "ways"), [(np.uint8, 256), (np.int8, 150)])
def test_labels_of_eight_bits_and_more_ways_than_they_can_tell(kind, ways):
    labels = np.array([0, 1, 100], kind)
    assert membership({"labels": labels}, ways).argmax(axis=1).tolist() == [0, 1, 100]


def test_networks_that_do_not_fit_are_told():
    net, params = few_shot.made()
    relate = from_linen(nn.Dense(2))
    pairs = jnp.ones((1, 2 * few_shot.FEATURES))
    first = jax.eval_shape(relate.init, KEY, pairs)
    sgd = optax.sgd(0.1)
    support = few_shot.task_of(few_shot.episodes(), 0)["support"]

    def run(learner):
        start = learner.init(Variables(params))
        found = learner.adapt(start.params, {}, start.model_state, support, KEY)
        learner.predict(found.params, {}, found.model_state, support["inputs"])

    for learner, message in (
        (meta.matching(net, ways=3, tap="feature"), "tap 'feature' names no module"),
        (
            meta.proto_maml(net, sgd, steps=1, head="top"),
            "head: no parameter 'top/kernel'.*nearest: 'head/",
        ),
        (
            meta.proto_maml(net, sgd, steps=1, tap="head"),
            "tap: 'head' has 3 features where the head 'head' takes 4",
        ),
        (
            meta.relation(net, relate, start=zeros(first), **TAP),
            r"module: .* 21 pairs have shape \(21, 2\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda learner=learner: run(learner))


def zeros(shapes):
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def test_a_complex_step_is_a_derivative():
    """The yardstick itself: d/dx of x^3 y."""
    found = complex_step(lambda p: p["x"] ** 3 * p["y"], {"x": 2.0, "y": 5.0})
    assert found == {"x": 60.0, "y": 8.0}
