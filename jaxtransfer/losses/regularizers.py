"""Penalties on parameters; scalars over a tree."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxtransfer.losses.reduction import widen
from jaxtransfer.ops.dtypes import common_dtype
from jaxtransfer.typing import AnyArray


def l2(params: PyTree[Float[AnyArray, "..."]]) -> Float[Array, ""]:
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
    params: PyTree[Float[AnyArray, "..."]], anchor: PyTree[Float[AnyArray, "..."]]
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
    return _half_squares(_differences(params, anchor).values())


def l1_sp(
    params: PyTree[Float[AnyArray, "..."]], anchor: PyTree[Float[AnyArray, "..."]]
) -> Float[Array, ""]:
    """Absolute distance to the start point (L1-SP), ``|w - w_0|_1``.

    Over the leaves that the anchor has, like `l2_sp`; it pulls parameters back to
    exactly where they began, where `l2_sp` only pulls them near.

    Args:
        params: Tree of arrays, nested dicts.
        anchor: The pretrained values: a tree with some or all of the paths of
            ``params``. No gradient flows into it.

    Returns:
        Scalar, float32 or wider; its gradient is ``sign(w - w_0)``, 0 at the anchor.

    Raises:
        ValueError: If the anchor is empty, has a path that ``params`` lack, or another
            shape there.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"body": jnp.array([1.0, 3.0]), "head": jnp.array([9.0])}
        >>> float(l1_sp(params, {"body": jnp.array([2.0, 1.0])}))
        3.0

    Reference:
        Li, Grandvalet and Davoine, "Explicit Inductive Bias for Transfer Learning with
        Convolutional Networks", ICML 2018, sec. 3.
    """
    differences = _differences(params, anchor).values()

    def size(x):
        # The derivative of jnp.abs is 1 at 0, which would push off the anchor.
        return jnp.where(x > 0, x, jnp.where(x < 0, -x, 0.0 * x))

    return _sum(jnp.sum(size(difference)) for difference in differences)


def elastic_weight_consolidation(
    params: PyTree[Float[AnyArray, "..."]],
    anchor: PyTree[Float[AnyArray, "..."]],
    importance: PyTree[Float[AnyArray, "..."]],
) -> Float[Array, ""]:
    """Elastic weight consolidation (EWC): weighted squared distance to an anchor.

    ``sum_i F_i (w_i - w*_i)^2 / 2``. With `fisher_information` as F this is EWC (and
    L2-SP-Fisher); with `synaptic_importance` it is synaptic intelligence (SI), whose
    strength c corresponds to ``2 c`` here; with ones it is `l2_sp`. Over the leaves
    that the anchor has; what it lacks, such as a new head, is free.

    Several tasks: add one such term a task. Online EWC keeps one term instead, of the
    newest anchor and the importance
    ``jax.tree.map(lambda old, new: decay * old + new, importance, fisher)``.

    Args:
        params: Tree of arrays, nested dicts.
        anchor: The values after the earlier task: a tree with some or all of the paths
            of ``params``. No gradient flows into it.
        importance: F, the paths and shapes of the anchor, not negative. No gradient
            flows into it.

    Returns:
        Scalar, float32 or wider; its gradient is ``F (w - w*)``.

    Raises:
        ValueError: If the anchor is empty, has a path that ``params`` lack, or another
            shape there, or if the paths or shapes of the importance are not those of
            the anchor.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"body": jnp.array([1.0, 3.0]), "head": jnp.array([9.0])}
        >>> anchor = {"body": jnp.array([0.0, 1.0])}
        >>> importance = {"body": jnp.array([2.0, 0.5])}
        >>> float(elastic_weight_consolidation(params, anchor, importance))
        2.0

    Reference:
        Kirkpatrick et al., "Overcoming Catastrophic Forgetting in Neural Networks",
        PNAS 114, 2017, eq. 3. Online form: Schwarz et al., "Progress & Compress: A
        Scalable Framework for Continual Learning", ICML 2018. SI: Zenke, Poole and
        Ganguli, "Continual Learning Through Synaptic Intelligence", ICML 2017, eq. 4.
    """
    differences, importance = _differences(params, anchor), _paths(importance)
    for path in sorted({*differences} ^ {*importance}):
        has, lacks = ("importance", "anchor")[:: 1 if path in importance else -1]
        raise ValueError(
            f"{has} has {path!r}, which {lacks} lacks; give both the same paths."
        )
    terms = []
    for path, difference in differences.items():
        if jnp.shape(importance[path]) != difference.shape:
            raise ValueError(
                f"importance and anchor differ in shape at {path!r}: "
                f"{jnp.shape(importance[path])} and {difference.shape}."
            )
        weight = jax.lax.stop_gradient(widen(importance[path]))
        terms.append(jnp.sum(weight * difference**2))
    return 0.5 * _sum(terms)


def _differences(params, anchor):
    """Difference by path, over the paths of the anchor, which gets no gradient."""
    params, anchor = _paths(params), _paths(anchor)
    if not anchor:
        raise ValueError("anchor has no arrays; give it the pretrained parameters.")
    differences = {}
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
        differences[path] = widen(params[path]) - jax.lax.stop_gradient(widen(start))
    return differences


def _half_squares(leaves):
    return 0.5 * _sum(jnp.sum(widen(leaf) ** 2) for leaf in leaves)


def _sum(terms):
    total = sum(terms, start=0.0)
    return jnp.asarray(total, dtype=common_dtype(total, jnp.float32))


def _paths(tree):
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in leaves
    }
