import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtransfer import compress, losses, parallel, tree
from jaxtransfer.methods import distill, finetune
from jaxtransfer.train import init_state, train_step
from jaxtransfer.typing import Variables
from tests.digits import accuracy, batches, digits, learn
from tests.twins import jitted, network, same

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (16, 6))
BATCH = {"inputs": X, "labels": jnp.arange(16) % 3}
STUDENT = network("linen", widths=(8, 5), normalized=True)
TEACHER = network("linen", widths=(9, 7), normalized=True)
OWN, GIVEN = jitted(STUDENT).init(KEY, X), jitted(TEACHER).init(jax.random.key(3), X)
KERNELS = "student/(.*/)?kernel"
SLOTS = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.02, weight_decay=0.1))


def steps(optimizer, variables, *, count, task=None, frozen=None, **options):
    """States after each update."""
    task = finetune.objective(STUDENT) if task is None else task
    step = jax.jit(train_step(task, optimizer, **options))
    state = init_state(KEY, variables, optimizer, frozen=frozen)
    states = []
    for _ in range(count):
        state, measured = step(state, BATCH)
        states.append((state, float(measured["loss"].total)))
    return states


def kernels(params, rules=compress.KERNELS):
    leaves = tree.flatten(params)
    return {path: np.asarray(leaves[path]) for path in tree.match(rules, leaves)}


def test_the_schedule_is_cubic():
    schedule = compress.cubic_sparsity(0.9, begin=20, end=120, initial=0.1)
    for step in (20, 21, 70, 119):
        left = 1 - (step - 20) / 100
        np.testing.assert_allclose(schedule(step), 0.9 - 0.8 * left**3, rtol=1e-6)
    assert [float(schedule(t)) for t in (0, 20)] == pytest.approx([0.1, 0.1])
    assert float(schedule(120)) == float(schedule(10**9)) == np.float32(0.9)
    assert jax.jit(schedule)(jnp.int32(70)) == schedule(70)


def test_a_student_is_distilled_and_pruned_in_one_step():
    """Exactly as sparse as the schedule says, and what is zero stays zero."""
    terms = {
        "logits": distill.Term(loss=losses.knowledge_distillation),
        "hint": distill.Term(
            loss=losses.hint,
            student="blocks_0",
            teacher="blocks_0",
            bridge=distill.match(),
        ),
    }
    begun = distill.start(
        KEY,
        STUDENT,
        TEACHER,
        terms,
        student_variables=OWN,
        teacher_variables=GIVEN,
        inputs=X,
    )
    schedule = compress.cubic_sparsity(0.8, begin=2, end=10)
    optimizer = compress.pruned(SLOTS, schedule, rules=KERNELS, every=2)
    states = steps(
        optimizer,
        begun,
        count=14,
        task=distill.objective(STUDENT, TEACHER, terms=terms),
        frozen={"teacher": GIVEN},
    )
    gone: dict[str, np.ndarray] = {}
    for done, (state, _) in enumerate(states, 1):
        share = np.asarray(schedule(done - done % 2))  # float32, as it is used
        for path, kernel in kernels(state.params, KERNELS).items():
            zero = kernel == 0
            assert zero.sum() == np.round(share * np.float32(kernel.size)), done
            assert (zero | ~gone.get(path, zero)).all(), "a pruned weight came back"
            gone[path] = zero
    assert set(gone) == {
        f"student/{layer}/kernel"
        for layer in ("blocks_0/dense", "blocks_1/dense", "head")
    }
    state, loss = states[-1]
    assert (kernels(state.params, "bridges")["bridges/hint/channels/kernel"] != 0).all()
    assert loss < 0.9 * states[0][1]
    assert same(state.frozen["teacher"], jax.tree.map(jnp.asarray, GIVEN))
    statistics = [begun.model_state["student"], state.model_state["student"]]
    assert not same(*statistics)


@pytest.mark.present_code
def test_at_sparsity_zero_nothing_changes():
    plain = steps(SLOTS, OWN, count=3)[-1][0]
    pruned = steps(compress.pruned(SLOTS, 0.0), OWN, count=3)[-1][0]
    assert same(plain.params, pruned.params)
    assert same(plain.opt_state, pruned.opt_state.inner)


def test_at_sparsity_one_no_kernel_is_left():
    state, _ = steps(compress.pruned(SLOTS, 1), OWN, count=2)[-1]
    assert all((kernel == 0).all() for kernel in kernels(state.params).values())
    assert (state.params["head"]["bias"] != 0).any()


@pytest.mark.parametrize("structure", [None, "channel"])
def test_a_number_prunes_by_the_initial_weights_once(structure):
    options = {"scope": "global", "structure": structure}
    states = steps(compress.pruned(SLOTS, 0.5, **options), OWN, count=4)
    masks = tree.flatten(compress.masks(OWN.params, 0.5, **options))
    for state, _ in states:
        for path, kernel in kernels(state.params).items():
            mask = np.broadcast_to(masks[path], kernel.shape)
            np.testing.assert_array_equal(kernel == 0, ~mask)


