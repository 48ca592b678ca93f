"""The fine-tuning study on real digits, and that what is held is watched."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import finetune_digits
from jaxtransfer.typing import Variables

SMOKE = finetune_digits.PRESETS["smoke"]


@pytest.mark.slow
@pytest.mark.data
def test_smoke_has_every_method_and_begins_alike_again(tmp_path, data_dir):
    config = dataclasses.replace(SMOKE, run_dir=tmp_path, data_dir=data_dir)
    rows = finetune_digits.main(config)
    methods = [row.method for row in rows if row.task == "5 labels a class"]
    assert methods == [*finetune_digits.METHODS, finetune_digits.PROBE]
    assert all(len(row.values) == config.seeds for row in rows)
    probe = next(row for row in rows if row.method == finetune_digits.PROBE)
    assert min(probe.values) > 30
    first = [(row.task, row.method, row.values[0]) for row in rows[:3]]
    again = finetune_digits.study(config, finetune_digits.read(config))
    assert list(itertools.islice(again, 3)) == first


def test_a_held_layer_that_moved_stops_the_study():
    before = Variables({"head": {"w": jnp.ones(2)}, "stem": {"w": jnp.ones(2)}})
    tuned = Variables({"head": {"w": jnp.zeros(2)}, "stem": {"w": jnp.ones(2)}})
    finetune_digits.check_held(before, tuned, ("head",))
    with pytest.raises(AssertionError, match="held"):
        finetune_digits.check_held(before, tuned, ("stem",))


@pytest.mark.parametrize("labels", [(5,), (3, 7), (1, 5, 10, 50)])
def test_every_number_of_labels_fills_the_common_size_evenly(labels):
    images = {"labels": np.arange(1000) % 10, "rows": np.arange(1000)}
    size = finetune_digits.common_size(labels, 64)
    assert size >= 64
    for count in labels:
        some = finetune_digits.few(images, count, size, (0, 0))
        _, times = np.unique(some["rows"], return_counts=True)
        assert len(times) == 10 * count and len(set(times)) == 1


def test_few_are_balanced_nested_and_of_one_size():
    images = {"labels": np.arange(200) % 10, "rows": np.arange(200)}
    some = finetune_digits.few(images, 1, 40, (0, 0))
    more = finetune_digits.few(images, 4, 40, (0, 0))
    assert len(some["rows"]) == len(more["rows"]) == 40
    assert np.bincount(some["labels"]).tolist() == [4] * 10
    assert len(set(some["rows"])) == 10 and len(set(more["rows"])) == 40
    assert set(some["rows"]) < set(more["rows"])
    for count in (0, -1, 21):
        with pytest.raises(
            ValueError, match=f"labels: 1 to 20 of a class, got {count}"
        ):
            finetune_digits.few(images, count, 40, (0, 0))
    other = finetune_digits.few(images, 1, 40, (0, 1))
    assert set(other["rows"]) != set(some["rows"])
