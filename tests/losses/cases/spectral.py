"""Cases of `jaxtransfer.losses.spectral`."""

import numpy as np

from jaxtransfer.losses import spectral
from tests.losses.case import Case, det

LOGITS, FEATURES = det((6, 4), 81, 3.0), det((6, 4), 82)
MASK = {"masks": {"where": (0,)}}
DOMAINS = {
    "differentiable": (0, 1),
    "masks": {"source_where": (0,), "target_where": (1,)},
}
SMALL = {"one row": (FEATURES[:1],), "equal values": (np.eye(4),)}

CASES = [
    Case(
        spectral.batch_nuclear_norm,
        (LOGITS,),
        at_extremes=(0,),
        more={"one class": (np.tile([9.0, 0.0, -1.0, -2.0], (6, 1)),)},
        **MASK,
    ),
    Case(
        spectral.batch_nuclear_norm,
        (LOGITS,),
        options={"form": "code"},
        label="code",
        at_extremes=(0,),
        **MASK,
    ),
    Case(
        spectral.adaptive_feature_norm,
        (FEATURES,),
        per_example=True,
        smooth=False,  # constant by value
        more=SMALL,
        **MASK,
    ),
    Case(
        spectral.batch_spectral_penalization,
        (FEATURES, det((5, 4), 83)),
        more={"equal values": (np.eye(4), np.eye(4))},
        **DOMAINS,
    ),
    Case(spectral.batch_spectral_shrinkage, (FEATURES,), more=SMALL, **MASK),
    Case(
        spectral.nuclear_wasserstein_discrepancy,
        (LOGITS, det((5, 4), 84, 0.5)),
        at_extremes=(0, 1),
        **DOMAINS,
    ),
]
