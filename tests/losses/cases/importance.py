"""Cases of `jaxtransfer.losses.importance`."""

import jax
import numpy as np

from jaxtransfer.losses import importance
from tests.losses.case import Case, det

PARAMS = {"bias": det((3,), 51), "kernel": det((2, 3), 52)}
INPUTS, LABELS = det((5, 2), 53, 2.0), np.array([0, 2, 1, 2, 0])
STATE = importance.SynapticIntelligence(
    {"w": det((4,), 54)}, {"w": det((4,), 55) + 1.5}
)
BEFORE, AFTER, GRADIENTS = ({"w": det((4,), seed)} for seed in (56, 57, 58))


def log_probabilities(params, x):
    return jax.nn.log_softmax(x @ params["kernel"] + params["bias"])


# Half precision is the network's own business: only its squares are widened.
FISHER = {"log_probabilities": log_probabilities, "chunk_size": 2}

CASES = [
    Case(
        importance.fisher_information,
        (PARAMS, INPUTS),
        options=FISHER,
        differentiable=(0, 1),
        masks={"where": (1,)},
        half=False,
    ),
    Case(
        importance.fisher_information,
        (PARAMS, INPUTS),
        options=FISHER | {"labels": LABELS},
        label="empirical",
        differentiable=(0, 1),
        half=False,
    ),
    Case(
        importance.fisher_information,
        (PARAMS, INPUTS),
        options=FISHER | {"key": jax.random.key(0)},
        label="sampled",
        smooth=False,  # the drawn label jumps
        half=False,
    ),
    Case(importance.init_synaptic_intelligence, (PARAMS,)),
    Case(
        importance.update_synaptic_intelligence,
        (STATE, BEFORE, AFTER, GRADIENTS),
        differentiable=(0, 1, 2, 3),
    ),
    Case(importance.synaptic_importance, (STATE, BEFORE), differentiable=(0, 1)),
    Case(
        importance.synaptic_importance,
        (STATE, BEFORE),
        options={"form": "paper", "damping": 0.5},
        label="paper",
        differentiable=(0, 1),
    ),
]
