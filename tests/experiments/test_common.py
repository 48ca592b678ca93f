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
