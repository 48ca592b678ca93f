"""Distillation of sequences and of the layers of transformers, with padding."""

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.peers import Row, Rows, integers, normal
from jaxtransfer import losses

BATCH, TOKENS, HEADS, WIDTH, VOCABULARY = 32, 128, 12, 768, 8000
# Sentences of 64 to 128 tokens: a quarter of the batch is padding.
REAL = np.arange(TOKENS) < integers(BATCH, 1, high=65, seed=11) + 64

FEW = 8
LOGITS = tuple(
    normal(FEW, TOKENS, VOCABULARY, seed=seed, scale=3.0) for seed in (12, 13)
)
WORDS = integers(FEW, TOKENS, high=VOCABULARY, seed=14)
# [batch * heads, tokens, tokens]: four axes would be taken for maps.
SCORES = tuple(
    normal(BATCH * HEADS, TOKENS, TOKENS, seed=seed, scale=2.0) for seed in (15, 16)
)
HIDDEN = tuple(normal(BATCH, TOKENS, WIDTH, seed=seed) for seed in (17, 18))
FIRST = tuple(normal(6, 256, WIDTH, seed=seed) for seed in (19, 20))
VALUES = tuple(
    normal(BATCH * HEADS, TOKENS, width, seed=seed)
    for width, seed in ((26, 21), (64, 22))
)
STATES = tuple(
    normal(FEW, TOKENS, width, seed=seed) for width, seed in ((312, 23), (WIDTH, 24))
)
OUTPUTS = tuple(
    normal(width, VOCABULARY, seed=seed, scale=0.1)
    for width, seed in ((312, 25), (WIDTH, 26))
)


def _of_tokens(loss, **options):
    """The mean over the real tokens."""

    def run(*arrays):
        *arrays, where = arrays
        return losses.mean(loss(*arrays, where=where, **options), where=where)

    return run


def _by_head(array):
    return array.reshape(BATCH, HEADS, *array.shape[1:])


def _of_attention(function, **options):
    """Of scores or values, whose heads are split off first."""

    def run(student, teacher, **mask):
        heads = _by_head(student), _by_head(teacher)
        return function(*heads, **mask, **options)

    return run


def _matching(**options):
    matching = _of_attention(losses.attention_matching, **options)
    return lambda student, teacher, where: matching(student, teacher, where=where)


def _kept(states, mask):
    """The states of the real tokens, [n, features]."""
    mask = mask.unsqueeze(-1).expand_as(states)
    return torch.masked_select(states, mask).view(-1, states.shape[-1])


def _words(student, teacher, mask):
    log_s = F.log_softmax(_kept(student, mask), dim=-1)
    soft = F.softmax(_kept(teacher, mask), dim=-1)
    return F.kl_div(log_s, soft, reduction="batchmean")


def _generalized(student, teacher, mask, beta=0.5):
    log_s, log_t = F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1)
    b = torch.tensor(beta)
    mixed = torch.logsumexp(
        torch.stack([log_s + torch.log(1 - b), log_t + torch.log(b)]), dim=0
    )
    to_teacher = F.kl_div(mixed, log_t, reduction="none", log_target=True)
    to_student = F.kl_div(mixed, log_s, reduction="none", log_target=True)
    divergence = beta * to_teacher + (1 - beta) * to_student
    return divergence[mask].sum() / mask.sum()


def _sequences(student, words, mask):
    words = words.masked_fill(~mask, -100)
    total = F.cross_entropy(
        student.view(-1, student.shape[-1]), words.view(-1), reduction="sum"
    )
    return total / len(student)


def _sequences_in_jax(student, words, where):
    return losses.mean(losses.sequence_distillation(student, words, where=where))


def _from_states(student, student_output, teacher, teacher_output, mask):
    with torch.no_grad():
        theirs = teacher @ teacher_output
    return _words(student @ student_output, theirs, mask)


def _chunked_in_jax(student, student_output, teacher, teacher_output, where):
    values = losses.chunked_token_distillation(
        student, student_output, teacher, teacher_output, chunk_size=256, where=where
    )
    return losses.mean(values, where=where)


def _attention_mse(student, teacher, mask):
    mask = mask.to(student).unsqueeze(1).expand(-1, HEADS, -1)
    student, teacher = (
        torch.where(s <= -1e2, torch.zeros_like(s), s)
        for s in (_by_head(student), _by_head(teacher))
    )
    squares = F.mse_loss(student, teacher, reduction="none")
    squares = squares * mask.unsqueeze(-1) * mask.unsqueeze(2)
    return squares.sum() / mask.sum(-1).pow(2).sum()


