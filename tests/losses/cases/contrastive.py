"""Cases of `jaxtransfer.losses.contrastive`."""

import numpy as np

from jaxtransfer.losses import contrastive
from tests.losses.case import Case, det

STUDENT, TEACHER = det((5, 4), 81), det((5, 4), 82)
INDICES = np.array([2, 0, 7, 5, 8])
NEGATIVES = (INDICES[:, None] + np.array([1, 3, 4])) % 9
ROWS = det((9, 4), 83, 0.9), det((9, 4), 84, 0.9)
NEW = contrastive.ContrastiveMemory(*ROWS, np.full(2, -np.inf))
USED = NEW._replace(log_normalizers=np.array([3.0, 4.0]))
OF_BATCH = {"where": (0, 1, 2, 3)}
# One and two times the same example, its embeddings opposite.
TURNED = np.concatenate([STUDENT, -STUDENT])

WITHOUT = {
    "contrastive_memory": "makes a memory, of no data",
    "sample_negatives": "returns indices",
}

CASES = [
    Case(
        contrastive.contrastive_representation_distillation,
        (STUDENT, TEACHER, INDICES, NEGATIVES, USED),
        differentiable=(0, 1),
        stopped=(4,),
        masks=OF_BATCH,
        per_example=True,
        at_extremes=(0, 1),
    ),
    Case(
        contrastive.contrastive_representation_distillation,
        (STUDENT, TEACHER, INDICES, NEGATIVES, NEW),
        options={"epsilon": 1e-7, "temperature": 0.5},
        label="first",
        differentiable=(0, 1),
        stopped=(4,),
        masks=OF_BATCH,
        per_example=True,
        smooth=False,  # Z is a constant of the gradient
    ),
    Case(
        contrastive.contrastive_representation_distillation,
        (STUDENT, TEACHER, INDICES, NEGATIVES, USED),
        options={"normalize": False},
        label="as-given",
        differentiable=(0, 1),
        stopped=(4,),
        masks=OF_BATCH,
        per_example=True,
        at_extremes=(0, 1),
    ),
    Case(
        contrastive.update_contrastive_memory,
        (STUDENT, TEACHER, INDICES, NEGATIVES, USED),
        differentiable=(),
        stopped=(0, 1, 4),
        masks=OF_BATCH,
        half=False,  # the memory keeps its own type
    ),
    Case(
        contrastive.update_contrastive_memory,
        (STUDENT, TEACHER, INDICES, NEGATIVES, NEW),
        label="first",
        differentiable=(),
        stopped=(0, 1, 4),
        half=False,
    ),
    Case(
        contrastive.contrastive_distillation,
        (STUDENT, TEACHER),
        stopped=(1,),
        masks={"where": (0, 1)},
        per_example=True,
        at_extremes=(0, 1),
        smooth=False,  # too sharp for finite differences; the symmetric case is not
        more={
            "one": (STUDENT[:1], TEACHER[:1]),
            "opposite": (TURNED, -TURNED),
            "same": (STUDENT, STUDENT),
        },
    ),
    Case(
        contrastive.contrastive_distillation,
        (STUDENT, TEACHER),
        options={
            "symmetric": True,
            "temperature": 0.5,
            "labels": np.array([0, 1, 0, 2, 1]),
        },
        label="symmetric",
        stopped=(1,),
        per_example=True,
        at_extremes=(0, 1),
    ),
    Case(
        contrastive.contrastive_distillation,
        (STUDENT, TEACHER),
        options={"labels": np.zeros(5, int)},
        label="one-class",
        differentiable=(),
        per_example=True,
    ),
]