def test_pruned_weights_have_no_gradient_to_clip():
    """The inner optimizer sees gradients of what is left only."""
    seen = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda gradient, state, params: (
            jax.tree.map(lambda g: -0.1 * g, gradient),
            gradient,
        ),
    )
    state, _ = steps(compress.pruned(seen, 0.6), OWN, count=2)[-1]
    kept = tree.flatten(state.opt_state.masks)
    for path, gradient in kernels(state.opt_state.inner).items():
        assert (gradient[~kept[path]] == 0).all() and (gradient[kept[path]] != 0).any()


@pytest.mark.parametrize("wrap", ["jit", "shard_map", "pmap"])
def test_devices_prune_alike(wrap):
    schedule = compress.cubic_sparsity(0.7, end=3)
    optimizer = compress.pruned(optax.sgd(0.1, momentum=0.9), schedule)
    model = network("linen")  # no statistics of a batch, which devices would halve
    task = finetune.objective(model)
    own = jitted(model).init(KEY, X)
    mesh = parallel.make_mesh()
    if wrap == "jit":
        run = parallel.jit_step(train_step(task, optimizer), mesh)
    elif wrap == "shard_map":
        step = train_step(task, optimizer, axis_name="data")
        run = parallel.shard_map_step(step, mesh)
    else:
        run = parallel.pmap_step(train_step(task, optimizer, axis_name="data"))
    alone = jax.jit(train_step(task, optimizer))
    one, many = (init_state(KEY, own, optimizer) for _ in range(2))
    for _ in range(4):
        one, many = alone(one, BATCH)[0], run(many, BATCH)[0]
    for path, kernel in kernels(one.params).items():
        other = kernels(many.params)[path]
        np.testing.assert_allclose(other, kernel, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(other == 0, kernel == 0)


def test_masks_that_are_given_hold():
    masks = compress.masks(OWN.params, 0.5)
    state, _ = steps(
        SLOTS,
        OWN,
        count=3,
        frozen={"masks": masks},
        after_update=compress.keep_pruned,
    )[-1]
    for path, kernel in kernels(state.params).items():
        np.testing.assert_array_equal(kernel != 0, tree.flatten(masks)[path])


def test_pruning_in_training_beats_cutting_afterwards():
    """On digits, nine weights of ten: the student learns with what is left."""
    train, test = digits()
    model = network("linen", inputs=64, outputs=10, widths=(24,))
    own = jitted(model).init(KEY, train["inputs"][:2])
    run = {"draw": batches(train, 64), "steps": 300}
    task, adam = finetune.objective(model), optax.adam(0.01)
    schedule = compress.cubic_sparsity(0.9, begin=30, end=200)
    pruned = learn(task, compress.pruned(adam, schedule, every=10), own, **run)
    whole = learn(task, adam, own, **run)
    masks = compress.masks(whole.params, 0.9)
    cut = whole.replace(params=compress.apply_masks(whole.params, masks))
    predict = finetune.predict(model)
    found = {
        name: accuracy(predict, state, test)
        for name, state in (("pruned", pruned), ("cut", cut), ("whole", whole))
    }
    assert float(compress.sparsity(pruned.params)) == pytest.approx(0.9, abs=2e-3)
    assert found["pruned"] > 0.85 > found["cut"] + 0.1, found
    assert found["whole"] > found["pruned"] - 0.01, found


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compress.pruned(SLOTS, 1.5), "sparsity: got 1.5"),
        (lambda: compress.pruned(SLOTS, 0.5, every=0), "every: got 0; it must be at"),
        (lambda: compress.cubic_sparsity(2.0, end=3), "final: got 2.0"),
        (lambda: compress.cubic_sparsity(0.5, end=3, initial=-1.0), "initial: got -1"),
        (lambda: compress.cubic_sparsity(0.5, end=3, begin=3), "end: got 3; it must"),
        (
            lambda: compress.pruned(SLOTS, 0.5, rules="body").init(OWN.params),
            "rule 'body' matches no parameter; nearest",
        ),
        (
            lambda: compress.keep_pruned(init_state(KEY, OWN, SLOTS)),
            "frozen: there are no 'masks'",
        ),
    ],
)
def test_what_can_t_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_parameters_are_needed():
    optimizer = compress.pruned(SLOTS, 0.5)
    with pytest.raises(ValueError, match="params: pruning needs them"):
        optimizer.update(OWN.params, optimizer.init(OWN.params))


def test_an_optimizer_of_extra_arguments_gets_them():
    optimizer = compress.pruned(optax.polyak_sgd(100.0), 0.5)

    def objective(params, frozen, model_state, batch, key):
        return jnp.sum((params["kernel"] - batch) ** 2), (model_state, {})

    start = Variables({"kernel": jnp.array([0.1, 2.0])}, {})
    state = init_state(KEY, start, optimizer)
    state, _ = train_step(objective, optimizer)(state, jnp.array([9.0, 3.0]))
    # (loss / |kept gradient|^2) x that gradient, of the one weight that is left.
    loss = 8.9**2 + 1.0
    np.testing.assert_allclose(state.params["kernel"], [0.0, 2 + loss / 2], rtol=1e-5)
