"""A whole run as one traceable function, over data that lies on the device."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtransfer import ops, prng
from jaxtransfer.train import metrics as metrics_lib
from jaxtransfer.train.state import TrainState
from jaxtransfer.typing import Batch, Metrics, Step

Sample = Callable[[jax.Array, jax.Array | int], Batch]
"""``(key, step) -> batch``, pure: the same key and step give the same batch."""


class ScanHistory(NamedTuple):
    """What a compiled run leaves behind.

    Attributes:
        step: number of updates done at each record, ``[records]``.
        train: metrics by name, ``[records]``; the mean over a block with
            ``eval_every``, else those of each step.
        evaluation: what ``evaluate`` returned by name, ``[evaluations]``.
    """

    step: jax.Array
    train: dict[str, jax.Array]
    evaluation: dict[str, jax.Array]


def _values(metrics: Metrics) -> dict[str, jax.Array]:
    pairs = metrics_lib.promote(metrics)
    return {name: jnp.divide(*pair) for name, pair in pairs.items()}


def scan_fit(
    step: Step,
    state: TrainState,
    sample: Sample,
    *,
    steps: int,
    evaluate: Callable[[TrainState], Metrics] | None = None,
    eval_every: int | None = None,
) -> tuple[TrainState, ScanHistory]:
    """Train with ``jax.lax.scan``: no host in between.

    The function is traceable: ``jit`` it, ``vmap`` it over seeds, learning rates or
    data. Build the state, the optimizer and the sample *inside* the function that is
    compiled, so that their arrays are arguments of the program and no constants.
    What is frozen enters the scan as it is and is not carried. Nothing stops a run
    whose loss is not finite; the history shows it.

    Args:
        step: pure step, not compiled.
        state: where to start; a state at step *n* goes on with the batches and keys
            of step *n*.
        sample: ``(key, step) -> batch``, e.g. of :func:`resident`; ``key`` is the
            stream ``"data"`` of ``state.key``.
        steps: how many updates to do, ≥ 1.
        evaluate: ``state -> metrics``, traceable.
        eval_every: updates between two evaluations, a divisor of ``steps``; ``None``
            evaluates once, at the end.

    Returns:
        The state after the last update, and the history. A metric that counted nothing
        (of another of ``stages``) is not a number there, which ``jax_debug_nans`` takes
        for an error.

    Raises:
        ValueError: ``steps`` is no positive multiple of ``eval_every``.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from jaxtransfer.train import init_state, train_step
        >>> from jaxtransfer.typing import Variables
        >>> def objective(params, frozen, model_state, batch, key):
        ...     return jnp.mean((batch - params["w"]) ** 2), (model_state, {})
        >>> def run(key, learning_rate, data):
        ...     optimizer = optax.sgd(learning_rate)
        ...     start = Variables({"w": jnp.zeros(())})
        ...     state = init_state(key, start, optimizer)
        ...     step = train_step(objective, optimizer)
        ...     return scan_fit(step, state, resident(data, 2), steps=20)
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> data = jnp.array([1.0, 2.0, 3.0, 2.0])
        >>> seeds = jax.jit(jax.vmap(run, in_axes=(0, None, None)))
        >>> state, history = seeds(keys, 0.1, data)
        >>> state.params["w"].shape, history.train["loss"].shape
        ((3,), (3, 20))
    """
    block = steps if eval_every is None else eval_every
    if steps < 1 or block < 1 or steps % block:
        raise ValueError(
            f"steps: {steps} must be a positive multiple of eval_every, {eval_every}"
        )
    frozen = state.frozen
    data_key = prng.stream(state.key, "data")
    first_step = state.step

    def update(carry: TrainState, _: None) -> tuple[TrainState, Any]:
        batch = sample(data_key, carry.step)
        state, metrics = step(carry.replace(frozen=frozen), batch)
        return state.replace(frozen=None), metrics_lib.promote(metrics)

    def measure(carry: TrainState) -> dict[str, jax.Array]:
        if evaluate is None:
            return {}
        return _values(evaluate(carry.replace(frozen=frozen)))

    def train_block(carry: TrainState, _: None) -> tuple[TrainState, Any]:
        carry, metrics = jax.lax.scan(update, carry, length=block)
        summed = jax.tree.map(lambda x: jnp.sum(x, axis=0), metrics)
        return carry, (_values(summed), measure(carry))

    carry = state.replace(frozen=None)
    if eval_every is None:
        carry, metrics = jax.lax.scan(update, carry, length=steps)
        train = _values(metrics)
        evaluation = jax.tree.map(lambda x: x[None], measure(carry))
        done = first_step + 1 + jnp.arange(steps, dtype=first_step.dtype)
    else:
        carry, (train, evaluation) = jax.lax.scan(
            train_block, carry, length=steps // block
        )
        blocks = 1 + jnp.arange(steps // block, dtype=first_step.dtype)
        done = first_step + block * blocks
    return carry.replace(frozen=frozen), ScanHistory(done, train, evaluation)


def resident(arrays: Any, batch_size: int, *, replacement: bool = False) -> Sample:
    """Draw batches from arrays that lie on the device.

    Without replacement each epoch is a permutation of its own
    (:func:`~jaxtransfer.ops.shuffled` of ``fold_in(key, epoch)``), of which the last
    incomplete batch is left out.

    Args:
        arrays: pytree of ``[examples, ...]``, e.g. ``{"inputs", "labels"}``; may be
            traced. Arrays on the host or closed over become constants of the program:
            pass them to the compiled function and call this inside.
        batch_size: examples in a batch, ``1 … examples``.
        replacement: draw every example independently.

    Returns:
        ``(key, step) -> batch`` with leaves ``[batch_size, ...]``.

    Raises:
        ValueError: the arrays differ in their number of examples, or there are fewer
            than ``batch_size``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> sample = resident({"labels": jnp.arange(4)}, 2)
        >>> epoch = [sample(jax.random.key(0), step)["labels"] for step in (0, 1)]
        >>> sorted(jnp.concatenate(epoch).tolist())
        [0, 1, 2, 3]
    """
    shapes = {
        jax.tree_util.keystr(path): jnp.shape(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(arrays)
    }
    sizes = {shape[0] if shape else -1 for shape in shapes.values()}
    if len(sizes) != 1 or -1 in sizes:
        raise ValueError(
            f"arrays: must all have the same number of examples in front, got {shapes}"
        )
    (examples,) = sizes
    if not 1 <= batch_size <= examples:
        raise ValueError(
            f"batch_size: must be 1 … {examples} (the number of examples), "
            f"got {batch_size}"
        )
    batches = examples // batch_size

    def sample(key: jax.Array, step: jax.Array | int) -> Any:
        if replacement:
            key = jax.random.fold_in(key, step)
            rows = jax.random.randint(key, (batch_size,), 0, examples)
        else:
            epoch, batch = step // batches, step % batches
            within = jnp.arange(batch_size, dtype=jnp.result_type(step))
            places = batch * batch_size + within
            rows = ops.shuffled(jax.random.fold_in(key, epoch), places, examples)
        return jax.tree.map(lambda x: jnp.asarray(x)[rows], arrays)

    return sample


def paired(source: Sample, target: Sample) -> Sample:
    """Draw from two domains at once, with a key stream for each.

    Args:
        source: ``(key, step) -> batch``.
        target: ``(key, step) -> batch``.

    Returns:
        ``(key, step) -> {"source": batch, "target": batch}``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> sample = resident({"inputs": jnp.arange(8.0)}, 4)
        >>> batch = paired(sample, sample)(jax.random.key(0), 0)
        >>> sorted(batch), batch["source"]["inputs"].shape
        (['source', 'target'], (4,))
    """

    def sample(key: jax.Array, step: jax.Array | int) -> Any:
        return {
            "source": source(prng.stream(key, "source"), step),
            "target": target(prng.stream(key, "target"), step),
        }

    return sample


__all__ = ["Sample", "ScanHistory", "paired", "resident", "scan_fit"]
