"""Cases of `jaxtransfer.losses.factors`."""

from jaxtransfer.losses import factors
from tests.losses.case import Case, det

STUDENT, TEACHER = det((3, 5, 4, 2), 3, 2.0), det((3, 5, 4, 2), 4, 2.0)
LARGE = det((3, 7, 6, 3), 5, 2.0)
FURTHER = {
    "student is teacher": (TEACHER, TEACHER),
    "large": (1e20 * STUDENT, 1e20 * TEACHER),
    "small": (1e-20 * STUDENT, 1e-20 * TEACHER),
    "one dead example": (STUDENT * [[[[0.0]]], [[[1.0]]], [[[1.0]]]], TEACHER),
}


def _case(function, *, teacher=TEACHER, label="", more=FURTHER, **options):
    return Case(
        function,
        (STUDENT, teacher),
        options,
        label,
        stopped=(1,),
        masks={"where": (0, 1)},
        per_example=True,
        at_extremes=(0, 1),
        more=more,
    )


CASES = [
    Case(
        factors.attention_map,
        (STUDENT,),
        masks={},  # one map a row; `attention_transfer` tries its mask
        at_extremes=(0,),
    ),
    *(
        _case(factors.attention_transfer, form=form, label=form)
        for form in ("code", "paper")
    ),
    _case(factors.attention_transfer, teacher=LARGE, label="pooled", power=1.0),
    *(
        _case(factors.factor_transfer, form=form, label=form)
        for form in ("factor", "attention")
    ),
    _case(factors.channel_distillation, more={}),
    Case(
        factors.pearson_feature_distillation,
        (STUDENT, TEACHER),
        stopped=(1,),
        masks={"where": (0, 1)},
        at_extremes=(0, 1),
        more={name: FURTHER[name] for name in ("student is teacher", "small")},
    ),
]
