"""Losses of fine-tuning: towards a start point, of a source network, of a queue."""

import jax
import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.peers import (
    BATCH,
    CLASSES,
    LABELS,
    STUDENT_FEATURES,
    STUDENT_LOGITS,
    STUDENT_MAPS,
    TEACHER_LOGITS,
    TEACHER_MAPS,
    WIDTH,
    Row,
    Rows,
    integers,
    normal,
)
from jaxtransfer import losses

BODY = {"a": (7, 7, 3, 64), "b": (3, 3, 64, 256), "c": (3, 3, 256, 512)}
BODY |= {f"d{i}": (3, 3, 512, 512) for i in range(4)} | {"e": (512, CLASSES)}
PARAMS, ANCHOR, IMPORTANCE = (
    {
        name: normal(*shape, seed=seed + i)
        for i, (name, shape) in enumerate(BODY.items())
    }
    for seed in (40, 50, 60)
)
IMPORTANCE = jax.tree.map(np.square, IMPORTANCE)
ATTENTION = np.abs(normal(64, seed=70))
ATTENTION /= ATTENTION.sum()
FEW_CLASSES, QUEUE_SIZE, PROJECTED = 200, 40, 128
FEW_LABELS = integers(BATCH, high=FEW_CLASSES, seed=71)
TARGET_LOGITS = normal(BATCH, FEW_CLASSES, seed=72)
NETWORK, START = (
    {
        "first": normal(WIDTH, 256, seed=seed, scale=0.05),
        "second": normal(256, CLASSES, seed=seed + 1, scale=0.1),
    }
    for seed in (73, 75)
)
SMALL_NETWORK, SMALL_START = (
    {"first": net["first"], "second": np.ascontiguousarray(net["second"][:, :10])}
    for net in (NETWORK, START)
)
QUERIES, KEYS = (normal(BATCH, PROJECTED, seed=seed) for seed in (77, 78))
QUEUE = normal(FEW_CLASSES, QUEUE_SIZE, PROJECTED, seed=79)
WIDE_QUEUE = normal(FEW_CLASSES, QUEUE_SIZE, WIDTH, seed=80)
PROTOTYPES = normal(FEW_CLASSES, WIDTH, seed=81)


def _softmax(logits):
    raised = np.exp(logits - logits.max(1, keepdims=True))
    return raised / raised.sum(1, keepdims=True)


PREDICTIONS = _softmax(TEACHER_LOGITS)


def _l2_sp(params, anchor):
    terms = (0.5 * torch.norm(params[k] - anchor[k].detach()) ** 2 for k in params)
    return sum(terms)


def _l1_sp(params, anchor):
    return sum((params[k] - anchor[k].detach()).abs().sum() for k in params)


def _l2(params):
    return sum(0.5 * torch.norm(value) ** 2 for value in params.values())


def _consolidation(params, anchor, importance):
    return 0.5 * sum(
        (importance[k] * (params[k] - anchor[k]).pow(2)).sum() for k in params
    )


def _behavioral(maps, anchor):
    return 0.5 * torch.norm(maps - anchor.detach()) ** 2 / len(maps)


def _attentive(maps, anchor, attention):
    n, channels, height, width = maps.shape
    distance = torch.norm((maps - anchor.detach()).reshape(n, channels, -1), 2, 2)
    distance = channels * attention * distance**2 / (height * width)
    return 0.5 * distance.sum() / n


def _shrinkage(features):
    _, values, _ = torch.svd(features.t())
    return values[-1] ** 2


def _forgetting(logits, recorded, temperature=2.0):
    log_p = F.log_softmax(logits / temperature, 1)
    return F.kl_div(log_p, F.softmax(recorded / temperature, 1), reduction="batchmean")


def _relationship(probabilities, labels):
    rows = []
    for label in range(FEW_CLASSES):
        rows.append(probabilities[labels == label].mean(0))
    return torch.stack(rows)


def _co_tuning(logits, labels, probabilities):
    relationship = _relationship(probabilities, labels)
    return -(relationship[labels] * F.log_softmax(logits, 1)).sum(1).mean()


def _library_co_tuning(logits, labels, probabilities):
    relationship = losses.category_relationship(probabilities, labels, FEW_CLASSES)
    return losses.mean(losses.co_tuning(logits, labels, relationship))


