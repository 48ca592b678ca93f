"""Cases of `jaxtransfer.losses.disparity`."""

from jaxtransfer.losses import disparity
from tests.losses.case import Case, det

FIRST, SECOND = det((6, 3), 61, 3.0), det((6, 3), 62, 3.0)
THIRD, FOURTH = det((5, 3), 63, 3.0), det((5, 3), 64, 3.0)
TWO_CLASSES = (FIRST[:, :2], SECOND[:, :2], THIRD[:, :2], FOURTH[:, :2])

CASES = [
    Case(
        disparity.classifier_discrepancy,
        (FIRST, SECOND),
        differentiable=(0, 1),
        masks={"where": (0, 1)},
        per_example=True,
        at_extremes=(0, 1),
    ),
    Case(
        disparity.class_balance,
        (FIRST,),
        masks={"where": (0,)},
        at_extremes=(0,),
    ),
    Case(
        disparity.class_balance,
        (FIRST,),
        options={"epsilon": 0.0},
        label="exact",
        masks={"where": (0,)},
        at_extremes=(0,),
    ),
    *(
        Case(
            disparity.margin_disparity_discrepancy,
            (FIRST, SECOND, THIRD, FOURTH),
            options={"form": form},
            label=form,
            differentiable=(1, 3),
            stopped=(0, 2),
            masks={"source_where": (0, 1), "target_where": (2, 3)},
            at_extremes=(0, 1, 2, 3),
            more={"two classes": TWO_CLASSES},
        )
        for form in ("paper", "code")
    ),
]
