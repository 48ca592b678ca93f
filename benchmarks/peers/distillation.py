"""Distillation of logits."""

import torch
import torch.nn.functional as F

from benchmarks.peers import (
    BATCH,
    CLASSES,
    LABELS,
    STUDENT_FEATURES,
    STUDENT_LOGITS,
    TEACHER_FEATURES,
    TEACHER_LOGITS,
    Row,
    Rows,
    normal,
)
from jaxtransfer import losses

PAIR = (STUDENT_LOGITS, TEACHER_LOGITS)
LABELLED = (*PAIR, LABELS)
# Three networks: teachers of one student, or a cohort of students.
SEVERAL = normal(3, BATCH, CLASSES, seed=7, scale=3.0)


def _stored(k=64):
    """What `cached_knowledge_distillation` reads: log-probabilities and classes."""
    kept, indices = torch.from_numpy(TEACHER_LOGITS).log_softmax(1).topk(k, 1)
    return kept.numpy(), indices.int().numpy()


def _mean(loss, **options):
    return lambda *arrays: losses.mean(loss(*arrays, **options))


def _distillation(student, teacher, temperature=4.0):
    log_student = F.log_softmax(student / temperature, dim=1)
    soft = F.softmax(teacher / temperature, dim=1)
    return F.kl_div(log_student, soft, reduction="batchmean") * temperature**2


def _reverse(student, teacher, temperature=4.0):
    log_s = F.log_softmax(student / temperature, dim=1)
    log_t = F.log_softmax(teacher / temperature, dim=1)
    losses = F.kl_div(log_t, log_s, reduction="batchmean", log_target=True)
    return losses * temperature**2


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


def _centred(student, teacher):
    def centre(z):
        return z - z.mean(1, keepdim=True)

    return F.mse_loss(centre(student), centre(teacher))


def _is_label(student, labels):
    return torch.zeros_like(student).scatter_(1, labels[:, None], 1).bool()


def _target(student, teacher, labels, temperature=4.0):
    target = _is_label(student, labels)

    def two(logits):
        soft = F.softmax(logits / temperature, 1)
        return torch.stack([(soft * target).sum(1), (soft * ~target).sum(1)], 1)

    binary = F.kl_div(two(student).log(), two(teacher), reduction="sum")
    return temperature**2 / len(labels) * binary


def _nontarget(student, teacher, labels, temperature=4.0):
    target = _is_label(student, labels)
    others_t = F.softmax(teacher / temperature - 1000.0 * target, 1)
    others_s = F.log_softmax(student / temperature - 1000.0 * target, 1)
    others = F.kl_div(others_s, others_t, reduction="sum")
    return temperature**2 / len(labels) * others


def _decoupled(student, teacher, labels, alpha=1.0, beta=8.0):
    arrays = student, teacher, labels
    return alpha * _target(*arrays) + beta * _nontarget(*arrays)


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


def _cached(student, log_t, index):
    log_t, ours = log_t.log_softmax(1), student.gather(1, index).log_softmax(1)
    return F.kl_div(ours, log_t, reduction="batchmean", log_target=True)


def _virtual(student, labels, a=0.99, temperature=20.0):
    classes = student.shape[1]
    teacher = torch.full_like(student, (1 - a) / (classes - 1))
    teacher.scatter_(1, labels[:, None], a)
    soft = F.softmax(teacher / temperature, dim=1)
    return F.kl_div(F.log_softmax(student, dim=1), soft, reduction="batchmean")


def _of_probabilities(student, teachers, temperature=4.0):
    soft = F.softmax(teachers / temperature, dim=-1).mean(0)
    log_student = F.log_softmax(student / temperature, dim=1)
    return F.kl_div(log_student, soft, reduction="batchmean") * temperature**2


def _of_logits(student, teachers):
    return _distillation(student, teachers.mean(0))


def _of_divergences(student, teachers):
    return sum(_distillation(student, t) for t in teachers) / len(teachers)


