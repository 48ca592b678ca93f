"""Losses of predictions on unlabelled data, and of norms and singular values."""

import jax
import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.peers import (
    CLASSES,
    STUDENT_FEATURES,
    STUDENT_LOGITS,
    TEACHER_FEATURES,
    TEACHER_LOGITS,
    WIDTH,
    Row,
    Rows,
    normal,
)
from jaxtransfer import losses

LOGITS = (STUDENT_LOGITS,)
PAIR = (STUDENT_LOGITS, TEACHER_LOGITS)
FEATURES = (STUDENT_FEATURES, TEACHER_FEATURES)
NETWORK = {
    "first": normal(WIDTH, 256, seed=30, scale=0.05),
    "second": normal(256, CLASSES, seed=31, scale=0.1),
}
SURE_LOGITS = np.float32(3.0) * TEACHER_LOGITS


def _entropy(logits):
    p = F.softmax(logits, 1)
    return -(p * torch.log(p + 1e-5)).sum(1)


def _diversity(logits):
    mean = F.softmax(logits, 1).mean(0)
    return (mean * torch.log(mean + 1e-5)).sum()


def _confusion(logits, temperature=2.5):
    n, classes = logits.shape
    p = F.softmax(logits / temperature, 1)
    weights = 1 + torch.exp(-_entropy(p.log())).detach()
    weights = (n * weights / weights.sum()).unsqueeze(1)
    confusion = torch.mm((p * weights).transpose(1, 0), p)
    confusion = confusion / confusion.sum(1, keepdim=True)
    return (confusion.sum() - confusion.trace()) / classes


def _nuclear(logits):
    return -torch.norm(F.softmax(logits, 1), "nuc") / len(logits)


def _feature_norm(features, step=1.0):
    norms = features.norm(p=2, dim=1)
    return ((norms - (norms.detach() + step)) ** 2).mean()


def _penalization(source, target):
    _, of_source, _ = torch.svd(source)
    _, of_target, _ = torch.svd(target)
    return of_source[0] ** 2 + of_target[0] ** 2


def _wasserstein(source, target):
    return _nuclear(target) - _nuclear(source)


def _pseudo_label(logits, labelling, threshold=0.95):
    sureness, labels = F.softmax(labelling.detach(), 1).max(1)
    losses = F.cross_entropy(logits, labels, reduction="none")
    return (losses * (sureness >= threshold)).mean()


def _network(network, inputs):
    return torch.relu(inputs @ network["first"]) @ network["second"]


def _unit(rows):
    return rows / (rows.flatten(1).norm(dim=1, keepdim=True) + 1e-8)


def _virtual(network, inputs, radius=1.0, probe=1e-2):
    with torch.no_grad():
        p = F.softmax(_network(network, inputs), 1)
    change = _unit(torch.randn_like(inputs)).requires_grad_()
    moved = F.log_softmax(_network(network, inputs + probe * change), 1)
    (slope,) = torch.autograd.grad(F.kl_div(moved, p, reduction="sum"), change)
    moved = F.log_softmax(_network(network, inputs + radius * _unit(slope)), 1)
    return F.kl_div(moved, p, reduction="batchmean")


def _library_virtual(network, inputs):
    def logits(inputs):
        return jax.nn.relu(inputs @ network["first"]) @ network["second"]

    return losses.mean(losses.virtual_adversarial(inputs, logits))


def _centroid(features, logits, rounds=1):
    with torch.no_grad():
        p = F.softmax(logits, 1)
        extended = torch.cat([features, features.new_ones(len(features), 1)], 1)
        extended = F.normalize(extended, dim=1)
        hard = torch.eye(logits.shape[1], device=logits.device)
        weights, found = p, hard[p.argmax(1)]
        for _ in range(rounds + 1):
            centroids = weights.T @ extended
            cosines = extended @ F.normalize(centroids, dim=1).T
            cosines[:, found.sum(0) == 0] = -torch.inf
            labels = cosines.argmax(1)
            weights = found = hard[labels]
    return F.cross_entropy(logits, labels)


def _library_centroid(features, logits):
    labels = losses.centroid_pseudo_labels(features, logits)
    return losses.mean(losses.cross_entropy(logits, labels))


ROWS: Rows = {
    "entropy": Row(
        lambda logits: losses.mean(losses.entropy(logits)),
        lambda logits: _entropy(logits).mean(),
        LOGITS,
        of="TLlib",
        rtol=0.01,
    ),
    "entropy, log_softmax": Row(
        lambda logits: losses.mean(losses.entropy(logits)),
        lambda logits: -(F.softmax(logits, 1) * F.log_softmax(logits, 1)).sum(1).mean(),
        LOGITS,
        of="TENT",
    ),
    "diversity": Row(losses.diversity, _diversity, LOGITS, of="SHOT", rtol=0.01),
    "information_maximization": Row(
        losses.information_maximization,
        lambda logits: _entropy(logits).mean() + _diversity(logits),
        LOGITS,
        of="SHOT",
        rtol=0.01,
    ),
    "minimum_class_confusion": Row(
        losses.minimum_class_confusion, _confusion, LOGITS, of="TLlib"
    ),
    "batch_nuclear_norm": Row(losses.batch_nuclear_norm, _nuclear, LOGITS, of="BNM"),
    "adaptive_feature_norm": Row(
        lambda rows: losses.mean(losses.adaptive_feature_norm(rows)),
        _feature_norm,
        (STUDENT_FEATURES,),
        of="TLlib",
    ),
    "batch_spectral_penalization": Row(
        losses.batch_spectral_penalization, _penalization, FEATURES, (0, 1), "TLlib"
    ),
    "nuclear_wasserstein_discrepancy": Row(
        losses.nuclear_wasserstein_discrepancy, _wasserstein, PAIR, (0, 1), "DALN"
    ),
    "pseudo_label": Row(
        lambda *logits: losses.mean(losses.pseudo_label(*logits)),
        _pseudo_label,
        (STUDENT_LOGITS, SURE_LOGITS),
        of="TLlib",
    ),
    "virtual_adversarial": Row(
        _library_virtual,
        _virtual,
        (NETWORK, STUDENT_FEATURES),
        of="TLlib, two dense layers",
        rtol=0.1,
    ),
    "centroid_pseudo_labels": Row(
        _library_centroid, _centroid, (STUDENT_FEATURES, STUDENT_LOGITS), (1,), "SHOT"
    ),
}
