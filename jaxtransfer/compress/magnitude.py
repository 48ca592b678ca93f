"""Which weights are kept when the smallest are pruned, as masks."""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from jaxtransfer import tree
from jaxtransfer.ops.dtypes import common_dtype
from jaxtransfer.ops.order import kth_smallest
from jaxtransfer.typing import Params, Scalar

KERNELS = "(.*/)?kernel(?!/array/scale$)"
"""Rule of the kernels of all layers: not of biases, normalisation, integers' scales."""

Masks = Mapping[str, Any]
"""Nested dict of booleans, True where a weight is kept, of what is pruned at all."""

Sparsity = float | int | np.number | Float[Array, ""]
Scope = Literal["layer", "global"]
Structure = Literal["channel"] | None


def masks(
    params: Params,
    sparsity: Sparsity,
    *,
    rules: tree.Rules = KERNELS,
    scope: Scope = "layer",
    structure: Structure = None,
) -> Masks:
    r"""Which weights are kept when the smallest are pruned.

    Of :math:`n` weights the :math:`\mathrm{round}(s\,n)` of smallest magnitude are
    pruned, exactly so many: of equal ones the first. Can be compiled, with a traced
    sparsity too.

    Args:
        params: nested dict of arrays.
        sparsity: :math:`s`, 0 (keep all) … 1 (none).
        rules: what is pruned; see :func:`jaxtransfer.tree.match`.
        scope: ``"layer"``: the share holds in each array; ``"global"``: of all
            together, the same threshold for each.
        structure: None: single weights; ``"channel"``: whole slices of the last axis
            (the outputs of a kernel) by their mean magnitude. A channel's bias and
            normalisation are left alone.

    Returns:
        Booleans by path, of the shape of the weights, or ``[1, ..., channels]``.

    Raises:
        ValueError: a rule matches nothing, an unknown scope or structure, or the
            sparsity is not in 0 … 1.

    Example:
        >>> import jax.numpy as jnp
        >>> masks({"kernel": jnp.array([0.3, -0.1, 0.1, 2.0])}, 0.5)["kernel"].tolist()
        [True, False, False, True]

    References:
        Han et al., *Learning both weights and connections for efficient neural
        networks*, NeurIPS 2015; channels: Li et al., *Pruning filters for efficient
        ConvNets*, ICLR 2017 (the sum of magnitudes there; the mean also compares
        layers).
    """
    if scope not in ("layer", "global"):
        raise ValueError(f'scope: got {scope!r}; choose "layer" or "global"')
    if structure not in (None, "channel"):
        raise ValueError(f'structure: got {structure!r}; choose None or "channel"')
    check_share(sparsity, "sparsity")
    leaves = tree.flatten(params)
    chosen = sorted(tree.match(rules, leaves))
    scores = {path: _magnitudes(leaves[path], structure) for path in chosen}
    if scope == "layer":
        found = {path: _kept(score, sparsity) for path, score in scores.items()}
    else:
        widest = common_dtype(*scores.values())
        joined = jnp.concatenate(
            [score.ravel().astype(widest) for score in scores.values()]
        )
        ends = np.cumsum([score.size for score in scores.values()])[:-1]
        parts = jnp.split(_kept(joined, sparsity), ends)
        found = {
            path: part.reshape(score.shape)
            for (path, score), part in zip(scores.items(), parts, strict=True)
        }
    return tree.unflatten(found)


def check_share(sparsity: Any, name: str) -> None:
    """Refuse a number that is not in 0 … 1; traced ones pass."""
    if not isinstance(sparsity, Tracer) and not 0 <= sparsity <= 1:
        raise ValueError(f"{name}: got {sparsity}; a share of weights is in 0 … 1")


def _magnitudes(leaf: Any, structure: Structure) -> Float[Array, "..."]:
    sizes = jnp.abs(jnp.asarray(leaf))
    sizes = sizes.astype(common_dtype(sizes.dtype, jnp.float32))
    if structure is None or sizes.ndim == 0:
        return sizes
    return jnp.mean(sizes, axis=tuple(range(sizes.ndim - 1)), keepdims=True)


def _kept(scores: Float[Array, "*shape"], sparsity: Sparsity) -> Bool[Array, "*shape"]:
    if isinstance(sparsity, int | float | np.number):
        return _all_but(scores, jnp.int32(round(float(sparsity) * scores.size)))
    return _all_but(scores, jnp.round(sparsity * scores.size).astype(jnp.int32))


@jax.jit
def _all_but(
    scores: Float[Array, "*shape"], count: Int[Array, ""]
) -> Bool[Array, "*shape"]:
    """All but so many of the smallest, of equal ones the last."""
    flat = scores.ravel()
    last = kth_smallest(flat, jnp.clip(count - 1, 0, flat.size - 1))
    below, equal = flat < last, flat == last
    ties = count - jnp.sum(below, dtype=count.dtype)
    pruned = below | (equal & (jnp.cumsum(equal, dtype=count.dtype) <= ties))
    return ~(pruned & (count > 0)).reshape(scores.shape)


def apply_masks(params: Params, masks: Masks) -> Params:
    """Set to zero what is not kept.

    Args:
        params: nested dict of arrays, or of their gradients.
        masks: from :func:`masks`; leaves without one are as they were.

    Returns:
        The arrays, ``+0.0`` where pruned, whatever stood there.

    Raises:
        ValueError: there is a mask of no leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> found = apply_masks({"kernel": jnp.array([3.0, jnp.nan])},
        ...                     {"kernel": jnp.array([True, False])})
        >>> found["kernel"].tolist()
        [3.0, 0.0]
    """
    kept = tree.flatten(masks)
    strange = sorted(set(kept) - set(tree.flatten(params)))
    if strange:
        raise ValueError(
            f"masks: {strange[0]!r} is no parameter; nearest: "
            f"{tree.nearest(strange[0], tree.flatten(params))}. Make the masks from "
            "parameters of the same structure"
        )
    return chosen(masks, params, jax.tree.map(jnp.zeros_like, params))


def chosen(masks: Masks, kept: Any, pruned: Any) -> Any:
    """Leaves of the first tree where a mask is True or is none, else of the second."""
    found = tree.flatten(masks)

    def choose(place: Any, first: Any, second: Any) -> Any:
        path = "/".join(str(part.key) for part in place)
        return jnp.where(found[path], first, second) if path in found else first

    return jax.tree_util.tree_map_with_path(choose, kept, pruned)


def sparsity(params: Params, *, rules: tree.Rules = KERNELS) -> Scalar:
    """The share of weights that are zero.

    Args:
        params: nested dict of arrays.
        rules: which of them.

    Returns:
        0 … 1.

    Raises:
        ValueError: a rule matches nothing.

    Example:
        >>> import jax.numpy as jnp
        >>> float(sparsity({"kernel": jnp.array([0.0, 1.0]), "bias": jnp.zeros(3)}))
        0.5
    """
    leaves = tree.flatten(params)
    chosen = [leaves[path] for path in tree.match(rules, leaves)]
    zeros = jnp.stack([jnp.sum(jnp.asarray(leaf) == 0) for leaf in chosen])
    return jnp.sum(zeros) / tree.size(chosen)


__all__ = [
    "KERNELS",
    "Masks",
    "Scope",
    "Sparsity",
    "Structure",
    "apply_masks",
    "check_share",
    "chosen",
    "masks",
    "sparsity",
]
