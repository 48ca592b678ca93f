"""Cases of `jaxtransfer.losses.alignment`."""

from jaxtransfer.losses import alignment
from tests.losses.case import Case, det

SOURCE, TARGET = det((6, 4), 31), det((5, 4), 32) + 0.3
MASKS = {"source_where": (0,), "target_where": (1,)}

CASES = [
    Case(
        alignment.maximum_mean_discrepancy,
        (SOURCE, TARGET),
        options={"bandwidth": 2.0},
        differentiable=(0, 1),
        masks=MASKS,
    ),
    Case(
        alignment.maximum_mean_discrepancy,
        (SOURCE, TARGET),
        options={"estimator": "unbiased"},
        label="unbiased",
        smooth=False,  # the mean-distance bandwidth is a constant of the gradient
        differentiable=(0, 1),
        masks=MASKS,
    ),
    Case(
        alignment.correlation_alignment,
        (SOURCE, TARGET),
        differentiable=(0, 1),
        masks=MASKS,
    ),
]
