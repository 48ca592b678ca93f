"""Pruning while training: what is pruned is zero, and stays zero."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtransfer import tree
from jaxtransfer.compress.magnitude import (
    KERNELS,
    Masks,
    Scope,
    Sparsity,
    Structure,
    apply_masks,
    check_share,
    chosen,
    masks,
)
from jaxtransfer.train.state import TrainState
from jaxtransfer.train.step import extra_arguments
from jaxtransfer.typing import Array, Params, Scalar


def cubic_sparsity(
    final: float, *, end: int, begin: int = 0, initial: float = 0.0
) -> Callable[[Any], Scalar]:
    r"""Sparsity that rises fast while there is much to prune, then slowly.

    .. math:: s_t = s_f + (s_i - s_f)
              \left(1 - \frac{t - t_0}{t_1 - t_0}\right)^3

    Args:
        final: :math:`s_f`, from update ``end`` on.
        end: :math:`t_1`.
        begin: :math:`t_0`; up to it the sparsity is ``initial``.
        initial: :math:`s_i`.

    Returns:
        ``updates -> sparsity``, for :func:`pruned`.

    Raises:
        ValueError: a sparsity is not in 0 … 1, or the end is not after the beginning.

    Example:
        >>> schedule = cubic_sparsity(0.8, end=100)
        >>> [round(float(schedule(t)), 2) for t in (0, 50, 100, 200)]
        [0.0, 0.7, 0.8, 0.8]

    References:
        Zhu, Gupta, *To prune, or not to prune: exploring the efficacy of pruning for
        model compression*, 2017, eq. 1.
    """
    check_share(final, "final")
    check_share(initial, "initial")
    if end <= begin:
        raise ValueError(f"end: got {end}; it must be after begin, {begin}")

    def schedule(updates: Any) -> Scalar:
        done = jnp.clip((jnp.asarray(updates, float) - begin) / (end - begin), 0.0, 1.0)
        return final + (initial - final) * (1.0 - done) ** 3

    return schedule


class Pruned(NamedTuple):
    """State of :func:`pruned`: updates so far, what is kept, the inner state."""

    updates: Array
    masks: Masks
    inner: Any


def pruned(
    optimizer: optax.GradientTransformation,
    sparsity: Sparsity | Callable[[Any], Sparsity],
    *,
    rules: tree.Rules = KERNELS,
    scope: Scope = "layer",
    structure: Structure = None,
    every: int = 1,
) -> optax.GradientTransformation:
    """An optimizer whose parameters are pruned: after each update they are exactly 0.

    Around the optimizer of any training step; objective and step stay as they are, so
    a student is distilled and pruned in one step. The masks are part of the
    optimizer's state. What is pruned has no gradient and stays zero as long as the
    sparsity does not fall. At the start the masks are those of the initial weights
    (pretrained ones, say); the first update applies them.

    Nothing may change its updates afterwards, or what is pruned would not be zero: in
    ``optax.chain`` it is the last one, around the optimizer.

    Args:
        optimizer: what makes the updates.
        sparsity: a number, or a schedule of the updates done, as
            :func:`cubic_sparsity`. Within a compiled step it is given a traced number,
            so it chooses by ``jnp.where``, not by ``if``.
        rules: what is pruned; ``"student/(.*/)?kernel"`` leaves the bridges of
            distillation alone.
        scope: see :func:`masks`.
        structure: see :func:`masks`.
        every: updates between new masks; the schedule ends at one that it divides.

    Returns:
        The transformation, its state a :class:`Pruned`.

    Raises:
        ValueError: as :func:`masks`; ``every`` is not positive; (at an update) the
            parameters are not given.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from jaxtransfer.train import init_state, train_step
        >>> from jaxtransfer.typing import Variables
        >>> def objective(params, frozen, model_state, batch, key):
        ...     return jnp.sum((params["kernel"] - batch) ** 2), (model_state, {})
        >>> optimizer = pruned(optax.sgd(0.1), 0.5)
        >>> start = Variables({"kernel": jnp.array([0.1, 2.0])})
        >>> state = init_state(jax.random.key(0), start, optimizer)
        >>> step = train_step(objective, optimizer)
        >>> for _ in range(3):
        ...     state, _ = step(state, jnp.array([9.0, 2.0]))
        >>> state.params["kernel"].tolist()
        [0.0, 2.0]

    References:
        Zhu, Gupta, 2017, section 3.
    """
    if every < 1:
        raise ValueError(f"every: got {every}; it must be at least 1")
    if not callable(sparsity):
        check_share(sparsity, "sparsity")

    def kept(params: Params, updates: Any) -> Masks:
        now = sparsity(updates) if callable(sparsity) else sparsity
        return masks(params, now, rules=rules, scope=scope, structure=structure)

    def init(params: Any) -> Pruned:
        none = jnp.zeros((), jnp.int32)
        return Pruned(none, kept(params, none), optimizer.init(params))

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, Pruned]:
        if params is None:
            raise ValueError(
                "params: pruning needs them; call update(gradient, state, params)"
            )
        gradient = apply_masks(updates, state.masks)
        if "grad" in extra:
            extra["grad"] = gradient
        taken = extra_arguments(optimizer, **extra)
        moves, inner = optimizer.update(gradient, state.inner, params, **taken)
        after: Any = optax.apply_updates(params, moves)
        after = apply_masks(after, state.masks)
        done = state.updates + 1
        now = jax.lax.cond(
            done % every == 0, lambda: kept(after, done), lambda: state.masks
        )
        # A weight and its negative add to exactly 0, whatever the optimizer wanted.
        moves = chosen(now, moves, jax.tree.map(jnp.negative, params))
        return moves, Pruned(done, now, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def keep_pruned(state: TrainState) -> TrainState:
    """Keep at zero what given masks prune, for masks that never change.

    Args:
        state: of a run whose ``frozen["masks"]`` are from :func:`masks`.

    Returns:
        ``after_update`` of :func:`~jaxtransfer.train.train_step`.

    Raises:
        ValueError: there are no masks.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from jaxtransfer.train import init_state
        >>> from jaxtransfer.typing import Variables
        >>> params = {"kernel": jnp.array([0.1, 2.0])}
        >>> state = init_state(jax.random.key(0), Variables(params), optax.sgd(0.1),
        ...                    frozen={"masks": masks(params, 0.5)})
        >>> keep_pruned(state).params["kernel"].tolist()
        [0.0, 2.0]
    """
    if "masks" not in state.frozen:
        raise ValueError(
            "frozen: there are no 'masks'; give them to "
            "train.init_state(..., frozen={'masks': compress.masks(...)})"
        )
    return state.replace(params=apply_masks(state.params, state.frozen["masks"]))


__all__ = ["Pruned", "cubic_sparsity", "keep_pruned", "pruned"]
