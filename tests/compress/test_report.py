import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import compress, nets
from jaxtransfer.compress import report
from jaxtransfer.model import from_linen
from jaxtransfer.typing import Model, Variables
from tests.twins import KINDS, jitted, network

KEY = jax.random.key(0)
X = jnp.ones((5, 6))
TEACHER = compress.Measured(
    "large", 853_018, 853_018, 2.5e8, 3_428_712, 3_428_712, 40.0
)
STUDENT = compress.Measured("student", 78_042, 20_000, 2.3e7, 80_000, 40_000, 1.5, 87.5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_counted(kind):
    """6 - 8 - 5 - 3 with biases, and a mean and a variance for each hidden unit."""
    model = network(kind, normalized=True)
    variables = jitted(model).init(KEY, X)
    found = compress.measure("net", model, variables, X, repeats=1)
    weights = 6 * 8 + 8 * 5 + 5 * 3
    others = (8 + 5 + 3) + 2 * (8 + 5)  # biases, scales and shifts
    assert found.parameters == weights + others
    assert found.nonzero == weights + (8 + 5)  # biases and shifts begin at zero
    assert found.bytes == 4 * (weights + others + 2 * (8 + 5))
    # Two for each weight, and for each unit few: bias, normalisation, ReLU.
    assert 2 * weights <= found.flops <= 2 * weights + 20 * 16
    assert found.score is None and found.milliseconds > 0


def test_operations_are_those_of_one_example():
    layer = from_linen(nn.Conv(7, (3, 3), padding="VALID", use_bias=False))
    images = jnp.ones((4, 10, 9, 2))
    variables = layer.init(KEY, images)
    found = [
        compress.measure("conv", layer, variables, images[:n], repeats=1).flops
        for n in (1, 4)
    ]
    assert found == [2 * (8 * 7) * (3 * 3 * 2) * 7] * 2


def loops(unroll):
    """Five times three products of 8 by 8 and as many or two more, as loops."""

    def apply(variables, inputs, **_):
        def inner(x, weight):
            return x @ weight, None

        def outer(x, weights):
            x = jax.lax.scan(inner, x, weights, unroll=unroll)[0]
            return jax.lax.cond(
                x[0, 0] > 0,
                lambda x: jax.lax.scan(inner, x, weights[:3])[0],
                lambda x: jax.lax.scan(inner, x, weights[:2])[0],
                x,
            ), None

        weights = variables.params["weights"]
        return jax.lax.scan(outer, inputs, weights, unroll=unroll)[0], {}, {}

    return Model(lambda *_: Variables({}), apply)


@pytest.mark.parametrize("unroll", [1, 2, 0])
def test_a_loop_counts_for_every_trip(unroll):
    variables = Variables({"weights": jnp.ones((5, 3, 8, 8))})
    inputs = jax.ShapeDtypeStruct((4, 8), jnp.float32)  # zeros do
    found = compress.measure("x", loops(unroll), variables, inputs, repeats=1, warmup=0)
    assert found.flops == pytest.approx(5 * (3 + 3) * 2 * 8 * 8, rel=0.03)


def test_several_inputs_are_cut_to_one_example():
    class Both(nn.Module):
        @nn.compact
        def __call__(self, first, second):
            return nn.Dense(3, use_bias=False)(jnp.concatenate([first, second], 1))

    model, inputs = from_linen(Both()), (jnp.ones((4, 2)), jnp.ones((4, 5)))
    found = compress.measure("two", model, model.init(KEY, inputs), inputs, repeats=1)
    assert found.flops == 2 * 7 * 3


def test_a_random_key_in_the_state_counts_as_its_numbers():
    def apply(variables, inputs, **_):
        return inputs @ variables.params["weights"], {}, {}

    variables = Variables({"weights": jnp.ones((6, 2))}, {"key": KEY})
    model = Model(lambda *_: variables, apply)
    found = compress.measure("x", model, variables, X, repeats=1, warmup=0)
    assert found.parameters == 12 and found.bytes == 4 * 12 + 8


def test_zeros_are_left_out_of_the_packed_bytes():
    model = from_linen(nn.Dense(8))
    one = jnp.ones((1, 10))
    variables = model.init(KEY, one)
    params = {"bias": jnp.ones(8), "kernel": jnp.ones((10, 8)).at[2:].set(0.0)}
    found = compress.measure(
        "x", model, Variables(params), jnp.ones((1, 10)), repeats=1
    )
    assert found.nonzero == 8 + 16 and found.bytes == 4 * 88
    # Kernel: a bit for each of 80, and 16 numbers; the bias has no zeros to leave out.
    assert found.packed_bytes == 80 // 8 + 4 * 16 + 4 * 8
    dense = compress.measure("x", model, variables, one, repeats=1)
    assert dense.packed_bytes == 4 * 80 + 1  # the bias is zero: a bit each


def test_integers_take_a_byte():
    made = compress.quantized(nets.MLP(3, widths=(8,)), X)
    held = made.integer.init(KEY, X)
    found = compress.measure("int8", made.integer, held, X, repeats=1)
    weights, scales, biases = 6 * 8 + 8 * 3, 8 + 3, 8 + 3
    assert found.bytes == weights + 4 * (scales + biases)
    assert found.parameters == weights + scales + biases
    assert found.flops >= 2 * weights


def test_the_time_is_the_median_without_the_warm_up(monkeypatch):
    """Passes of 100 s (compiling), then of 1, 9, 2, 3 and 4 s."""
    ticks = np.cumsum([x for spent in (100, 100, 1, 9, 2, 3, 4) for x in (0, spent)])
    clock = iter(ticks.astype(float))
    monkeypatch.setattr(report.time, "perf_counter", lambda: next(clock))
    model = from_linen(nn.Dense(2))
    variables = model.init(KEY, X)
    found = compress.measure("x", model, variables, X, repeats=5, warmup=2)
    assert found.milliseconds == 3000.0
    assert next(clock, None) is None


def test_the_score_is_of_the_network():
    model = from_linen(nn.Dense(3))
    variables = model.init(KEY, X)
    expected = float(model.apply(variables, 2 * X)[0].sum())
    found = compress.measure(
        "x", model, variables, X, score=lambda run: float(run(2 * X).sum()), repeats=1
    )
    assert found.score == pytest.approx(expected, rel=1e-5)
    assert compress.measure("x", model, variables, X, score=7.5, repeats=1).score == 7.5
    with pytest.raises(ValueError, match="repeats: got 0"):
        compress.measure("x", model, variables, X, repeats=0)
    with pytest.raises(ValueError, match="warmup: got -1; it must be 0 or more"):
        compress.measure("x", model, variables, X, warmup=-1)


def test_the_table_compares_with_its_first_line():
    head, line, first, second = compress.table([TEACHER, STUDENT]).splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in (head, second)]
    assert dict(zip(*cells, strict=True)) == {
        "network": "student",
        "parameters": "78,042",
        "nonzero": "20,000",
        "MFLOPs": "23.00",
        "KiB": "78.1",
        "packed": "39.1",
        "smaller": "85.7x",
        "ms": "1.50",
        "accuracy %": "87.50",
    }
    assert len({len(row) for row in (head, line, first, second)}) == 1
    assert "accuracy" not in compress.table([TEACHER])
    with pytest.raises(ValueError, match="nothing to show"):
        compress.table([])


