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
    variances = F.softplus(params) + 1e-5
    squares = F.mse_loss(student, teacher, reduction="none").mean((0, 2, 3))
    return 0.5 * (squares / variances + torch.log(variances)).mean()


def _boundary(student, teacher, margin=1.0):
    signs = torch.where(teacher > 0, -1.0, 1.0)
    return F.relu(signs * student + margin).square().sum() / len(student)


def _overhaul(student, teacher, margins):
    with torch.no_grad():
        teacher = torch.max(teacher, margins.view(1, -1, 1, 1))
        counts = (student > teacher) | (teacher > 0)
    student = torch.where(counts, student, teacher)
    return F.mse_loss(student, teacher, reduction="sum") / len(student)


def _context(student, teacher):
    # Pooling is linear: the difference is pooled, and every level from the one before.
    difference = student - teacher
    total, weights, weight = difference.square().mean(), 1.0, 1.0
    for level in (4, 2, 1):
        if level < student.shape[2]:
            weight /= 2.0
            difference = F.avg_pool2d(difference, difference.shape[2] // level)
            total = total + weight * difference.square().mean()
            weights += weight
    return total / weights


def _generated(student, teacher, weight=7e-5):
    return weight * F.mse_loss(student, teacher, reduction="sum") / len(student)


def _attention(maps):
    return F.normalize((maps * maps).sum(1).flatten(1))


def _attention_transfer(student, teacher):
    return F.mse_loss(_attention(student), _attention(teacher))


def _attention_transfer_of_paper(student, teacher):
    return torch.norm(_attention(student) - _attention(teacher), dim=1).mean()


def _factors(student, teacher):
    return F.l1_loss(F.normalize(student.flatten(1)), F.normalize(teacher.flatten(1)))


def _factors_of_attention(student, teacher):
    return F.l1_loss(_attention(student), _attention(teacher))


def _channels(student, teacher, temperature=4.0):
    log_s, log_t = (
        F.log_softmax(m.flatten(2) / temperature, dim=2) for m in (student, teacher)
    )
    divergence = F.kl_div(log_s, log_t, reduction="sum", log_target=True)
    return temperature**2 * divergence / (student.shape[0] * student.shape[1])


def _pearson(student, teacher):
    def standard(maps):
        return F.batch_norm(maps, None, None, training=True, eps=1e-12)

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
