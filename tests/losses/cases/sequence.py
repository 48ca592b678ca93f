"""Cases of `jaxtransfer.losses.sequence`."""

import jax.numpy as jnp
import numpy as np

from jaxtransfer.losses import sequence
from tests.losses.case import Case, det

LOGITS = det((5, 6), 121, 3.0), det((5, 6), 122, 4.0)
DECODED = det((3, 4, 6), 123, 3.0), np.arange(12).reshape(3, 4) % 6
STUDENT = det((5, 3), 124), det((3, 6), 125)
TEACHER = det((5, 4), 126), det((4, 6), 127)


def sequence_distillation_by_example(logits, tokens, *, where=None):
    """A mask by example in place of one by token."""
    if where is not None:
        where = jnp.broadcast_to(where[:, None], tokens.shape)
    return sequence.sequence_distillation(logits, tokens, where=where)


CASES = [
    *(
        Case(
            sequence.token_distillation,
            LOGITS,
            options={"divergence": divergence, "temperature": 2.0},
            label=divergence,
            stopped=(1,),
            masks={"where": (0, 1)},
            per_example=True,
            at_extremes=(0, 1),
        )
        for divergence in ("forward", "jensen_shannon")
    ),
    Case(sequence.sequence_distillation, DECODED, per_example=True, at_extremes=(0,)),
    Case(
        sequence_distillation_by_example,
        DECODED,
        masks={"where": (0, 1)},
        per_example=True,
    ),
    Case(
        sequence.chunked_token_distillation,
        (*STUDENT, *TEACHER),
        options={"chunk_size": 2, "temperature": 2.0},
        differentiable=(0, 1),
        stopped=(2, 3),
        masks={"where": (0, 2)},
        per_example=True,
        at_extremes=(0, 2),
    ),
]