def _attention_cross_entropy(student, teacher, mask):
    mask = mask.to(student).unsqueeze(1).expand(-1, HEADS, -1)
    student, teacher = _by_head(student), _by_head(teacher)
    terms = F.softmax(teacher, dim=-1) * F.log_softmax(student, dim=-1)
    by_query = (terms * mask.unsqueeze(2)).sum(dim=-1) * mask
    return -by_query.sum() / mask.sum()


def _hidden_mse(student, teacher, mask):
    mask = mask.to(student)
    squares = F.mse_loss(student, teacher, reduction="none") * mask.unsqueeze(-1)
    return squares.sum() / mask.sum() / student.shape[-1]


def _hidden_cosine(student, teacher, mask):
    student, teacher = _kept(student, mask), _kept(teacher, mask)
    return F.cosine_embedding_loss(
        student, teacher, student.new_ones(len(student)), reduction="mean"
    )


def _patient(student, teacher):
    student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    return (student - teacher).pow(2).sum(dim=-1).mean()


def _divergence(student, teacher, mask):
    padding = ~mask[:, None, None, :]
    student, teacher = (
        s.masked_fill(padding, torch.finfo(s.dtype).min) for s in (student, teacher)
    )
    terms = F.kl_div(
        F.log_softmax(student, dim=-1), F.softmax(teacher, dim=-1), reduction="none"
    )
    by_token = terms.sum(-1).mean(1) * mask
    return by_token.sum() / mask.sum()


def _minilm_attention(student, teacher, mask):
    return _divergence(_by_head(student), _by_head(teacher), mask)


def _minilm_values(student, teacher, mask):
    def relations(values):
        products = torch.bmm(values, values.transpose(1, 2))
        return _by_head(products / values.shape[-1] ** 0.5)

    return _divergence(relations(student), relations(teacher), mask)


ROWS: Rows = {
    "token_distillation": Row(
        _of_tokens(losses.token_distillation),
        _words,
        (*LOGITS, REAL[:FEW]),
        of="DistilBERT, 8 x 128 tokens of 8 000",
    ),
    "token_jensen_shannon": Row(
        _of_tokens(losses.token_distillation, divergence="jensen_shannon"),
        _generalized,
        (*LOGITS, REAL[:FEW]),
        of="GKD in TRL, 8 x 128 tokens of 8 000",
    ),
    "sequence_distillation": Row(
        _sequences_in_jax,
        _sequences,
        (LOGITS[0], WORDS, REAL[:FEW]),
        of="transformers, 8 x 128 tokens of 8 000",
    ),
    "chunked_token_distillation": Row(
        _chunked_in_jax,
        _from_states,
        (STATES[0], OUTPUTS[0], STATES[1], OUTPUTS[1], REAL[:FEW]),
        wrt=(0, 1),
        of="DistilBERT, all logits at once, 8 x 128 tokens of 8 000",
    ),
    "attention_matching": Row(
        _matching(loss="mse"),
        _attention_mse,
        (*SCORES, REAL),
        of="TextBrewer, 32 x 12 x 128 x 128",
    ),
    "attention_matching_cross_entropy": Row(
        _matching(loss="cross_entropy", softmax="all"),
        _attention_cross_entropy,
        (*SCORES, REAL),
        of="TextBrewer, 32 x 12 x 128 x 128",
    ),
    "hidden_matching": Row(
        _of_tokens(losses.hidden_matching),
        _hidden_mse,
        (*HIDDEN, REAL),
        of="TextBrewer, 32 x 128 x 768",
    ),
    "hidden_cosine": Row(
        _of_tokens(losses.hidden_cosine),
        _hidden_cosine,
        (*HIDDEN, REAL),
        of="DistilBERT, 32 x 128 x 768",
    ),
    "patient_distillation": Row(
        lambda s, t: losses.mean(losses.patient_distillation(s, t)),
        _patient,
        FIRST,
        of="the authors, 6 x 256 x 768",
    ),
    "minilm_attention": Row(
        _of_tokens(_of_attention(losses.minilm_attention)),
        _minilm_attention,
        (*SCORES, REAL),
        of="unilm, 32 x 12 x 128 x 128",
    ),
    "minilm_values": Row(
        _of_tokens(_of_attention(losses.minilm_values)),
        _minilm_values,
        (*VALUES, REAL),
        of="unilm, 32 x 12 x 128 of 26 and 64",
    ),
}
