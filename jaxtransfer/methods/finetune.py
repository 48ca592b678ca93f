"""Fine-tuning: start from the source's weights, hold some layers, train the others.

Learned: the chosen layers. Given: the others (``frozen["params"]``) and, for L2-SP,
the start point (``frozen["anchor"]``).
"""

from collections.abc import Callable
from typing import Any

import jax

from jaxtransfer import losses, tree
from jaxtransfer.methods import _supervised
from jaxtransfer.methods._supervised import Loss, supervised
from jaxtransfer.pretrained.loading import leaves_of
from jaxtransfer.typing import (
    Batch,
    Frozen,
    Metrics,
    Model,
    ModelState,
    Objective,
    Params,
    Predict,
    Scalar,
    Variables,
)


def split(
    variables: Variables, rules: tree.Rules
) -> tuple[Variables, dict[str, Params]]:
    """Divide a network into what is trained and what is held.

    Args:
        variables: the source network.
        rules: paths of what is trained; see :func:`jaxtransfer.tree.match`. A module
            that has statistics and no parameters, such as a normalisation without
            scale and bias, is held unless a rule matches it.

    Returns:
        ``(variables, frozen)`` for :func:`~jaxtransfer.train.init_state`. Held modules
        without parameters are empty dicts in ``frozen["params"]``.

    Raises:
        ValueError: a rule matches nothing.

    Example:
        >>> import jax.numpy as jnp
        >>> source = Variables({"stem": {"w": jnp.ones(2)}, "head": {"w": jnp.ones(2)}})
        >>> trained, frozen = split(source, "head")
        >>> sorted(trained.params), sorted(frozen["params"])
        (['head'], ['stem'])
    """
    bare = _bare(variables)
    chosen = tree.match(rules, [*tree.flatten(variables.params), *bare])
    trained, held = tree.divide(variables.params, chosen)
    for path in bare:
        node = held
        for name in path.split("/") if path not in chosen else ():
            node = node.setdefault(name, {})
    return Variables(trained, variables.model_state), {"params": held}


def _bare(variables: Variables) -> dict[str, dict[str, Any]]:
    """The topmost modules with state and without parameters, as empty dicts."""
    below = tuple(tree.flatten(variables.params))
    bare: dict[str, dict[str, Any]] = {}
    for path, (leaf, _) in sorted(leaves_of(variables).items()):
        parents = path.split("/")[:-1]
        for depth in range(1, len(parents) + 1):
            module = "/".join(parents[:depth])
            if leaf.collection == "params" or module in bare:
                break
            if not any(other.startswith(f"{module}/") for other in below):
                bare[module] = {}
                break
    return bare


def objective(
    model: Model,
    *,
    loss: Loss = losses.cross_entropy,
    regularizer: Callable[[Params, Frozen], Scalar] | None = None,
    train: bool = True,
) -> Objective:
    r"""Task loss of a network of which some layers may be held.

    .. math:: L = \frac1n \sum_i \ell(f(x_i), y_i) + \Omega(\theta)

    Modules of which every parameter is held run in evaluation mode: their running
    statistics are used and stay bit-identical.

    Args:
        model: the network.
        loss: ``(outputs [batch, ...], labels [batch, ...]) -> [batch]``.
        regularizer: ``(params, frozen) -> scalar``, e.g.
            ``lambda params, frozen: 0.1 * losses.l2_sp(params, frozen["anchor"])``.
        train: run what is trained in training mode (batch statistics, dropout).

    Returns:
        Objective over batches ``{"inputs" [batch, ...], "labels" [batch, ...]}``, with
        ``"where" [batch]`` for rows that count and ``"classes" [classes]`` for classes
        that there are. Metrics: ``task_loss`` and, for integer labels, ``accuracy``.
        Rows that don't count are still rows of the network's own batch statistics:
        fill a batch up with rows of the data rather than with zeros.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from jaxtransfer.model import from_linen
        >>> model = from_linen(nn.Dense(3))
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 2)))
        >>> batch = {"inputs": jnp.ones((4, 2)), "labels": jnp.zeros(4, int)}
        >>> loss, (state, measured) = objective(model)(
        ...     variables.params, {}, variables.model_state, batch, jax.random.key(1))
        >>> sorted(measured)
        ['accuracy', 'task_loss']

    References:
        Yosinski et al., *How transferable are features in deep neural networks?*,
        NeurIPS 2014. L2-SP: Li et al., ICML 2018, eq. 3.
    """
    task = supervised(model, loss, train=train)
    if regularizer is None:
        return task

    def value(
        params: Params,
        frozen: Frozen,
        model_state: ModelState,
        batch: Batch,
        key: jax.Array,
    ) -> tuple[Scalar, tuple[ModelState, Metrics]]:
        total, rest = task(params, frozen, model_state, batch, key)
        return total + regularizer(params, frozen), rest

    return value


def predict(model: Model) -> Predict:
    """Outputs of the whole network, trained and held layers together.

    Args:
        model: the network given to :func:`objective`.

    Returns:
        ``(params, frozen, model_state, inputs) -> outputs`` in evaluation mode.
    """
    return _supervised.predict(model)


__all__ = ["objective", "predict", "split"]
