"""Cases of `jaxtransfer.losses.finetuning`."""

import numpy as np

from jaxtransfer.losses import finetuning
from tests.losses.case import Case, det

MAPS, ANCHOR = det((5, 3, 2, 4), 61), det((5, 3, 2, 4), 62)
ATTENTION = np.array([0.1, 0.2, 0.3, 0.4])
LOGITS, LABELS = det((6, 4), 63, 3.0), np.array([0, 2, 1, 2, 0, 0])
PROBABILITIES = np.exp(LOGITS) / np.exp(LOGITS).sum(axis=1, keepdims=True)
RELATIONSHIP = PROBABILITIES[:3]

CASES = [
    Case(
        finetuning.behavioral_regularization,
        (MAPS, ANCHOR),
        stopped=(1,),
        masks={"where": (0, 1)},
        per_example=True,
    ),
    *(
        Case(
            finetuning.attentive_behavioral_regularization,
            (MAPS, ANCHOR, ATTENTION),
            options={"form": form},
            label=form,
            stopped=(1, 2),
            masks={"where": (0, 1)},
            per_example=True,
        )
        for form in ("code", "paper")
    ),
    Case(
        finetuning.channel_attention,
        (det((4,), 64) + 2.0, np.array(0.7)),
        at_extremes=(0,),
    ),
    Case(
        finetuning.learning_without_forgetting,
        (LOGITS, det((6, 4), 65, 3.0)),
        stopped=(1,),
        masks={"where": (0, 1)},
        per_example=True,
        at_extremes=(0, 1),
    ),
    Case(
        finetuning.category_relationship,
        (PROBABILITIES, LABELS),
        options={"classes": 4},  # one of them without an example
        masks={"where": (0, 1)},
    ),
    Case(
        finetuning.calibrated_category_relationship,
        (det((4, 3), 66, 3.0), PROBABILITIES),
        differentiable=(0, 1),
        masks={"where": (1,)},
        at_extremes=(0,),
    ),
    Case(
        finetuning.co_tuning,
        (LOGITS, LABELS, RELATIONSHIP),
        stopped=(2,),
        masks={"where": (0, 1)},
        per_example=True,
        at_extremes=(0,),
    ),
]
