"""Regression tasks: sine waves of random amplitude and phase."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from jaxtransfer import prng
from jaxtransfer.data.episodes.drawing import check_counts
from jaxtransfer.data.episodes.sampling import Episodes


def sinusoid(key: Key[Array, ""], *, tasks: int, shots: int, queries: int) -> Episodes:
    """Draw sine regression tasks.

    `y = A sin(x - p)` with A ~ U[0.1, 5], p ~ U[0, pi] for each task and
    x ~ U[-5, 5] for each point. Pure and jit-able.

    Args:
        key: typed key; the same key draws the same tasks.
        tasks: number of tasks.
        shots: support points a task.
        queries: query points a task.

    Returns:
        `{"support": {"inputs" [tasks, shots, 1], "labels" [tasks, shots, 1]}, "query":
        the same with queries}`, float32.

    Raises:
        ValueError: a count below 1.

    Example:
        >>> tasks = sinusoid(jax.random.key(0), tasks=4, shots=5, queries=10)
        >>> tasks["query"]["labels"].shape
        (4, 10, 1)

    Reference:
        Finn et al., "Model-Agnostic Meta-Learning for Fast Adaptation of Deep
        Networks", 2017, section 5.1.
    """
    check_counts(tasks=tasks, shots=shots, queries=queries)
    amplitude_key, phase_key, point_key = prng.streams(
        key, "amplitude", "phase", "points"
    )
    amplitude = jax.random.uniform(amplitude_key, (tasks, 1, 1), minval=0.1, maxval=5.0)
    phase = jax.random.uniform(phase_key, (tasks, 1, 1), maxval=jnp.pi)
    inputs = jax.random.uniform(
        point_key, (tasks, shots + queries, 1), minval=-5.0, maxval=5.0
    )
    labels = amplitude * jnp.sin(inputs - phase)
    return {
        "support": {"inputs": inputs[:, :shots], "labels": labels[:, :shots]},
        "query": {"inputs": inputs[:, shots:], "labels": labels[:, shots:]},
    }
