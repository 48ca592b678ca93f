"""Baselines on the features of one network, against NumPy, under padding, and right."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtransfer import losses
from jaxtransfer.methods import meta
from jaxtransfer.typing import Variables
from tests.methods.meta import few_shot
from tests.methods.meta.few_shot import KEY, WAYS
from tests.twins import network, same

TAP = {"ways": WAYS, "tap": "features"}
STEPS, RATE, SCALE = 3, 1.0, 3.0
SGD = optax.sgd(RATE)
MEAN = np.random.default_rng(3).normal(size=few_shot.FEATURES) / 4


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def learners(steps=STEPS):
    net, _ = few_shot.made()
    tuned = {**TAP, "steps": steps}
    return {
        "simple_shot": meta.simple_shot(net, **TAP),
        "simple_shot l2": meta.simple_shot(net, **TAP, transform="l2"),
        "nearest_neighbors": meta.nearest_neighbors(net, **TAP, neighbors=3),
        "fine_tuning": meta.fine_tuning(net, SGD, **tuned),
        "fine_tuning of all": meta.fine_tuning(net, SGD, **tuned, body="tuned"),
        "cosine_head": meta.cosine_head(net, SGD, **tuned, scale=SCALE),
        "cosine_head of all": meta.cosine_head(
            net, SGD, **tuned, scale=SCALE, body="tuned"
        ),
        "transductive": meta.transductive_fine_tuning(net, SGD, **tuned),
    }


def begun():
    return Variables(few_shot.made()[1])


@functools.cache
def program(name):
    prepare = meta.with_unlabelled_query if name == "transductive" else lambda x: x
    return few_shot.compiled(learners()[name], prepare)


# --- twins ----------------------------------------------------------------------------


def parts(params, episode):
    return [
        (few_shot.embedded(params, episode[name]["inputs"]), episode[name]["labels"])
        for name in ("support", "query")
    ]


def first_heads(name):
    """The heads of both tasks before any step: they are random, and constants."""
    learner = learners(steps=0)[name]
    support = few_shot.episodes()["support"]
    keys = jax.random.split(KEY, 2)  # as the meta-objective deals them out
    found = jax.jit(jax.vmap(lambda s, k: learner.adapt(begun().params, {}, {}, s, k)))(
        support, keys
    )
    return jax.tree.map(np.asarray, found.params["head"])


def twin_simple_shot(params, episode, centre=MEAN):
    (z, y), (q, labels) = parts(params, episode)
    z, q = few_shot.unit(z - centre), few_shot.unit(q - centre)
    return few_shot.cross_entropy(-few_shot.squared(q, few_shot.means(z, y)), labels)


def tuned_head(head, z, y):
    """Gradient descent on a linear head: the gradient is Z^T (P - Y) / n."""
    kernel, bias = head["kernel"], head["bias"]
    for _ in range(STEPS):
        gaps = (few_shot.softmax(z @ kernel + bias) - np.eye(WAYS)[y]) / len(y)
        kernel, bias = kernel - RATE * z.T @ gaps, bias - RATE * gaps.sum(axis=0)
    return kernel, bias


def tuned_cosines(head, z, y):
    """The same on the sphere: dL/dw = s (I - u u^T) Z^T (P - Y) / (n |w|)."""
    kernel, z = head["kernel"], few_shot.unit(z)
    for _ in range(STEPS):
        lengths = np.sqrt((kernel**2).sum(axis=0))
        ways = kernel / lengths
        gaps = (few_shot.softmax(SCALE * z @ ways) - np.eye(WAYS)[y]) / len(y)
        slope = SCALE * z.T @ gaps
        kernel = kernel - RATE * (slope - ways * (ways * slope).sum(axis=0)) / lengths
    return kernel


def number_of(episode):
    """Which of the tasks it is."""
    first = few_shot.episodes()["support"]["inputs"][0]
    return 0 if np.array_equal(episode["support"]["inputs"], first) else 1


def twin_fine_tuning(params, episode, heads):
    (z, y), (q, labels) = parts(params, episode)
    kernel, bias = tuned_head(few_shot.task_of(heads, number_of(episode)), z, y)
    return few_shot.cross_entropy(q @ kernel + bias, labels)


def twin_cosine_head(params, episode, heads):
    (z, y), (q, labels) = parts(params, episode)
    kernel = tuned_cosines(few_shot.task_of(heads, number_of(episode)), z, y)
    logits = SCALE * few_shot.unit(q) @ few_shot.unit(kernel.T).T
    return few_shot.cross_entropy(logits, labels)


@pytest.mark.parametrize(
    "name", ["simple_shot", "simple_shot l2", "fine_tuning", "cosine_head"]
)
def test_value_and_gradient_are_the_twin_s_whatever_the_padding(name, float64):
    """With a held body too: the features are differentiated through all steps."""
    if name.startswith("simple_shot"):
        centre = 0 if name.endswith("l2") else MEAN
        twin = functools.partial(twin_simple_shot, centre=centre)
    else:
        twins = {"fine_tuning": twin_fine_tuning, "cosine_head": twin_cosine_head}
        twin = functools.partial(twins[name], heads=first_heads(name))
    slopes = few_shot.check_twin(program(name), begun(), twin, {"mean": MEAN})
    assert np.abs(slopes["features"]["dense"]["kernel"]).max() > 1e-3


def test_nearest_neighbors_are_those_of_a_sort(float64):
    batch = few_shot.episodes()
    value, slopes, outputs = program("nearest_neighbors")(
        begun(), {}, few_shot.padded(batch)
    )
    total = 0.0
    for number in range(2):
        (z, y), (q, labels) = parts(begun().params, few_shot.task_of(batch, number))
        order = np.argsort(few_shot.squared(q, z), axis=1)[:, :3]
        votes = np.zeros((len(q), WAYS))
        for row, near in enumerate(order):
            for place, index in enumerate(near, 1):
                votes[row, y[index]] += 1 + 2.0**-place
        # The rows of the padding come first.
        np.testing.assert_allclose(outputs[number, 2:], np.log(votes + 1), rtol=1e-9)
        total += few_shot.cross_entropy(np.log(votes + 1), labels)
    np.testing.assert_allclose(value, total / 2, rtol=1e-9)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(slopes))


def test_equal_votes_go_to_the_nearer():
    """Two neighbours of two classes, then three of three."""
    net, _ = few_shot.made()
    inputs = np.random.default_rng(4).normal(size=(3, few_shot.INPUTS))
    support = {"inputs": inputs, "labels": np.array([2, 0, 1])}
    for neighbors in (2, 3):
        learner = meta.nearest_neighbors(net, **TAP, neighbors=neighbors)

        @jax.jit
        def run(params, learner=learner):
            found = learner.adapt(params, {}, {}, support, KEY)
            return learner.predict(found.params, {}, {}, inputs + 1e-3)

        assert run(begun().params).argmax(-1).tolist() == [2, 0, 1]


def by_hand(name, episode, key):
    """Everything tuned, written out in JAX."""
    net, _ = few_shot.made()
    start = learners(steps=0)[name].adapt(
        begun().params, {}, {}, episode["support"], key
    )
    fast = {part: start.params[part] for part in ("network", "head")}

    def logits(fast, inputs):
        _, taps, _ = net.apply(Variables(fast["network"]), inputs, taps=("features",))
        z, head = taps["features"], fast["head"]
        if name == "cosine_head of all":
            lengths = jnp.linalg.norm(head["kernel"], axis=0)
            return (
                SCALE
                * z
                @ head["kernel"]
                / lengths
                / jnp.linalg.norm(z, axis=1, keepdims=True)
            )
        if name == "transductive":
            z = jax.nn.relu(z)
            z = z / jnp.linalg.norm(z, axis=1, keepdims=True)
        return z @ head["kernel"] + head["bias"]

    def loss(fast):
        support = episode["support"]
        found = losses.cross_entropy(logits(fast, support["inputs"]), support["labels"])
        if name != "transductive":
            return found.mean()
        p = jax.nn.softmax(logits(fast, episode["query"]["inputs"]))
        return found.mean() - jnp.sum(p * jnp.log(p), axis=1).mean()

    def step(_, fast):
        return jax.tree.map(lambda w, g: w - RATE * g, fast, jax.grad(loss)(fast))

    fast = jax.lax.fori_loop(0, STEPS, step, fast)
    query = episode["query"]
    return losses.cross_entropy(logits(fast, query["inputs"]), query["labels"]).mean()


@pytest.mark.parametrize(
    "name", ["fine_tuning of all", "cosine_head of all", "transductive"]
)
def test_tuning_of_everything_is_descent_written_out(name, float64):
    batch = few_shot.episodes()
    value, slopes, _ = program(name)(begun(), {}, few_shot.padded(batch))

    @jax.jit
    def expected(batch):
        if name == "transductive":
            batch = meta.with_unlabelled_query(batch)
        return jax.vmap(functools.partial(by_hand, name))(
            batch, jax.random.split(KEY, 2)
        ).mean()

    np.testing.assert_allclose(value, expected(batch), rtol=1e-9)
    assert np.abs(slopes["features"]["dense"]["kernel"]).max() > 1e-3


def test_transductive_heads_begin_at_the_class_means(float64):
    learner = learners(steps=0)["transductive"]
    episode = few_shot.task_of(meta.with_unlabelled_query(few_shot.episodes()), 0)
    found = jax.jit(learner.adapt)(begun().params, {}, {}, episode["support"], KEY)
    (z, y), _ = parts(begun().params, episode)
    expected = few_shot.unit(few_shot.means(np.maximum(z, 0), y)).T
    few_shot.close(found.params["head"], {"kernel": expected, "bias": np.zeros(WAYS)})


@pytest.mark.parametrize("name", learners())
def test_absent_classes_are_never_predicted(name, float64):
    few_shot.check_absent_classes(program(name), begun(), {"mean": MEAN})


@pytest.mark.parametrize("name", learners())
def test_labels_out_of_range_that_are_traced_give_not_a_number(name, float64):
    batch = few_shot.padded(few_shot.episodes())
    batch["support"]["labels"] += 1
    assert np.isnan(program(name)(begun(), {"mean": MEAN}, batch)[0])


# --- they are right more often than chance --------------------------------------------


@pytest.mark.parametrize("name", learners())
def test_they_beat_chance_on_plain_features(name, float64):
    """Classes that stand apart, seen by a network that has never learned."""
    right = {label: [] for label in range(WAYS)}
    for seed in range(20):
        batch = few_shot.episodes(seed=seed)
        centres = 2 * np.random.default_rng(seed).normal(size=(WAYS, few_shot.INPUTS))
        for part in batch.values():
            part["inputs"] = part["inputs"] / 3 + centres[part["labels"]]
        _, _, outputs = program(name)(begun(), {"mean": MEAN}, few_shot.padded(batch))
        chosen = np.argmax(outputs, axis=-1)[:, 2:]
        for label, found in right.items():
            found.append(np.mean(chosen[batch["query"]["labels"] == label] == label))
    balanced = np.mean([np.mean(found) for found in right.values()])
    assert balanced > 0.65, right


def test_the_query_s_own_inputs_help():
    """Entropy of the predictions falls with its weight; the query is sure of itself."""
    net, _ = few_shot.made()
    batch = meta.with_unlabelled_query(few_shot.episodes())
    support = few_shot.task_of(batch["support"], 0)
    unsure = []
    for weight in (0.0, 1.0):
        learner = meta.transductive_fine_tuning(
            net, optax.adam(0.02), **TAP, entropy_weight=weight
        )

        @jax.jit
        def run(params, learner=learner):
            found = learner.adapt(params, {}, {}, support, KEY)
            outputs = learner.predict(found.params, {}, {}, support["unlabelled"])
            return losses.entropy(outputs).mean()

        unsure.append(float(run(begun().params)))
    assert unsure[1] < unsure[0] - 0.05, unsure


# --- statistics, visits, errors -------------------------------------------------------

NORMED = network("linen", inputs=5, outputs=WAYS, widths=(6,), normalized=True)


@pytest.mark.parametrize("name", ["fine_tuning", "transductive"])
def test_whose_statistics_normalise(name):
    """All is tuned: the statistics are those of the parameters that came of it."""
    episode = few_shot.task_of(meta.with_unlabelled_query(few_shot.episodes()), 0)
    support = episode["support"]
    own = support["inputs"].astype(np.float32)
    moved = np.concatenate([own[:1], 3 * own[1:] + 1])
    start = jax.jit(NORMED.init)(KEY, own)
    build = {
        "fine_tuning": functools.partial(meta.fine_tuning, body="tuned"),
        "transductive": meta.transductive_fine_tuning,
    }[name]

    @jax.jit
    def run(inputs):
        outputs, states, again = {}, {}, {}
        for which in ("transductive", "support", "running"):
            learner = build(
                NORMED, SGD, ways=WAYS, steps=2, tap="blocks_0", statistics=which
            )
            found = learner.adapt(start.params, {}, start.model_state, support, KEY)
            outputs[which] = learner.predict(
                found.params, {}, found.model_state, inputs
            )
            states[which] = found.model_state
            again[which] = learner.statistics(
                found.params["network"], {}, start.model_state, support, KEY
            )
        return outputs, states, again

    (first, states, again), (second, _, _) = run(own), run(moved)
    for which in first:
        alone = np.allclose(first[which][0], second[which][0], rtol=1e-5, atol=1e-5)
        assert alone == (which != "transductive"), which
    assert same(states["running"], start.model_state)
    few_shot.close(states["support"], again["support"], 1e-4)
    assert not np.allclose(first["support"], first["running"], atol=1e-2)


def test_a_held_body_stays_as_it_is():
    support = few_shot.task_of(few_shot.episodes(), 0)["support"]
    for name, is_held in (("fine_tuning", True), ("fine_tuning of all", False)):
        found = jax.jit(learners()[name].adapt)(begun().params, {}, {}, support, KEY)
        kernels = (
            net["features"]["dense"]["kernel"]
            for net in (found.params["network"], begun().params)
        )
        assert np.allclose(*kernels, rtol=1e-6) == is_held


@pytest.mark.parametrize("name", ["fine_tuning", "fine_tuning of all"])
def test_every_step_is_looked_at(name, float64):
    batch = few_shot.episodes()
    learner = learners()[name]
    follow = jax.jit(meta.trajectory(learner, chunk=None))
    curves = follow(begun().params, {}, {}, batch, KEY)
    assert curves["loss"].shape == (2, STEPS + 1)
    value, _, _ = program(name)(begun(), {}, few_shot.padded(batch))
    np.testing.assert_allclose(curves["loss"][:, -1].mean(), value, rtol=1e-9)
    assert not np.allclose(curves["loss"][:, 0], curves["loss"][:, 1])


def test_rows_of_a_class_left_out_do_not_take_part_in_the_steps():
    net, params = few_shot.made()
    episode = meta.with_unlabelled_query(few_shot.task_of(few_shot.episodes(), 0))
    support, two = episode["support"], jnp.arange(WAYS) < 2
    learner = meta.transductive_fine_tuning(net, SGD, **TAP, steps=1)
    adapt = jax.jit(learner.adapt)
    found, expected = (
        adapt(params, {}, {}, {**support, "classes": two, **only}, KEY).params
        for only in ({}, {"where": support["labels"] < 2})
    )
    few_shot.close(found, expected, 1e-6)
    assert jnp.abs(found["head"]["kernel"]).max() < 1e3


def test_episodes_carry_the_query_without_its_labels():
    batch = few_shot.padded(few_shot.episodes())
    given = meta.with_unlabelled_query(batch)
    assert same(given["support"]["unlabelled"], batch["query"]["inputs"])
    assert same(given["support"]["unlabelled_where"], batch["query"]["where"])
    assert same(given["query"], batch["query"])
    assert set(batch["support"]) == {"inputs", "labels", "where", "classes"}


def test_what_can_be_wrong_is_told(types_unchecked):
    net, _ = few_shot.made()
    tuned = {"ways": WAYS, "steps": 1}
    for wrong, message in (
        (lambda: meta.simple_shot(net, ways=1), "ways: got 1; .*at least 2"),
        (
            lambda: meta.simple_shot(net, ways=3, transform="zca"),
            'transform: got \'zca\'; choose "none", "l2" or "centred_l2"',
        ),
        (
            lambda: meta.nearest_neighbors(net, ways=3, neighbors=0),
            "neighbors: got 0; it must be 1 or more",
        ),
        (
            lambda: meta.fine_tuning(net, SGD, **tuned, body="frozen"),
            'body: got \'frozen\'; choose "held" or "tuned"',
        ),
        (lambda: meta.fine_tuning(net, SGD, ways=3, steps=-1), "steps: got -1"),
        (lambda: meta.cosine_head(net, SGD, **tuned, scale=0), "scale: got 0"),
        (
            lambda: meta.transductive_fine_tuning(net, SGD, **tuned, entropy_weight=-1),
            "entropy_weight: got -1",
        ),
        (
            lambda: meta.cosine_head(net, SGD, **tuned, statistics="batch"),
            "statistics: got 'batch'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()


def test_what_is_lacking_is_told():
    net, params = few_shot.made()
    support = few_shot.task_of(few_shot.episodes(), 0)["support"]
    for learner, message in (
        (meta.simple_shot(net, **TAP), 'frozen: no "mean" to centre features by'),
        (
            meta.nearest_neighbors(net, **TAP, neighbors=8),
            "neighbors: got 8, more than the 7 rows of the support",
        ),
        (
            meta.transductive_fine_tuning(net, SGD, **TAP),
            "without 'unlabelled', .*wrap the episodes in meta.with_unlabelled_query",
        ),
        (
            meta.fine_tuning(net, SGD, ways=WAYS, steps=1, tap="body"),
            "tap 'body' names no module",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(
                lambda learner=learner: learner.adapt(params, {}, {}, support, KEY)
            )