def test_no_name_breaks_the_table():
    odd = report.dataclasses.replace(TEACHER, name="a|b\nc")
    assert compress.table([odd]).splitlines()[2].startswith(r"| a\|b c ")


@pytest.mark.parametrize("against", ["packed_bytes", "flops", "milliseconds"])
def test_the_figure_has_a_point_for_each(tmp_path, monkeypatch, against):
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda self, *args, **more: (drawn.append(self), save(self, *args, **more)),
    )
    other = report.dataclasses.replace(TEACHER, name=r"_$\foo$", score=93.4)
    compress.figure([other, STUDENT], tmp_path / "report.png", against=against)
    (axes,) = drawn[0].axes
    points = {line.get_label(): line.get_xydata()[0].tolist() for line in axes.lines}
    unit = {"packed_bytes": 1024, "flops": 1e6, "milliseconds": 1}[against]
    assert points == {
        row.name: [getattr(row, against) / unit, row.score] for row in (other, STUDENT)
    }
    legend = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert legend == [other.name, STUDENT.name]  # names are no TeX either
    assert axes.get_xscale() == "log"
    assert (tmp_path / "report.png").stat().st_size > 1000


def test_what_can_t_be_drawn_is_refused(tmp_path, monkeypatch, types_unchecked):
    with pytest.raises(ValueError, match=r"rows: no score of \['large'\]"):
        compress.figure([TEACHER, STUDENT], tmp_path / "x.png")
    with pytest.raises(ValueError, match="rows: there is nothing to draw"):
        compress.figure([], tmp_path / "x.png")
    free = report.dataclasses.replace(STUDENT, name="free", flops=0.0)
    with pytest.raises(ValueError, match=r"rows: flops of \['free'\] is not positive"):
        compress.figure([STUDENT, free], tmp_path / "x.png", against="flops")
    with pytest.raises(ValueError, match="against: got 'weight'; choose among"):
        compress.figure([STUDENT], tmp_path / "x.png", against="weight")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"matplotlib; run: .*r\[experiments\]"):
        compress.figure([STUDENT], tmp_path / "x.png")
    assert not list(tmp_path.iterdir())
