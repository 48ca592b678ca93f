"""Distillation of logits."""

import torch
import torch.nn.functional as F

from benchmarks.peers import LABELS, STUDENT_LOGITS, TEACHER_LOGITS, Row, Rows
from jaxtransfer import losses

PAIR = (STUDENT_LOGITS, TEACHER_LOGITS)
LABELLED = (*PAIR, LABELS)


def _mean(loss, **options):
    return lambda *arrays: losses.mean(loss(*arrays, **options))


def _distillation(student, teacher, temperature=4.0):
    log_student = F.log_softmax(student / temperature, dim=1)
    soft = F.softmax(teacher / temperature, dim=1)
    return F.kl_div(log_student, soft, reduction="batchmean") * temperature**2


def _jensen_shannon(student, teacher, temperature=4.0, beta=0.5):
    log_s = F.log_softmax(student / temperature, dim=1)
    log_t = F.log_softmax(teacher / temperature, dim=1)
    mixed = torch.logsumexp(
        torch.stack(
            [log_s + torch.tensor(1 - beta).log(), log_t + torch.tensor(beta).log()]
        ),
        dim=0,
    )
    to_teacher = F.kl_div(mixed, log_t, reduction="batchmean", log_target=True)
    to_student = F.kl_div(mixed, log_s, reduction="batchmean", log_target=True)
    return temperature**2 * (beta * to_teacher + (1 - beta) * to_student)


def _decoupled(student, teacher, labels, alpha=1.0, beta=8.0, temperature=4.0):
    target = torch.zeros_like(student).scatter_(1, labels[:, None], 1).bool()
    soft_s, soft_t = (
        F.softmax(student / temperature, 1),
        F.softmax(teacher / temperature, 1),
    )

    def two(soft):
        return torch.stack([(soft * target).sum(1), (soft * ~target).sum(1)], 1)

    binary = F.kl_div(two(soft_s).log(), two(soft_t), reduction="sum")
    others_t = F.softmax(teacher / temperature - 1000.0 * target, 1)
    others_s = F.log_softmax(student / temperature - 1000.0 * target, 1)
    others = F.kl_div(others_s, others_t, reduction="sum")
    return temperature**2 / len(labels) * (alpha * binary + beta * others)


def _pearson(a, b):
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)).mean()


def _stronger(student, teacher):
    s, t = F.softmax(student, 1), F.softmax(teacher, 1)
    return (1 - _pearson(s, t)) + (1 - _pearson(s.T, t.T))


def _normalized(student, teacher, labels, gamma=1.5):
    log_s, soft_t = F.log_softmax(student, 1), F.softmax(teacher, 1)
    index = labels[:, None]
    own = -(soft_t.gather(1, index) * log_s.gather(1, index)).mean()
    rest = torch.ones_like(student).scatter_(1, index, 0).bool()
    classes = student.shape[1] - 1
    others_s = F.log_softmax(student[rest].reshape(-1, classes), 1)
    others_t = F.softmax(teacher[rest].reshape(-1, classes), 1)
    return own - gamma * (others_t * others_s).sum(1).mean()


def _standardized(student, teacher):
    def standard(z):
        return (z - z.mean(1, keepdim=True)) / (1e-7 + z.std(1, keepdim=True))

    return _distillation(standard(student), standard(teacher), 2.0)


def _top_k(student, teacher, k=16):
    log_t, log_s = F.log_softmax(teacher, 1), F.log_softmax(student, 1)
    kept, index = log_t.topk(k, 1)
    ours = log_s.gather(1, index)
    tail_t = torch.log1p(-kept.exp().sum(1, keepdim=True))
    tail_s = torch.log1p(-ours.exp().sum(1, keepdim=True))
    one, other = torch.cat([kept, tail_t], 1), torch.cat([ours, tail_s], 1)
    return (one.exp() * (one - other)).sum(1).mean()


def _weighted(student, teacher, labels, tau=2.0):
    focal = F.cross_entropy(student, labels, reduction="none") / F.cross_entropy(
        teacher, labels, reduction="none"
    )
    soft = -(F.softmax(teacher / tau, 1) * F.log_softmax(student / tau, 1)).sum(1)
    return tau**2 * ((1 - torch.exp(-focal.detach())) * soft).mean()


ROWS: Rows = {
    "knowledge_distillation": Row(
        _mean(losses.knowledge_distillation), _distillation, PAIR, of="RepDistiller"
    ),
    "jensen_shannon": Row(
        _mean(losses.knowledge_distillation, divergence="jensen_shannon"),
        _jensen_shannon,
        PAIR,
        of="GKD in TRL",
    ),
    "decoupled_knowledge_distillation": Row(
        _mean(losses.decoupled_knowledge_distillation),
        _decoupled,
        LABELLED,
        of="mdistiller",
    ),
    "distillation_from_stronger_teacher": Row(
        losses.distillation_from_stronger_teacher, _stronger, PAIR, of="mmrazor"
    ),
    "normalized_knowledge_distillation": Row(
        _mean(losses.normalized_knowledge_distillation),
        _normalized,
        LABELLED,
        of="cls_KD",
    ),
    "standardize_logits": Row(
        lambda s, t: losses.mean(
            losses.knowledge_distillation(
                losses.standardize_logits(s),
                losses.standardize_logits(t),
                temperature=2.0,
            )
        ),
        _standardized,
        PAIR,
        of="torchdistill",
    ),
    "top_k_knowledge_distillation": Row(
        _mean(losses.top_k_knowledge_distillation, k=16, tail="bucket"),
        _top_k,
        PAIR,
        of="MaxText",
    ),
    "weighted_soft_label_distillation": Row(
        _mean(losses.weighted_soft_label_distillation),
        _weighted,
        LABELLED,
        of="mmrazor",
    ),
}
