"""The dtype of what is made of several, under every setting of JAX."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def common_dtype(*values: Any) -> np.dtype:
    """As ``jnp.result_type``, where JAX is told to mix no dtypes too.

    Under ``jax_numpy_dtype_promotion="strict"`` that one is an error, also where a
    dtype is asked for in order to widen to it.

    Args:
        *values: arrays, numbers or dtypes. Numbers, and what is made of numbers alone,
            give way to arrays; the ``dtype`` of an array does not.

    Returns:
        The dtype that standard promotion gives them.

    Example:
        >>> import jax.numpy as jnp
        >>> common_dtype(jnp.ones(2, jnp.bfloat16), jnp.float32)
        dtype('float32')
    """
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*values)
