"""Gradient reversal: forward the identity, backward the negated gradient."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxtransfer.ops.mapped import mapped_with


def gradient_reversal(
    x: PyTree[Array], strength: float | Float[Array, ""]
) -> PyTree[Array]:
    """Gradient reversal layer (GRL): identity forward, ``-strength * g`` backward.

    Placed between features and a domain critic, one descent step trains the critic
    to tell the domains apart and the features to hide them.

    Args:
        x: Array, or tree of arrays, of any shape.
        strength: Scalar weight lambda of the reversed gradient, usually a ramp from
            0 to 1 (see `jaxtransfer.ops.ramps.dann`). May be traced; it gets a zero
            gradient.

    Returns:
        ``x`` unchanged. It has no forward-mode derivative (``jax.jvp``).

    Raises:
        ValueError: If ``strength`` is not a scalar.

    Example:
        >>> import jax
        >>> float(jax.grad(lambda x: 3.0 * gradient_reversal(x, 0.5))(1.0))
        -1.5

    Reference:
        Ganin et al., "Domain-Adversarial Training of Neural Networks", JMLR 17,
        2016, eqs. 16-17.
    """
    if jnp.ndim(strength):
        raise ValueError(
            f"strength must be a scalar, got shape {jnp.shape(strength)}; under vmap "
            "pass one value per example through in_axes."
        )
    strength = jax.lax.stop_gradient(jnp.asarray(strength, dtype=float))
    return jax.tree.map(
        lambda leaf: (
            _reverse(leaf, strength)
            if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
            else leaf
        ),
        x,
    )


@jax.custom_vjp
def _reverse(x, strength):
    return mapped_with(x, strength)


def _forward(x, strength):
    return mapped_with(x, strength), strength


def _backward(strength, gradient):
    return -strength.astype(gradient.dtype) * gradient, None


_reverse.defvjp(_forward, _backward)
