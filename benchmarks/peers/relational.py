"""Distillation of relations between examples and between channels."""

import math

import torch
import torch.nn.functional as F

from benchmarks.peers import (
    STUDENT_FEATURES,
    STUDENT_MAPS,
    TEACHER_FEATURES,
    TEACHER_MAPS,
    Row,
    Rows,
    normal,
)
from jaxtransfer import losses

FEATURES = (STUDENT_FEATURES, TEACHER_FEATURES)
MAPS = (STUDENT_MAPS, TEACHER_MAPS)
# Where the peer holds [batch, channels, channels, positions], or [batch, batch, width].
FEWER_MAPS = tuple(maps[:64, :16, :16] for maps in MAPS)
FEWER_FEATURES = tuple(features[:64] for features in FEATURES)
NEXT_MAPS = tuple(normal(256, 32, 32, 64, seed=seed) for seed in (9, 10))


def _mean(loss, **options):
    return lambda *arrays: losses.mean(loss(*arrays, **options))


def _similarity(student, teacher):
    def gram(features):
        rows = features.reshape(len(features), -1)
        return F.normalize(torch.mm(rows, rows.t()))

    return ((gram(teacher) - gram(student)) ** 2).sum() / len(student) ** 2


def _adjacent(student, teacher):
    delta = torch.abs(student - teacher)
    return (delta[:-1] * delta[1:]).sum(1).mean()


def _congruence(student, teacher, gamma=0.4, order=2):
    def kernel(rows):
        rows = F.normalize(rows)
        cosines = torch.mm(rows, rows.t())
        total = torch.zeros_like(cosines)
        for p in range(order + 1):
            weight = math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p)
            total = total + weight * cosines.pow(p)
        return total

    return ((kernel(student) - kernel(teacher)) ** 2).sum() / len(student) ** 2


def _distances(rows):
    squares = rows.pow(2).sum(dim=1)
    products = rows @ rows.t()
    distances = squares.unsqueeze(1) + squares.unsqueeze(0) - 2 * products
    distances = distances.clamp(min=1e-12).sqrt().clone()
    distances[range(len(rows)), range(len(rows))] = 0
    return distances


def _distance(student, teacher):
    with torch.no_grad():
        theirs = _distances(teacher)
        theirs = theirs / theirs[theirs > 0].mean()
    ours = _distances(student)
    return F.smooth_l1_loss(ours / ours[ours > 0].mean(), theirs)


def _angle(student, teacher):
    def angles(rows):
        directions = F.normalize(rows.unsqueeze(0) - rows.unsqueeze(1), p=2, dim=2)
        return torch.bmm(directions, directions.transpose(1, 2)).view(-1)

    with torch.no_grad():
        theirs = angles(teacher)
    return F.smooth_l1_loss(angles(student), theirs)


def _relational(student, teacher):
    return 25.0 * _distance(student, teacher) + 50.0 * _angle(student, teacher)


def _transfer(student, teacher, eps=1e-7):
    def neighbours(rows):
        rows = rows / (torch.sqrt(torch.sum(rows**2, dim=1, keepdim=True)) + eps)
        similar = (torch.mm(rows, rows.t()) + 1.0) / 2.0
        return similar / torch.sum(similar, dim=1, keepdim=True)

    ours, theirs = neighbours(student), neighbours(teacher)
    return torch.mean(theirs * torch.log((theirs + eps) / (ours + eps)))


def _flow(student, student_next, teacher, teacher_next):
    def matrix(first, second):
        first, second = first.flatten(2), second.flatten(2)
        return torch.bmm(first, second.transpose(1, 2)) / first.shape[2]

    return F.mse_loss(matrix(student, student_next), matrix(teacher, teacher_next))


def _selectivity(student, teacher):
    def kernel(a, b):
        return (a.unsqueeze(1) * b.unsqueeze(2)).sum(-1).pow(2).mean()

    s, t = (F.normalize(maps.flatten(2), dim=2) for maps in (student, teacher))
    with torch.no_grad():
        of_teacher = kernel(t, t)
    return of_teacher + kernel(s, s) - 2 * kernel(s, t)


def _channels(student, teacher):
    def correlations(maps):
        rows = maps.flatten(2)
        return F.normalize(torch.bmm(rows, rows.transpose(1, 2)), dim=2)

    difference = correlations(student) - correlations(teacher)
    return difference.pow(2).sum() / (student.shape[0] * student.shape[1])


ROWS: Rows = {
    "similarity_preserving": Row(
        losses.similarity_preserving, _similarity, FEATURES, of="RepDistiller"
    ),
    "similarity_preserving_maps": Row(
        losses.similarity_preserving, _similarity, MAPS, of="RepDistiller"
    ),
    "correlation_congruence": Row(
        losses.correlation_congruence, _congruence, FEATURES, of="torchdistill"
    ),
    "correlation_congruence_code": Row(
        lambda *arrays: losses.correlation_congruence(*arrays, form="code"),
        _adjacent,
        FEATURES,
        of="RepDistiller",
    ),
    "relational_distance": Row(
        losses.relational_distance, _distance, FEATURES, of="RepDistiller"
    ),
    "relational_angle": Row(
        losses.relational_angle, _angle, FEATURES, of="RepDistiller"
    ),
    "relational_knowledge_distillation": Row(
        losses.relational_knowledge_distillation,
        _relational,
        FEWER_FEATURES,
        of="RepDistiller, batch 64",
    ),
    "probabilistic_knowledge_transfer": Row(
        losses.probabilistic_knowledge_transfer,
        _transfer,
        FEATURES,
        of="RepDistiller",
    ),
    "flow_of_solution_procedure": Row(
        _mean(losses.flow_of_solution_procedure),
        _flow,
        (MAPS[0], NEXT_MAPS[0], MAPS[1], NEXT_MAPS[1]),
        wrt=(0, 1),
        of="torchdistill",
    ),
    "neuron_selectivity_transfer": Row(
        _mean(losses.neuron_selectivity_transfer),
        _selectivity,
        FEWER_MAPS,
        of="RepDistiller, batch 64 of 16 x 16 x 64",
    ),
    "inter_channel_correlation": Row(
        _mean(losses.inter_channel_correlation), _channels, MAPS, of="ICKD's authors"
    ),
}
