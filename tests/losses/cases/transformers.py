"""Cases of `jaxtransfer.losses.transformers`."""

import jax.numpy as jnp

from jaxtransfer.losses import transformers
from tests.losses.case import Case, det

SCORES = det((3, 2, 4, 4), 111, 2.0), det((3, 2, 4, 4), 112, 2.0)
STATES = det((6, 5), 113), det((6, 5), 114)
VALUES = det((3, 2, 4, 3), 115), det((3, 2, 4, 5), 116)


def _by_tokens(where, tokens):
    return (
        None
        if where is None
        else jnp.broadcast_to(where[:, None], (*where.shape, tokens))
    )


def attention_matching_by_example(student, teacher, *, where=None, **options):
    """A mask by example in place of one by token."""
    where = _by_tokens(where, student.shape[-1])
    return transformers.attention_matching(student, teacher, where=where, **options)


def minilm_attention_by_example(student, teacher, *, where=None):
    """The mean over the tokens, and a mask by example."""
    where = _by_tokens(where, student.shape[-1])
    losses = transformers.minilm_attention(student, teacher, where=where)
    return jnp.mean(losses, axis=-1)


def minilm_values_by_example(student, teacher, *, where=None):
    """The mean over the tokens, and a mask by example."""
    where = _by_tokens(where, student.shape[-2])
    losses = transformers.minilm_values(student, teacher, where=where)
    return jnp.mean(losses, axis=-1)


BY_EXAMPLE = {"stopped": (1,), "masks": {"where": (0, 1)}}
FORMS = {
    "mse": {},
    "cross-entropy": {"loss": "cross_entropy"},
    "cross-entropy, all": {"loss": "cross_entropy", "softmax": "all"},
}

CASES = [
    Case(transformers.attention_matching, SCORES, stopped=(1,), at_extremes=(0, 1)),
    *(
        Case(
            attention_matching_by_example,
            SCORES,
            options=options,
            label=label,
            at_extremes=(0, 1),
            **BY_EXAMPLE,
        )
        for label, options in FORMS.items()
    ),
    *(
        Case(function, STATES, per_example=True, at_extremes=(0, 1), **BY_EXAMPLE)
        for function in (
            transformers.hidden_matching,
            transformers.hidden_cosine,
            transformers.patient_distillation,
        )
    ),
    Case(transformers.minilm_attention, SCORES, stopped=(1,)),
    Case(
        minilm_attention_by_example,
        SCORES,
        per_example=True,
        at_extremes=(0, 1),
        **BY_EXAMPLE,
    ),
    Case(transformers.minilm_values, VALUES, stopped=(1,)),
    Case(
        minilm_values_by_example,
        VALUES,
        per_example=True,
        at_extremes=(0, 1),
        **BY_EXAMPLE,
    ),
]
WITHOUT = {"uniform_layers": "takes numbers and returns indices"}
