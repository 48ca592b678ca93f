"""Pairs of domains and shifts made on the spot."""

from typing import get_args

import numpy as np
import pytest

from jaxtransfer import data
from jaxtransfer.data import domains

DIGITS = data.as_arrays(data.load("digits", "test[:40]"))["inputs"]


def test_pair_withholds_the_labels_of_the_target():
    """Shapes, sizes, channels, and which parts have labels."""
    pair = data.pair(
        "digits",
        "digits",
        size=12,
        channels=3,
        source_splits=("train[:30]", "test[:20]"),
        target_splits=("train[30:70]", "test[20:30]"),
    )
    assert pair["source"]["train"]["inputs"].shape == (30, 12, 12, 3)
    assert pair["target"]["train"]["inputs"].shape == (40, 12, 12, 3)
    assert set(pair["target"]["train"]) == {"inputs"}
    for domain, part in (("source", "train"), ("source", "test"), ("target", "test")):
        assert pair[domain][part]["labels"].dtype == np.int32
    labelled = data.pair("digits", "digits", target_labels=True)
    assert set(labelled["target"]["train"]) == {"inputs", "labels"}


def test_pair_needs_the_data(tmp_path):
    """The error of `load` comes through."""
    with pytest.raises(FileNotFoundError, match=r"jaxtransfer\.data\.prepare usps"):
        data.pair("digits", "usps", data_dir=tmp_path)


@pytest.mark.parametrize("option", ["size", "channels"])
def test_pair_takes_no_zero_for_none(option):
    with pytest.raises(ValueError, match=f"{option}=0"):
        data.pair("digits", "digits", **{option: 0})


@pytest.mark.parametrize("kind", get_args(domains.Kind))
def test_shift_is_a_function_of_its_seed(kind):
    """Same seed, same images; strength 0 is the identity; range and shape stay."""
    shifted = data.shift(DIGITS, kind=kind, seed=3)
    np.testing.assert_array_equal(shifted, data.shift(DIGITS, kind=kind, seed=3))
    if kind != "inversion":
        assert not np.array_equal(shifted, data.shift(DIGITS, kind=kind, seed=4))
    assert shifted.shape == DIGITS.shape
    assert shifted.dtype == np.float32
    assert 0 <= shifted.min() <= shifted.max() <= 1
    assert np.abs(shifted - DIGITS).mean() > 0.05
    same = data.shift(DIGITS, kind=kind, seed=3, strength=0.0)
    np.testing.assert_allclose(same, DIGITS, atol=1e-6)


def test_shifts_do_what_they_say():
    """Values that can be computed by hand."""
    np.testing.assert_allclose(
        data.shift(DIGITS, kind="inversion", seed=0), 1 - DIGITS, atol=1e-6
    )
    assert np.all(data.shift(DIGITS, kind="noise", seed=0) >= DIGITS)
    black, white = np.zeros((3, 8, 8, 3)), np.ones((3, 8, 8, 3))
    background = data.shift(black, kind="blending", seed=0)
    np.testing.assert_allclose(
        data.shift(white, kind="blending", seed=0), 1 - background, atol=1e-6
    )
    assert np.abs(np.diff(background, axis=2)).max() < 0.45
    assert len({image.tobytes() for image in background}) == 3
    dot = np.zeros((50, 9, 9, 1))
    dot[:, 4, 8] = 1
    turned = data.shift(dot, kind="rotation", seed=0)
    weight = turned[..., 0] / turned.sum((1, 2, 3))[:, None, None]
    rows = (weight.sum(2) * np.arange(9)).sum(1)
    columns = (weight.sum(1) * np.arange(9)).sum(1)
    angles = np.degrees(np.arctan2(4 - rows, columns - 4))
    assert -1 < angles.min() < 10 < 50 < angles.max() < 61


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "noise", "strength": 2.0}, "strength=2.0"),
        ({"kind": "noise", "images": DIGITS[0]}, "images must be"),
        ({"kind": "noise", "images": DIGITS * 255}, r"lie in \[0, 1\]"),
        ({"kind": "blur"}, "kind='blur'"),
    ],
)
def test_shift_refuses(arguments, message, types_unchecked):
    """Out of range, wrong rank, unscaled, unknown."""
    images = arguments.pop("images", DIGITS)
    with pytest.raises(ValueError, match=message):
        data.shift(images, seed=0, **arguments)


@pytest.mark.data
def test_real_pair_has_common_shapes(data_dir):
    """USPS is enlarged to MNIST's size, MNIST coloured for MNIST-M."""
    try:
        pair = data.pair(
            "usps",
            "mnist_m",
            source_splits=("train[:40]", "test[:10]"),
            target_splits=("train[:30]", "test[:10]"),
            data_dir=data_dir,
        )
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert pair["source"]["train"]["inputs"].shape == (40, 32, 32, 3)
    assert pair["target"]["train"]["inputs"].shape == (30, 32, 32, 3)