def _calibrated(classifier, probabilities, logits, labels):
    posterior = F.softmax(classifier, 1)
    joint = (posterior * probabilities.mean(0)[:, None]).T
    relationship = (joint / joint.sum(1, keepdim=True)).detach()
    return -(relationship[labels] * F.log_softmax(logits, 1)).sum(1).mean()


def _library_calibrated(classifier, probabilities, logits, labels):
    relationship = losses.calibrated_category_relationship(classifier, probabilities)
    return losses.mean(losses.co_tuning(logits, labels, relationship))


def _log_probabilities(network, example):
    hidden = torch.relu(example @ network["first"])
    return F.log_softmax(hidden @ network["second"], 0)


def _library_log_probabilities(network, example):
    hidden = jax.nn.relu(example @ network["first"])
    return jax.nn.log_softmax(hidden @ network["second"])


def _fisher(network, anchor, inputs, labels):
    def of_one(network, example, label):
        return _log_probabilities(network, example).gather(0, label[None])[0]

    slopes = torch.func.vmap(torch.func.grad(of_one), (None, 0, 0), chunk_size=16)
    detached = {k: v.detach() for k, v in network.items()}
    importance = {
        k: (g**2).mean(0) for k, g in slopes(detached, inputs, labels).items()
    }
    return _consolidation(network, anchor, importance)


def _library_fisher(network, anchor, inputs, labels):
    importance = losses.fisher_information(
        network, inputs, _library_log_probabilities, labels=labels
    )
    return losses.elastic_weight_consolidation(network, anchor, importance)


def _exact_fisher(network, anchor, inputs):
    detached = {k: v.detach() for k, v in network.items()}
    total = {k: torch.zeros_like(v) for k, v in detached.items()}
    slopes = torch.func.vmap(
        torch.func.jacrev(_log_probabilities), (None, 0), chunk_size=16
    )
    found = slopes(detached, inputs)
    with torch.no_grad():
        p = torch.func.vmap(_log_probabilities, (None, 0))(detached, inputs).exp()
        for k, slope in found.items():
            total[k] = torch.einsum("nc,nc...->...", p, slope**2) / len(inputs)
    return _consolidation(network, anchor, total)


def _library_exact_fisher(network, anchor, inputs):
    importance = losses.fisher_information(network, inputs, _library_log_probabilities)
    return losses.elastic_weight_consolidation(network, anchor, importance)


def _intelligence(params, start, gradients, damping=0.1):
    importance = {}
    for k in params:
        moved = params[k].detach() - start[k]
        path = torch.zeros_like(moved) - gradients[k] * moved
        importance[k] = torch.relu(path) / (moved**2 + damping)
    return _consolidation(params, start, importance)


def _library_intelligence(params, start, gradients):
    state = losses.init_synaptic_intelligence(start)
    state = losses.update_synaptic_intelligence(state, start, params, gradients)
    importance = losses.synaptic_importance(state, params)
    return losses.elastic_weight_consolidation(params, start, importance)


def _contrast(queries, own, labels, queue, temperature=0.07):
    queue = F.normalize(queue, dim=2)
    own = torch.einsum("nc,nc->n", queries, own).unsqueeze(1)
    others = torch.einsum("nc,mc->nm", queries, queue.flatten(0, 1))
    logits = torch.cat([own, others], 1) / temperature
    positive = F.one_hot(labels, len(queue)).float()
    positive = positive.repeat_interleave(queue.shape[1], 1)
    positive = torch.cat([positive.new_ones(len(labels), 1), positive], 1)
    positive = positive / positive.sum(1, keepdim=True)
    return -(positive * F.log_softmax(logits, 1)).sum(1).mean()


def _categorical(features, keys, labels, queue):
    own = F.normalize(keys, dim=1).detach()
    return _contrast(F.normalize(features, dim=1), own, labels, queue)


def _contrastive(features, prototypes, labels, queue):
    queries = F.normalize(prototypes, dim=1).detach()[labels]
    return _contrast(queries, F.normalize(features, dim=1), labels, queue)


