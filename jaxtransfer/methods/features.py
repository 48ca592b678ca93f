"""Feature extraction: run the source to a layer, train a new task model on it.

Learned: the new task model. Given: the source (``frozen["source"]``). What lies
behind the tapped layer is not computed.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from jaxtransfer import losses
from jaxtransfer.losses.classification import classified
from jaxtransfer.methods._inputs import check_scaled
from jaxtransfer.methods._supervised import task_loss
from jaxtransfer.ops.dtypes import common_dtype
from jaxtransfer.ops.products import product
from jaxtransfer.parallel import jit
from jaxtransfer.typing import (
    AnyArray,
    Batch,
    Frozen,
    Inputs,
    Metrics,
    Model,
    ModelState,
    Objective,
    Params,
    Predict,
    Scalar,
    Variables,
)


def extract(source: Model, *, tap: str) -> Callable[[Variables, Inputs], Any]:
    """Make the function that runs a network to a layer.

    Args:
        source: the source network.
        tap: path of the layer's module.

    Returns:
        ``(variables, inputs [batch, ...]) -> features [batch, ...]``, in evaluation
        mode and under ``stop_gradient``; under ``jit`` it stops at the layer.

    Raises:
        ValueError: (at the call) the tap does not exist.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from jaxtransfer.model import from_linen
        >>> source = from_linen(nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)]))
        >>> variables = source.init(jax.random.key(0), jnp.ones((1, 3)))
        >>> extract(source, tap="layers_0")(variables, jnp.ones((5, 3))).shape
        (5, 4)
    """

    def run(variables: Variables, inputs: Inputs) -> Any:
        _, features, _ = source.apply(variables, inputs, taps=(tap,))
        return jax.lax.stop_gradient(features[tap])

    return run


def extract_all(
    source: Model, variables: Variables, inputs: Any, *, tap: str, batch_size: int = 256
) -> Any:
    """Features of a whole data set, computed once, to train on many times.

    Args:
        source: the source network.
        variables: its variables.
        inputs: array ``[examples, ...]``, or a tuple or dict of them that the network
            takes.
        tap: path of the layer's module.
        batch_size: rows a forward pass.

    Returns:
        Features ``[examples, ...]``; a tree of them if the layer's output is one.

    Raises:
        ValueError: there are no examples or not as many in each array, they are images
            of integers, the tap does not exist, or ``batch_size`` is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}; it must be at least 1")
    if isinstance(inputs, list):  # of rows
        inputs = jnp.asarray(inputs)
    counts = {len(leaf) for leaf in jax.tree.leaves(inputs)}
    if len(counts) > 1:
        raise ValueError(f"inputs: arrays of {sorted(counts)} examples; give as many")
    count = max(counts, default=0)
    if count == 0:
        raise ValueError("inputs: no examples to extract features of")
    check_scaled("inputs", inputs)
    run = jit(extract(source, tap=tap))
    parts = []
    for start in range(0, count, batch_size):
        rows = min(batch_size, count - start)
        short = batch_size - rows if count > batch_size else 0

        def cut(leaf: Any, start: int = start, rows: int = rows, short: int = short):
            part = jnp.asarray(leaf[start : start + rows])
            return jnp.pad(part, [(0, short), *[(0, 0)] * (part.ndim - 1)])

        found = run(variables, jax.tree.map(cut, inputs))
        parts.append(jax.tree.map(lambda leaf, rows=rows: leaf[:rows], found))
    return jax.tree.map(lambda *found: jnp.concatenate(found), *parts)


def objective(
    source: Model,
    head: Model,
    *,
    tap: str,
    loss: Callable[[Any, Any], jax.Array] = losses.cross_entropy,
) -> Objective:
    r"""Task loss of a new model on tapped features of a source that stays as it is.

    .. math:: L = \frac1n \sum_i \ell(h(\phi(x_i)), y_i)

    Args:
        source: the source network; its variables are ``frozen["source"]``.
        head: the new task model, whose inputs are the features.
        tap: path of the source's layer.
        loss: ``(outputs [batch, ...], labels [batch, ...]) -> [batch]``.

    Returns:
        Objective over ``{"inputs", "labels"}`` batches; ``params`` and
        ``model_state`` are the head's.

    Raises:
        ValueError: (at the first call) ``frozen`` has no ``"source"``.

    References:
        Donahue et al., *DeCAF*, ICML 2014; Razavian et al., *CNN features
        off-the-shelf*, CVPR workshops 2014.
    """
    run = extract(source, tap=tap)

    def value(
        params: Params,
        frozen: Frozen,
        model_state: ModelState,
        batch: Batch,
        key: jax.Array,
    ) -> tuple[Scalar, tuple[ModelState, Metrics]]:
        outputs, _, model_state = head.apply(
            Variables(params, model_state),
            run(_source(frozen), batch["inputs"]),
            train=True,
            key=key,
        )
        total, measured = task_loss(loss, outputs, batch)
        return total, (model_state, measured)

    return value


def _source(frozen: Frozen) -> Variables:
    """The source's variables.

    Raises:
        ValueError: there are none.
    """
    if "source" not in frozen:
        raise ValueError(
            f"frozen: got {sorted(frozen)}, but no 'source'; give init_state("
            "..., frozen={'source': variables})"
        )
    return frozen["source"]


