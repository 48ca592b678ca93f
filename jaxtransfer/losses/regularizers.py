"""Penalties on parameters; scalars over a tree."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxtransfer.losses.reduction import widen


def l2(params: PyTree[Float[Array, "..."]]) -> Float[Array, ""]:
    """Squared length of the parameters, ``|w|^2 / 2``.

    Args:
        params: Tree of arrays.

    Returns:
        Scalar, float32 or wider; its gradient is the parameters.

    Example:
        >>> import jax.numpy as jnp
        >>> float(l2({"kernel": jnp.array([3.0, 4.0])}))
        12.5
    """
    return _half_squares(jax.tree.leaves(params))


def l2_sp(
    params: PyTree[Float[Array, "..."]], anchor: PyTree[Float[Array, "..."]]
) -> Float[Array, ""]:
    """Squared distance to the start point (L2-SP), ``|w - w_0|^2 / 2``.

    Over the leaves that the anchor has; a new head, which it lacks, takes `l2`.

    Args:
        params: Tree of arrays, nested dicts.
        anchor: The pretrained values: a tree with some or all of the paths of
            ``params``. No gradient flows into it.

    Returns:
        Scalar, float32 or wider; its gradient is ``w - w_0``.

    Raises:
        ValueError: If the anchor is empty, has a path that ``params`` lack, or another
            shape there.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"body": jnp.array([1.0, 3.0]), "head": jnp.array([9.0])}
        >>> float(l2_sp(params, {"body": jnp.array([1.0, 1.0])}))
        2.0

    Reference:
        Li, Grandvalet and Davoine, "Explicit Inductive Bias for Transfer Learning with
        Convolutional Networks", ICML 2018, eq. 2 (the first term of eq. 3; the second
        is `l2` of the head).
    """
    params, anchor = _paths(params), _paths(anchor)
    if not anchor:
        raise ValueError("anchor has no arrays; give it the pretrained parameters.")
    differences = []
    for path, start in anchor.items():
        if path not in params:
            raise ValueError(
                f"anchor has {path!r}, which params lack (they have "
                f"{', '.join(sorted(params)[:8])}); keep only shared paths."
            )
        if jnp.shape(params[path]) != jnp.shape(start):
            raise ValueError(
                f"anchor and params differ in shape at {path!r}: "
                f"{jnp.shape(start)} and {jnp.shape(params[path])}; leave a "
                "replaced layer out of the anchor."
            )
        differences.append(widen(params[path]) - jax.lax.stop_gradient(widen(start)))
    return _half_squares(differences)


def _half_squares(leaves):
    total = sum((jnp.sum(widen(leaf) ** 2) for leaf in leaves), start=0.0)
    return 0.5 * jnp.asarray(total, dtype=jnp.result_type(total, jnp.float32))


def _paths(tree):
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in leaves
    }
