"""A mean over a batch in chunks, whose gradient needs the memory of one chunk."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxtransfer.ops.dtypes import common_dtype
from jaxtransfer.ops.varying import vary, varying_axes


def chunked_mean(
    fn: Callable[..., tuple[jax.Array, Any]],
    chunk_size: int | None,
    *,
    aux: Literal["mean", "stack"] = "mean",
) -> Callable[..., tuple[jax.Array, Any]]:
    """Mean of ``fn`` over the leading axis of a batch, one chunk after the other.

    ``fn(params, *shared, chunk) -> (mean over the chunk, aux)``. The chunks run in a
    ``lax.scan`` and, when differentiated, the gradient is taken and summed inside it,
    so memory does not grow with the batch. Chunk k of n holds the examples k, k + n,
    k + 2n, ...: a batch that is sharded over devices stays so within every chunk.

    Args:
        fn: Returns a scalar mean over its last argument's leading axis, and a tree of
            arrays. It must take whatever it differentiates through ``params``.
        chunk_size: Examples per chunk, a divisor of the batch; None is all at once.
        aux: "mean" averages the second output over the chunks, "stack" returns it
            with a leading axis of chunks.

    Returns:
        A function of ``(params, *shared, batch)`` that returns the mean and aux. Only
        ``params`` receive a gradient, and only from the mean.

    Raises:
        ValueError: If ``chunk_size`` is not positive or does not divide the batch (the
            latter at the call).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> def loss(weight, batch):
        ...     return jnp.mean((weight - batch) ** 2), {}
        >>> mean_loss = chunked_mean(loss, 2)
        >>> gradient, _ = jax.grad(mean_loss, has_aux=True)(1.0, jnp.arange(4.0))
        >>> float(gradient)
        -1.0
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be positive or None, got {chunk_size}.")
    if aux not in ("mean", "stack"):
        raise ValueError(f'aux must be "mean" or "stack", got {aux!r}.')

    def finish(losses, stacked):
        if aux == "mean":
            stacked = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), stacked)
        return jnp.mean(losses), stacked

    @jax.custom_vjp
    def mean(params, shared, chunks):
        def body(carry, chunk):
            return carry, fn(params, *shared, chunk)

        return finish(*jax.lax.scan(body, None, chunks)[1])

    def forward(params, shared, chunks):
        def body(total, chunk):
            (loss, extra), gradient = jax.value_and_grad(fn, has_aux=True)(
                params, *shared, chunk
            )
            return jax.tree.map(_added, total, gradient), (loss, extra)

        zeros = jax.tree.map(_zeros, params)
        total, outputs = jax.lax.scan(body, zeros, chunks)
        count = len(jax.tree.leaves(chunks)[0])
        return finish(*outputs), jax.tree.map(
            lambda leaf, like: (leaf / count).astype(jnp.result_type(like)),
            total,
            params,
        )

    def backward(gradient, cotangents):
        scale, _ = cotangents
        return jax.tree.map(functools.partial(_scaled, scale), gradient), None, None

    mean.defvjp(forward, backward)

    def call(params, *arguments):
        if not arguments:
            raise ValueError("the last argument must be the batch, got only params.")
        *shared, batch = arguments
        chunks = _split(batch, chunk_size)
        # In shard_map, params that are equal on all devices become device-varying
        # here, outside the custom rule: the transpose of this cast is what sums
        # their gradient over devices, as it would for the plain mean.
        params = vary(jax.tree.map(jnp.asarray, params), varying_axes(arguments))
        return mean(params, tuple(shared), chunks)

    return call


def _split(batch, chunk_size):
    leaves = jax.tree.leaves(batch)
    sizes = {jnp.shape(leaf)[:1] for leaf in leaves}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            "all arrays of the batch must share one leading axis, got shapes "
            f"{[jnp.shape(leaf) for leaf in leaves]}."
        )
    ((size,),) = sizes
    width = size if chunk_size is None else chunk_size
    if size == 0 or size % width:
        raise ValueError(
            f"chunk_size={chunk_size} does not divide the {size} examples of the "
            "batch; choose a divisor, or None for all at once."
        )
    return jax.tree.map(
        lambda leaf: leaf.reshape(width, size // width, *leaf.shape[1:]).swapaxes(0, 1),
        batch,
    )


def _zeros(leaf):
    return jnp.zeros_like(leaf, dtype=common_dtype(leaf.dtype, jnp.float32))


def _added(total, leaf):
    return total + leaf.astype(total.dtype)


def _scaled(scale, leaf):
    dtype = common_dtype(scale, leaf)
    return (scale.astype(dtype) * leaf.astype(dtype)).astype(leaf.dtype)
