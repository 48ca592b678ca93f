"""Cases of `jaxtransfer.losses.bituning`."""

import numpy as np

from jaxtransfer.losses import bituning
from tests.losses.case import Case, det

FEATURES, KEYS = det((5, 4), 71), det((5, 4), 72)
PROTOTYPES, QUEUE = det((3, 4), 73), det((3, 2, 4), 74)
LABELS = np.array([0, 2, 1, 2, 0])
FILLED = np.array([[True, True], [True, False], [False, False]])

WITHOUT = {
    "class_queue": "makes an empty queue, of no data",
    "enqueue": "returns a queue, whose counts are integers",
}

CASES = [
    Case(
        bituning.categorical_contrastive,
        (FEATURES, KEYS, LABELS, QUEUE),
        options={"filled": FILLED},
        stopped=(1, 3),
        masks={"where": (0, 1, 2)},
        per_example=True,
    ),
    Case(
        bituning.contrastive_cross_entropy,
        (FEATURES, PROTOTYPES, LABELS, QUEUE),
        options={"filled": FILLED},
        stopped=(1, 3),
        masks={"where": (0, 2)},
        per_example=True,
    ),
    Case(
        bituning.contrastive_cross_entropy,
        (FEATURES, PROTOTYPES, LABELS, QUEUE),
        options={"train_prototypes": True, "temperature": 0.5},
        label="prototypes",
        differentiable=(0, 1),
        stopped=(3,),
        masks={"where": (0, 2)},
        per_example=True,
    ),
]
