"""Cases of `jaxtransfer.losses.confidence`."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer.losses import confidence
from tests.losses.case import Case, det

LOGITS = det((6, 4), 71, 3.0)
ONE_CLASS = {"one class": (np.tile([9.0, 0.0, -1.0, -2.0], (6, 1)),)}
OF_LOGITS = {"masks": {"where": (0,)}, "at_extremes": (0,)}


def _network(x):
    kernels = jnp.asarray(det((3, 4), 74)), jnp.asarray(det((4, 3), 75))
    return jnp.tanh(x @ kernels[0]) @ kernels[1]


CASES = [
    Case(confidence.entropy, (LOGITS,), per_example=True, more=ONE_CLASS, **OF_LOGITS),
    Case(confidence.diversity, (LOGITS,), more=ONE_CLASS, **OF_LOGITS),
    Case(confidence.information_maximization, (LOGITS,), more=ONE_CLASS, **OF_LOGITS),
    Case(
        confidence.minimum_class_confusion,
        (LOGITS,),
        more=ONE_CLASS | {"two classes": (LOGITS[:, :2],), "one": (LOGITS[:1],)},
        smooth=False,  # the weights are constants of the gradient
        **OF_LOGITS,
    ),
    Case(
        confidence.pseudo_label,
        (LOGITS, det((6, 4), 72, 5.0)),
        options={"threshold": 0.7},
        stopped=(1,),
        masks={"where": (0, 1)},
        per_example=True,
        at_extremes=(0, 1),
    ),
    Case(
        confidence.virtual_adversarial,
        (det((5, 3), 73),),
        options={"apply": _network, "key": jax.random.key(1), "probe": 0.3},
        masks={},  # the first direction depends on the number of rows
        per_example=True,
        smooth=False,  # prediction and direction are constants of the gradient
    ),
]

WITHOUT = {"centroid_pseudo_labels": "returns labels"}