def _enqueued(features, keys, labels, queue, counts):
    queue, counts = queue.clone(), counts.clone()
    for key, label in zip(keys, labels.tolist(), strict=True):
        queue[label, counts[label] % queue.shape[1]] = key
        counts[label] += 1
    return _categorical(features, keys, labels, queue)


def _library_enqueued(features, keys, labels, queue, counts):
    queue = losses.enqueue(keys, labels, losses.ClassQueue(queue, counts))
    return losses.mean(
        losses.categorical_contrastive(
            features, keys, labels, queue.keys, filled=queue.filled
        )
    )


def _mean(loss):
    return lambda *arrays: losses.mean(loss(*arrays))


FULL = np.full(FEW_CLASSES, QUEUE_SIZE, np.int32)

ROWS: Rows = {
    "l2": Row(losses.l2, _l2, (PARAMS,), of="TLlib, 11 M parameters"),
    "l2_sp": Row(losses.l2_sp, _l2_sp, (PARAMS, ANCHOR), of="TLlib, 11 M parameters"),
    "l1_sp": Row(
        losses.l1_sp, _l1_sp, (PARAMS, ANCHOR), of="Li et al. 2018, 11 M parameters"
    ),
    "elastic_weight_consolidation": Row(
        losses.elastic_weight_consolidation,
        _consolidation,
        (PARAMS, ANCHOR, IMPORTANCE),
        of="avalanche, 11 M parameters",
    ),
    "behavioral_regularization": Row(
        _mean(losses.behavioral_regularization),
        _behavioral,
        (STUDENT_MAPS, TEACHER_MAPS),
        of="TLlib",
        rtol=0.01,
    ),
    "attentive_behavioral_regularization": Row(
        _mean(losses.attentive_behavioral_regularization),
        _attentive,
        (STUDENT_MAPS, TEACHER_MAPS, ATTENTION),
        of="TLlib",
    ),
    "batch_spectral_shrinkage": Row(
        losses.batch_spectral_shrinkage, _shrinkage, (STUDENT_FEATURES,), of="TLlib"
    ),
    "learning_without_forgetting": Row(
        _mean(losses.learning_without_forgetting),
        _forgetting,
        (STUDENT_LOGITS, TEACHER_LOGITS),
        of="TLlib",
    ),
    "co_tuning, category_relationship": Row(
        _library_co_tuning,
        _co_tuning,
        (STUDENT_LOGITS, FEW_LABELS, PREDICTIONS),
        of="TLlib, 200 classes",
    ),
    "co_tuning, calibrated_category_relationship": Row(
        _library_calibrated,
        _calibrated,
        (
            normal(CLASSES, FEW_CLASSES, seed=82),
            PREDICTIONS,
            STUDENT_LOGITS,
            FEW_LABELS,
        ),
        (2,),
        "TLlib, 200 classes",
    ),
    "fisher_information, labels": Row(
        _library_fisher,
        _fisher,
        (NETWORK, START, STUDENT_FEATURES, LABELS),
        of="torch.func, two dense layers",
    ),
    "fisher_information": Row(
        _library_exact_fisher,
        _exact_fisher,
        (SMALL_NETWORK, SMALL_START, STUDENT_FEATURES[:64]),
        of="torch.func, two dense layers, 10 classes, batch 64",
    ),
    "synaptic_intelligence": Row(
        _library_intelligence,
        _intelligence,
        (PARAMS, ANCHOR, jax.tree.map(np.negative, IMPORTANCE)),
        of="avalanche, 11 M parameters",
    ),
    "categorical_contrastive": Row(
        _mean(losses.categorical_contrastive),
        _categorical,
        (QUERIES, KEYS, FEW_LABELS, QUEUE),
        of="TLlib, queue 200 x 40 x 128",
    ),
    "categorical_contrastive, enqueue": Row(
        _library_enqueued,
        _enqueued,
        (QUERIES, KEYS, FEW_LABELS, QUEUE, FULL),
        of="TLlib, queue 200 x 40 x 128",
    ),
    "contrastive_cross_entropy": Row(
        _mean(losses.contrastive_cross_entropy),
        _contrastive,
        (STUDENT_FEATURES, PROTOTYPES, FEW_LABELS, WIDE_QUEUE),
        of="TLlib, queue 200 x 40 x 512",
    ),
}
