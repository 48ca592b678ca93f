"""Distillation of feature maps, position by position and normalised."""

import torch
import torch.nn.functional as F

from benchmarks.peers import STUDENT_MAPS, TEACHER_MAPS, Row, Rows, normal
from jaxtransfer import losses

MAPS = (STUDENT_MAPS, TEACHER_MAPS)
PER_CHANNEL = normal(64, seed=8)


def _mean(loss, **options):
    return lambda *arrays: losses.mean(loss(*arrays, **options))


def _variational(student, teacher, params):
    variances = torch.log(1.0 + torch.exp(params)) + 1e-5
    variances = variances.view(1, -1, 1, 1)
    return (0.5 * ((student - teacher) ** 2 / variances + torch.log(variances))).mean()


def _boundary(student, teacher, margin=1.0):
    off = (student + margin) ** 2 * ((student > -margin) & (teacher <= 0)).float()
    on = (student - margin) ** 2 * ((student <= margin) & (teacher > 0)).float()
    return (off + on).sum() / len(student)


def _overhaul(student, teacher, margins):
    teacher = torch.max(teacher, margins.view(1, -1, 1, 1))
    terms = F.mse_loss(student, teacher, reduction="none")
    terms = terms * ((student > teacher) | (teacher > 0)).float()
    return terms.sum() / len(student)


def _context(student, teacher):
    total, weights, weight = F.mse_loss(student, teacher), 1.0, 1.0
    for level in (4, 2, 1):
        if level < student.shape[2]:
            weight /= 2.0
            ours = F.adaptive_avg_pool2d(student, level)
            theirs = F.adaptive_avg_pool2d(teacher, level)
            total = total + weight * F.mse_loss(ours, theirs)
            weights += weight
    return total / weights


def _generated(student, teacher, weight=7e-5):
    return weight * F.mse_loss(student, teacher, reduction="sum") / len(student)


def _attention(maps, power=2):
    return F.normalize(maps.pow(power).mean(1).flatten(1))


def _attention_transfer(student, teacher):
    return (_attention(student) - _attention(teacher)).pow(2).mean()


def _attention_transfer_of_paper(student, teacher):
    return torch.norm(_attention(student) - _attention(teacher), dim=1).mean()


def _factors(student, teacher):
    return F.l1_loss(F.normalize(student.flatten(1)), F.normalize(teacher.flatten(1)))


def _factors_of_attention(student, teacher):
    return (_attention(student) - _attention(teacher)).abs().mean()


def _channels(student, teacher, temperature=4.0):
    batch, channels = student.shape[:2]
    student, teacher = (
        m.reshape(batch * channels, -1) / temperature for m in (student, teacher)
    )
    log_t, log_s = F.log_softmax(teacher, dim=1), F.log_softmax(student, dim=1)
    divergence = torch.sum(F.softmax(teacher, dim=1) * (log_t - log_s))
    return temperature**2 * divergence / (batch * channels)


def _pearson(student, teacher):
    def standard(maps):
        batch, channels, height, width = maps.shape
        rows = maps.permute(1, 0, 2, 3).reshape(channels, -1)
        rows = rows - rows.mean(-1, keepdim=True)
        rows = rows / (rows.std(-1, keepdim=True) + 1e-6)
        return rows.reshape(channels, batch, height, width).permute(1, 0, 2, 3)

    return F.mse_loss(standard(student), standard(teacher)) / 2


ROWS: Rows = {
    "hint": Row(_mean(losses.hint), F.mse_loss, MAPS, of="RepDistiller"),
    "reused_classifier": Row(
        _mean(losses.reused_classifier), F.mse_loss, MAPS, of="SimKD"
    ),
    "variational_information_distillation": Row(
        _mean(losses.variational_information_distillation),
        _variational,
        (*MAPS, PER_CHANNEL),
        wrt=(0, 2),
        of="RepDistiller",
    ),
    "activation_boundary": Row(
        _mean(losses.activation_boundary), _boundary, MAPS, of="RepDistiller"
    ),
    "overhaul": Row(
        _mean(losses.overhaul),
        _overhaul,
        (*MAPS, -abs(PER_CHANNEL)),
        of="mdistiller",
    ),
    "hierarchical_context": Row(
        _mean(losses.hierarchical_context), _context, MAPS, of="mdistiller"
    ),
    "masked_generative": Row(
        _mean(losses.masked_generative), _generated, MAPS, of="mmrazor"
    ),
    "attention_transfer": Row(
        _mean(losses.attention_transfer), _attention_transfer, MAPS, of="RepDistiller"
    ),
    "attention_transfer_paper": Row(
        _mean(losses.attention_transfer, form="paper"),
        _attention_transfer_of_paper,
        MAPS,
        of="torchdistill",
    ),
    "factor_transfer": Row(
        _mean(losses.factor_transfer), _factors, MAPS, of="the authors"
    ),
    "factor_transfer_attention": Row(
        _mean(losses.factor_transfer, form="attention"),
        _factors_of_attention,
        MAPS,
        of="RepDistiller",
    ),
    "channel_distillation": Row(
        _mean(losses.channel_distillation), _channels, MAPS, of="mmrazor"
    ),
    "pearson_feature_distillation": Row(
        losses.pearson_feature_distillation, _pearson, MAPS, of="mmrazor"
    ),
}
