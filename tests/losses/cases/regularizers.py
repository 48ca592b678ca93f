"""Cases of `jaxtransfer.losses.regularizers`; `l2` and `l2_sp` are in supervised."""

from jaxtransfer.losses import regularizers
from tests.losses.case import Case, det

PARAMS = {"body": det((3, 2), 45), "head": det((2,), 46)}
ANCHOR = {"body": det((3, 2), 48)}

CASES = [
    Case(regularizers.l1_sp, (PARAMS, ANCHOR), stopped=(1,)),
    Case(
        regularizers.elastic_weight_consolidation,
        (PARAMS, ANCHOR, {"body": det((3, 2), 49) + 1.0}),
        stopped=(1, 2),
    ),
]
