"""Cases of `jaxtransfer.losses.features`."""

import numpy as np

from jaxtransfer.losses import features
from tests.losses.case import Case, det

STUDENT, TEACHER = det((3, 5, 4, 2), 3, 2.0), det((3, 5, 4, 2), 4, 2.0)
PER_CHANNEL = det((2,), 5)
CLOSE = {"student is teacher": (TEACHER, TEACHER)}


def _case(function, *parameters, stopped=(1,), differentiable=(0,), **more):
    return Case(
        function,
        (STUDENT, TEACHER, *parameters),
        stopped=stopped,
        differentiable=differentiable,
        masks={"where": (0, 1)},
        per_example=True,
        at_extremes=(0, 1),
        more={name: (*pair, *parameters) for name, pair in CLOSE.items()},
        **more,
    )


CASES = [
    _case(features.hint),
    _case(features.reused_classifier),
    _case(
        features.variational_information_distillation,
        PER_CHANNEL,
        differentiable=(0, 2),
    ),
    _case(features.activation_boundary),
    _case(features.overhaul, -np.abs(PER_CHANNEL), stopped=(1, 2)),
    _case(features.hierarchical_context),
    _case(features.masked_generative, options={"weight": 0.01}),
    *(
        Case(
            features.overhaul_margin,
            (det((4,), 6), det((4,), 7)),
            options={"form": form},
            label=form,
            differentiable=(),
            stopped=(0, 1),
            more={"far": (np.array([1e-30, 1e-3, 1e4, 0.0]), np.full(4, 1e4))},
        )
        for form in ("code", "paper")
    ),
]
