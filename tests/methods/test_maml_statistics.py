"""Which batch statistics an adapted network carries."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtransfer import nets
from jaxtransfer.methods import finetune, maml
from jaxtransfer.model import from_linen

MODEL = from_linen(nets.Conv4(3, filters=4))
TASK = finetune.objective(MODEL)
INPUTS = jax.random.normal(jax.random.key(1), (6, 8, 8, 1))
SUPPORT = {"inputs": INPUTS, "labels": jnp.arange(6, dtype=jnp.int32) % 3}
EPISODE = jax.tree.map(lambda leaf: leaf[None], {"support": SUPPORT, "query": SUPPORT})


def test_statistics_are_those_of_the_adapted_parameters(key):
    start = MODEL.init(key, INPUTS[:1])
    for steps in (0, 1, 2):
        run = maml.adapt(TASK, optax.sgd(1.0), steps=steps)
        adapted, state = jax.jit(run)(start.params, {}, start.model_state, SUPPORT, key)
        _, (own, _) = TASK(adapted, {}, start.model_state, SUPPORT, key)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            state,
            own,
        )


def test_query_by_statistics_of_the_same_examples_equals_its_own(key):
    """Query = support: both kinds of normalisation see the same statistics."""
    start = MODEL.init(key, INPUTS[:1])
    losses = [
        maml.objective(TASK, optax.sgd(1.0), steps=1, query=query)(
            start.params, {}, start.model_state, EPISODE, key
        )[0]
        for query in (None, finetune.objective(MODEL, train=False))
    ]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    paths = [
        maml.trajectory(TASK, optax.sgd(1.0), steps=2, query=query)(
            start.params, {}, start.model_state, EPISODE, key
        )["loss"]
        for query in (None, finetune.objective(MODEL, train=False))
    ]
    np.testing.assert_allclose(*paths, rtol=1e-3)
