"""Matrix products in full precision on every device."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxtransfer.typing import AnyArray


def product(
    x: Float[AnyArray, "..."], y: Float[AnyArray, "..."]
) -> Float[Array, "..."]:
    """``jnp.matmul`` in the full precision of its numbers.

    Accelerators multiply float32 matrices in fewer bits if they are not told otherwise.
    That is enough for a layer, not for a distance, the difference of large numbers.

    Args:
        x: Matrices [..., n, k], or a vector [k].
        y: Matrices [..., k, m], or a vector [k].

    Returns:
        Products [..., n, m], as of ``jnp.matmul``.

    Example:
        >>> import jax.numpy as jnp
        >>> product(jnp.ones((2, 3)), jnp.ones(3)).tolist()
        [3.0, 3.0]
    """
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def gram(x: Float[AnyArray, "*stack n k"]) -> Float[Array, "*stack n n"]:
    """Inner products of all pairs of rows, ``X X'``, in full precision.

    Differentiated with one product, ``(C + C') X`` for a cotangent C, where that of
    ``x @ x.T`` takes two.

    Args:
        x: X [..., n, k]; of columns, give ``x.mT``.

    Returns:
        Inner products [..., n, n].

    Example:
        >>> import jax.numpy as jnp
        >>> gram(jnp.array([[1.0, 0.0], [1.0, 2.0]])).tolist()
        [[1.0, 1.0], [1.0, 5.0]]
    """
    return _gram(jnp.asarray(x))


@jax.custom_jvp
def _gram(rows):
    return product(rows, rows.mT)


@_gram.defjvp
def _gram_jvp(primals, tangents):
    (rows,), (slopes,) = primals, tangents
    one_side = product(slopes, rows.mT)
    return _gram(rows), one_side + one_side.mT
