"""Cases of `jaxtransfer.losses.ensembles`."""

import numpy as np

from jaxtransfer.losses import ensembles
from tests.losses.case import Case, det

STUDENT, TEACHERS = det((8, 10), 1, 3.0), det((3, 8, 10), 2, 4.0)
COHORT = det((3, 8, 10), 3, 3.0)
ROUTED = np.abs(det((3, 8), 4)) * (det((3, 8), 5) > -0.5)


def multi_teacher_by_example(student, teachers, **options):
    """The teachers on the second axis, so that masks cover the first."""
    return ensembles.multi_teacher_distillation(
        student, teachers.swapaxes(0, 1), **options
    )


def mutual_learning_by_example(cohort, **options):
    """The students on the second axis, so that masks cover the first; their sum."""
    return ensembles.mutual_learning(cohort.swapaxes(0, 1), **options).sum(axis=0)


CASES = [
    *(
        Case(
            ensembles.multi_teacher_distillation,
            (STUDENT, TEACHERS),
            options={"combine": combine, "weights": weights},
            label=f"{combine} {label}",
            stopped=(1,),
            per_example=True,
            at_extremes=(0, 1),
        )
        for combine in ("probabilities", "logits", "divergences")
        for label, weights in (("equal", None), ("routed", ROUTED))
    ),
    *(
        Case(
            multi_teacher_by_example,
            (STUDENT, TEACHERS.swapaxes(0, 1)),
            options={"combine": combine, "weights": np.array([1.0, 0.0, 2.0])},
            label=combine,
            stopped=(1,),
            masks={"where": (0, 1)},
            per_example=True,
        )
        for combine in ("probabilities", "logits", "divergences")
    ),
    Case(
        ensembles.mutual_learning,
        (COHORT,),
        smooth=False,  # the peers are constants of the gradient
        at_extremes=(0,),
        more={"one student": (COHORT[:1],)},
    ),
    Case(
        mutual_learning_by_example,
        (COHORT.swapaxes(0, 1),),
        options={"temperature": 2.0},
        smooth=False,
        masks={"where": (0,)},
        per_example=True,
    ),
]