def _mutual(cohort):
    total = 0.0
    for i, student in enumerate(cohort):
        for j, peer in enumerate(cohort):
            if i != j:
                total = total + _distillation(student, peer.detach(), 1.0)
    return total / (len(cohort) - 1) / len(cohort)


def _dynamic(student, teacher, base=4.0, beta=1.0):
    with torch.no_grad():
        weights = 1 - F.cosine_similarity(student, teacher, dim=1)
        temperature = (base + beta * (weights.mean() - weights)).clamp(min=1.0)
        temperature = temperature[:, None]
    log_student = F.log_softmax(student / temperature, dim=1)
    soft = F.softmax(teacher / temperature, dim=1)
    losses = F.kl_div(log_student, soft, reduction="none").sum(1)
    return (losses * temperature[:, 0] ** 2).mean()


def _dynamic_in_jax(student, teacher):
    temperature = losses.dynamic_temperature(student, teacher)
    return losses.mean(
        losses.knowledge_distillation(student, teacher, temperature=temperature)
    )


ROWS: Rows = {
    "cross_entropy": Row(
        _mean(losses.cross_entropy),
        F.cross_entropy,
        (STUDENT_LOGITS, LABELS),
        of="PyTorch",
    ),
    "cross_entropy_smoothed": Row(
        _mean(losses.cross_entropy, label_smoothing=0.1),
        lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1),
        (STUDENT_LOGITS, LABELS),
        of="PyTorch",
    ),
    "mean_squared_error": Row(
        _mean(losses.mean_squared_error),
        F.mse_loss,
        (STUDENT_FEATURES, TEACHER_FEATURES),
        of="PyTorch",
    ),
    "knowledge_distillation": Row(
        _mean(losses.knowledge_distillation), _distillation, PAIR, of="RepDistiller"
    ),
    "reverse_knowledge_distillation": Row(
        _mean(losses.knowledge_distillation, divergence="reverse"),
        _reverse,
        PAIR,
        of="GKD in TRL",
    ),
    "jensen_shannon": Row(
        _mean(losses.knowledge_distillation, divergence="jensen_shannon"),
        _jensen_shannon,
        PAIR,
        of="GKD in TRL",
    ),
    "logit_matching": Row(_mean(losses.logit_matching), F.mse_loss, PAIR, of="NNCF"),
    "logit_matching_centred": Row(
        _mean(losses.logit_matching, centred=True), _centred, PAIR, of="the formula"
    ),
    "target_class_distillation": Row(
        _mean(losses.target_class_distillation), _target, LABELLED, of="mdistiller"
    ),
    "nontarget_class_distillation": Row(
        _mean(losses.nontarget_class_distillation),
        _nontarget,
        LABELLED,
        of="mdistiller",
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
    "cached_knowledge_distillation": Row(
        _mean(losses.cached_knowledge_distillation),
        _cached,
        (STUDENT_LOGITS, *_stored()),
        of="MaxText",
    ),
    "virtual_teacher_distillation": Row(
        _mean(losses.virtual_teacher_distillation, form="code"),
        _virtual,
        (STUDENT_LOGITS, LABELS),
        of="Tf-KD",
    ),
    "dynamic_temperature": Row(_dynamic_in_jax, _dynamic, PAIR, of="TextBrewer"),
    "multi_teacher_probabilities": Row(
        _mean(losses.multi_teacher_distillation),
        _of_probabilities,
        (STUDENT_LOGITS, SEVERAL),
        of="the formula",
    ),
    "multi_teacher_logits": Row(
        _mean(losses.multi_teacher_distillation, combine="logits"),
        _of_logits,
        (STUDENT_LOGITS, SEVERAL),
        of="TextBrewer",
    ),
    "multi_teacher_divergences": Row(
        _mean(losses.multi_teacher_distillation, combine="divergences"),
        _of_divergences,
        (STUDENT_LOGITS, SEVERAL),
        of="TRL",
    ),
    "mutual_learning": Row(
        _mean(losses.mutual_learning), _mutual, (SEVERAL,), of="KD_Lib"
    ),
}
