"""Pairwise squared distances and the mean-distance bandwidth of kernels."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from jaxtransfer.ops.dtypes import common_dtype
from jaxtransfer.ops.products import gram, product
from jaxtransfer.ops.sums import sum_first


def squared_distances(
    x: Float[Array, "n features"], y: Float[Array, "m features"]
) -> Float[Array, "n m"]:
    """Squared Euclidean distances ``|x_i - y_j|^2`` between the rows of two sets.

    Gram form ``|x|^2 + |y|^2 - 2 x.y``, clamped at 0: memory O(nm), not O(nmd). The
    rows are first shifted by a common constant, which leaves distances alone and
    removes most of the cancellation. Accumulates in float32 or wider.

    Args:
        x: Rows [n, features].
        y: Rows [m, features].

    Returns:
        Distances [n, m], float32 or wider, non-negative. For the distances within
        one set use `self_squared_distances`, whose diagonal is exactly 0.

    Raises:
        ValueError: If the inputs are not matrices of equal width.

    Example:
        >>> import jax.numpy as jnp
        >>> squared_distances(jnp.zeros((1, 2)), jnp.array([[3.0, 4.0]])).tolist()
        [[25.0]]
    """
    _check_rows("x", x)
    _check_rows("y", y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"x and y must have the same number of features, got shapes {x.shape} and "
            f"{y.shape}."
        )
    x, y = _widen(x), _widen(y)
    shift = jax.lax.stop_gradient(sum_first(x) / len(x))[None]
    x, y = x - shift, y - shift
    return _distances(x, y, product(x, y.T))


def self_squared_distances(x: Float[Array, "n features"]) -> Float[Array, "n n"]:
    """Squared Euclidean distances between the rows of one set, with a zero diagonal.

    As `squared_distances` of ``x`` with itself; the diagonal is exactly 0 and has no
    gradient.

    Args:
        x: Rows [n, features].

    Returns:
        Distances [n, n], float32 or wider, non-negative, symmetric.

    Raises:
        ValueError: If the input is not a matrix.

    Example:
        >>> import jax.numpy as jnp
        >>> self_squared_distances(jnp.array([[0.0], [2.0]])).tolist()
        [[0.0, 4.0], [4.0, 0.0]]
    """
    _check_rows("x", x)
    x = _widen(x)
    x = x - jax.lax.stop_gradient(sum_first(x) / len(x))[None]
    return jnp.where(jnp.eye(len(x), dtype=bool), 0.0, _distances(x, x, gram(x)))


def mean_squared_distance(
    x: Float[Array, "n features"],
    *more: Float[Array, "_ features"],
    where: Shaped[Array, " rows"] | None = None,
) -> Float[Array, ""]:
    """Mean squared distance between distinct rows, without forming the pairs.

    ``sum_ij |x_i - x_j|^2 / (n^2 - n) = 2 sum_i |x_i - mean x|^2 / (n - 1)``: O(nd).

    Args:
        x: Rows [n, features].
        *more: Further sets, whose rows are taken with those of ``x`` as one set.
        where: Rows that count, of all sets one after the other, booleans or
            non-negative weights [rows]; default all.

    Returns:
        Scalar, float32 or wider; 0 with fewer than two rows.

    Raises:
        ValueError: If the input is not a matrix, the sets' features differ or
            ``where`` does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> float(mean_squared_distance(jnp.array([[0.0], [2.0]])))
        4.0
    """
    sets = (x, *more)
    for rows in sets:
        _check_rows("x", rows)
        if rows.shape[1] != x.shape[1]:
            raise ValueError(
                "all sets must have the same number of features, got shapes "
                f"{[rows.shape for rows in sets]}."
            )
    sets = [_widen(rows) for rows in sets]
    ends = np.cumsum([len(rows) for rows in sets])
    given = jnp.ones(ends[-1]) if where is None else where
    if given.shape != (ends[-1],):
        raise ValueError(
            f"where must be one a row, {ends[-1]}, got shape {given.shape}."
        )
    parts = jnp.split(given, ends[:-1])
    weights = [w.astype(rows.dtype) for w, rows in zip(parts, sets, strict=True)]
    if where is not None:
        sets = [
            jnp.where(w[:, None] > 0, rows, 0.0)
            for w, rows in zip(weights, sets, strict=True)
        ]
    total = sum(jnp.sum(w) for w in weights)
    pairs = total**2 - sum(jnp.sum(w**2) for w in weights)
    sums = sum(product(w, rows) for w, rows in zip(weights, sets, strict=True))
    mean = (sums / jnp.where(total > 0, total, 1.0))[None]
    scatter = sum(
        jnp.sum(w * jnp.sum((rows - mean) ** 2, axis=1))
        for w, rows in zip(weights, sets, strict=True)
    )
    mean_distance = 2.0 * total * scatter / jnp.where(pairs > 0, pairs, 1.0)
    return jnp.where(pairs > 0, mean_distance, 0.0)


def _distances(x, y, products):
    norms = jnp.sum(x**2, axis=1)[:, None] + jnp.sum(y**2, axis=1)[None]
    return jnp.maximum(norms - 2.0 * products, 0.0)


def _widen(x):
    return x.astype(common_dtype(x.dtype, jnp.float32))


def _check_rows(name, x):
    if jnp.ndim(x) != 2:
        raise ValueError(
            f"{name} must be [rows, features], got shape {jnp.shape(x)}; flatten the "
            "trailing axes with reshape(len(x), -1)."
        )
