"""How well scores order the items of a list: discounted cumulative gain."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from jaxtransfer.ops.dtypes import common_dtype
from jaxtransfer.typing import AnyArray


def normalized_discounted_cumulative_gain(
    scores: Shaped[AnyArray, "... items"],
    gains: Shaped[AnyArray, "... items"],
    *,
    top: int | None = None,
    where: Bool[AnyArray, "... items"] | None = None,
) -> Float[Array, "..."]:
    r"""Normalised discounted cumulative gain (nDCG) at ``top`` of every list.

    .. math:: \mathrm{DCG@}k = \sum_{r=1}^{k} \frac{g_{(r)}}{\log_2(1 + r)}, \qquad
              \mathrm{nDCG@}k = \frac{\mathrm{DCG@}k}{\max \mathrm{DCG@}k}

    with :math:`g_{(r)}` the gain of the item of rank r by score. Items of equal score
    share their ranks: the result is the mean over the orders among them, so a constant
    score is worth as much as a random order. No gradient flows to the scores.

    Args:
        scores: what ranks, the highest first ``[..., items]``; finite.
        gains: what an item is worth ``[..., items]``, 0 or more; :math:`2^y - 1` for
            the usual emphasis on high labels y.
        top: k, ranks that count; all if None.
        where: items that are there ``[..., items]``; the others have no rank.

    Returns:
        ``[...]`` in 0 ... 1, float32 or wider; 0 for a list without gain.

    Raises:
        ValueError: ``top`` is below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> gains = jnp.array([1.0, 0.0, 0.0, 3.0])
        >>> scores = jnp.array([0.9, 0.3, 0.2, 0.1])
        >>> round(float(normalized_discounted_cumulative_gain(scores, gains, top=1)), 3)
        0.333
        >>> there = jnp.array([True, True, True, False])
        >>> float(normalized_discounted_cumulative_gain(scores, gains, where=there))
        1.0

    References:
        Järvelin, Kekäläinen, *Cumulated gain-based evaluation of IR techniques*, ACM
        TOIS 2002. Ties: McSherry, Najork, *Computing information retrieval performance
        measures efficiently in the presence of tied scores*, ECIR 2008.
    """
    if top is not None and top < 1:
        raise ValueError(f"top: got {top}; it must be 1 or more, or None for all ranks")
    scores, gains = jnp.asarray(scores), jnp.asarray(gains)
    gains = gains.astype(common_dtype(gains.dtype, jnp.float32))
    there = jnp.ones(scores.shape, bool) if where is None else jnp.asarray(where)
    gains = jnp.where(there, gains, 0)
    ranks = jnp.arange(1, scores.shape[-1] + 1)
    discounts = 1 / jnp.log2(1 + ranks).astype(gains.dtype)
    if top is not None:
        discounts = jnp.where(ranks <= top, discounts, 0)
    until = jnp.concatenate([jnp.zeros(1, gains.dtype), jnp.cumsum(discounts)])

    def gained(by: Array) -> Array:
        others = there[..., None, :]
        above = jnp.sum(others & (by[..., None, :] > by[..., :, None]), axis=-1)
        equal = jnp.sum(others & (by[..., None, :] == by[..., :, None]), axis=-1)
        places = jnp.maximum(equal, 1).astype(gains.dtype)
        shared = (until[above + equal] - until[above]) / places
        return jnp.sum(gains * shared, axis=-1)

    best = gained(gains)
    return jnp.where(best > 0, gained(scores) / jnp.where(best > 0, best, 1), 0)


ndcg = normalized_discounted_cumulative_gain

__all__ = ["ndcg", "normalized_discounted_cumulative_gain"]
