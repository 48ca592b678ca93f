"""Objectives of many terms: what each compares, weighs, carries and is bridged by."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtransfer import losses, tree
from jaxtransfer.methods import distill, finetune
from jaxtransfer.methods.distill import Term
from jaxtransfer.model import from_linen
from jaxtransfer.train import init_state, train_step
from jaxtransfer.train.metrics import finalize, promote
from jaxtransfer.typing import Variables
from tests.twins import KINDS, jitted, network, same

KEY = jax.random.key(0)


class Net(nn.Module):
    """Two maps of other sizes, batch statistics, and logits."""

    width: int
    size: int = 4

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = jnp.tanh(nn.Dense(self.width * self.size**2, name="first")(x))
        x = nn.BatchNorm(not train, name="norm")(x)
        x = x.reshape(len(x), self.size, self.size, self.width)
        x = nn.Dense(self.width, name="maps")(x)
        x = nn.Dense(self.width, name="more")(jnp.tanh(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


X = jax.random.normal(KEY, (6, 5))
BATCH = {"inputs": X, "labels": jnp.array([0, 2, 1, 1, 0, 2])}
SMALL, LARGE, OTHER = (from_linen(Net(*size)) for size in ((2,), (3, 2), (4, 4)))
STUDENT = SMALL.init(jax.random.key(1), X)
TEACHER = LARGE.init(jax.random.key(2), X)
SECOND = OTHER.init(jax.random.key(3), X)


def run(task, begun, batch=BATCH, teacher: Any = TEACHER, **more):
    frozen = {} if teacher is None else {"teacher": teacher}
    loss, (state, measured) = jax.jit(task)(
        begun.params, {**frozen, **more}, begun.model_state, batch, KEY
    )
    return float(loss), state, finalize(promote(measured))


def of_student(path, train=True):
    return SMALL.apply(STUDENT, X, train=train, taps=(path,))[1][path]


def of_teacher(path, model=LARGE, variables=TEACHER):
    return model.apply(variables, X, taps=(path,))[1][path]


def outputs():
    return SMALL.apply(STUDENT, X, train=True)[0], LARGE.apply(TEACHER, X)[0]


def test_the_sum_of_what_the_terms_say():
    terms = {
        "logits": Term(
            loss=losses.knowledge_distillation, weight=0.9, options={"temperature": 2.0}
        ),
        "attention": Term(
            loss=losses.attention_transfer, student="maps", teacher="maps", weight=10.0
        ),
        "labelled": Term(
            loss=losses.decoupled_knowledge_distillation, batch=("labels",), weight=0.5
        ),
        "flow": Term(
            loss=lambda a, b, c, d: jnp.mean(a * b) - jnp.mean(c * d),
            student=("maps", "more"),
            teacher=("maps", "more"),
        ),
        "nothing": Term(loss=losses.hint, student="no such layer", weight=0.0),
    }
    task = distill.objective(SMALL, LARGE, terms=terms, task_weight=0.1)
    loss, _, measured = run(task, distill.init(STUDENT))
    own, taught = outputs()
    expected = {
        "logits": losses.knowledge_distillation(own, taught, temperature=2.0).mean(),
        "attention": losses.attention_transfer(
            of_student("maps"), of_teacher("maps")
        ).mean(),
        "labelled": losses.decoupled_knowledge_distillation(
            own, taught, BATCH["labels"]
        ).mean(),
        "flow": jnp.mean(of_student("maps") * of_student("more"))
        - jnp.mean(of_teacher("maps") * of_teacher("more")),
        "task_loss": losses.cross_entropy(own, BATCH["labels"]).mean(),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(measured[name], value, rtol=1e-5, err_msg=name)
    weights = {"logits": 0.9, "attention": 10.0, "labelled": 0.5, "task_loss": 0.1}
    total = sum(weights.get(name, 1.0) * value for name, value in expected.items())
    np.testing.assert_allclose(loss, total, rtol=1e-5)
    assert set(measured) == {*expected, "accuracy"}


def test_a_term_of_weight_zero_is_absent():
    terms = {"logits": Term(loss=losses.knowledge_distillation)}
    more = {**terms, "hint": Term(loss=losses.hint, weight=0.0, bridge=distill.match())}
    programs = [
        jax.jit(distill.objective(SMALL, LARGE, terms=given))
        .lower(*_arguments(distill.init(STUDENT)))
        .as_text()
        for given in (terms, more)
    ]
    assert programs[0] == programs[1]
    alone = distill.objective(SMALL, LARGE, terms={"hint": more["hint"]})
    run(alone, distill.init(STUDENT), teacher=None)  # No teacher is needed.


def _arguments(begun):
    return begun.params, {"teacher": TEACHER}, begun.model_state, BATCH, KEY


def test_every_network_runs_once():
    calls = []

    def counting(model, name):
        def apply(*given, **options):
            calls.append((name, options.get("taps", ())))
            return model.apply(*given, **options)

        return model._replace(apply=apply)

    terms = {
        str(n): Term(loss=losses.similarity_preserving, student=path, teacher=path)
        for n, path in enumerate(("maps", "more", "maps"))
    }
    task = distill.objective(
        counting(SMALL, "student"), counting(LARGE, "teacher"), terms=terms
    )
    jax.eval_shape(task, *_arguments(distill.init(STUDENT)))
    assert calls == [("student", ("maps", "more")), ("teacher", ("maps", "more"))]


def test_rows_that_do_not_count_and_rows_of_a_teacher():
    where, mine = jnp.arange(6) < 5, jnp.arange(6) % 2 == 0
    terms = {
        "set": Term(loss=losses.similarity_preserving, student="maps", teacher="maps"),
        "each": Term(loss=losses.knowledge_distillation, rows="mine"),
        "tokens": Term(loss=lambda s, t, where: (s - t) ** 2, rows="mine"),
    }
    task = distill.objective(SMALL, LARGE, terms=terms)
    batch = {**BATCH, "where": where, "mine": mine}
    _, _, measured = run(task, distill.init(STUDENT), batch)
    own, taught = outputs()
    np.testing.assert_allclose(
        measured["set"],
        losses.similarity_preserving(
            of_student("maps"), of_teacher("maps"), where=where
        ),
        rtol=1e-5,
    )
    rows = [0, 2, 4]
    each = losses.knowledge_distillation(own[jnp.array(rows)], taught[jnp.array(rows)])
    np.testing.assert_allclose(measured["each"], each.mean(), rtol=1e-5)
    squares = ((own - taught) ** 2)[jnp.array(rows)].mean()
    np.testing.assert_allclose(measured["tokens"], squares, rtol=1e-5)


@pytest.mark.parametrize("as_list", [False, True])
def test_rows_of_a_teacher_of_tokens(as_list):
    """The rows are [batch], the tokens that count [batch, length]."""
    where, mine = jnp.arange(3) < jnp.arange(6)[:, None], jnp.arange(6) % 2 == 0
    terms = {
        "tokens": Term(
            loss=lambda s, t, where: jnp.where(where, (s - t) ** 2, jnp.nan),
            rows="mine",
        )
    }
    batch = {"inputs": X, "where": where, "mine": mine}
    if as_list:
        batch |= {"where": where.tolist(), "mine": mine.tolist()}
    _, _, measured = run(
        distill.objective(SMALL, LARGE, terms=terms), distill.init(STUDENT), batch
    )
    own, taught = outputs()
    counted = ((own - taught) ** 2)[np.asarray(where & mine[:, None])]
    assert len(counted) == 5
    np.testing.assert_allclose(measured["tokens"], counted.mean(), rtol=1e-5)


def test_rows_that_count_as_a_list():
    terms = {"t": Term(loss=losses.knowledge_distillation)}
    task, begun = distill.objective(SMALL, LARGE, terms=terms), distill.init(STUDENT)
    where = jnp.arange(6) < 4
    expected, found = (
        run(task, begun, {"inputs": X, "where": rows})[0]
        for rows in (where, where.tolist())
    )
    assert found == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mine": jnp.ones(6)}, "mine must be boolean, got float32; use `mine > 0`"),
        ({"where": jnp.ones(6, int)}, "where must be boolean, got int32; use"),
        (
            {"mine": jnp.ones(4, bool)},
            r"'mine' is \(4,\), its 'where' \(6,\); give one",
        ),
    ],
)
def test_rows_that_say_nothing(given, message):
    every = jnp.ones(6, bool)
    term = Term(loss=lambda s, t, where: jnp.zeros(6), rows="mine")
    task = distill.objective(SMALL, LARGE, terms={"t": term})
    batch = {"inputs": X, "where": every, "mine": every, **given}
    with pytest.raises(ValueError, match=message):
        run(task, distill.init(STUDENT), batch)


def test_rows_of_outputs_that_are_as_long_as_the_batch():
    """[batch, tokens, classes] with as many tokens as rows: the mask is of the rows."""
    net, inputs = from_linen(nn.Dense(3)), jax.random.normal(KEY, (6, 6, 5))
    student, teacher = (net.init(key, inputs) for key in jax.random.split(KEY))
    where, some = jnp.arange(6) < 2, jnp.arange(6) > 3
    batch = {"inputs": inputs, "where": where, "some": some}
    own, taught = (net.apply(given, inputs)[0] for given in (student, teacher))
    each = losses.knowledge_distillation(own, taught)
    terms = {
        name: Term(loss=losses.knowledge_distillation, where=mask)
        for name, mask in (("a", "where"), ("b", "some"), ("c", None))
    }
    task = distill.objective(net, net, terms=terms)
    _, _, measured = run(task, distill.init(student), batch, teacher)
    for name, rows in (("a", where), ("b", some), ("c", slice(None))):
        np.testing.assert_allclose(measured[name], each[rows].mean(), rtol=1e-5)


def test_a_loss_that_fails_names_its_term(types_unchecked):
    terms = {"maps": Term(loss=losses.hint, student="maps", teacher="maps")}
    pixels = {**BATCH, "where": jnp.ones((6, 4, 4), bool)}
    task = distill.objective(SMALL, SMALL, terms=terms)
    with pytest.raises(ValueError, match="where of shape") as raised:
        run(task, distill.init(STUDENT), pixels, STUDENT)
    assert "This was the loss of the term 'maps'." in raised.value.__notes__


# --- several teachers -----------------------------------------------------------------


def test_several_teachers():
    terms = {
        "a": Term(loss=losses.knowledge_distillation, of="a"),
        "b": Term(
            loss=losses.similarity_preserving, student="maps", teacher="more", of="b"
        ),
        "both": Term(loss=losses.multi_teacher_distillation, of=("a", "b")),
    }
    teachers = {"a": LARGE, "b": OTHER}
    task = distill.objective(SMALL, teachers, terms=terms)
    given = {"a": TEACHER, "b": SECOND}
    _, _, measured = run(task, distill.init(STUDENT), teacher=given)
    own, taught = outputs()
    other = OTHER.apply(SECOND, X)[0]
    expected = {
        "a": losses.knowledge_distillation(own, taught).mean(),
        "b": losses.similarity_preserving(
            of_student("maps"), of_teacher("more", OTHER, SECOND)
        ),
        "both": losses.multi_teacher_distillation(
            own, jnp.stack([taught, other])
        ).mean(),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(measured[name], value, rtol=3e-5, err_msg=name)
    with pytest.raises(
        ValueError, match=r"frozen\['teacher'\] has \['a'\], but a term"
    ):
        run(task, distill.init(STUDENT), teacher={"a": TEACHER})


def test_what_the_batch_brings_is_not_run():
    """The same loss and gradient from cached outputs and features."""
    terms = {
        "logits": Term(loss=losses.knowledge_distillation),
        "maps": Term(loss=losses.similarity_preserving, student="maps", teacher="more"),
    }
    task = distill.objective(SMALL, LARGE, terms=terms)
    begun = distill.init(STUDENT)
    cached = {"": LARGE.apply(TEACHER, X)[0], "more": of_teacher("more")}
    online, *_ = run(task, begun)
    offline, *_ = run(task, begun, {**BATCH, "teacher": cached}, teacher=None)
    np.testing.assert_allclose(online, offline, rtol=1e-6)
    with pytest.raises(ValueError, match="needs 'more'; cache that as well"):
        run(task, begun, {**BATCH, "teacher": {"": cached[""]}}, teacher=None)


@pytest.mark.parametrize(
    ("several", "form", "message"),
    [
        (True, lambda said: {"": said}, r"has \[''\], but '' is none of the teachers"),
        (
            True,
            lambda said: {"bgi": {"": said}},
            r"'bgi' is none of .* \['big'\]; give",
        ),
        (
            True,
            lambda said: {"big": {"": said}, "": said},
            r"has \['', 'big'\], but '' .*cache\.batches\(data, name=\.\.\.\)",
        ),
        (True, lambda said: {"big": said}, r"\['big'\] is no mapping; give {'': outp"),
        (True, lambda said: said, "is no mapping; give {name: {'': outputs, path: f"),
        (False, lambda said: said, "is no mapping; .* for outputs alone {'': outputs}"),
    ],
)
def test_what_the_batch_brings_in_another_form(several, form, message):
    """Is refused, the teacher that is there is not run in its place."""
    name = "big" if several else "teacher"
    terms = {"kd": Term(loss=losses.knowledge_distillation, of=name)}
    task = distill.objective(SMALL, {"big": LARGE} if several else LARGE, terms=terms)
    said = LARGE.apply(TEACHER, X)[0]
    batch, given = {**BATCH, "teacher": form(said)}, {"big": TEACHER}
    with pytest.raises(ValueError, match=message):
        run(task, distill.init(STUDENT), batch, given if several else TEACHER)


def test_what_the_batch_brings_without_a_teacher():
    """Is of nobody here, so that labels alone may be learned from the same batches."""
    task, begun = distill.objective(SMALL, terms={}), distill.init(STUDENT)
    batch = {**BATCH, "teacher": {"": jnp.ones((6, 3))}}
    assert run(task, begun, batch, None)[0] == run(task, begun, teacher=None)[0]


def test_the_student_teaches_itself():
    """Deeper layers teach shallower ones and get no gradient for it."""
    own = Term(loss=losses.hint, student="maps", teacher="more", of="student")
    task = distill.objective(SMALL, terms={"own": own}, task_weight=0.0)
    begun = distill.init(STUDENT)
    loss, *_ = run(task, begun, teacher=None)
    expected = losses.hint(of_student("maps"), of_student("more")).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    slopes = jax.grad(lambda p: task(p, {}, begun.model_state, BATCH, KEY)[0])(
        begun.params
    )["student"]
    assert jnp.any(slopes["maps"]["kernel"]) and not jnp.any(slopes["more"]["kernel"])


def test_the_moving_average_teaches():
    begun = distill.with_average(distill.init(STUDENT))
    terms = {"mean": Term(loss=losses.knowledge_distillation, of="average")}
    task = distill.objective(SMALL, terms=terms)
    step = train_step(task, optax.sgd(0.5), after_update=distill.moving_average(0.9))
    state = init_state(KEY, begun, optax.sgd(0.5))
    step = jax.jit(step)
    first, _ = step(state, BATCH)
    average = first.model_state["average"]["params"]
    expected = jax.tree.map(
        lambda old, new: 0.9 * old + 0.1 * new, STUDENT.params, first.params["student"]
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5), average, expected)
    _, measured = step(first, BATCH)
    own = SMALL.apply(
        distill.of_student(first.params, first.model_state), X, train=True
    )[0]
    taught = SMALL.apply(Variables(**first.model_state["average"]), X)[0]
    np.testing.assert_allclose(
        finalize(measured)["mean"],
        losses.knowledge_distillation(own, taught).mean(),
        rtol=1e-4,
    )


def test_the_average_follows_a_student_of_half_precision():
    begun = distill.with_average(
        distill.init(
            Variables({"w": jnp.ones(2, jnp.bfloat16)}, {"calls": jnp.array(3)})
        )
    )
    state = init_state(KEY, begun, optax.sgd(0.1))
    state = state.replace(params={"student": {"w": jnp.zeros(2, jnp.bfloat16)}})
    follow = distill.moving_average(0.999)
    for _ in range(3):
        state = follow(state)
    average = state.model_state["average"]
    assert average["params"]["w"].dtype == jnp.float32
    np.testing.assert_allclose(average["params"]["w"], 0.999**3, rtol=1e-6)
    assert average["model_state"]["calls"].dtype == jnp.int32


# --- what is begun with the student ---------------------------------------------------


def started(terms):
    return distill.start(
        KEY,
        SMALL,
        LARGE,
        terms,
        student_variables=STUDENT,
        teacher_variables=TEACHER,
        inputs=X,
    )


def test_bridges_are_trained_and_not_exported():
    terms = {
        "hint": Term(
            loss=losses.hint, student="maps", teacher="maps", bridge=distill.match()
        ),
        "normed": Term(
            loss=losses.hint,
            student="maps",
            teacher="more",
            bridge=distill.match(norm=True),
        ),
        "logits": Term(loss=losses.hint, bridge=distill.match()),  # of one shape
    }
    begun = started(terms)
    assert sorted(begun.params["bridges"]) == ["hint", "normed"]
    task = distill.objective(SMALL, LARGE, terms=terms)
    loss, state, measured = run(task, begun)
    pooled = of_student("maps").reshape(6, 2, 2, 2, 2, 2).mean((2, 4))
    bridge = begun.params["bridges"]["hint"]["channels"]
    crossed = pooled @ bridge["kernel"] + bridge["bias"]
    expected = losses.hint(crossed, of_teacher("maps")).mean()
    np.testing.assert_allclose(measured["hint"], expected, rtol=1e-5)
    assert not same(state["bridges"]["normed"], begun.model_state["bridges"]["normed"])
    slopes = jax.grad(
        lambda p: task(p, {"teacher": TEACHER}, begun.model_state, BATCH, KEY)[0]
    )(begun.params)["bridges"]
    assert all(jnp.any(leaf) for leaf in jax.tree.leaves(slopes["hint"]))
    assert same(distill.of_student(begun.params, begun.model_state), STUDENT)
    with pytest.raises(ValueError, match="'hint' needs a bridge, which the parameters"):
        run(task, distill.init(STUDENT))


def test_a_sequence_is_brought_to_the_length_of_another():
    net = distill.match()((1, 3, 2), (1, 5, 4))
    assert net is not None
    inputs = jnp.arange(12.0).reshape(2, 3, 2)
    variables = net.init(KEY, inputs)
    assert net.apply(variables, inputs)[0].shape == (2, 5, 4)
    assert distill.match()((1, 5, 4), (1, 5, 4)) is None
    with pytest.raises(ValueError, match="tap layers with as many axes"):
        distill.match()((1, 5, 4), (1, 4))


def test_the_variance_of_vid_is_learned():
    def loss(guess, maps, **options):
        return losses.variational_information_distillation(
            guess[0], maps, guess[1], **options
        )

    terms = {
        "vid": Term(
            loss=loss, student="more", teacher="more", bridge=distill.variational
        )
    }
    small, same_size = from_linen(Net(2)), from_linen(Net(3))
    given = same_size.init(KEY, X)
    begun = distill.start(
        KEY,
        small,
        same_size,
        terms,
        student_variables=STUDENT,
        teacher_variables=given,
        inputs=X,
    )
    variance = jax.nn.softplus(begun.params["bridges"]["vid"]["variance"]) + 1e-5
    np.testing.assert_allclose(variance, 5.0, rtol=1e-6)
    task = distill.objective(small, same_size, terms=terms)
    slopes = jax.grad(
        lambda p: task(p, {"teacher": given}, begun.model_state, BATCH, KEY)[0]
    )(begun.params)
    assert jnp.all(slopes["bridges"]["vid"]["variance"] != 0)


def test_schedules_follow_the_updates():
    terms = {
        "logits": Term(
            loss=losses.knowledge_distillation,
            weight=optax.linear_schedule(0.0, 1.0, 2),
            options={"temperature": lambda count: 1.0 + count},
        )
    }
    task = distill.objective(SMALL, LARGE, terms=terms, task_weight=0.0)
    begun = started(terms)
    own, taught = outputs()
    state = begun.model_state
    for count in range(3):
        found, state, _ = run(task, Variables(begun.params, state))
        value = losses.knowledge_distillation(own, taught, temperature=1.0 + count)
        np.testing.assert_allclose(found, min(count / 2, 1) * value.mean(), rtol=1e-5)
    with pytest.raises(ValueError, match="follows the number of updates"):
        run(task, distill.init(STUDENT))


def test_the_task_weight_alone_may_follow_the_updates():
    terms = {"logits": Term(loss=losses.knowledge_distillation, weight=0.0)}
    schedule = optax.linear_schedule(0.0, 1.0, 2)
    task = distill.objective(SMALL, LARGE, terms=terms, task_weight=schedule)
    begun = started(terms)
    state = begun.model_state
    for count in range(3):
        found, state, measured = run(task, Variables(begun.params, state))
        np.testing.assert_allclose(found, count / 2 * measured["task_loss"], rtol=1e-5)
    run(task, distill.counted(distill.init(STUDENT)))
    with pytest.raises(ValueError, match=r"task_weight.*distill\.counted\(variables\)"):
        run(task, distill.init(STUDENT))


def test_a_memory_is_carried_and_a_key_is_given():
    def loss(own, taught, labels, *, state, key):
        new = state.at[labels].add(jax.lax.stop_gradient(own[:, 0]))
        return state.sum() + jnp.mean(own) + 0 * jax.random.uniform(key), new

    terms = {
        "memory": Term(loss=loss, batch=("labels",), state=jnp.ones(3), random=True)
    }
    task = distill.objective(SMALL, LARGE, terms=terms, task_weight=0.0)
    begun = started(terms)
    value, state, _ = run(task, begun)
    own = outputs()[0]
    np.testing.assert_allclose(value, 3 + own.mean(), rtol=1e-5)
    expected = np.ones(3)
    np.add.at(expected, np.asarray(BATCH["labels"]), np.asarray(own[:, 0]))
    np.testing.assert_allclose(state["terms"]["memory"], expected, rtol=1e-5)
    with pytest.raises(ValueError, match="'memory' carries a state"):
        run(task, distill.init(STUDENT))


# --- layers by rule -------------------------------------------------------------------


class Odd(nn.Module):
    """Eleven layers, of which the first is used by another method than its call."""

    def setup(self):
        self.embed = nn.Embed(5, 5)
        self.layers = [nn.Dense(5) for _ in range(11)]

    def __call__(self, x):
        x = self.embed.attend(x)
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("kind", KINDS)
def test_rules_name_the_layers_of_terms(kind):
    model = network(kind, inputs=5, outputs=3, widths=(4, 6), normalized=True)
    variables = jitted(model).init(KEY, X)

    def taps(rules):
        return distill.taps(model, rules, variables, X)

    assert taps(r"blocks_\d") == ("blocks_0", "blocks_1")
    assert taps("head") == ("head",)
    several = ("head", ".*/norm", "blocks_1.*")
    inner = ("blocks_0/norm", "blocks_1/norm", "blocks_1", "blocks_1/dense")
    assert taps(several) == ("head", *inner)
    with pytest.raises(ValueError, match="'blok' matches no module.*: 'blocks_"):
        taps(["head", "blok"])
    with pytest.raises(ValueError, match=r"'\(' is not a regular expression"):
        taps("(")
    terms = {
        path: Term(loss=losses.hint, student=path, teacher=path, of="again")
        for path in taps(r"blocks_\d")
    }
    begun = distill.init(variables)
    _, (_, measured) = distill.objective(model, {"again": model}, terms=terms)(
        begun.params, {"teacher": {"again": variables}}, begun.model_state, BATCH, KEY
    )
    assert {"blocks_0", "blocks_1"} < set(measured)


def test_layers_by_rule_are_in_order_and_can_be_tapped():
    model, numbers = from_linen(Odd()), tuple(f"layers_{n}" for n in range(11))
    variables = jitted(model).init(KEY, X)
    assert distill.taps(model, ".*", variables, X) == numbers
    with pytest.raises(ValueError, match="'embed' matches no module"):
        distill.taps(model, "embed", variables, X)
    with pytest.raises(TypeError):  # of the network itself, about its inputs
        distill.taps(model, ".*", variables, (X, X))


# --- bad input ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ({"of": "nobody"}, "'t': no teacher 'nobody'; there are"),
        ({"batch": ("index",)}, "the batch has no 'index'; it has"),
        ({"rows": "mine"}, "the batch has no 'mine', which says whom"),
        ({"where": "mask"}, "the batch has no 'mask', which says what counts"),
        (
            {"student": ("maps", "more"), "bridge": distill.match()},
            "as many layers of the student as of the teacher",
        ),
        (
            {
                "student": ("maps", "more"),
                "teacher": ("maps", "more"),
                "bridge": distill.match(),
            },
            "match joins one layer to one; make a term of each pair",
        ),
        ({"of": "average"}, "no 'average'; begin with"),
    ],
)
def test_what_a_term_lacks_is_named(term, message):
    made = Term(loss=losses.knowledge_distillation, **term)
    with pytest.raises(ValueError, match=message):
        run(distill.objective(SMALL, LARGE, terms={"t": made}), distill.init(STUDENT))


def test_names_and_teachers_that_are_missing():
    term = Term(loss=losses.knowledge_distillation)
    with pytest.raises(ValueError, match="'task_loss' is the name of a metric"):
        distill.objective(SMALL, LARGE, terms={"task_loss": term})
    with pytest.raises(ValueError, match="teacher: 'student' is the name of the"):
        distill.objective(SMALL, {"student": LARGE}, terms={"t": term})
    with pytest.raises(ValueError, match="frozen: there is no 'teacher'"):
        run(
            distill.objective(SMALL, LARGE, terms={"t": term}),
            distill.init(STUDENT),
            teacher=None,
        )
    named = Term(loss=losses.knowledge_distillation, of="a")
    with pytest.raises(ValueError, match=r"got Variables, but .* names; give {'a': it"):
        run(
            distill.objective(SMALL, {"a": LARGE}, terms={"t": named}),
            distill.init(STUDENT),
        )
    with pytest.raises(ValueError, match="decay: got 2.0"):
        distill.moving_average(2.0)
    with pytest.raises(ValueError, match=r"got \['model'\], but no 'student'; begin"):
        distill.with_average(Variables({"model": STUDENT.params}))


def test_several_teachers_of_unlike_shapes():
    five = from_linen(nn.Dense(5))
    given = {"a": TEACHER, "b": five.init(KEY, X)}
    term = Term(loss=losses.multi_teacher_distillation, of=("a", "b"))
    task = distill.objective(SMALL, {"a": LARGE, "b": five}, terms={"both": term})
    message = (
        r"'both': .* at '', {'a': \(6, 3\), 'b': \(6, 5\)}.* a term of each teacher"
    )
    with pytest.raises(ValueError, match=message):
        run(task, distill.init(STUDENT), teacher=given)


@pytest.mark.parametrize("several", [False, True])
def test_likeliest_classes_without_a_cache(several):
    term = Term(
        loss=losses.top_k_knowledge_distillation,
        teacher=distill.TOP_K,
        of="a" if several else "teacher",
    )
    teacher = {"a": LARGE} if several else LARGE
    task = distill.objective(SMALL, teacher, terms={"few": term})
    with pytest.raises(ValueError, match=r"only a cache has.*top_k=\.\.\."):
        run(task, distill.init(STUDENT))


@pytest.mark.parametrize("name", ["alpha", "temperature"])
def test_schedules_need_terms(name, types_unchecked):
    schedule: Any = optax.constant_schedule(0.5)
    with pytest.raises(ValueError, match=f"{name}: a schedule needs a term; give"):
        distill.objective(SMALL, LARGE, **{name: schedule})


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"alpha": 0.5}, "alpha: got 0.5 with terms, .* give distill.Term"),
        ({"alpha": 0.9}, "alpha: got 0.9 with terms"),  # even that of the default
        ({"temperature": 1.0}, "temperature: got 1.0 with terms, which have their own"),
        ({"terms": None, "task_weight": 0.0}, "task_weight: got 0.0 without.*alpha="),
        (
            {"terms": None, "task_weight": optax.constant_schedule(1)},
            "task_weight: got",
        ),
    ],
)
def test_weights_that_would_not_be_read(option, message):
    given = {"terms": {"t": Term(loss=losses.knowledge_distillation)}, **option}
    with pytest.raises(ValueError, match=message):
        distill.objective(SMALL, LARGE, **given)


def test_layers_of_a_student_are_not_held():
    """By the objective; the optimizer may, and then the student stays in one piece."""
    begun = distill.init(STUDENT)
    part, frozen = finetune.split(begun, "student/head")
    task = distill.objective(SMALL, LARGE)
    message = "holds 'student/first/bias' .one of .*set_to_zero"
    with pytest.raises(ValueError, match=message):
        run(task, part, **frozen)
    with pytest.raises(ValueError, match=message):
        distill.predict(SMALL)(part.params, frozen, part.model_state, X)
    kinds = tree.map_with_path(
        lambda path, _: "train" if "head" in path else "hold", begun.params
    )
    optimizer = optax.multi_transform(
        {"train": optax.adamw(0.1), "hold": optax.set_to_zero()}, kinds
    )
    state = init_state(KEY, begun, optimizer, frozen={"teacher": TEACHER})
    state, _ = jax.jit(train_step(task, optimizer))(state, BATCH)
    after, before = state.params["student"], STUDENT.params
    assert same(after["first"], before["first"]) and same(after["maps"], before["maps"])
    assert not same(after["head"], before["head"])
