import dataclasses
import json

from experiments import distill_without_data as study


def test_smoke_writes_a_table(tmp_path):
    config = dataclasses.replace(study.PRESETS["smoke"], run_dir=tmp_path, seeds=1)
    found = study.main(config)
    names = [study.NOISE, study.GENERATED, study.REAL]
    assert [row.method for row in found["rows"]] == names
    (file,) = tmp_path.rglob("results.json")
    written = json.loads(file.read_text())["rows"]
    assert all(0 <= value <= 100 for row in written for value in row["values"])
