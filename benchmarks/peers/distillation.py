"""Distillation of logits."""

import torch.nn.functional as F

from benchmarks.peers import STUDENT_LOGITS, TEACHER_LOGITS, Row, Rows
from jaxtransfer import losses


def _distillation(student, teacher, temperature=4.0):
    log_student = F.log_softmax(student / temperature, dim=1)
    soft = F.softmax(teacher / temperature, dim=1)
    return F.kl_div(log_student, soft, reduction="batchmean") * temperature**2


ROWS: Rows = {
    "knowledge_distillation": Row(
        lambda s, t: losses.mean(losses.knowledge_distillation(s, t)),
        _distillation,
        (STUDENT_LOGITS, TEACHER_LOGITS),
        of="RepDistiller",
    ),
}
