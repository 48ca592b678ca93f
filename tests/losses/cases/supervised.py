"""Cases of classification, adversarial and parameter losses."""

import numpy as np

from jaxtransfer.losses import adversarial, classification, reduction, regularizers
from tests.losses.case import Case, det

LOGITS, LABELS = det((6, 4), 41, 3.0), np.array([0, 3, 1, 2, 0, 1])
PARAMS = {"body": det((3, 2), 45), "head": det((2,), 46)}
DOMAINS = {"source_where": (0,), "target_where": (1,)}

CASES = [
    Case(
        classification.cross_entropy,
        (LOGITS, LABELS),
        options={"label_smoothing": 0.1},
        masks={"where": (0, 1)},
        per_example=True,
        at_extremes=(0,),
    ),
    Case(
        classification.mean_squared_error,
        (LOGITS, det((6, 4), 42)),
        differentiable=(0, 1),
        masks={"where": (0, 1)},
        per_example=True,
    ),
    Case(
        classification.accuracy,
        (LOGITS, LABELS),
        differentiable=(),
        masks={"where": (0, 1)},
        per_example=True,
        at_extremes=(0,),
    ),
    Case(reduction.mean, (det((6,), 43),), masks={"where": (0,)}),
    Case(
        adversarial.domain_adversarial,
        (det((6,), 44, 2.0), det((5, 1), 47, 2.0)),
        differentiable=(0, 1),
        masks=DOMAINS,
        at_extremes=(0, 1),
    ),
    Case(
        adversarial.domain_accuracy,
        (det((6,), 44, 2.0), det((5, 1), 47, 2.0)),
        differentiable=(),
        masks=DOMAINS,
        at_extremes=(0, 1),
    ),
    Case(regularizers.l2, (PARAMS,)),
    Case(regularizers.l2_sp, (PARAMS, {"body": det((3, 2), 48)}), stopped=(1,)),
]
