"""Distillation of logits."""

import math

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


def _divergence(log_student, log_teacher):
    """Quicker than with the teacher's probabilities."""
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def _stored(k=64):
    """What `cached_knowledge_distillation` reads: log-probabilities and classes."""
    kept, indices = torch.from_numpy(TEACHER_LOGITS).log_softmax(1).topk(k, 1)
    return kept.numpy(), indices.int().numpy()


def _mean(loss, **options):
    return lambda *arrays: losses.mean(loss(*arrays, **options))


def _distillation(student, teacher, temperature=4.0):
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher / temperature, dim=1)
    return _divergence(log_student, log_teacher) * temperature**2


def _reverse(student, teacher, temperature=4.0):
    return _distillation(teacher, student, temperature)


def _jensen_shannon(student, teacher, temperature=4.0, beta=0.5):
    log_s = F.log_softmax(student / temperature, dim=1)
    log_t = F.log_softmax(teacher / temperature, dim=1)
    s, t = log_s.exp(), log_t.exp()
    mixed = torch.log((1 - beta) * s + beta * t)
    divergence = beta * t * (log_t - mixed) + (1 - beta) * s * (log_s - mixed)
    return temperature**2 * divergence.sum() / len(student)


def _centred(student, teacher):
    return (student - teacher).var(1, correction=0).mean()


def _parts(student, teacher, labels, temperature):
    """The divergences of DKD, of target and not and of the others, by example."""
    index = labels[:, None]
    log_s = F.log_softmax(student / temperature, 1)
    log_t = F.log_softmax(teacher / temperature, 1)
    own_s, own_t = log_s.gather(1, index), log_t.gather(1, index)
    rest_s, rest_t = (torch.log(-torch.expm1(own)) for own in (own_s, own_t))
    own, rest = own_t.exp() * (own_t - own_s), rest_t - rest_s
    target = own + rest_t.exp() * rest
    total = (log_t.exp() * (log_t - log_s)).sum(1, keepdim=True)
    return target, (total - own) / rest_t.exp() - rest


def _target(student, teacher, labels, temperature=4.0):
    def two(logits):
        own = -F.cross_entropy(logits / temperature, labels, reduction="none")
        return torch.stack([own, torch.log(-torch.expm1(own))], 1)

    return temperature**2 * _divergence(two(student), two(teacher))


def _nontarget(student, teacher, labels, temperature=4.0):
    return temperature**2 * _parts(student, teacher, labels, temperature)[1].mean()


def _decoupled(student, teacher, labels, alpha=1.0, beta=8.0, temperature=4.0):
    target, others = _parts(student, teacher, labels, temperature)
    return temperature**2 * (alpha * target + beta * others).mean()


def _pearson(student, teacher, dim):
    teacher = teacher - teacher.mean(dim, keepdim=True)
    teacher = teacher / teacher.norm(dim=dim, keepdim=True)
    scale = student.shape[dim] ** 0.5 * student.std(dim, correction=0) + 1e-8
    return ((student * teacher).sum(dim) / scale).mean()


def _stronger(student, teacher):
    s, t = F.softmax(student, 1), F.softmax(teacher, 1)
    return 2 - _pearson(s, t, 1) - _pearson(s, t, 0)


def _normalized(student, teacher, labels, gamma=1.5):
    log_s, log_t = F.log_softmax(student, 1), F.log_softmax(teacher, 1)
    index = labels[:, None]
    own = -(log_t.gather(1, index).exp() * log_s.gather(1, index)).mean()
    others_s = F.log_softmax(student.scatter(1, index, -1e9), 1)
    others_t = F.softmax(teacher.scatter(1, index, -1e9), 1)
    return own - gamma * (others_t * others_s).sum() / len(labels)


def _standardized(student, teacher):
    def standard(z):
        std, mean = torch.std_mean(z, 1, keepdim=True)
        return (z - mean) / (1e-7 + std)

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
    with torch.no_grad():
        focal = F.cross_entropy(student, labels, reduction="none") / F.cross_entropy(
            teacher, labels, reduction="none"
        )
        weights = tau**2 * (1 - torch.exp(-focal)) / len(labels)
        soft = F.softmax(teacher / tau, 1) * weights[:, None]
    return -(soft * F.log_softmax(student / tau, 1)).sum()


def _cached(student, log_t, index):
    log_t, ours = log_t.log_softmax(1), student.gather(1, index).log_softmax(1)
    return _divergence(ours, log_t)


def _virtual(student, labels, a=0.99, temperature=20.0):
    # Its soft teacher is a smoothed label.
    classes = student.shape[1]
    rest = (1 - a) / (classes - 1)
    own = math.exp((a - rest) / temperature)
    low = 1 / (own + classes - 1)
    entropy = own * low * math.log(own * low) + (classes - 1) * low * math.log(low)
    return entropy + F.cross_entropy(student, labels, label_smoothing=classes * low)


def _of_probabilities(student, teachers, temperature=4.0):
    log_soft = F.softmax(teachers / temperature, dim=-1).mean(0).log()
    log_student = F.log_softmax(student / temperature, dim=1)
    return _divergence(log_student, log_soft) * temperature**2


def _of_logits(student, teachers):
    return _distillation(student, teachers.mean(0))


def _of_divergences(student, teachers, temperature=4.0):
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teachers = F.log_softmax(teachers / temperature, dim=-1)
    soft = log_teachers.exp()
    cross = (soft.mean(0) * log_student).sum()
    divergence = (soft * log_teachers).sum() / len(teachers) - cross
    return divergence * temperature**2 / len(student)


def _mutual(cohort):
    # Of all pairs: what a network's peers say is the sum less its own.
    log_p = F.log_softmax(cohort, -1)
    with torch.no_grad():
        p = log_p.exp()
        negentropy = (p * log_p).sum()
        peers = p.sum(0) - p
    count = (len(cohort) - 1) * len(cohort) * cohort.shape[1]
    return ((len(cohort) - 1) * negentropy - (peers * log_p).sum()) / count


def _dynamic(student, teacher, base=4.0, beta=1.0):
    with torch.no_grad():
        weights = 1 - F.cosine_similarity(student, teacher, dim=1)
        temperature = (base + beta * (weights.mean() - weights)).clamp(min=1.0)
        temperature = temperature[:, None]
        log_teacher = F.log_softmax(teacher / temperature, dim=1)
        soft = log_teacher.exp() * temperature**2 / len(student)
    log_student = F.log_softmax(student / temperature, dim=1)
    return (soft * (log_teacher - log_student)).sum()


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
