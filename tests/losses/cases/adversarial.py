"""Cases of `jaxtransfer.losses.adversarial`."""

import jax
import numpy as np

from jaxtransfer.losses import adversarial
from tests.losses.case import Case, det

FEATURES, LOGITS = det((6, 4), 51), det((6, 3), 52, 3.0)
PROBABILITIES = np.exp(LOGITS) / np.exp(LOGITS).sum(axis=1, keepdims=True)

# What returns rows, or two arrays, has its masks tried in test_adversarial.py.
CASES = [
    Case(
        adversarial.domain_adversarial,
        (det((6,), 44, 2.0), det((5, 1), 47, 2.0)),
        options={
            "source_weights": np.linspace(0.5, 1.5, 6),
            "target_weights": np.linspace(0.2, 1.8, 5),
        },
        label="weights",
        differentiable=(0, 1),
        at_extremes=(0, 1),
    ),
    Case(
        adversarial.inverted_label_adversarial,
        (det((6, 1), 53, 2.0),),
        masks={"where": (0,)},
        per_example=True,
        at_extremes=(0,),
    ),
    Case(
        adversarial.domain_confusion,
        (det((6,), 54, 2.0),),
        masks={"where": (0,)},
        per_example=True,
        at_extremes=(0,),
    ),
    Case(
        adversarial.domain_confusion,
        (LOGITS,),
        label="three-domains",
        masks={"where": (0,)},
        per_example=True,
        at_extremes=(0,),
    ),
    Case(adversarial.multilinear_map, (FEATURES, PROBABILITIES), stopped=(1,)),
    Case(
        adversarial.randomized_multilinear_map,
        (FEATURES, PROBABILITIES),
        options={"key": jax.random.key(0), "width": 16},
        stopped=(1,),
    ),
    Case(
        adversarial.entropy_weights,
        (LOGITS, det((5, 3), 55, 3.0)),
        differentiable=(),
        stopped=(0, 1),
        at_extremes=(0, 1),
    ),
]
