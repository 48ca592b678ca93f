"""A count of updates in the model state, which weights and stages follow."""

import jax
import jax.numpy as jnp

from jaxtransfer.typing import ModelState, Variables


def counted(variables: Variables) -> Variables:
    """Add a count of updates to the model state, for weights that follow it.

    Args:
        variables: of :func:`~jaxtransfer.train.init_state`.

    Returns:
        Variables whose model state has ``"updates"``.

    Example:
        >>> int(counted(Variables({})).model_state["updates"])
        0
    """
    state = {**variables.model_state, "updates": jnp.zeros((), jnp.int32)}
    return Variables(variables.params, state)


def count_of(model_state: ModelState, follower: str) -> jax.Array:
    """The updates so far.

    Raises:
        ValueError: nobody counts; names who follows the count.
    """
    if "updates" not in model_state:
        raise ValueError(
            f"{follower} follow the number of updates, which the model state lacks; "
            "start from counted(variables), of distill or meta"
        )
    return model_state["updates"]


def without_count(model_state: ModelState) -> ModelState:
    """The model state of the network alone."""
    return {name: part for name, part in model_state.items() if name != "updates"}
