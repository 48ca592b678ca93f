"""Cases of `jaxtransfer.losses.labelled_distillation`."""

import numpy as np

from jaxtransfer.losses import labelled_distillation as labelled
from tests.losses.case import Case, det

STUDENT, TEACHER = det((8, 10), 1, 3.0), det((8, 10), 2, 4.0)
LABELS = (3 * np.arange(8) + 1) % 10
SURE = 1e4 * np.eye(2)[LABELS % 2]

CASES = [
    *(
        Case(
            function,
            (STUDENT, TEACHER, LABELS),
            stopped=(1,),
            masks={"where": (0, 1, 2)},
            per_example=True,
            at_extremes=(0, 1),
            more={
                "two classes": (STUDENT[:, :2], TEACHER[:, :2], LABELS % 2),
                "both sure and right": (SURE, SURE, LABELS % 2),
                "student sure and wrong": (-SURE, SURE, LABELS % 2),
                "teacher sure and wrong": (SURE, -SURE, LABELS % 2),
            },
        )
        for function in (
            labelled.target_class_distillation,
            labelled.nontarget_class_distillation,
            labelled.decoupled_knowledge_distillation,
            labelled.normalized_knowledge_distillation,
        )
    ),
    Case(
        labelled.weighted_soft_label_distillation,
        (STUDENT, TEACHER, LABELS),
        smooth=False,  # the weights are constants of the gradient
        stopped=(1,),
        masks={"where": (0, 1, 2)},
        per_example=True,
        at_extremes=(0, 1),
        more={
            "two classes": (STUDENT[:, :2], TEACHER[:, :2], LABELS % 2),
            "both sure and right": (SURE, SURE, LABELS % 2),
            "teacher sure and right": (-SURE, SURE, LABELS % 2),
        },
    ),
    *(
        Case(
            labelled.virtual_teacher_distillation,
            (STUDENT, LABELS),
            options=options,
            label=label,
            masks={"where": (0, 1)},
            per_example=True,
            at_extremes=(0,),
            more={"two classes": (STUDENT[:, :2], LABELS % 2)},
        )
        for label, options in (
            ("", {}),
            ("never wrong", {"correct_probability": 1.0}),
            ("code", {"form": "code"}),
        )
    ),
]
