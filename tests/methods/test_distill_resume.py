"""A run that reads a teacher cache, stopped and gone on with: the same to the last bit.

The student, its bridge, the optimizer, CRD's memory, the count that a weight follows,
the place in the data and in the variants of the cache.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtransfer import data, losses, nets, parallel
from jaxtransfer.methods import distill
from jaxtransfer.methods.distill import Augmentation, Term
from jaxtransfer.model import from_linen
from jaxtransfer.train import Checkpointer, fit, init_state, train_step
from tests.twins import same

KEY = jax.random.key(0)
NUMBER, BATCH, STEPS = 20, 8, 9  # 3.6 epochs
X = np.asarray(jax.random.normal(KEY, (NUMBER, 6)))
COLUMNS = {"inputs": X, "labels": np.arange(NUMBER) % 3, "index": np.arange(NUMBER)}
SMALL, LARGE = (from_linen(nets.MLP(3, widths=(n,))) for n in (4, 8))
TEACHER = LARGE.init(jax.random.key(1), X)
AUGMENTATION = Augmentation(
    lambda key, x: jnp.roll(x, jax.random.randint(key, (), 0, 6)),
    key=jax.random.key(2),
    variants=3,
)
OPTIMIZER = optax.adam(1e-2)


def contrastive(own, taught, indices, *, state, key):
    negatives = losses.sample_negatives(key, COLUMNS["labels"], indices, count=4)
    given = own, taught, indices, negatives, state
    value = losses.contrastive_representation_distillation(*given)
    return value, losses.update_contrastive_memory(*given)


TERMS = {
    "logits": Term(
        loss=losses.knowledge_distillation, weight=optax.linear_schedule(0, 1, 7)
    ),
    "crd": Term(
        loss=contrastive,
        student="features",
        teacher="features",
        bridge=distill.match(),
        batch=("index",),
        random=True,
        state=losses.contrastive_memory(KEY, examples=NUMBER, features=8),
    ),
}
OBJECTIVE = distill.objective(SMALL, LARGE, terms=TERMS)
STEP = parallel.jit_step(train_step(OBJECTIVE, OPTIMIZER))


def write(folder, variables=TEACHER, augmentation=AUGMENTATION):
    return distill.cache_teacher(
        folder,
        LARGE,
        variables,
        X,
        augmentation=augmentation,
        taps=("features",),
        batch_size=BATCH,
    )


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    return write(tmp_path_factory.mktemp("cache"))


def begin(**frozen):
    begun = distill.start(
        jax.random.key(3),
        SMALL,
        LARGE,
        TERMS,
        student_variables=SMALL.init(jax.random.key(4), X),
        teacher_variables=TEACHER,
        inputs=X,
    )
    return init_state(KEY, begun, OPTIMIZER, frozen=frozen)


def read(cache):
    """The stream of batches from its beginning, with what the teacher says."""
    return cache.batches(data.batches(COLUMNS, batch_size=BATCH, seed=0))


def train(state, batches, steps, checkpointer=None, step=STEP):
    state, _ = fit(
        step, state, batches, steps=steps, checkpointer=checkpointer, progress=False
    )
    return state


def arrays(state):
    return state.params, state.model_state, state.opt_state, state.step


@pytest.mark.parametrize("stop", [1, 4, 5])
def test_stopped_and_gone_on_with_is_uninterrupted(cached, tmp_path, stop):
    expected = train(begin(), read(cached), STEPS)
    assert int(expected.model_state["updates"]) == STEPS
    with Checkpointer(tmp_path) as checkpointer:
        train(begin(), read(cached), stop, checkpointer)
    again = distill.open_cache(
        cached.folder, variables=TEACHER, examples=X, augmentation=AUGMENTATION
    )
    batches = read(again)
    with Checkpointer(tmp_path) as checkpointer:
        found = train(begin(), batches, STEPS, checkpointer)
    assert same(arrays(found), arrays(expected))
    first = begin()
    memory = first.model_state["terms"]["crd"]
    assert not same(expected.model_state["terms"]["crd"], memory)
    # Where the batches are now: one after the last, of another variant than the first.
    uninterrupted = read(cached)
    for _ in range(STEPS):
        next(uninterrupted)
    assert batches.get_state() == uninterrupted.get_state()
    assert same(next(batches), next(uninterrupted))


def test_without_its_place_a_run_would_be_another(cached, tmp_path):
    """The test above can fail: batches that start over give another student."""
    expected = train(begin(), read(cached), STEPS)
    with Checkpointer(tmp_path) as checkpointer:
        train(begin(), read(cached), 4, checkpointer)
        state = checkpointer.restore(begin())
    assert not same(arrays(train(state, read(cached), STEPS)), arrays(expected))


@pytest.mark.parametrize("kind", ["teacher", "augmentation"])
def test_another_cache_is_not_gone_on_with(cached, tmp_path, kind):
    with Checkpointer(tmp_path / "run") as checkpointer:
        train(begin(), read(cached), 4, checkpointer)
    if kind == "teacher":
        other = write(tmp_path / "cache", LARGE.init(jax.random.key(9), X))
        message = "read a cache of another teacher: its fingerprint was"
    else:
        changed = dataclasses.replace(AUGMENTATION, variants=2)
        other = write(tmp_path / "cache", augmentation=changed)
        message = "read a cache of another augmentation: its variants was 3.* is 2"
    with Checkpointer(tmp_path / "run") as checkpointer:
        with pytest.raises(ValueError, match=message):
            train(begin(), read(other), STEPS, checkpointer)
        train(begin(), read(cached), 6, checkpointer)  # nothing is lost


def looked_up(state, batch):
    """A step whose cache lies on the device, among what is given to the run."""
    epoch = state.step // (NUMBER // BATCH)
    variant = AUGMENTATION.variant(epoch)
    inputs = AUGMENTATION(batch["inputs"], batch["index"], variant)
    taught = state.frozen["cache"].lookup(batch["index"], variant)
    step = train_step(OBJECTIVE, OPTIMIZER)
    return step(state, {**batch, "inputs": inputs, "teacher": taught})


def test_on_the_device_it_is_resumed_too_and_another_cache_is_refused(cached, tmp_path):
    step = parallel.jit_step(looked_up)

    def run(cache, steps, checkpointer=None):
        batches = data.batches(COLUMNS, batch_size=BATCH, seed=0)
        state = begin(cache=cache.on_device())
        return train(state, batches, steps, checkpointer, step)

    expected = run(cached, STEPS)
    with Checkpointer(tmp_path / "run") as checkpointer:
        run(cached, 5, checkpointer)
    with Checkpointer(tmp_path / "run") as checkpointer:
        assert same(arrays(run(cached, STEPS, checkpointer)), arrays(expected))
    other = write(tmp_path / "other", LARGE.init(jax.random.key(9), X))
    with Checkpointer(tmp_path / "run") as checkpointer:
        with pytest.raises(ValueError, match="'cache'"):
            run(other, STEPS + 1, checkpointer)
