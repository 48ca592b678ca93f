import flax.linen as nn
import jax
import numpy as np
import pytest

from jaxtransfer import nets


def test_a_cohort_of_resnets_is_the_same_by_both_convolutions():
    inputs = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    keys = jax.random.split(jax.random.key(1), 2)

    def outputs(conv):
        net = nets.ResNet(4, depth=8, filters=4, conv=conv)
        cohort = jax.vmap(net.init, (0, None))(keys, inputs)
        return jax.jit(jax.vmap(net.apply, (0, None)))(cohort, inputs)

    ours, theirs = outputs(nets.PatchConv), outputs(nn.Conv)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_user_without_fields_is_refused():
    net, rows = nets.UserPreference((), marks=3), np.ones((2, 3), np.int32)
    with pytest.raises(ValueError, match=r"fields: got \(\); give the number"):
        jax.eval_shape(net.init, jax.random.key(0), rows)
