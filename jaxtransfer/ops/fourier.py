"""Random Fourier features: sums of a kernel's features over a set, of any size."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxtransfer.ops.products import product
from jaxtransfer.ops.varying import vary, varying_axes


def fourier_sums(
    x: Float[Array, "n features"],
    frequencies: Float[Array, "features frequencies"],
    scales: Float[Array, " kernels"],
    *,
    weights: Float[Array, " n"] | None = None,
    chunk_size: int = 1024,
) -> Float[Array, "kernels 2 frequencies"]:
    """Sums of cosines and sines of projected rows: a kernel's mean embedding, streamed.

    ``sum_i u_i [cos(s_k x_i.w_l), sin(s_k x_i.w_l)]``. With standard normal frequencies
    and ``s_k = sqrt(2 / b_k)`` the mean over l of ``cos cos' + sin sin'`` estimates the
    Gaussian kernel ``exp(-|x - x'|^2 / b_k)``, so that sums of it over pairs are
    products of these. The rows are taken in chunks, computed again for the gradient:
    memory is O(chunk_size frequencies kernels).

    Args:
        x: Rows [n, features].
        frequencies: w [features, frequencies], one column a frequency.
        scales: s_k [kernels].
        weights: u_i [n]; default 1. Rows with weight 0 may not hold NaN.
        chunk_size: Rows of a chunk, positive.

    Returns:
        Sums [kernels, 2, frequencies], of the cosines and of the sines.

    Raises:
        ValueError: If shapes do not match or the chunk size is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> sums = fourier_sums(jnp.zeros((3, 2)), jnp.ones((2, 1)), jnp.ones(1))
        >>> sums.tolist()
        [[[3.0], [0.0]]]

    Reference:
        Rahimi and Recht, "Random Features for Large-Scale Kernel Machines", NeurIPS
        2007, sec. 3.
    """
    if jnp.ndim(x) != 2 or x.shape[1:] != frequencies.shape[:1]:
        raise ValueError(
            "x must be [rows, features] and frequencies [features, frequencies], got "
            f"shapes {jnp.shape(x)} and {jnp.shape(frequencies)}."
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be positive, got {chunk_size}.")
    u = jnp.ones(len(x), x.dtype) if weights is None else weights

    @jax.checkpoint
    def of_chunk(rows, u):
        angles = product(rows, frequencies)
        sums = [
            product(u, wave(scale * angles))
            for scale in scales
            for wave in (jnp.cos, jnp.sin)
        ]
        return jnp.stack(sums).reshape(len(scales), 2, -1)

    if len(x) <= chunk_size:
        return of_chunk(x, u)
    missing = -len(x) % chunk_size
    rows = jnp.pad(x, ((0, missing), (0, 0))).reshape(-1, chunk_size, x.shape[1])
    u = jnp.pad(u, (0, missing)).reshape(-1, chunk_size)
    zeros = jnp.zeros((len(scales), 2, frequencies.shape[1]), x.dtype)
    zeros = vary(zeros, varying_axes((rows, u, frequencies, scales)))
    total, _ = jax.lax.scan(
        lambda total, chunk: (total + of_chunk(*chunk), None), zeros, (rows, u)
    )
    return total
