"""Cases of `jaxtransfer.losses.distillation`."""

from jaxtransfer.losses import distillation
from tests.losses.case import Case, det

STUDENT, TEACHER = det((8, 10), 1, 3.0), det((8, 10), 2, 4.0)

CASES = [
    Case(
        distillation.knowledge_distillation,
        (STUDENT, TEACHER),
        stopped=(1,),
        masks={"where": (0, 1)},
        per_example=True,
        at_extremes=(0, 1),
    ),
]
