"""Optimizers of the inner loop that are themselves learned.

Each is a :class:`Learned`: parameters, and how they make an optax transformation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtransfer.typing import Params


class Learned(NamedTuple):
    """An optimizer with parameters of its own.

    Attributes:
        init: ``(parameters that adapt, steps) -> its own parameters``, a nested dict.
        build: ``(its own parameters) -> optax transformation``.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> adam = Learned(lambda params, steps: {"rate": jnp.array(0.01)},
        ...                lambda own: optax.adam(own["rate"]))
        >>> sorted(adam.init({}, 1))
        ['rate']
    """

    init: Callable[[Params, int], Params]
    build: Callable[[Any], optax.GradientTransformation]


def meta_sgd(rate: float) -> Learned:
    r"""Meta-SGD: a learned rate for every single parameter.

    .. math:: \theta' = \theta - \alpha \circ \nabla L_S(\theta)

    Args:
        rate: initial value of every :math:`\alpha`.

    Returns:
        The optimizer.

    Example:
        >>> import jax.numpy as jnp
        >>> own = meta_sgd(0.1).init({"w": jnp.zeros(2)}, 1)
        >>> own["w"].tolist() == [jnp.float32(0.1)] * 2
        True

    References:
        Li et al., *Meta-SGD: Learning to learn quickly for few-shot learning*, 2017,
        eq. 2.
    """

    def init(params: Params, steps: int) -> Params:
        del steps
        return jax.tree.map(lambda leaf: jnp.full_like(leaf, rate), params)

    def build(rates: Params) -> optax.GradientTransformation:
        return optax.stateless(
            lambda slopes, _: jax.tree.map(lambda a, g: -a * g, rates, slopes)
        )

    return Learned(init, build)


def per_layer_per_step(rate: float) -> Learned:
    r"""Learned rates for each layer and step, as in MAML++ (LSLR).

    .. math:: \theta^l_{j+1} = \theta^l_j - \alpha^l_j \nabla_{\theta^l} L_S(\theta_j)

    Each array of parameters is a layer. Steps beyond those trained take the last rate.

    Args:
        rate: initial value of every :math:`\alpha`.

    Returns:
        The optimizer.

    Example:
        >>> import jax.numpy as jnp
        >>> per_layer_per_step(0.1).init({"w": jnp.zeros((2, 3))}, 5)["w"].shape
        (5,)

    References:
        Antoniou, Edwards, Storkey, *How to train your MAML*, ICLR 2019, section 4.
    """

    def init(params: Params, steps: int) -> Params:
        return jax.tree.map(
            lambda leaf: jnp.full((max(steps, 1),), rate, jnp.result_type(leaf)), params
        )

    def build(rates: Params) -> optax.GradientTransformation:
        def update(slopes, count, params=None):
            del params

            def scaled(rates, slope):
                at = jnp.minimum(count, len(rates) - 1)
                return -jax.lax.dynamic_index_in_dim(rates, at, keepdims=False) * slope

            return jax.tree.map(scaled, rates, slopes), count + 1

        return optax.GradientTransformation(
            lambda params: jnp.zeros((), jnp.int32),
            update,  # pyright: ignore[reportArgumentType]
        )

    return Learned(init, build)


def meta_curvature(rate: float) -> Learned:
    r"""Meta-curvature: gradients turned by learned matrices, one along each axis.

    .. math:: \mathrm{MC}(G) = G \times_1 M_w \times_2 M_i \times_3 M_o, \qquad
              \theta' = \theta - \alpha\,\mathrm{MC}(\nabla L_S(\theta))

    :math:`M_w` over the positions of a convolution's window, :math:`M_i` over inputs,
    :math:`M_o` over outputs; all begin as the identity. Vectors have :math:`M_o` only;
    numbers are scaled by a learned 1 x 1.

    Args:
        rate: :math:`\alpha`, fixed: the matrices learn its scale.

    Returns:
        The optimizer.

    Example:
        >>> import jax.numpy as jnp
        >>> own = meta_curvature(0.1).init({"w": jnp.zeros((3, 3, 2, 4))}, 1)
        >>> {name: matrix.shape for name, matrix in own["w"].items()}
        {'axis_0': (9, 9), 'axis_1': (2, 2), 'axis_2': (4, 4)}

    References:
        Park and Oliva, *Meta-curvature*, NeurIPS 2019, eqs. 5-8.
    """

    def folded(leaf: jax.Array) -> jax.Array:
        if leaf.ndim < 3:
            return leaf.reshape(leaf.shape or (1,))
        return leaf.reshape(-1, *leaf.shape[-2:])

    def init(params: Params, steps: int) -> Params:
        del steps
        return jax.tree.map(
            lambda leaf: {
                f"axis_{axis}": jnp.eye(size, dtype=leaf.dtype)
                for axis, size in enumerate(folded(leaf).shape)
            },
            params,
        )

    def turned(slope: jax.Array, matrices: Params) -> jax.Array:
        value = folded(slope)
        for axis in range(value.ndim):
            value = jnp.moveaxis(
                jnp.tensordot(matrices[f"axis_{axis}"], value, (1, axis)), 0, axis
            )
        return -rate * value.reshape(slope.shape)

    def build(own: Params) -> optax.GradientTransformation:
        return optax.stateless(lambda slopes, _: jax.tree.map(turned, slopes, own))

    return Learned(init, build)
