"""The cases of every public score; see `tests/losses/case.py`."""

import numpy as np

from jaxtransfer import scores
from tests.losses.case import Case, det

FEATURES, LOGITS = det((9, 4), 11), det((9, 4), 12, 3.0)
LABELS, GIVEN = np.arange(9) % 3, np.array([0, 1, 1, 0, 1, 0, 2, 1, 2])
PROBABILITIES = np.exp(LOGITS) / np.exp(LOGITS).sum(axis=1, keepdims=True)
LOSSES, WEIGHTS = abs(det((9,), 13)), np.exp(det((9,), 14))
RUNS = "returns the number of a run"
WITHOUT = {"choose": RUNS}


def of_labels(function, array, label="", **options):
    """Of one class of 4 there is no example, of another there may be one."""
    return Case(
        function,
        (array, LABELS),
        options={"classes": 4, **options},
        label=label,
        differentiable=(),
        masks={"where": (0, 1)},
        more={
            "fewer rows than columns": (array[:3], LABELS[:3]),
            "one row": (array[:1], LABELS[:1]),
            "one class": (array, 0 * LABELS),
            "one a class": (array[:4], np.arange(4)),
        },
    )


def of_logits(function, label="", **options):
    return Case(
        function,
        (LOGITS,),
        options=options,
        label=label,
        differentiable=(),
        masks={"where": (0,)},
        at_extremes=(0,),
        more={
            "one row": (LOGITS[:1],),
            "one class": (np.tile([9.0, 0.0, -1.0, -2.0], (6, 1)),),
        },
    )


def of_losses(function):
    return Case(
        function,
        (LOSSES, WEIGHTS),
        differentiable=(),
        masks={"where": (0, 1)},
        more={"large": (LOSSES, 1e13 * WEIGHTS), "one": (LOSSES[:1], WEIGHTS[:1])},
    )


def of_domains(function, source, target, **options):
    return Case(
        function,
        (source, target),
        differentiable=(),
        masks={"source_where": (0,), "target_where": (1,)},
        more={"one each": (source[:1], target[:1])},
        **options,
    )


CASES = [
    of_labels(scores.leep, PROBABILITIES),
    Case(
        scores.nce,
        (GIVEN, LABELS),
        options={"source_classes": 4, "classes": 4},
        differentiable=(),
        masks={"where": (0, 1)},
    ),
    of_labels(scores.log_me, FEATURES),
    Case(
        scores.log_me,
        (FEATURES, det((9, 2), 15)),
        label="regression",
        differentiable=(),
        masks={"where": (0, 1)},
        more={"without error": (FEATURES[:3], FEATURES[:3, 0])},
    ),
    of_labels(scores.h_score, FEATURES),
    of_labels(scores.h_score, FEATURES, "ledoit_wolf", shrinkage="ledoit_wolf"),
    of_labels(scores.h_score, FEATURES, "shrunk", shrinkage=0.5),
    of_labels(scores.transrate, FEATURES),
    of_labels(scores.transrate, FEATURES, "examples", average="examples"),
    of_labels(scores.gbc, FEATURES),
    of_labels(scores.gbc, FEATURES, "diagonal", covariance="diagonal"),
    of_labels(scores.gbc, FEATURES, "code", covariance="spherical_code"),
    of_labels(scores.gbc, FEATURES, "components", components=2),
    of_domains(
        scores.proxy_a_distance, LOGITS[:, 0], LOGITS[:5, 1], at_extremes=(0, 1)
    ),
    of_domains(
        scores.held_out_domain_logits,
        FEATURES,
        det((7, 4), 16),
        options={"iterations": 8},
    ),
    Case(
        scores.density_ratio,
        (LOGITS[:, 0],),
        options={"size_ratio": 0.5},
        differentiable=(),
        masks={"where": (0,)},
        per_example=True,
        at_extremes=(0,),
    ),
    Case(
        scores.source_accuracy,
        (LOGITS, LABELS),
        differentiable=(),
        masks={"where": (0, 1)},
        at_extremes=(0,),
    ),
    Case(
        scores.oracle_target_accuracy,
        (LOGITS, LABELS),
        differentiable=(),
        masks={"where": (0, 1)},
        at_extremes=(0,),
    ),
    of_logits(scores.negative_entropy),
    of_logits(scores.prediction_diversity),
    of_logits(scores.mutual_information),
    of_logits(scores.nuclear_norm),
    of_logits(scores.snd),
    of_logits(scores.snd, "tiles", tile=2, temperature=1e-2),
    of_losses(scores.iwcv),
    of_losses(scores.dev),
]
