"""Transductive fine-tuning: the query's inputs are trained on too, without labels."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtransfer.methods.meta.embedding import class_means, direction
from jaxtransfer.methods.meta.learner import Learner, Statistics
from jaxtransfer.methods.meta.tuning import Head, tuned
from jaxtransfer.ops.products import product
from jaxtransfer.typing import Batch, Model


def with_unlabelled_query(episodes: Batch) -> dict[str, Any]:
    """Episodes whose support carries the query's inputs, for transductive learners.

    Args:
        episodes: ``{"support", "query"}``, of one task or with an axis of tasks.

    Returns:
        The same with ``support["unlabelled"]``, the query's inputs, and, if the query
        has ``"where"``, ``support["unlabelled_where"]``. The labels stay behind.

    Example:
        >>> import jax.numpy as jnp
        >>> part = {"inputs": jnp.ones((2, 3)), "labels": jnp.array([0, 1])}
        >>> episode = with_unlabelled_query({"support": part, "query": part})
        >>> sorted(episode["support"])
        ['inputs', 'labels', 'unlabelled']
    """
    support, query = episodes["support"], episodes["query"]
    added = {"unlabelled": query["inputs"]}
    if "where" in query:
        added["unlabelled_where"] = query["where"]
    return {**episodes, "support": {**support, **added}}


def transductive_fine_tuning(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    ways: int,
    steps: int = 25,
    entropy_weight: float = 1.0,
    tap: str | None = None,
    statistics: Statistics = "running",
) -> Learner:
    r"""Transductive fine-tuning: fit the support, and be sure about the query.

    .. math:: \min_{\theta, W, b} \frac1{|S|} \sum_{(x, y) \in S} -\log p_y(x)
              + \frac{\beta}{|Q|} \sum_{x \in Q} H(p(x)), \qquad
              p(x) = \mathrm{softmax}\Big(
              \frac{f(x)_+}{\lVert f(x)_+ \rVert} W + b\Big)

    with :math:`f(x)_+` the rectified features. Column :math:`k` of :math:`W` begins at
    the mean of the rectified features of class :math:`k`, scaled to length 1, and
    :math:`b` at 0; then everything is trained.

    Support and unlabelled examples go through the network one after the other, and
    the latter are normalised as a query is.

    Args:
        model: the network; the paper takes its outputs, the base classes' logits, as
            features.
        optimizer: of a task; the paper's is ``optax.adam(5e-5)``.
        ways: classes of a task, at least 2. A class without support examples that
            count, or out of ``"classes"``, is never predicted.
        steps: 0 or more. A step takes both terms at once, where the paper takes one
            after the other in each of 25 epochs.
        entropy_weight: :math:`\beta \ge 0`.
        tap: module whose output is the features; the network's output if None.
        statistics: whose batch statistics normalise; see
            :data:`~jaxtransfer.methods.meta.Statistics`.

    Returns:
        The learner; its meta-parameters are the network's. The support that it adapts
        to has ``"unlabelled" [rows, ...]`` inputs besides and maybe
        ``"unlabelled_where" [rows]`` for those that count: wrap episodes in
        :func:`with_unlabelled_query`.

    Raises:
        ValueError: an option out of range; (at the call) no unlabelled inputs, no such
            tap, no support examples, or labels that are no classes.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, optax
        >>> from jaxtransfer.methods import meta
        >>> from jaxtransfer.model import from_linen
        >>> net = from_linen(nn.Dense(4))
        >>> start = net.init(jax.random.key(0), jnp.ones((1, 2)))
        >>> part = {"inputs": jnp.eye(2)[None], "labels": jnp.array([[1, 0]])}
        >>> episodes = with_unlabelled_query({"support": part, "query": part})
        >>> learner = transductive_fine_tuning(net, optax.adam(1e-3), ways=2)
        >>> loss, (_, measured) = jax.jit(meta.objective(learner))(
        ...     start.params, {}, {}, episodes, jax.random.key(1))
        >>> sorted(measured)
        ['accuracy', 'task_loss']

    References:
        Dhillon et al., *A baseline for few-shot image classification*, ICLR 2020, eqs.
        6-8.
    """
    if not entropy_weight >= 0:
        raise ValueError(f"entropy_weight: got {entropy_weight}; it must be 0 or more")

    def start(key, features, member):
        del key
        kernel = direction(class_means(jax.nn.relu(features), member)).T
        return {"kernel": kernel, "bias": jnp.zeros(member.shape[1], kernel.dtype)}

    def score(params, features):
        directions = direction(jax.nn.relu(features))
        return product(directions, params["kernel"]) + params["bias"][None]

    return tuned(
        model,
        optimizer,
        Head(start, score),
        ways=ways,
        steps=steps,
        tap=tap,
        body="tuned",
        statistics=statistics,
        entropy_weight=entropy_weight,
    )


__all__ = ["transductive_fine_tuning", "with_unlabelled_query"]
