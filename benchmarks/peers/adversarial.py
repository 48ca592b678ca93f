"""Losses of a domain critic and of disagreeing classifiers."""

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.peers import (
    BATCH,
    CLASSES,
    STUDENT_FEATURES,
    STUDENT_LOGITS,
    TEACHER_LOGITS,
    WIDTH,
    Row,
    Rows,
    normal,
)
from jaxtransfer import losses

FEW_CLASSES = 31
SOURCE_CRITIC, TARGET_CRITIC = normal(BATCH, 1, seed=20), normal(BATCH, 1, seed=21)
CRITICS = (SOURCE_CRITIC, TARGET_CRITIC)
LOGITS = (STUDENT_LOGITS, TEACHER_LOGITS)
FOUR_LOGITS = (
    STUDENT_LOGITS,
    normal(BATCH, CLASSES, seed=22),
    TEACHER_LOGITS,
    normal(BATCH, CLASSES, seed=23),
)


def _softmax(logits):
    raised = np.exp(logits - logits.max(1, keepdims=True))
    return raised / raised.sum(1, keepdims=True)


PREDICTIONS = _softmax(STUDENT_LOGITS)
FEW_PREDICTIONS = _softmax(normal(BATCH, FEW_CLASSES, seed=24))
CRITIC_KERNEL = normal(FEW_CLASSES * WIDTH, 1, seed=25, scale=0.01)
PROJECTIONS = (normal(WIDTH, 1024, seed=26), normal(CLASSES, 1024, seed=27))


def _adversarial(source, target):
    of_source = F.binary_cross_entropy(torch.sigmoid(source), torch.ones_like(source))
    of_target = F.binary_cross_entropy(torch.sigmoid(target), torch.zeros_like(target))
    return 0.5 * (of_source + of_target)


def _weights(logits):
    p = F.softmax(logits, 1).detach()
    entropy = -(p * torch.log(p + 1e-5)).sum(1)
    weights = 1 + torch.exp(-entropy)
    return weights / weights.mean()


def _weighted(source, target, source_logits, target_logits):
    loss = F.binary_cross_entropy_with_logits
    of_source = loss(
        source, torch.ones_like(source), weight=_weights(source_logits)[:, None]
    )
    of_target = loss(
        target, torch.zeros_like(target), weight=_weights(target_logits)[:, None]
    )
    return 0.5 * (of_source + of_target)


def _library_weighted(source, target, *logits):
    of_source, of_target = losses.entropy_weights(*logits, epsilon=1e-5)
    return losses.domain_adversarial(
        source, target, source_weights=of_source, target_weights=of_target
    )


def _confusion(logits):
    uniform = torch.full_like(logits, 1 / logits.shape[1])
    return -(uniform * F.log_softmax(logits, 1)).sum(1).mean()


def _multilinear(features, probabilities, kernel):
    joint = torch.bmm(probabilities.detach().unsqueeze(2), features.unsqueeze(1))
    return ((joint.flatten(1) @ kernel) ** 2).mean()


def _library_multilinear(features, probabilities, kernel):
    return losses.mean((losses.multilinear_map(features, probabilities) @ kernel) ** 2)


def _randomized(features, probabilities, projections):
    of_features = features @ projections[0]
    of_probabilities = probabilities.detach() @ projections[1]
    joint = of_features * of_probabilities / projections[0].shape[1] ** 0.5
    return (joint**2).mean()


def _library_randomized(features, probabilities, projections):
    joint = losses.randomized_multilinear_map(
        features, probabilities, projections=projections
    )
    return losses.mean(joint**2)


def _discrepancy(first, second):
    return (F.softmax(first, 1) - F.softmax(second, 1)).abs().mean()


def _balance(logits):
    return -torch.log(F.softmax(logits, 1).mean(0) + 1e-6).mean()


def _shifted_log(values):
    return torch.log(torch.clamp(values + 1e-6, max=1.0))


def _margin(source, source_adversarial, target, target_adversarial, margin=4.0):
    of_source = -margin * F.cross_entropy(source_adversarial, source.argmax(1))
    of_target = -F.nll_loss(
        _shifted_log(1 - F.softmax(target_adversarial, 1)), target.argmax(1)
    )
    return of_source + of_target


def _exact_margin(source, source_adversarial, target, target_adversarial, margin=4.0):
    of_source = -margin * F.cross_entropy(source_adversarial, source.argmax(1))
    logs = F.log_softmax(target_adversarial, 1)
    chosen = F.one_hot(target.argmax(1), logs.shape[1]).bool()
    return of_source + torch.logsumexp(logs.masked_fill(chosen, -torch.inf), 1).mean()


ROWS: Rows = {
    "domain_adversarial": Row(
        losses.domain_adversarial, _adversarial, CRITICS, (0, 1), "TLlib"
    ),
    "entropy_weights": Row(
        _library_weighted, _weighted, (*CRITICS, *LOGITS), (0, 1), "CDAN"
    ),
    "domain_confusion": Row(
        lambda logits: losses.mean(losses.domain_confusion(logits)),
        _confusion,
        (normal(BATCH, 2, seed=28),),
        of="pytorch-adapt",
    ),
    "inverted_label_adversarial": Row(
        lambda logits: losses.mean(losses.inverted_label_adversarial(logits)),
        lambda logits: F.binary_cross_entropy_with_logits(
            logits, torch.ones_like(logits)
        ),
        (TARGET_CRITIC,),
        of="ADDA",
    ),
    "multilinear_map": Row(
        _library_multilinear,
        _multilinear,
        (STUDENT_FEATURES, FEW_PREDICTIONS, CRITIC_KERNEL),
        (0, 2),
        "TLlib, 31 classes",
    ),
    "randomized_multilinear_map": Row(
        _library_randomized,
        _randomized,
        (STUDENT_FEATURES, PREDICTIONS, PROJECTIONS),
        of="TLlib",
    ),
    "classifier_discrepancy": Row(
        lambda *logits: losses.mean(losses.classifier_discrepancy(*logits)),
        _discrepancy,
        LOGITS,
        (0, 1),
        "TLlib",
    ),
    "class_balance": Row(losses.class_balance, _balance, (STUDENT_LOGITS,), of="TLlib"),
    "margin_disparity_discrepancy": Row(
        losses.margin_disparity_discrepancy,
        _exact_margin,
        FOUR_LOGITS,
        (1, 3),
        "Zhang et al. 2019",
    ),
    "margin_disparity_discrepancy, code": Row(
        lambda *logits: losses.margin_disparity_discrepancy(*logits, form="code"),
        _margin,
        FOUR_LOGITS,
        (1, 3),
        "TLlib",
    ),
}
