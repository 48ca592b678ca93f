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


def number(value: Any) -> Any:
    """A NumPy scalar as the number it is, which gives way to arrays.

    ``np.float64(0.5)``, of a range of values or a file, would turn arrays to float64
    where ``0.5`` does not.

    Args:
        value: an option; what is no NumPy scalar stays as it is.

    Returns:
        The number, or the value.

    Example:
        >>> number(np.float64(0.5)).__class__, number(None)
        (<class 'float'>, None)
    """
    return value.item() if isinstance(value, np.generic) else value
