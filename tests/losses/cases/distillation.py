"""Cases of `jaxtransfer.losses.distillation`."""

import numpy as np

from jaxtransfer.losses import distillation
from tests.losses.case import Case, det

STUDENT, TEACHER = det((8, 10), 1, 3.0), det((8, 10), 2, 4.0)
ONE = {"one": (STUDENT[:1], TEACHER[:1])}
PROMISES = {
    "stopped": (1,),
    "masks": {"where": (0, 1)},
    "per_example": True,
    "at_extremes": (0, 1),
    "more": ONE,
}
LOG_P = TEACHER - np.log(np.exp(TEACHER).sum(axis=1, keepdims=True))
INDICES = np.argsort(-LOG_P, axis=1)[:, :3]

CASES = [
    Case(distillation.knowledge_distillation, (STUDENT, TEACHER), **PROMISES),
    Case(
        distillation.knowledge_distillation,
        (STUDENT, TEACHER),
        options={"divergence": "reverse", "temperature": 2.0},
        label="reverse",
        **PROMISES,
    ),
    Case(
        distillation.knowledge_distillation,
        (STUDENT, TEACHER),
        options={"divergence": "jensen_shannon", "beta": 0.1, "temperature": 1.0},
        label="jensen_shannon",
        **PROMISES,
    ),
    Case(
        distillation.logit_matching,
        (STUDENT, TEACHER),
        options={"centred": True},
        **PROMISES,
    ),
    Case(
        distillation.standardize_logits,
        (STUDENT,),  # masked rows: in test_distillation.py, the result has classes
        at_extremes=(0,),
        more={"a constant row": (np.vstack([STUDENT, np.full(10, 1e4 / 3)]),)},
    ),
    *(
        Case(
            distillation.dynamic_temperature,
            (STUDENT, TEACHER),
            options={"weighting": weighting},
            label=weighting,
            differentiable=(),  # a temperature is a constant of the gradient
            stopped=(0, 1),
            masks={"where": (0, 1)},
            per_example=True,
            at_extremes=(0, 1),
            more=ONE,
        )
        for weighting in ("flsw", "cwsm")
    ),
    *(
        Case(
            distillation.distillation_from_stronger_teacher,
            (STUDENT, TEACHER),
            options=options,
            label=label,
            stopped=(1,),
            masks={"where": (0, 1)},
            at_extremes=(0, 1),
            more={
                **ONE,
                "a constant row": (np.vstack([STUDENT, np.full(10, 0.1)]),) * 2,
                "tiny probabilities": (18 * STUDENT, TEACHER),
            },
        )
        for label, options in (
            ("", {"temperature": 4.0}),
            ("plain correlation", {"eps": 0.0}),
        )
    ),
    *(
        Case(
            distillation.top_k_knowledge_distillation,
            (STUDENT, TEACHER),
            options={"k": 3, "tail": tail, "temperature": 2.0},
            label=tail,
            **PROMISES,
        )
        for tail in ("renormalize", "bucket")
    ),
    *(
        Case(
            distillation.cached_knowledge_distillation,
            (STUDENT, LOG_P[np.arange(8)[:, None], INDICES], INDICES),
            options={"tail": tail},
            label=tail,
            stopped=(1,),
            masks={"where": (0, 1, 2)},
            per_example=True,
            at_extremes=(0,),
        )
        for tail in ("renormalize", "bucket")
    ),
]
