"""Cases of `jaxtransfer.losses.neighbors`."""

import numpy as np

from jaxtransfer.losses import neighbors
from tests.losses.case import Case, det

LOGITS, INDICES = det((6, 4), 91, 3.0), np.array([4, 0, 7, 8, 2, 5])
PROBABILITIES = det((9, 4), 93) + 1.5
BANK = neighbors.NeighborBank(
    det((9, 3), 92),
    PROBABILITIES / PROBABILITIES.sum(axis=1, keepdims=True),
    np.arange(9) != 8,
)
FEW = {"neighbors": 3, "expanded": 2}
OF_LOGITS = {"masks": {"where": (0, 1)}, "at_extremes": (0,)}

WITHOUT = {
    "neighbor_bank": "makes an empty bank, of no data",
    "update_neighbor_bank": "returns a bank, which says what is filled",
}

CASES = [
    Case(
        neighbors.neighborhood_reciprocal_clustering,
        (LOGITS, INDICES, BANK),
        options=FEW,
        more={
            "nothing seen": (LOGITS, INDICES, BANK._replace(filled=np.zeros(9, bool))),
            "one class": (np.tile([9.0, 0.0, -1.0, -2.0], (6, 1)), INDICES, BANK),
        },
        **OF_LOGITS,
    ),
    Case(
        neighbors.neighborhood_reciprocal_clustering,
        (LOGITS, INDICES, BANK),
        options={"form": "code", "affinity": 0.3},
        label="code",
        **OF_LOGITS,
    ),
]
