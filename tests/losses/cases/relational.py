"""Cases of `jaxtransfer.losses.relational` and `jaxtransfer.losses.channels`."""

from jaxtransfer.losses import channels, relational
from tests.losses.case import Case, det

STUDENT, TEACHER = det((6, 4), 91), det((6, 5), 92)
MAPS = [det((3, 2, 2, 4), 93), det((3, 2, 2, 3), 94)]
OTHERS = [det((3, 3, 3, 4), 95), det((3, 3, 3, 3), 96)]
PAIR = {"stopped": (1,), "masks": {"where": (0, 1)}}


def _case(function, teacher=TEACHER, label="", **options):
    return Case(function, (STUDENT, teacher), options=options, label=label, **PAIR)


CASES = [
    _case(relational.similarity_preserving),
    _case(relational.correlation_congruence),
    _case(relational.correlation_congruence, det((6, 4), 97), "code", form="code"),
    _case(relational.relational_distance),
    _case(relational.relational_angle),
    _case(relational.relational_knowledge_distillation),
    _case(relational.probabilistic_knowledge_transfer),
    *(
        Case(
            channels.flow_of_solution_procedure,
            (*MAPS, *OTHERS),
            options={"form": form},
            label=form,
            differentiable=(0, 1),
            stopped=(2, 3),
            masks={"where": (0, 1, 2, 3)},
            per_example=True,
        )
        for form in ("paper", "norms")
    ),
    Case(
        channels.neuron_selectivity_transfer,
        (MAPS[0], det((3, 2, 2, 5), 98)),
        per_example=True,
        **PAIR,
    ),
    Case(
        channels.inter_channel_correlation,
        (MAPS[0], det((3, 3, 2, 4), 99)),
        per_example=True,
        **PAIR,
    ),
]