def predict(source: Model, head: Model, *, tap: str) -> Predict:
    """Outputs of the new task model on the source's features.

    Args:
        source: as in :func:`objective`.
        head: as in :func:`objective`.
        tap: as in :func:`objective`.

    Returns:
        ``(params, frozen, model_state, inputs) -> outputs`` in evaluation mode.
    """
    run = extract(source, tap=tap)

    def outputs(
        params: Params, frozen: Frozen, model_state: ModelState, inputs: Inputs
    ) -> Any:
        features = run(_source(frozen), inputs)
        return head.apply(Variables(params, model_state), features)[0]

    return outputs


def logistic_regression(
    features: Float[AnyArray, "batch dim"],
    labels: Int[AnyArray, " batch"],
    *,
    classes: int,
    l2: float | Float[Array, ""] = 1e-3,
    iterations: int = 100,
    where: Bool[AnyArray, " batch"] | None = None,
) -> dict[str, jax.Array]:
    r"""Fit a linear probe: multinomial logistic regression by L-BFGS.

    .. math:: \min_{W,b} \frac1n \sum_i -\log\mathrm{softmax}(W^\top z_i + b)_{y_i}
              + \frac{\lambda}{2} \lVert W \rVert_F^2

    with :math:`z` the features standardised by their own mean and deviation, which is
    folded into ``W`` and ``b`` on return. Compiled; ``vmap`` it over ``l2`` or seeds.

    Args:
        features: ``[batch, dim]``.
        labels: ``[batch]`` in ``0 … classes - 1``.
        classes: number of classes.
        l2: :math:`\lambda \ge 0`; the bias is not penalised.
        iterations: L-BFGS steps.
        where: ``[batch]``; rows that count. The others may hold anything.

    Returns:
        ``{"kernel": [dim, classes], "bias": [classes]}``.

    Raises:
        ValueError: the features are not ``[batch, dim]``, or the labels not one for
            each row; outside of ``jit``, a label is out of range or ``l2`` negative.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.array([[-2.0], [-1.0], [1.0], [2.0]])
        >>> probe = logistic_regression(x, jnp.array([0, 0, 1, 1]), classes=2)
        >>> (x @ probe["kernel"] + probe["bias"]).argmax(-1).tolist()
        [0, 0, 1, 1]
    """
    if jnp.ndim(features) != 2:
        raise ValueError(
            f"features: got shape {jnp.shape(features)}, needs [batch, dim]; pool maps "
            "first, features.mean((1, 2))"
        )
    if jnp.shape(labels) != (len(features),):
        raise ValueError(
            f"labels: got shape {jnp.shape(labels)} for features of {len(features)} "
            "rows; give one for each row"
        )
    if not isinstance(l2, Tracer) and not np.all(np.asarray(l2) >= 0):
        raise ValueError(
            f"l2: got {l2}, needs 0 or more; a negative one has no minimum"
        )
    if where is None:
        where = jnp.ones(len(features), bool)
    _, labels, where = classified(jnp.zeros((len(features), classes)), labels, where)
    return _fit_probe(features, labels, classes, l2, iterations, where)


@functools.partial(jax.jit, static_argnames=("classes", "iterations"))
def _fit_probe(features, labels, classes, l2, iterations, rows):
    dtype = common_dtype(features.dtype, jnp.float32)
    l2 = jnp.asarray(l2, dtype)
    weight = rows.astype(dtype) / jnp.maximum(jnp.sum(rows, dtype=dtype), 1)
    features = jnp.where(rows[:, None], features.astype(dtype), 0)
    centre = product(weight, features)
    deviation = jnp.sqrt(product(weight, (features - centre[None]) ** 2))
    # What is constant but for rounding is left as it is.
    constant = deviation <= 16 * jnp.finfo(dtype).eps * jnp.abs(centre)
    scale = jnp.where(constant, 1.0, deviation)
    inputs = (features - centre[None]) / scale[None]

    def value(params: dict[str, jax.Array]) -> jax.Array:
        logits = product(inputs, params["kernel"]) + params["bias"][None]
        data = jnp.sum(weight * losses.cross_entropy(logits, labels))
        return data + l2 / 2 * jnp.sum(params["kernel"] ** 2)

    start = {
        "kernel": jnp.zeros((features.shape[1], classes), dtype),
        "bias": jnp.zeros(classes, dtype),
    }
    solver = optax.lbfgs()
    value_and_gradient = optax.value_and_grad_from_state(value)

    def iterate(carry: Any, _: None) -> tuple[Any, None]:
        params, state = carry
        loss, gradient = value_and_gradient(params, state=state)
        updates, state = solver.update(
            gradient, state, params, value=loss, grad=gradient, value_fn=value
        )
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(
        iterate, (start, solver.init(start)), length=iterations
    )
    kernel = params["kernel"] / scale[:, None]
    return {"kernel": kernel, "bias": params["bias"] - product(centre, kernel)}


__all__ = ["extract", "extract_all", "logistic_regression", "objective", "predict"]
