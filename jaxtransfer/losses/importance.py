"""How much a task needs each parameter: the weights of a penalty on parameters.

What comes out goes into `elastic_weight_consolidation`, for the Fisher information and
for synaptic intelligence alike.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Integer, PyTree, Shaped

from jaxtransfer.losses.reduction import check_mask, integers, widen
from jaxtransfer.ops.sums import sum_first
from jaxtransfer.ops.varying import vary, varying_axes
from jaxtransfer.typing import AnyArray


def fisher_information(
    params: PyTree[Float[AnyArray, "..."]],
    inputs: PyTree[Shaped[AnyArray, "n ..."]],
    log_probabilities: Callable[[Any, Any], Float[Array, " classes"]],
    *,
    labels: Integer[AnyArray, " n"] | None = None,
    key: Array | None = None,
    chunk_size: int | None = 16,
    where: Bool[AnyArray, " n"] | None = None,
) -> PyTree[Float[Array, "..."]]:
    """Diagonal of the Fisher information of a classifier, exact per example.

    ``F_i = mean_x E_y[(d log p(y | x) / d w_i)^2]``, each example's gradient squared
    before anything is averaged, so that the batch has no influence but through which
    examples are in it. What y is:

    - by default the Fisher information itself, the expectation over ``p(y | x)`` as a
      sum over all classes (one backward pass a class);
    - with ``key`` an unbiased estimate of it, one class drawn from ``p(y | x)`` each;
    - with ``labels`` the empirical Fisher information, y the given label. Not an
      estimate of the former: it vanishes where the training data are fitted.

    Memory is that of the gradients of ``chunk_size`` examples, whatever n is.

    Args:
        params: Tree of arrays.
        inputs: Examples, an array [n, ...] or a tree of such.
        log_probabilities: ``(params, example) -> [classes]``, normalised log p(y | x)
            of one example without its leading axis. A network that wants a batch gets
            ``example[None]``; it should run as in evaluation.
        labels: Classes [n] in [0, classes), for the empirical Fisher information.
        key: Typed key, for one drawn class an example.
        chunk_size: How many examples are differentiated at once; None for all.
        where: Which examples count [n]; the others may hold anything.

    Returns:
        Tree like ``params``, not negative, float32 or wider; zeros if nothing counts.
        A label out of range that can't be seen because it is traced gives
        not-a-number.

    Raises:
        ValueError: If there are no examples, the sizes differ, both ``labels`` and
            ``key`` are given, ``chunk_size`` is not positive, ``labels`` are out of
            range, ``where`` is no mask of [n] or ``log_probabilities`` does not return
            [classes].

    Example:
        >>> import jax, jax.numpy as jnp
        >>> def log_probabilities(weight, x):
        ...     return jax.nn.log_softmax(jnp.stack([weight * x, 0.0]))
        >>> inputs = jnp.array([1.0, 3.0])
        >>> float(fisher_information(jnp.array(0.0), inputs, log_probabilities))
        1.25

    Reference:
        Kirkpatrick et al., "Overcoming Catastrophic Forgetting in Neural Networks",
        PNAS 114, 2017, sec. 2. The kinds of y: Kunstner, Balles and Hennig,
        "Limitations of the Empirical Fisher Approximation for Natural Gradient
        Descent", NeurIPS 2019. Deviation: common code squares the gradient of a
        batch's mean loss, which is smaller by a factor of about the batch size.
    """
    if labels is not None and key is not None:
        raise ValueError("labels and key exclude each other; give one or none of them.")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be positive or None, got {chunk_size}.")
    params, inputs = jax.tree.map(jnp.asarray, (params, inputs))
    count = _count(inputs)
    where = check_mask("where", True if where is None else where, (count,))
    inputs = jax.tree.map(lambda x: _keep(where, x), inputs)
    example = jax.tree.map(lambda x: x[0], inputs)
    shape = jax.eval_shape(log_probabilities, params, example).shape
    if len(shape) != 1:
        raise ValueError(
            "log_probabilities must return [classes] for one example, got shape "
            f"{shape}; drop the axis of the batch."
        )
    given: dict[str, Any] = {}
    if labels is not None:
        given["label"] = jnp.where(where, _labels(labels, where, count, shape[0]), 0)
    if key is not None:
        given["key"] = jax.random.split(key, count)

    axes = varying_axes((params, inputs, given))
    params = vary(params, axes)
    zeros = vary(jax.tree.map(lambda leaf: jnp.zeros_like(widen(leaf)), params), axes)

    def of_one(x, given, counts):
        values, pull = jax.vjp(lambda p: log_probabilities(p, x), params)

        def add(total, choice):
            direction, weight = choice
            (gradient,) = pull(direction)
            return jax.tree.map(
                lambda t, g: t + jnp.where(weight > 0, weight * widen(g) ** 2, 0.0),
                total,
                gradient,
            ), None

        directions = jnp.eye(len(values), dtype=values.dtype)
        directions = vary(directions, varying_axes(values))
        if given:
            label = (
                given["label"]
                if "label" in given
                else jax.random.categorical(given["key"], values)
            )
            valid = (label >= 0) & (label < len(values))
            direction = directions[label] * jnp.where(valid, 1, jnp.nan)
            return add(zeros, (direction, jnp.where(counts, 1.0, 0.0)))[0]
        weights = jnp.where(counts, jnp.exp(widen(values)), 0.0)
        return jax.lax.scan(add, zeros, (directions, weights))[0]

    def of_chunk(total, chunk):
        squares = jax.vmap(of_one)(*chunk)
        return jax.tree.map(lambda t, s: t + sum_first(s), total, squares), None

    chunks = _chunks((inputs, given), where, count, chunk_size)
    total, _ = jax.lax.scan(of_chunk, zeros, chunks)
    divisor = jnp.maximum(jnp.sum(where), 1)
    return jax.tree.map(lambda leaf: leaf / divisor.astype(leaf.dtype), total)


class SynapticIntelligence(NamedTuple):
    """What synaptic intelligence keeps during one task.

    Attributes:
        start: The parameters at the start of the task.
        path: How much of the loss's fall each parameter has brought about so far.
    """

    start: Any
    path: Any


def init_synaptic_intelligence(
    params: PyTree[Float[AnyArray, "..."]],
) -> SynapticIntelligence:
    """Start synaptic intelligence (SI) at the beginning of a task.

    ``start = w`` and ``path = 0``.

    Args:
        params: Tree of arrays; copied, so that a step may donate them.

    Returns:
        The state, trees like ``params`` in float32 or wider.

    Example:
        >>> import jax.numpy as jnp
        >>> init_synaptic_intelligence({"w": jnp.array([2.0])}).path["w"].tolist()
        [0.0]

    Reference:
        Zenke, Poole and Ganguli, "Continual Learning Through Synaptic Intelligence",
        ICML 2017, sec. 3.
    """
    return SynapticIntelligence(
        jax.tree.map(lambda leaf: jnp.array(widen(leaf), copy=True), params),
        jax.tree.map(lambda leaf: jnp.zeros_like(widen(leaf)), params),
    )


def update_synaptic_intelligence(
    state: SynapticIntelligence,
    params_before: PyTree[Float[AnyArray, "..."]],
    params_after: PyTree[Float[AnyArray, "..."]],
    gradients: PyTree[Float[AnyArray, "..."]],
) -> SynapticIntelligence:
    """Account for one step of training in synaptic intelligence (SI).

    ``path_i <- path_i - g_i (w'_i - w_i)``: what the step along parameter i took off
    the loss, to first order.

    Args:
        state: The state of the task.
        params_before: The parameters w before the step.
        params_after: The parameters w' after it.
        gradients: Gradient g of the task's own loss, without any penalty, at
            ``params_before``.

    Returns:
        The new state.

    Example:
        >>> import jax.numpy as jnp
        >>> state = init_synaptic_intelligence(jnp.array([2.0]))
        >>> before, after, gradient = jnp.array([[2.0], [1.5], [4.0]])
        >>> update_synaptic_intelligence(state, before, after, gradient).path.tolist()
        [2.0]

    Reference:
        Zenke, Poole and Ganguli, "Continual Learning Through Synaptic Intelligence",
        ICML 2017, eq. 3.
    """
    path = jax.tree.map(
        lambda p, w, moved, g: widen(p) - widen(g) * (widen(moved) - widen(w)),
        state.path,
        params_before,
        params_after,
        gradients,
    )
    return SynapticIntelligence(jax.tree.map(widen, state.start), path)


def synaptic_importance(
    state: SynapticIntelligence,
    params: PyTree[Float[AnyArray, "..."]],
    *,
    damping: float | Float[AnyArray, ""] = 0.1,
    form: Literal["code", "paper"] = "code",
) -> PyTree[Float[Array, "..."]]:
    """Importance of parameters by synaptic intelligence (SI), at the end of a task.

    ``max(path_i, 0) / ((w_i - start_i)^2 + damping)``. It is a weight of
    `elastic_weight_consolidation`; the importances of several tasks are added up.

    Args:
        state: The state at the end of the task.
        params: The parameters at the end of the task.
        damping: What keeps the quotient bounded, positive.
        form: "code" cuts negative contributions off, which keeps the penalty bounded
            below; "paper" keeps them.

    Returns:
        Tree like ``params``, float32 or wider.

    Raises:
        ValueError: If ``damping`` is not positive or ``form`` unknown.

    Example:
        >>> import jax.numpy as jnp
        >>> state = SynapticIntelligence(jnp.array([1.0]), jnp.array([0.5]))
        >>> synaptic_importance(state, jnp.array([2.0]), damping=0.25).tolist()
        [0.4000000059604645]

    Reference:
        Zenke, Poole and Ganguli, "Continual Learning Through Synaptic Intelligence",
        ICML 2017, eq. 5; the cut at 0 is the authors' code.
    """
    if form not in ("code", "paper"):
        raise ValueError(f'form must be "code" or "paper", got {form!r}.')
    if not isinstance(damping, Tracer) and not damping > 0:
        raise ValueError(f"damping must be positive, got {damping}.")

    def quotient(start, path, w):
        path = widen(path) if form == "paper" else jax.nn.relu(widen(path))
        return path / ((widen(w) - widen(start)) ** 2 + damping)

    return jax.tree.map(quotient, state.start, state.path, params)


def _count(inputs):
    sizes = {leaf.shape[:1] for leaf in jax.tree.leaves(inputs)}
    if len(sizes) != 1 or sizes <= {(), (0,)}:
        raise ValueError(
            "inputs must be arrays [n, ...] of one n, at least 1, got shapes "
            f"{[leaf.shape for leaf in jax.tree.leaves(inputs)]}."
        )
    ((count,),) = sizes
    return count


def _keep(where, leaf):
    """The rows that count; zeros in place of the others."""
    mask = where.reshape(-1, *(1,) * (leaf.ndim - 1))
    return jnp.where(mask, leaf, jnp.zeros((), leaf.dtype))


def _labels(labels, where, count, classes):
    labels = integers(labels)
    if labels.shape != (count,):
        raise ValueError(f"labels must be [{count}] as inputs, got {labels.shape}.")
    outside = where & ((labels < 0) | (labels >= classes))
    seen = not isinstance(outside, Tracer) and outside.is_fully_addressable
    if seen and outside.any():
        raise ValueError(
            f"labels must be in [0, {classes}), got {labels[outside].tolist()[:5]}."
        )
    return labels


def _chunks(arrays, where, count, chunk_size):
    """The arrays and the mask as [chunks, width, ...], filled up by masked rows.

    Chunk k of n holds the rows k, k + n, ...: sharded rows stay so in every chunk.
    """
    width = count if chunk_size is None else min(chunk_size, count)
    number = -(-count // width)
    missing = number * width - count

    def split(leaf):
        if missing:
            leaf = jnp.concatenate([leaf, leaf[:missing]])
        return leaf.reshape(width, number, *leaf.shape[1:]).swapaxes(0, 1)

    counts = jnp.concatenate([where, jnp.zeros(missing, bool)])
    counts = counts.reshape(width, number).swapaxes(0, 1)
    return (*jax.tree.map(split, arrays), counts)
