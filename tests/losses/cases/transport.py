"""Cases of `jaxtransfer.losses.transport`."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer.losses import transport
from tests.losses.case import Case, det

SOURCE, TARGET = det((6, 4), 31), det((5, 4), 32) + 0.3
LABELS, LOGITS = np.array([0, 1, 2, 0, 1, 2]), det((5, 3), 33, 3.0)
MASKS = {"source_where": (0,), "target_where": (1,)}


def _critic(weights, rows):
    return jnp.tanh(rows @ weights[0]) @ weights[1]


CRITIC = jax.tree_util.Partial(_critic, (det((4, 3), 34, 2.0), det((3,), 35, 2.0)))

CASES = [
    Case(
        transport.sliced_wasserstein,
        (SOURCE, TARGET),
        options={"key": jax.random.key(0), "projections": 8},
        differentiable=(0, 1),
        masks=MASKS,
    ),
    Case(
        transport.sliced_wasserstein,
        (SOURCE[:5], TARGET),
        options={"key": jax.random.key(0), "projections": 8, "power": 1},
        label="equal-sizes",
        differentiable=(0, 1),
        masks=MASKS,
    ),
    # A plan that is a constant of the gradient, and stops short of convergence, is not
    # what finite differences see; test_transport.py lets it converge.
    Case(
        transport.sinkhorn_divergence,
        (SOURCE, TARGET),
        differentiable=(0, 1),
        masks=MASKS,
        smooth=False,
    ),
    Case(
        transport.deep_joint_distribution_transport,
        (SOURCE, TARGET, LABELS, LOGITS),
        options={"feature_weight": 1.0, "label_weight": 1.0},
        differentiable=(0, 1, 3),
        masks={"source_where": (0, 2), "target_where": (1, 3)},
        at_extremes=(3,),
        smooth=False,
    ),
    Case(
        transport.wasserstein_critic,
        (det((6,), 36), det((5, 1), 37)),
        differentiable=(0, 1),
        masks=MASKS,
        at_extremes=(0, 1),
    ),
    Case(
        transport.gradient_penalty,
        (SOURCE, TARGET, CRITIC),
        options={"key": jax.random.key(0)},
        differentiable=(0, 1, 2),
        masks=MASKS,
        half=False,  # the critic computes in the dtype of its own weights
    ),
]
