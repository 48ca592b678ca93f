"""What a person can do wrong is told clearly: what, where and what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtransfer import data, losses, parallel, tree
from jaxtransfer.methods import adapt, distill, features, finetune, meta
from jaxtransfer.model import with_head
from jaxtransfer.train import init_state, metrics, train_step
from jaxtransfer.typing import Variables
from tests.twins import KINDS, jitted, network

KEY = jax.random.key(0)
X = jnp.ones((4, 6))
LABELS = jnp.array([0, 1, 2, 0])
OPTIMIZER = optax.sgd(0.1)


@pytest.fixture(scope="module", params=KINDS)
def net(request):
    model = network(request.param)
    return model, jitted(model).init(KEY, X)


def run(task, variables, batch, frozen=None):
    """One step as a person runs it: compiled."""
    state = init_state(KEY, variables, OPTIMIZER, frozen=frozen)
    return parallel.jit_step(train_step(task, OPTIMIZER))(state, batch)


def test_a_rule_that_matches_nothing(net):
    model, start = net
    with pytest.raises(ValueError, match=r"'hed' matches no parameter; nearest: 'head"):
        finetune.split(start, "hed")
    with pytest.raises(ValueError, match=r"'block_1' matches no parameter.*blocks_1"):
        tree.match("block_1", tree.flatten(start.params))
    learner = meta.anil(meta.task(model), OPTIMIZER, steps=1, head="classifier")
    episode = {"inputs": X[None], "labels": LABELS[None]}
    with pytest.raises(ValueError, match="'classifier' matches no parameter"):
        run(meta.objective(learner), start, {"support": episode, "query": episode})


def test_rules_that_hold_everything(net):
    _, start = net
    trained, frozen = finetune.split(start, ())
    with pytest.raises(ValueError, match="nothing to learn; do the rules hold"):
        init_state(KEY, trained, OPTIMIZER, frozen=frozen)


def test_a_tap_that_does_not_exist(net):
    model, start = net
    wrong = r"tap 'blocks_2' names no module; nearest: 'blocks_"
    with pytest.raises(ValueError, match=wrong):
        model.apply(start, X, taps=("blocks_2",))
    with pytest.raises(ValueError, match=wrong):
        features.extract_all(model, start, X, tap="blocks_2")
    with pytest.raises(ValueError, match=wrong):
        with_head(model, model, tap="blocks_2").init(KEY, X)
    pair = {"source": {"inputs": X, "labels": LABELS}, "target": {"inputs": X}}
    task = adapt.objective(model, adapt.align(tap="blocks_2"))
    with pytest.raises(ValueError, match=wrong):
        run(task, adapt.init(KEY, model, start, X), pair)
    with pytest.raises(ValueError, match=wrong):
        adapt.init(KEY, model, start, X, critic=model, tap="blocks_2")
    task = distill.cross_domain_objective(model, model, tap="blocks_2")
    with pytest.raises(ValueError, match=wrong):
        run(task, distill.init(start), pair, {"teacher": start})


def test_a_critic_without_a_tap(net):
    model, start = net
    with pytest.raises(ValueError, match="tap: name the layer"):
        adapt.init(KEY, model, start, X, critic=model)


@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [0, 1, 2, -1]])
def test_labels_out_of_range(net, labels):
    """An error where they can be seen, not-a-number where they are traced."""
    model, start = net
    with pytest.raises(ValueError, match=r"labels must be in \[0, 3\).*head more"):
        losses.cross_entropy(model.apply(start, X)[0], jnp.array(labels))
    batch = {"inputs": X, "labels": jnp.array(labels)}
    _, measured = run(finetune.objective(model), start, batch)
    assert np.isnan(metrics.finalize(measured)["loss"])


def test_labels_that_are_no_numbers_of_classes(net, types_unchecked):
    model, start = net
    batch = {"inputs": X, "labels": LABELS.astype(jnp.float32)}
    with pytest.raises(ValueError, match="labels must be integers, got float32"):
        losses.cross_entropy(model.apply(start, X)[0], batch["labels"])


def test_labels_of_another_length(net, types_unchecked):
    model, start = net
    batch = {"inputs": X, "labels": LABELS[:3]}
    with pytest.raises(ValueError, match="labels must have the shape of logits"):
        run(finetune.objective(model), start, batch)


def test_source_and_target_of_different_shapes(net):
    model, start = net
    pair = {
        "source": {"inputs": X, "labels": LABELS},
        "target": {"inputs": jnp.ones((4, 5))},
    }
    task = adapt.objective(model, adapt.align(tap="blocks_1"))
    with pytest.raises(ValueError, match=r"source inputs are \(6,\), target .*\(5,\)"):
        run(task, adapt.init(KEY, model, start, X), pair)
    task = distill.cross_domain_objective(model, model, tap="blocks_1")
    with pytest.raises(ValueError, match=r"source inputs are \(6,\), target .*\(5,\)"):
        run(task, distill.init(start), pair, {"teacher": start})


def test_teacher_and_student_of_different_classes(net):
    model, start = net
    teacher = network("linen", outputs=5)
    given = jitted(teacher).init(KEY, X)
    batch = {"inputs": X, "labels": LABELS}
    with pytest.raises(ValueError, match="student has 3 classes, teacher 5"):
        run(
            distill.objective(model, teacher),
            distill.init(start),
            batch,
            {"teacher": given},
        )


@pytest.mark.parametrize(
    "option", [{"alpha": 1.5}, {"alpha": -0.1}, {"temperature": 0}]
)
def test_weights_and_temperatures_out_of_range(net, option, types_unchecked):
    (name,) = option
    with pytest.raises(ValueError, match=f"{name}: got"):
        distill.objective(net[0], net[0], **option)


def test_ramps_without_an_end_and_terms_of_one_name(net):
    model, _ = net
    with pytest.raises(ValueError, match="steps: term 'domain' follows a ramp"):
        adapt.objective(model, adapt.dann(model, tap="blocks_1"))
    term = adapt.align(tap="blocks_1")
    with pytest.raises(ValueError, match="names must differ.*give name="):
        adapt.objective(model, term, term)


def test_an_empty_pool_of_episodes():
    with pytest.raises(ValueError, match="the episode pool holds no example"):
        data.class_index(np.zeros(0, np.int32))


def test_more_ways_than_classes():
    pool = data.class_index(np.arange(12) % 4)
    with pytest.raises(ValueError, match="ways=5 is more than the 4 classes"):
        data.sample(KEY, X[:, :1], pool, tasks=1, ways=5, shots=1, queries=1)


def test_more_shots_than_examples():
    pool = data.class_index(np.arange(12) % 4)
    with pytest.raises(ValueError, match=r"2 \+ 2 is more than the 3 examples"):
        data.sample(KEY, X[:, :1], pool, tasks=1, ways=2, shots=2, queries=2)


def test_episodes_without_tasks_or_support(net, types_unchecked):
    model, start = net
    learner = meta.maml(meta.task(model), OPTIMIZER, steps=1)
    task = meta.objective(learner)
    some = {"inputs": X[None], "labels": LABELS[None]}
    none = jax.tree.map(lambda leaf: leaf[:0], some)
    empty = jax.tree.map(lambda leaf: leaf[:, :0], some)
    two = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), some)
    with pytest.raises(ValueError, match="non-empty leading axis of tasks"):
        run(task, start, {"support": none, "query": none})
    with pytest.raises(ValueError, match=r"same.*leading axis of tasks.*\[1, 2\]"):
        run(task, start, {"support": some, "query": two})
    with pytest.raises(ValueError, match="support: no examples to adapt on"):
        run(task, start, {"support": empty, "query": some})
    with pytest.raises(ValueError, match="steps: got -1"):
        meta.maml(meta.task(model), OPTIMIZER, steps=-1)
    with pytest.raises(ValueError, match="backward: got 'reverse'; choose"):
        meta.maml(meta.task(model), OPTIMIZER, steps=1, backward="reverse")
    task = meta.objective(learner, chunk=2)
    three = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * 3), some)
    with pytest.raises(ValueError, match="does not divide the 3"):
        run(task, start, {"support": three, "query": three})


def test_a_nan_in_the_data_is_seen_in_the_metrics(net):
    model, start = net
    batch = {"inputs": X.at[2, 3].set(jnp.nan), "labels": LABELS}
    _, measured = run(finetune.objective(model), start, batch)
    final = metrics.finalize(measured)
    assert np.isnan(final["loss"]) and np.isnan(final["gradient_norm"])


@pytest.mark.parametrize("label", [2, -1, 99])
def test_a_row_that_does_not_count_may_hold_anything_finite(net, label):
    model, start = net
    batch = {
        "inputs": X.at[2, 3].set(1e6),
        "labels": LABELS.at[2].set(label),
        "where": jnp.array([True, True, False, True]),
    }
    state, measured = run(finetune.objective(model), start, batch)
    assert np.isfinite(metrics.finalize(measured)["loss"])
    assert np.isfinite(metrics.finalize(measured)["gradient_norm"])
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_a_batch_that_does_not_fit_the_devices(net):
    model, start = net
    state = init_state(KEY, start, OPTIMIZER)
    step = parallel.jit_step(
        train_step(finetune.objective(model), OPTIMIZER), parallel.make_mesh()
    )
    with pytest.raises(ValueError, match=r"batch\['inputs'\].*over 8 devices; make"):
        step(state, {"inputs": X, "labels": LABELS})


def test_a_raw_key(net, types_unchecked):
    with pytest.raises(TypeError, match=r"key: .*jax\.random\.key\(seed\), not"):
        init_state(jax.random.PRNGKey(0), net[1], OPTIMIZER)


def test_no_examples_to_extract_features_of(net):
    model, start = net
    with pytest.raises(ValueError, match="inputs: no examples"):
        features.extract_all(model, start, X[:0], tap="blocks_0")


def test_variables_of_another_model(net):
    """Linen's own words, or ours: the name that is missing is in either."""
    model, start = net
    lacking = Variables({"head": start.params["head"]}, start.model_state)
    with pytest.raises(Exception, match="blocks_0"):
        model.apply(lacking, X)
