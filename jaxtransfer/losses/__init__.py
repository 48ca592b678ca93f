"""Losses: pure functions over arrays. No model, no state, no loop.

Losses of examples return one value per example, ``[...]``; average them with `mean`.
Losses of a set (alignment, adversarial, regularisers) return a scalar.
"""

from jaxtransfer.losses.adversarial import domain_accuracy, domain_adversarial
from jaxtransfer.losses.alignment import (
    coral,
    correlation_alignment,
    maximum_mean_discrepancy,
    mmd,
)
from jaxtransfer.losses.classification import (
    accuracy,
    cross_entropy,
    mean_squared_error,
)
from jaxtransfer.losses.distillation import knowledge_distillation
from jaxtransfer.losses.reduction import mean
from jaxtransfer.losses.regularizers import l2, l2_sp

__all__ = [
    "accuracy",
    "coral",
    "correlation_alignment",
    "cross_entropy",
    "domain_accuracy",
    "domain_adversarial",
    "knowledge_distillation",
    "l2",
    "l2_sp",
    "maximum_mean_discrepancy",
    "mean",
    "mean_squared_error",
    "mmd",
]
