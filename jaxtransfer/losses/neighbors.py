"""Predictions on unlabelled target data made like those of their neighbours."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from jaxtransfer.losses.confidence import diversity
from jaxtransfer.losses.directions import unit
from jaxtransfer.losses.memory import (
    checked_indices,
    counted_rows,
    gathered,
    write_rows,
)
from jaxtransfer.losses.reduction import check_mask, mean, widen
from jaxtransfer.losses.sets import matrix
from jaxtransfer.ops.products import product
from jaxtransfer.typing import AnyArray


class NeighborBank(NamedTuple):
    """Features and predictions of all target data, as they were last seen.

    Attributes:
        features: Of length 1 [examples, features].
        probabilities: Softmax predictions [examples, classes].
        filled: Which examples have been seen [examples].
    """

    features: Array
    probabilities: Array
    filled: Array


def neighbor_bank(classes: int, features: int, examples: int) -> NeighborBank:
    """Make an empty bank of features and predictions (NRC).

    It is filled by `update_neighbor_bank`, best with the whole target set before the
    first step of training.

    Args:
        classes: How many classes there are.
        features: Width of the features.
        examples: How many examples the target set has.

    Returns:
        The bank.

    Raises:
        ValueError: If a number is not positive.

    Example:
        >>> neighbor_bank(3, 8, 50).features.shape
        (50, 8)

    Reference:
        Yang et al., "Exploiting the Intrinsic Neighborhood Structure for Source-free
        Domain Adaptation", NeurIPS 2021, sec. 3.
    """
    if min(classes, features, examples) < 1:
        raise ValueError(
            "classes, features and examples must be positive, got "
            f"{classes}, {features} and {examples}."
        )
    return NeighborBank(
        jnp.zeros((examples, features), jnp.float32),
        jnp.zeros((examples, classes), jnp.float32),
        jnp.zeros(examples, bool),
    )


def update_neighbor_bank(
    features: Float[AnyArray, "batch features"],
    logits: Float[AnyArray, "batch classes"],
    indices: Integer[AnyArray, " batch"],
    bank: NeighborBank,
    *,
    where: Bool[AnyArray, " batch"] | None = None,
    axis_name: str | None = None,
) -> NeighborBank:
    """Write a batch into the bank of features and predictions (NRC).

    Features at length 1 and ``softmax(logits)`` take the place of what was there.

    Args:
        features: [batch, features]: what the classifier sees.
        logits: [batch, classes].
        indices: Which examples of the target set these are [batch]. Of an example that
            is there more than once the last one is written.
        bank: The bank.
        where: Which examples are written [batch].
        axis_name: Axis of ``pmap`` or ``shard_map`` over which the batch is divided, so
            that every device writes the rows of all; without it each would write its
            own, and a training step would average the copies.

    Returns:
        The new bank; no gradient flows through it. An index out of range that can't be
        seen because it is traced is not written.

    Raises:
        ValueError: If shapes do not match or, outside of ``jit``, an index is out of
            range.

    Example:
        >>> import jax.numpy as jnp
        >>> bank = neighbor_bank(2, 2, 3)
        >>> bank = update_neighbor_bank(
        ...     jnp.array([[0.0, 4.0]]), jnp.zeros((1, 2)), jnp.array([1]), bank
        ... )
        >>> bank.features[1].tolist(), bank.probabilities[1].tolist()
        ([0.0, 1.0], [0.5, 0.5])

    Reference:
        Yang et al., "Exploiting the Intrinsic Neighborhood Structure for Source-free
        Domain Adaptation", NeurIPS 2021, sec. 3.
    """
    features, logits, indices, where = gathered(
        axis_name, features, logits, indices, where
    )
    features, logits = matrix("features", features), matrix("logits", logits)
    examples, width = bank.features.shape
    classes = bank.probabilities.shape[1]
    shapes = (len(features), width), (len(features), classes)
    if (features.shape, logits.shape) != shapes:
        raise ValueError(
            f"features and logits must be {shapes[0]} and {shapes[1]}, as wide as the "
            f"bank, got {features.shape} and {logits.shape}."
        )
    shape = features.shape[:1]
    where = check_mask("where", True if where is None else where, shape)
    indices, valid = checked_indices("indices", indices, shape, examples, where)
    features = unit(counted_rows("features", features, where))
    probabilities = jax.nn.softmax(counted_rows("logits", logits, where))
    written = where & valid
    bank = NeighborBank(
        write_rows(bank.features, indices, features, written),
        write_rows(bank.probabilities, indices, probabilities, written),
        write_rows(bank.filled, indices, written, written),
    )
    return jax.lax.stop_gradient(bank)


def neighborhood_reciprocal_clustering(
    logits: Float[AnyArray, "batch classes"],
    indices: Integer[AnyArray, " batch"],
    bank: NeighborBank,
    *,
    neighbors: int = 5,
    expanded: int = 5,
    affinity: float | Float[AnyArray, ""] = 0.1,
    form: Literal["paper", "code"] = "paper",
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, ""]:
    """Neighbourhood reciprocal clustering (NRC) of target data, without source data.

    With ``p_i = softmax(z_i)``, the banked predictions ``s`` and, by the cosine of the
    banked features, the ``neighbors`` nearest N(i) of an example and the ``expanded``
    nearest E(k) of each of those, the mean over the batch of

    ``-sum_{k in N(i)} (a_ik s_k + r sum_{m in E(k)} s_m).p_i - s_i.p_i``

    plus the divergence ``sum_c q_c log(q_c classes)`` of the mean prediction q from the
    even one. The affinity ``a_ik`` is 1 for reciprocal neighbours, i in E(k), and r for
    the others.

    In form "paper" i itself is left out of E(k). In form "code" it is in, at r like
    every other, and the last term, which keeps a prediction, is dropped.

    Args:
        logits: z [batch, classes], finite.
        indices: Which examples of the target set these are [batch].
        bank: The bank, already updated with this batch; no gradient flows into it.
            Examples that it has not seen are nobody's neighbours and have none.
        neighbors: How many nearest neighbours; less on small target sets: the authors
            take 2 to 5.
        expanded: How many nearest neighbours of each neighbour; the authors take 2 to
            5.
        affinity: r.
        form: "paper" or "code".
        where: Which examples count [batch]; default all.

    Returns:
        Scalar, float32 or wider; 0 if no example counts. An index out of range that
        can't be seen because it is traced gives not-a-number.

    Raises:
        ValueError: If shapes do not match, ``form`` is unknown, there are less other
            examples in the bank than neighbours or, outside of ``jit``, an index is
            out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> logits = 9.0 * jnp.eye(2)[jnp.array([0, 0, 1, 1])]
        >>> indices = jnp.arange(4)
        >>> bank = update_neighbor_bank(
        ...     logits, logits, indices, neighbor_bank(2, 2, 4)
        ... )
        >>> loss = neighborhood_reciprocal_clustering(
        ...     logits, indices, bank, neighbors=1, expanded=1
        ... )
        >>> print(f"{loss:.2f}")
        -2.00

    Reference:
        Yang et al., "Exploiting the Intrinsic Neighborhood Structure for Source-free
        Domain Adaptation", NeurIPS 2021, sec. 3. Deviations: an example is never its
        own neighbour, however many equal ones there are; exact logarithms (the authors'
        code adds 1e-5). The authors' code also adds ``sum s log s`` to every product, a
        constant without a gradient.
    """
    if form not in ("paper", "code"):
        raise ValueError(f'form must be "paper" or "code", got {form!r}.')
    logits = matrix("logits", logits)
    examples, classes = bank.probabilities.shape
    if logits.shape[1] != classes:
        raise ValueError(
            f"logits must be [batch, {classes}] as the bank, got shape {logits.shape}."
        )
    for name, number in (("neighbors", neighbors), ("expanded", expanded)):
        if not 1 <= number < examples:
            raise ValueError(
                f"{name} must be in [1, {examples - 1}], the other examples of the "
                f"bank, got {number}."
            )
    shape = logits.shape[:1]
    where = check_mask("where", True if where is None else where, shape)
    indices, valid = checked_indices("indices", indices, shape, examples, where)
    logits = counted_rows("logits", logits, where)
    bank = jax.lax.stop_gradient(bank)

    near, near_weights, far, far_weights = _neighbourhoods(
        indices, bank, neighbors, expanded, affinity
    )
    own_weights = jnp.zeros_like(near_weights[:, 0])
    if form == "paper":
        far_weights = jnp.where(far == indices[:, None], 0.0, far_weights)
        own_weights = bank.filled[indices].astype(near_weights.dtype)
    rows = jnp.concatenate([near, far, indices[:, None]], axis=1)
    weights = jnp.concatenate([near_weights, far_weights, own_weights[:, None]], axis=1)
    targets = jnp.einsum(
        "bn,bnc->bc",
        weights,
        widen(bank.probabilities[rows]),
        precision=jax.lax.Precision.HIGHEST,
    )
    agreement = jnp.sum(targets * jax.nn.softmax(logits), axis=1)
    losses = jnp.where(valid, -agreement, jnp.nan)
    highest = jnp.where(jnp.any(where), jnp.log(classes), 0.0)
    return mean(losses, where=where) + (diversity(logits, where=where) + highest)


def _neighbourhoods(indices, bank, neighbors, expanded, affinity):
    """The nearest [batch, n] and theirs [batch, n * m], with the weight of each."""
    features = widen(bank.features)

    def nearest(examples, count):
        cosines = product(features[examples], features.T)
        places = jnp.arange(len(features), dtype=examples.dtype)
        others = bank.filled[None] & (places[None] != examples[:, None])
        cosines = jnp.where(others, cosines, -jnp.inf)
        values, found = jax.lax.top_k(cosines, count)
        return found, (values > -jnp.inf) & bank.filled[examples][:, None]

    near, is_near = nearest(indices, neighbors)
    # One neighbour after the other: cosines of [batch, examples] at a time.
    far, is_far = jax.lax.map(lambda some: nearest(some, expanded), near.T)
    far, is_far = far.swapaxes(0, 1), is_far.swapaxes(0, 1) & is_near[..., None]
    reciprocal = jnp.any((far == indices[:, None, None]) & is_far, axis=2)
    flat = len(indices), neighbors * expanded
    near_weights = jnp.where(is_near, jnp.where(reciprocal, 1.0, affinity), 0.0)
    far_weights = jnp.where(is_far, affinity, 0.0)
    dtype = features.dtype
    return (
        near,
        near_weights.astype(dtype),
        far.reshape(flat),
        far_weights.reshape(flat).astype(dtype),
    )
