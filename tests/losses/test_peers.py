"""What other libraries' losses give, composed of these: their values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import losses

LABELS = (3 * np.arange(8) + 1) % 10


def _distillation(student, teacher, temperature):
    """Without the factor of squared temperature that some leave out."""
    values = losses.knowledge_distillation(student, teacher, temperature=temperature)
    return values.mean() / temperature**2


def _half_labels(student, teacher):
    own = losses.cross_entropy(student, LABELS).mean()
    return 0.5 * own + 0.5 * 16.0 * _distillation(student, teacher, 4.0)


def _unscaled(student, teacher):
    return _distillation(student, teacher, 4.0)


def _cross_entropy(student, teacher):
    entropy = losses.entropy(teacher / 8.0).mean()
    return _distillation(student, teacher, 8.0) + entropy


def _matching(student, teacher):
    return losses.logit_matching(student / 8.0, teacher / 8.0).mean()


def _standardized(student, teacher):
    pair = map(losses.standardize_logits, (student, teacher))
    return _distillation(*pair, temperature=2.0)


# Value and norm of the student's gradient.
PEERS = {
    "torchdistill KDLoss, alpha 0.5": (_half_labels, 3.61457935366, 0.2480243982),
    "torchdistill KDLoss, alpha 0": (_unscaled, 0.23082055869, 0.01901497636),
    "torchdistill LogitStd": (_standardized, 0.252695956597, 0.01530282613),
    "TextBrewer kd_ce": (_cross_entropy, 2.33195762566, 0.004719091719),
    "TextBrewer kd_mse": (_matching, 0.118728909849, 0.009631041523),
}


@pytest.mark.parametrize("name", PEERS)
def test_golden(float64, student_logits, teacher_logits, name):
    loss, golden, length = PEERS[name]
    run = jax.jit(jax.value_and_grad(loss))
    for dtype, tolerance in ((jnp.float64, 1e-9), (jnp.float32, 1e-5)):
        arrays = (jnp.asarray(z, dtype) for z in (student_logits, teacher_logits))
        value, gradient = run(*arrays)
        np.testing.assert_allclose(value, golden, rtol=tolerance)
        size = jnp.linalg.norm(gradient)
        np.testing.assert_allclose(size, length, rtol=tolerance)
