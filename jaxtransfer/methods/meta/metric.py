"""Learners that compare: a query with class means, with examples, by regression.

They take no steps: the support's embeddings make the classifier in closed form, and
the meta-gradient goes through it to the embedding.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp

from jaxtransfer.methods.meta.embedding import (
    check_choice,
    class_means,
    comparing,
    cosines,
    only_present,
)
from jaxtransfer.methods.meta.learner import Learner, Statistics
from jaxtransfer.ops.dtypes import number
from jaxtransfer.ops.kernels import squared_distances
from jaxtransfer.ops.products import gram, product
from jaxtransfer.typing import Model

Distance = Literal["squared_euclidean", "cosine"]


def prototypical(
    model: Model,
    *,
    ways: int,
    tap: str | None = None,
    distance: Distance = "squared_euclidean",
    scale: float | None = None,
    learn_scale: bool = False,
    statistics: Statistics = "support",
) -> Learner:
    r"""Prototypical network (ProtoNet): the nearest mean of a class's embeddings.

    .. math:: c_k = \frac{1}{|S_k|} \sum_{x \in S_k} f(x), \qquad
              z_k(x) = -s \lVert f(x) - c_k \rVert^2
              \quad\text{or}\quad s \cos(f(x), c_k)

    and the cross-entropy of :math:`z`.

    Args:
        model: the embedding.
        ways: classes of a task, at least 2. A class without support examples that
            count, or out of ``"classes"``, is never predicted.
        tap: module whose output is the embedding; the network's output if None.
            Layers behind it are not learned.
        distance: ``"squared_euclidean"``, or ``"cosine"`` similarity.
        scale: :math:`s > 0`; None is 1 for distances and 10 for cosines.
        learn_scale: learn :math:`s` with the network, from there.
        statistics: whose batch statistics normalise; see
            :data:`~jaxtransfer.methods.meta.Statistics`.

    Returns:
        The learner. Its meta-parameters are the network's; with ``learn_scale``
        ``{"network": …, "metric": {"scale"}}``.

    Raises:
        ValueError: an option out of range; (at the call) no such tap, no support
            examples, or labels that are no classes.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from jaxtransfer.model import from_linen
        >>> net = from_linen(nn.Dense(4))
        >>> start = net.init(jax.random.key(0), jnp.ones((1, 2)))
        >>> support = {"inputs": jnp.eye(2), "labels": jnp.array([1, 0])}
        >>> learner = prototypical(net, ways=2)
        >>> adapted = learner.adapt(*start[:1], {}, {}, support, jax.random.key(1))
        >>> learner.predict(adapted.params, {}, {}, jnp.eye(2)).argmax(-1).tolist()
        [1, 0]

    References:
        Snell, Swersky, Zemel, *Prototypical networks for few-shot learning*, NeurIPS
        2017, eqs. 1-2. Scaled cosines: Chen et al., *Meta-Baseline*, ICCV 2021.
    """
    check_choice("distance", distance, ("squared_euclidean", "cosine"))
    euclidean = distance == "squared_euclidean"
    if scale is None:
        scale = 1.0 if euclidean else 10.0
    _check_positive(scale=scale)

    def fit(metric, frozen, features, member):
        del frozen
        own = metric if learn_scale else {"scale": jnp.asarray(scale, features.dtype)}
        return {"means": class_means(features, member), **own}

    def score(classifier, frozen, features):
        del frozen
        means = classifier["means"]
        if euclidean:  # prototypes first: no query moves the others' rounding
            return -classifier["scale"] * squared_distances(means, features).T
        return classifier["scale"] * cosines(features, means)

    return comparing(
        model,
        ways=ways,
        tap=tap,
        statistics=statistics,
        fit=fit,
        score=score,
        own={"scale": scale} if learn_scale else None,
    )


def matching(
    model: Model,
    *,
    ways: int,
    tap: str | None = None,
    scale: float = 1.0,
    statistics: Statistics = "support",
) -> Learner:
    r"""Matching network: attention over the support, summed by class.

    .. math:: a_i(x) = \mathrm{softmax}_i\, s \cos(f(x), f(x_i)), \qquad
              p_k(x) = \sum_{i : y_i = k} a_i(x), \qquad L = -\log p_y(x)

    Outputs are :math:`\log p`. One network embeds support and query, each example on
    its own: there are no full context embeddings.

    Args:
        model: the embedding :math:`f`.
        ways: classes, as for :func:`prototypical`.
        tap: as for :func:`prototypical`.
        scale: :math:`s > 0`; 1 as published.
        statistics: as for :func:`prototypical`.

    Returns:
        The learner; its meta-parameters are the network's.

    Raises:
        ValueError: as :func:`prototypical`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from jaxtransfer.model import from_linen
        >>> net = from_linen(nn.Dense(4))
        >>> start = net.init(jax.random.key(0), jnp.ones((1, 2)))
        >>> support = {"inputs": jnp.eye(2), "labels": jnp.array([1, 0])}
        >>> learner = matching(net, ways=2)
        >>> adapted = learner.adapt(*start[:1], {}, {}, support, jax.random.key(1))
        >>> outputs = learner.predict(adapted.params, {}, {}, jnp.eye(2))
        >>> print(f"{float(jnp.exp(outputs).sum(-1)[0]):.4f}")
        1.0000

    References:
        Vinyals et al., *Matching networks for one shot learning*, NeurIPS 2016, eqs.
        1-2 and section 2.1.1.
    """
    _check_positive(scale=scale)
    scale = number(scale)

    def fit(metric, frozen, features, member):
        del metric, frozen
        return {"features": features, "member": member}

    def score(classifier, frozen, features):
        del frozen
        scores = scale * cosines(features, classifier["features"])
        by_class = only_present(scores[:, :, None], classifier["member"])
        mass = jax.nn.logsumexp(by_class, axis=1)
        some = classifier["member"].any(axis=0)
        return jax.nn.log_softmax(only_present(mass, some))

    return comparing(
        model, ways=ways, tap=tap, statistics=statistics, fit=fit, score=score
    )


def ridge(
    model: Model,
    *,
    ways: int,
    tap: str | None = None,
    strength: float = 1.0,
    scale: float = 1.0,
    form: Literal["paper", "released"] = "paper",
    statistics: Statistics = "support",
) -> Learner:
    r"""Ridge regression differentiable discriminator (R2D2).

    The one-hot labels are regressed on the embeddings in closed form:

    .. math:: W = Z^\top (Z Z^\top + \lambda I)^{-1} Y, \qquad
              z(x) = \alpha\, f(x) W + \beta

    By Woodbury's identity the system is as large as the support, not as the
    embedding. :math:`\lambda` (as its logarithm), :math:`\alpha` and :math:`\beta` are
    learned; the softmax of the cross-entropy doesn't see the common :math:`\beta`.

    Args:
        model: the embedding :math:`f`.
        ways: classes, as for :func:`prototypical`.
        tap: as for :func:`prototypical`.
        strength: initial :math:`\lambda > 0`.
        scale: initial :math:`\alpha > 0`.
        form: ``"paper"``: as above. ``"released"``: as in the released code, with a
            one appended to every embedding, and :math:`Z` and :math:`Y` divided by
            the root of the number of examples, so that :math:`\lambda` counts for
            each of them.
        statistics: as for :func:`prototypical`.

    Returns:
        The learner; its meta-parameters are ``{"network": …, "metric":
        {"log_strength", "scale", "offset"}}``.

    Raises:
        ValueError: as :func:`prototypical`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from jaxtransfer.model import from_linen
        >>> net = from_linen(nn.Dense(4))
        >>> learner = ridge(net, ways=2)
        >>> start = learner.init(net.init(jax.random.key(0), jnp.ones((1, 2))))
        >>> support = {"inputs": jnp.eye(2), "labels": jnp.array([1, 0])}
        >>> adapted = learner.adapt(start.params, {}, {}, support, jax.random.key(1))
        >>> sorted(start.params["metric"])
        ['log_strength', 'offset', 'scale']

    References:
        Bertinetto et al., *Meta-learning with differentiable closed-form solvers*, ICLR
        2019, section 3.2.
    """
    _check_positive(strength=strength, scale=scale)
    check_choice("form", form, ("paper", "released"))
    released = form == "released"

    def extended(features: jax.Array) -> jax.Array:
        ones = ((0, 0), (0, 1))
        return jnp.pad(features, ones, constant_values=1) if released else features

    def fit(metric, frozen, features, member):
        del frozen
        counts = member.any(axis=1, keepdims=True)
        rows = jnp.where(counts, extended(features), 0)
        targets = member.astype(rows.dtype)
        if released:
            root = jnp.sqrt(jnp.maximum(counts.sum(), 1).astype(rows.dtype))
            rows, targets = rows / root, targets / root
        identity = jnp.eye(len(rows), dtype=rows.dtype)
        system = gram(rows) + jnp.exp(metric["log_strength"]) * identity
        dual = jax.scipy.linalg.solve(system, targets, assume_a="pos")
        own = {name: metric[name] for name in ("scale", "offset")}
        return {"kernel": product(rows.T, dual), **own}

    def score(classifier, frozen, features):
        del frozen
        outputs = product(extended(features), classifier["kernel"])
        return classifier["scale"] * outputs + classifier["offset"]

    own = {"log_strength": math.log(strength), "scale": scale, "offset": 0.0}
    return comparing(
        model, ways=ways, tap=tap, statistics=statistics, fit=fit, score=score, own=own
    )


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name}: got {value}; it must be positive")


__all__ = ["Distance", "matching", "prototypical", "ridge"]
