"""Cases of `jaxtransfer.losses.moments`."""

from jaxtransfer.losses import moments
from tests.losses.case import Case, det

SOURCE, TARGET = det((6, 4), 31), det((5, 4), 32) + 0.3
MASKS = {"source_where": (0,), "target_where": (1,)}

CASES = [
    Case(
        moments.correlation_alignment,
        (SOURCE, TARGET),
        differentiable=(0, 1),
        masks=MASKS,
    ),
    Case(
        moments.correlation_alignment,
        (SOURCE, TARGET),
        options={"form": "mean_covariance"},
        label="mean_covariance",
        differentiable=(0, 1),
        masks=MASKS,
    ),
    Case(
        moments.log_correlation_alignment,
        (SOURCE, TARGET),
        options={"epsilon": 1e-2},
        differentiable=(0, 1),
        masks=MASKS,
        more={"fewer rows than features": (SOURCE[:2], TARGET[:3])},
    ),
    Case(
        moments.central_moment_discrepancy,
        (SOURCE, TARGET),
        options={"bounds": (-1.0, 1.0)},
        differentiable=(0, 1),
        masks=MASKS,
        more={"one row a side": (SOURCE[:1], TARGET[:1])},
    ),
]
