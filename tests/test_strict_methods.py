"""Methods and training under JAX's strict settings, with float64 as its default.

Programs are traced and not run, as in ``test_strict_settings``. Options are NumPy's
numbers, which turn arrays to float64 where Python's do not.
"""

import dataclasses
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtransfer import losses, nets, ops, parallel, train
from jaxtransfer.methods import adapt, distill, features, meta
from jaxtransfer.model import from_linen
from jaxtransfer.ops.dtypes import common_dtype, number
from jaxtransfer.train.metrics import counted
from jaxtransfer.typing import Mean, Variables

KEY = jax.random.key(0)
SGD = optax.sgd(0.1)
HALF = np.float64(0.5)
TWO = np.float64(2.0)


class Net(nn.Module):
    """Two convolutions and a head, in one dtype."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, inputs):
        options = {"dtype": self.dtype, "param_dtype": self.dtype}
        x = nn.Conv(4, (3, 3), name="first", **options)(inputs)
        x = nn.relu(nn.Conv(4, (3, 3), strides=2, name="second", **options)(x))
        x = nn.Dense(5, name="features", **options)(x.mean((1, 2)))
        return nn.Dense(3, name="head", **options)(x)


@dataclasses.dataclass
class Given:
    """What a case is made of, in one dtype."""

    dtype: jnp.dtype

    def dense(self, size):
        return from_linen(nn.Dense(size, dtype=self.dtype, param_dtype=self.dtype))

    @property
    def net(self):
        return from_linen(Net(self.dtype))

    @property
    def images(self):
        return jnp.ones((6, 4, 4, 2), self.dtype)

    @property
    def variables(self):
        return self.net.init(KEY, self.images)

    @property
    def batch(self):
        return {
            "inputs": self.images,
            "labels": jnp.arange(6, dtype=jnp.int32) % 3,
        }

    @property
    def domains(self):
        return {"source": self.batch, "target": {"inputs": self.images}}

    @property
    def episodes(self):
        task = jax.tree.map(lambda leaf: leaf[None], self.batch)
        return {"support": task, "query": task}

    @property
    def teacher(self):
        return {"teacher": self.variables}


def plain(given):
    objective = distill.objective(given.net, given.net, alpha=HALF, temperature=TWO)
    return objective, distill.init(given.variables), given.teacher, given.batch


def terms(given, **terms):
    begun = distill.start(
        KEY,
        given.net,
        given.net,
        terms,
        student_variables=given.variables,
        teacher_variables=given.variables,
        inputs=given.images,
    )
    objective = distill.objective(given.net, given.net, terms=terms, task_weight=HALF)
    return objective, begun, given.teacher, given.batch


def hint(given):
    term = distill.Term(
        loss=losses.hint,
        student="first",
        teacher="second",
        bridge=distill.match(norm=True),
        weight=lambda updates: updates / 500,
    )
    return terms(given, hint=term)


def variational(given):
    def loss(guess, maps, **options):
        mean, variance = guess
        return losses.variational_information_distillation(
            mean, maps, variance, **options
        )

    layers = {"student": "first", "teacher": "first"}
    term = distill.Term(loss=loss, bridge=distill.variational, weight=HALF, **layers)
    return terms(given, variational=term)


def review(given):
    layers = ("first", "second")
    return terms(given, review=distill.review(layers, layers, weight=HALF))


def exits(given):
    options = {"alpha": HALF, "temperature": TWO, "weight": HALF}
    return terms(given, **distill.early_exits(["first"], **options))


def mutual(given):
    begun = distill.init_cohort(KEY, given.net, given.images, students=2)
    objective = distill.mutual_objective(given.net, weight=HALF, temperature=TWO)
    return objective, begun, {}, {"inputs": given.images}


class Generator(nn.Module):
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, inputs):
        x = nn.Dense(32, dtype=self.dtype, param_dtype=self.dtype)(inputs)
        return x.reshape(len(x), 4, 4, 2)


def data_free(given):
    generator = from_linen(Generator(given.dtype))
    made = generator.init(KEY, jnp.ones((2, 5), given.dtype))
    weights = dict.fromkeys(("sure", "diverse", "active", "temperature"), HALF)
    objective = distill.data_free_objective(
        given.net, given.net, generator, examples=6, noise=5, tap="features", **weights
    )
    begun = distill.with_generator(given.variables, made)
    return objective, begun, given.teacher, {}


def cross_domain(given):
    weights = dict.fromkeys(("temperature", "distillation", "alignment"), HALF)
    objective = distill.cross_domain_objective(
        given.net, given.net, tap="features", **weights
    )
    return objective, distill.init(given.variables), given.teacher, given.domains


def _adapting(given, weight):
    term = adapt.align(losses.coral, tap="features", weight=weight)
    begun = adapt.init(KEY, given.net, given.variables, given.images)
    return adapt.objective(given.net, term, steps=10), begun, {}, given.domains


def ramp(given):
    return _adapting(given, ops.linear)


def aligned(given):
    return _adapting(given, HALF)


def _learning(given, make, frozen=None, **options):
    learner = make(given.net, ways=3, tap="features", **options)
    begun = learner.init(given.variables)
    return meta.objective(learner), begun, frozen or {}, given.episodes


def prototypical(given):
    return _learning(given, meta.prototypical, scale=HALF, learn_scale=True)


def ridge(given):
    return _learning(given, meta.ridge, scale=HALF, strength=HALF)


def matching(given):
    return _learning(given, meta.matching, scale=HALF)


def cosine_head(given):
    def make(net, **options):
        return meta.cosine_head(net, SGD, steps=1, scale=HALF, **options)

    return _learning(given, make)


def relation(given):
    module = given.dense(1)
    start = module.init(KEY, jnp.ones((1, 10), given.dtype))

    def make(net, **options):
        return meta.relation(net, module, start=start, **options)

    return _learning(given, make)


def simple_shot(given):
    return _learning(given, meta.simple_shot, {"mean": jnp.ones(5, given.dtype)})


def stages(given):
    objective, begun, frozen, batch = plain(given)
    parts = (2, objective), (None, objective)
    return distill.stages(*parts), distill.counted(begun), frozen, batch


OF_DISTILLATION = [plain, hint, variational, review, exits, mutual, cross_domain]
OTHERS = [ramp, aligned, prototypical, ridge, stages]
IN_FLOAT32_ONLY = [data_free, matching, cosine_head]
CASES = [
    *((case, jnp.float32) for case in OF_DISTILLATION + OTHERS + IN_FLOAT32_ONLY),
    *((case, jnp.float64) for case in [*OF_DISTILLATION, prototypical, ridge]),
    *(
        (case, jnp.bfloat16)
        for case in [hint, variational, review, exits, data_free, relation, simple_shot]
    ),
]


@pytest.fixture
def strict():
    with (
        jax.enable_x64(True),
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
    ):
        yield


def floats(tree):
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(tree)}
    return {dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)}


@pytest.mark.parametrize(
    ("case", "dtype"), CASES, ids=lambda x: getattr(x, "__name__", None)
)
def test_nothing_is_promoted(case, dtype, strict):
    """Float32 stays what it is, and losses are in float32 at least."""

    def run():
        objective, begun, frozen, batch = case(Given(dtype))
        loss, after = objective(begun.params, frozen, begun.model_state, batch, KEY)
        return loss, begun, after

    found = jax.eval_shape(run)
    assert found[0].dtype == common_dtype(dtype, jnp.float32)
    if dtype == jnp.float32:
        assert floats(found) == {jnp.dtype("float32")}


NETWORKS = {
    "Conv4": (nets.Conv4(3, filters=4), (2, 16, 16, 1)),
    "Conv4 by task": (nets.Conv4(3, filters=4, norm="task"), (2, 16, 16, 1)),
    "Context": (nets.Context(3), (2, 4)),
    "ConcatenatedContext": (nets.ConcatenatedContext(3), (2, 4)),
    "ViT": (nets.ViT(3, width=4, depth=1, heads=2, patch=8), (2, 8, 8, 3)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_in_float32(name, strict):
    network, shape = NETWORKS[name]

    def run():
        model, inputs = from_linen(network), jnp.ones(shape, jnp.float32)
        start = model.init(KEY, inputs)
        outputs, _, state = model.apply(start, inputs, train=True)
        return start, outputs, state

    found = jax.eval_shape(run)
    assert floats(found) == {jnp.dtype("float32")}
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(found))


def test_a_moving_average_keeps_its_dtype(strict):
    begun = distill.init(Variables({"w": jnp.ones(1, jnp.float32)}))
    state = train.init_state(KEY, distill.with_average(begun), SGD)
    after = distill.moving_average(np.float64(0.99))(state)
    assert floats(after.model_state) == {jnp.dtype("float32")}


@pytest.mark.parametrize("l2", [np.float64(1e-3), jnp.array([1e-3, 1.0])], ids=type)
def test_a_probe_takes_penalties_of_another_dtype(l2, strict):
    def fit(l2):
        x, labels = jnp.ones((4, 2), jnp.float32), jnp.arange(4, dtype=jnp.int32) % 2
        return features.logistic_regression(x, labels, classes=2, l2=l2, iterations=1)

    with jax.numpy_dtype_promotion("standard"):  # optax's line search mixes them
        wide = jnp.asarray(l2, jnp.float64)
        found = jax.eval_shape(jax.vmap(fit) if wide.ndim else fit, wide)
    assert floats(found) == {jnp.dtype("float32")}


def pulled(params, frozen, model_state, batch, key):
    return jnp.mean((batch - params["w"][None]) ** 2), (model_state, {})


@pytest.mark.parametrize("eval_every", [None, 2])
def test_a_run_in_one_program_counts_in_the_integers_of_its_step(eval_every, strict):
    def run(data):
        state = train.init_state(KEY, Variables({"w": jnp.zeros(1, jnp.float32)}), SGD)
        step = train.train_step(pulled, SGD)
        options = {"steps": 4, "eval_every": eval_every}
        return train.scan_fit(step, state, train.resident(data, 2), **options)

    data = jnp.ones((4, 1), jnp.float32)
    state, history = jax.eval_shape(run, data)
    assert history.step.dtype == state.step.dtype == jnp.int32


def test_the_norm_of_numbers_of_two_dtypes(strict):
    tree = {"a": jnp.full(1, 3.0, jnp.float32), "b": jnp.full(1, 4.0, jnp.float64)}
    found = train.metrics.norm(tree)
    assert found == 5.0 and found.dtype == jnp.float64


def test_progress_and_ramps_keep_the_dtype_of_an_array(strict):
    for dtype, expected in (("float32", "float32"), ("bfloat16", "float32")):
        done = ops.progress(jnp.array(1, dtype), 4)
        for ramp in (ops.linear, ops.cosine, ops.dann):
            assert done.dtype == ramp(done).dtype == jnp.dtype(expected)
    assert ops.progress(1, 4).dtype == jnp.float64


def test_stages_measure_what_one_of_them_does_in_its_own_shape_and_dtype(strict):
    def part(measured):
        def objective(params, frozen, model_state, batch, key):
            return jnp.sum(params["w"]), (model_state, measured)

        return objective

    exact = jnp.array(1 / 3, jnp.float64)
    recall = Mean(jnp.ones(3, jnp.float32), jnp.ones(3, jnp.float32))
    both = meta.stages(
        (1, part({"recall": recall, "mean": jnp.float32(1.0)})),
        (None, part({"exact": exact, "mean": exact})),
    )
    begun = {"w": jnp.ones(1, jnp.float64)}
    seen = [
        both(begun, {}, {"updates": jnp.array(n, jnp.int32)}, {}, KEY)[1][1]
        for n in (0, 1)
    ]
    assert seen[0]["recall"].count.tolist() == [1, 1, 1]
    assert seen[1]["recall"].count.tolist() == [0, 0, 0]
    assert seen[0]["exact"].count == 0 and seen[1]["exact"].total == 1 / 3
    assert seen[1]["mean"].total == 1 / 3 and seen[0]["recall"].total.dtype == "float32"


def test_a_class_that_a_task_lacks_has_a_finite_logit_in_float16():
    batch = {"labels": jnp.array([0]), "classes": jnp.array([True, True, False])}
    logits, _ = counted(jnp.zeros((1, 3), jnp.float16), batch)
    np.testing.assert_allclose(losses.entropy(logits), np.log(2), rtol=1e-3)
    assert counted(jnp.zeros((1, 3)), batch)[0][0, 2] == train.metrics.ABSENT


def test_numbers_of_numpy_are_numbers():
    for value in (np.float64(0.5), np.float32(0.5), 0.5):
        assert type(number(value)) is float
    schedule = optax.constant_schedule(1.0)
    assert number(schedule) is schedule


def _begun():
    return train.init_state(KEY, Variables({"w": jnp.zeros(1)}), SGD)


def test_a_run_moves_nothing_to_the_device_unasked():
    step = parallel.jit_step(train.train_step(pulled, SGD))
    data, state = itertools.repeat(jnp.ones((4, 1))), _begun()
    with jax.transfer_guard_host_to_device("disallow"):
        _, history = train.fit(step, state, data, steps=5, log_every=2, progress=False)
    assert [record["step"] for record in history.train] == [2, 4, 5]


def test_pmap_compiles_once_and_moves_nothing_unasked(caplog):
    step = parallel.pmap_step(train.train_step(pulled, SGD, axis_name="data"))
    batch = np.ones((jax.device_count(), 1), np.float32)
    with jax.log_compiles():
        state, _ = step(_begun(), batch)
        assert "Compiling" in caplog.text
        caplog.clear()
        with jax.transfer_guard("disallow"):
            step(state, batch)
    assert "Compiling" not in caplog.text
