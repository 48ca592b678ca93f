import dataclasses
import json

import pytest

from experiments import common

CONFIG = common.StudyConfig()


def begun(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"config": {"seed": CONFIG.seed, "seeds": CONFIG.seeds}})
    )
    for row in ("KD", "a\u2028b", "π"):
        common.keep(tmp_path, "values.jsonl", row=row)
    return tmp_path / "values.jsonl"


def rows(folder):
    return [x["row"] for x in common.kept([folder], "values.jsonl", CONFIG)]


@pytest.mark.parametrize(
    ("lost", "left"), [(0, 3), (1, 3), (3, 2), (4, 2), (12, 2), (13, 2)]
)
def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path, lost, left):
    """Within the line, between the bytes of one letter, before its end, at its end."""
    path = begun(tmp_path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size - lost])
    assert rows(tmp_path) == ["KD", "a\u2028b", "π"][:left]


def test_a_damaged_line_before_others_is_named(tmp_path):
    path = begun(tmp_path)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], lines[1][:5], *lines[2:]]))
    with pytest.raises(
        ValueError, match=r"line 2 of .*values.jsonl is damaged.*remove"
    ):
        rows(tmp_path)


@dataclasses.dataclass(frozen=True)
class Inner:
    queries: int = 10


@dataclasses.dataclass(frozen=True)
class Options(common.StudyConfig):
    inner: Inner = Inner()
    weight: float = 1.0
    labels: tuple[int, ...] = (1, 5)
    rows: tuple[str, ...] = ("KD",)
    widths: tuple[int, ...] = (16, 16)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"inner": Inner(0)}, "inner.queries: 0 must be 1 or more"),
        ({"weight": float("nan")}, "weight: must be a number"),
        ({"labels": (5, 1, 5)}, "labels: 5 is there twice"),
        ({"rows": ("KD", "KD")}, "rows: 'KD' is there twice"),
        ({"seed": 2**32}, "seed: 0 to 4294967295, got 4294967296"),
        ({"seed": -1}, "seed: 0 to"),
    ],
)
def test_options_that_can_t_be(changed, message):
    common.check_options(Options())
    with pytest.raises(ValueError, match=message):
        common.check_options(dataclasses.replace(Options(), **changed))


def test_damaged_options_and_lines_of_an_earlier_run(tmp_path):
    path = begun(tmp_path)
    path.write_bytes(b"5\n" + path.read_bytes())
    with pytest.raises(ValueError, match=r"line 1 of .* is damaged .no object"):
        rows(tmp_path)
    (tmp_path / "config.json").write_text('{"config": {"se')
    with pytest.raises(ValueError, match="config.json is damaged .*; leave the folder"):
        rows(tmp_path)


@pytest.mark.parametrize("lower", [False, True])
def test_a_gain_is_positive_where_the_row_is_better(tmp_path, lower):
    """Of an accuracy and of an error; and no difference has no sign."""
    rows = [
        common.Row("users", "mean", [0.5, 0.5]),
        common.Row("users", "MeLU", [0.2, 0.4], "mean"),
        common.Row("users", "same", [0.5, 0.5], "mean"),
    ]
    common.show("x", rows, tmp_path, unit="MAE", lower_is_better=lower)
    lines = (tmp_path / "table.md").read_text().splitlines()[-2:]
    gains = [line.split("|")[-2].split(" ± ")[0].strip() for line in lines]
    assert gains == ["0.20" if lower else "-0.20", "0.00"]
