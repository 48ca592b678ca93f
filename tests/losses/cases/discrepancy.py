"""Cases of `jaxtransfer.losses.discrepancy` and what is built from it."""

import jax
import numpy as np

from jaxtransfer.losses import discrepancy, joint, presets, two_sample
from tests.losses.case import Case, det

SOURCE, TARGET = det((6, 4), 31), det((5, 4), 32) + 0.3
LAYERS = [SOURCE, det((6, 3), 33)], [TARGET, det((5, 3), 34)]
LABELS, PSEUDO = np.array([0, 1, 2, 2, 1, 0]), np.array([2, 1, 1, 2, 0])
SCORES = det((5, 3), 35, 2.0)
PROBABILITIES = np.exp(SCORES) / np.exp(SCORES).sum(axis=1, keepdims=True)
MASKS = {"source_where": (0,), "target_where": (1,)}
BOTH = {"differentiable": (0, 1), "masks": MASKS}


def _mmd(label, **options):
    # Rules of the bandwidth are constants of the gradient.
    return Case(
        discrepancy.maximum_mean_discrepancy,
        (SOURCE, TARGET),
        options=options,
        label=label,
        smooth="bandwidth" in options and not isinstance(options["bandwidth"], str),
        **BOTH,
    )


def _preset(preset, arrays=(SOURCE, TARGET), smooth=False):
    return Case(
        presets.mmd_preset,
        arrays,
        options={"preset": preset},
        label=preset,
        smooth=smooth,
        **BOTH,
    )


CASES = [
    _mmd("fixed", bandwidth=2.0),
    _mmd("unbiased", estimator="unbiased"),
    _mmd("linear", estimator="linear", bandwidth=2.0),
    _mmd("block", estimator="block", block_size=3, bandwidth=(1.0, 3.0)),
    _mmd("median", bandwidth="median"),
    _mmd(
        "fourier",
        estimator="fourier",
        bandwidth=(1.0, 3.0),
        frequencies=8,
        key=jax.random.key(3),
    ),
    _mmd("weighted", bandwidth=(1.0, 3.0), kernel_weights=(0.2, 0.8)),
    *map(_preset, ("xlearn", "deepda", "tllib", "pytorch_adapt", "dassl")),
    _preset("tllib_linear", (SOURCE, np.roll(SOURCE, 1, axis=1) + 0.3)),
    _preset("pytorch_adapt_linear"),
    _preset("domainbed", smooth=True),
    Case(
        joint.joint_maximum_mean_discrepancy,
        LAYERS,
        options={"bandwidth": [2.0, (1.0, 3.0)]},
        **BOTH,
    ),
    Case(
        joint.local_maximum_mean_discrepancy,
        (SOURCE, TARGET, LABELS, PROBABILITIES),
        options={"bandwidth": 2.0},
        differentiable=(0, 1),
        stopped=(3,),
        masks={"source_where": (0, 2), "target_where": (1, 3)},
        more={
            "one class": (SOURCE, TARGET, 0 * LABELS, PROBABILITIES),
            "no class in both": (
                SOURCE,
                TARGET,
                0 * LABELS,
                np.eye(3)[np.full(5, 2)],
            ),
        },
    ),
    Case(
        joint.contrastive_domain_discrepancy,
        (SOURCE, TARGET, LABELS, PSEUDO),
        options={"bandwidth": 2.0, "classes": 3},
        differentiable=(0, 1),
        masks={"source_where": (0, 2), "target_where": (1, 3)},
        more={"one class": (SOURCE, TARGET, 0 * LABELS, 0 * PSEUDO)},
    ),
    Case(
        two_sample.permutation_test,
        (SOURCE, TARGET),
        options={"bandwidth": 2.0, "permutations": 20, "key": jax.random.key(1)},
        differentiable=(),
        masks={},  # the draws depend on the number of rows; tested with the twin
    ),
    Case(
        two_sample.optimal_kernel_weights,
        (det((16, 3), 36), det((14, 3), 37) + 0.5),
        options={"steps": 20},
        differentiable=(),
        stopped=(0, 1),
        masks={},  # pairs of neighbours: rows in the middle would be tried
        half=False,  # which kernel sees nothing can hang on the last digit
    ),
]
