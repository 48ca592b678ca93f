"""The training state: one pytree of arrays, nothing else inside."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jaxtransfer.typing import Frozen, Variables


class TrainState(struct.PyTreeNode):
    """Everything a run needs to go on, and nothing that is not an array.

    Attributes:
        step: number of updates done, int32 ``[]``.
        params: what is learned.
        frozen: what is given, by role (``"params"``, ``"teacher"``, ``"anchor"``, …).
        model_state: running statistics and the like, by collection.
        opt_state: the optimizer's slots; of ``params`` only.
        key: typed root key; never advanced, step *n* uses ``fold_in(key, n)``.
    """

    # `Any`: under transformations a field may hold shardings, shapes or nothing.
    step: Any
    params: Any
    frozen: Any
    model_state: Any
    opt_state: Any
    key: Any


def init_state(
    key: jax.Array,
    variables: Variables,
    optimizer: optax.GradientTransformation
    | Mapping[str, optax.GradientTransformation],
    *,
    frozen: Frozen | None = None,
) -> TrainState:
    """Make the state of a fresh run.

    Load pretrained weights into ``variables`` before calling this, so that the
    optimizer (and an anchor such as L2-SP's) starts from them. Arrays are copied: a
    compiled step that donates the state leaves the caller's arrays alone.

    Args:
        key: typed root key, ``[]``.
        variables: what is learned and its model state.
        optimizer: optax transformation; or one by role, for
            :func:`~jaxtransfer.train.alternate`.
        frozen: what is given, by role.

    Returns:
        The state at step 0.

    Raises:
        TypeError: ``key`` is not a typed key.
        ValueError: there is nothing to learn, or an optimizer has no role.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> variables = Variables({"w": jnp.ones(3)})
        >>> state = init_state(jax.random.key(0), variables, optax.sgd(0.1))
        >>> int(state.step), sorted(state.frozen)
        (0, [])
    """
    if not jax.dtypes.issubdtype(jnp.asarray(key).dtype, jax.dtypes.prng_key):
        raise TypeError(
            f"key: got an array of {jnp.asarray(key).dtype}; make a typed key with "
            "jax.random.key(seed), not jax.random.PRNGKey"
        )
    if not jax.tree.leaves(variables.params):
        raise ValueError("params: nothing to learn; do the rules hold every parameter?")
    params, model_state = jax.tree.map(_own, variables)
    if isinstance(optimizer, Mapping):
        if set(optimizer) != set(params):
            raise ValueError(
                f"optimizer: roles {sorted(optimizer)} must be those of params, "
                f"{sorted(params)}"
            )
        opt_state = {role: optimizer[role].init(params[role]) for role in optimizer}
    else:
        opt_state = optimizer.init(params)
    # Some keep the parameters they began with, which `jit_step` would donate twice.
    opt_state = jax.tree.map(_own, opt_state)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        frozen=jax.tree.map(jnp.asarray, dict(frozen or {})),
        model_state=model_state,
        opt_state=opt_state,
        key=jnp.array(key, copy=True),
    )


def _own(leaf: Any) -> jax.Array:
    """A copy of the dtype it has: one that gives way to others is not kept on disk."""
    copy = jnp.array(leaf, copy=True)
    return jnp.asarray(copy, copy.dtype)
