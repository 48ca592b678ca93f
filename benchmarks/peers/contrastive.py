"""Losses that tell an example from others, and those of neighbours in a bank."""

import jax
import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.peers import (
    BATCH,
    STUDENT_FEATURES,
    TEACHER_FEATURES,
    Row,
    Rows,
    integers,
    normal,
)
from jaxtransfer import losses

EXAMPLES, NEGATIVES, WIDTH = 50_000, 1024, 128
TARGETS, BANKED, CLASSES = 2817, 256, 31
EMBEDDINGS = normal(BATCH, WIDTH, seed=40), normal(BATCH, WIDTH, seed=41)
MEMORY = losses.ContrastiveMemory(
    normal(EXAMPLES, WIDTH, seed=42, scale=WIDTH**-0.5),
    normal(EXAMPLES, WIDTH, seed=43, scale=WIDTH**-0.5),
    np.full(2, -np.inf, np.float32),
)
INDICES = np.arange(BATCH, dtype=np.int32)
OTHERS = BATCH + integers(BATCH, NEGATIVES, high=EXAMPLES - BATCH, seed=44)
PLACES = integers(BATCH, high=TARGETS, seed=45)


def _bank():
    features = normal(TARGETS, BANKED, seed=46)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    logits = normal(TARGETS, CLASSES, seed=47, scale=3.0)
    return losses.NeighborBank(
        features, np.array(jax.nn.softmax(logits)), np.ones(TARGETS, bool)
    )


def _crd(student, teacher, indices, negatives, memory):
    student, teacher = F.normalize(student), F.normalize(teacher)
    rows = torch.cat([indices[:, None], negatives], 1)
    total = 0.0
    for anchor, kept in ((student, memory.teacher), (teacher, memory.student)):
        examples, count = len(kept), negatives.shape[1]
        scores = torch.bmm(kept[rows], anchor[:, :, None])[..., 0]
        x = torch.exp(scores / 0.07)
        x = x / (x.mean().detach() * examples)
        chance = count / examples
        total = total - torch.log(x[:, 0] / (x[:, 0] + chance)).mean()
        total = total - torch.log(chance / (x[:, 1:] + chance)).sum(1).mean()
    return total


def _info_nce(student, teacher):
    scores = F.normalize(student) @ F.normalize(teacher).T / 0.07
    return F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))


def _reciprocal(logits, indices, bank, near=5, expanded=5, affinity=0.1):
    p = F.softmax(logits, 1)
    with torch.no_grad():
        features, scores = bank.features, bank.probabilities
        closest = (features[indices] @ features.T).topk(near + 1)[1][:, 1:]
        around = (features[closest] @ features.T).topk(expanded + 1)[1][:, :, 1:]
        mutual = (around == indices[:, None, None]).any(-1)
        weights = torch.where(mutual, 1.0, affinity)
        pull = (weights[..., None] * scores[closest]).sum(1)
        pull = pull + affinity * scores[around].sum((1, 2))
    mean = p.mean(0)
    even = (mean * torch.log(mean * mean.shape[0])).sum()
    return -(pull * p).sum(1).mean() + even


ROWS: Rows = {
    "contrastive_representation_distillation": Row(
        lambda *given: losses.mean(
            losses.contrastive_representation_distillation(*given)
        ),
        _crd,
        (*EMBEDDINGS, INDICES, OTHERS, MEMORY),
        (0, 1),
        "RepDistiller, 1 024 of 50 000 x 128",
    ),
    "contrastive_distillation": Row(
        lambda *pair: losses.mean(losses.contrastive_distillation(*pair)),
        _info_nce,
        (STUDENT_FEATURES, TEACHER_FEATURES),
        of="InfoNCE",
    ),
    "neighborhood_reciprocal_clustering": Row(
        lambda *given: losses.neighborhood_reciprocal_clustering(*given, form="code"),
        _reciprocal,
        (normal(BATCH, CLASSES, seed=48), PLACES, _bank()),
        of="NRC's authors, bank of 2 817 x 256",
    ),
}
