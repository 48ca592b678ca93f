"""Few-shot baselines on the features of a network that was trained once, plainly.

What a meta-learner should be compared with. The features of the base classes' network
are run by its running statistics unless told otherwise.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import optax

from jaxtransfer.methods.meta.embedding import (
    check_choice,
    class_means,
    comparing,
    cosines,
    direction,
)
from jaxtransfer.methods.meta.learner import Learner, Statistics
from jaxtransfer.methods.meta.tuning import Body, Head, tuned, uniform_kernel
from jaxtransfer.ops.dtypes import common_dtype, number
from jaxtransfer.ops.kernels import squared_distances
from jaxtransfer.ops.products import product
from jaxtransfer.typing import Frozen, Model

Transform = Literal["none", "l2", "centred_l2"]
"""What is done to features before they are compared.

- ``"none"``: nothing.
- ``"l2"``: scaled to length 1.
- ``"centred_l2"``: the mean of the base classes' features, ``frozen["mean"]
  [features]``, is subtracted, then scaled to length 1.
"""


def _transformed(how: Transform, frozen: Frozen, features: jax.Array) -> jax.Array:
    if how == "none":
        return features
    if how == "centred_l2":
        if "mean" not in frozen:
            raise ValueError(
                'frozen: no "mean" to centre features by; give the mean [features] of '
                'the base classes\' features, or choose transform="l2"'
            )
        mean = frozen["mean"]
        dtype = common_dtype(features, mean)
        features = features.astype(dtype) - mean.astype(dtype)[None]
    return direction(features)


def _check_transform(transform: Transform) -> None:
    check_choice("transform", transform, ("none", "l2", "centred_l2"))


def simple_shot(
    model: Model,
    *,
    ways: int,
    tap: str | None = None,
    transform: Transform = "centred_l2",
    statistics: Statistics = "running",
) -> Learner:
    r"""SimpleShot: the nearest class mean of transformed features.

    .. math:: z_k(x) = -\Big\lVert t(f(x)) -
              \frac{1}{|S_k|} \sum_{x_i \in S_k} t(f(x_i)) \Big\rVert^2

    Args:
        model: the network.
        ways: classes of a task, at least 2. A class without support examples that
            count, or out of ``"classes"``, is never predicted.
        tap: module whose output is the features; the network's output if None.
        transform: :math:`t`; see :data:`Transform`.
        statistics: whose batch statistics normalise; see
            :data:`~jaxtransfer.methods.meta.Statistics`.

    Returns:
        The learner; its meta-parameters are the network's.

    Raises:
        ValueError: an unknown name; (at the call) no such tap, no ``frozen["mean"]``,
            no support examples, or labels that are no classes.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from jaxtransfer.model import from_linen
        >>> net = from_linen(nn.Dense(4))
        >>> start = net.init(jax.random.key(0), jnp.ones((1, 2)))
        >>> support = {"inputs": jnp.eye(2), "labels": jnp.array([1, 0])}
        >>> learner, frozen = simple_shot(net, ways=2), {"mean": jnp.zeros(4)}
        >>> adapted = learner.adapt(
        ...     start.params, frozen, {}, support, jax.random.key(1))
        >>> learner.predict(adapted.params, frozen, {}, jnp.eye(2)).argmax(-1).tolist()
        [1, 0]

    References:
        Wang et al., *SimpleShot: Revisiting nearest-neighbor classification for
        few-shot learning*, 2019, section 2.
    """
    _check_transform(transform)

    def fit(own, frozen, features, member):
        del own
        features = _transformed(transform, frozen, features)
        return {"means": class_means(features, member)}

    def score(classifier, frozen, features):
        features = _transformed(transform, frozen, features)
        return -squared_distances(classifier["means"], features).T

    return comparing(
        model, ways=ways, tap=tap, statistics=statistics, fit=fit, score=score
    )


def nearest_neighbors(
    model: Model,
    *,
    ways: int,
    neighbors: int = 1,
    tap: str | None = None,
    transform: Transform = "none",
    statistics: Statistics = "running",
) -> Learner:
    r"""Nearest neighbours (kNN) of the query among the support's features.

    .. math:: p_k(x) = \frac{v_k(x) + 1}{\sum_j (v_j(x) + 1)}

    with :math:`v_k` the votes of the nearest examples for their classes. Equal votes
    are decided for the class of the nearer example: the i-th neighbour's vote is
    :math:`1 + 2^{-i}`. Outputs are :math:`\log (v + 1)`. Votes have no gradient: the
    network is not learned by them.

    Args:
        model: the network.
        ways: classes, as for :func:`simple_shot`.
        neighbors: how many vote, at least 1; where fewer examples count, all of them.
        tap: as for :func:`simple_shot`.
        transform: as for :func:`simple_shot`; with ``"l2"`` the nearest are those of
            the largest cosine.
        statistics: as for :func:`simple_shot`.

    Returns:
        The learner; its meta-parameters are the network's.

    Raises:
        ValueError: as :func:`simple_shot`; (at the call) ``neighbors`` is more than
            the rows of the support.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from jaxtransfer.model import from_linen
        >>> net = from_linen(nn.Dense(4))
        >>> start = net.init(jax.random.key(0), jnp.ones((1, 2)))
        >>> support = {"inputs": jnp.eye(2), "labels": jnp.array([1, 0])}
        >>> learner = nearest_neighbors(net, ways=2)
        >>> adapted = learner.adapt(start.params, {}, {}, support, jax.random.key(1))
        >>> learner.predict(adapted.params, {}, {}, jnp.eye(2)).argmax(-1).tolist()
        [1, 0]

    References:
        Triantafillou et al., *Meta-Dataset*, ICLR 2020, section 3 (k-NN).
    """
    _check_transform(transform)
    if neighbors < 1:
        raise ValueError(f"neighbors: got {neighbors}; it must be 1 or more")

    def fit(own, frozen, features, member):
        del own
        if neighbors > len(features):
            raise ValueError(
                f"neighbors: got {neighbors}, more than the {len(features)} rows of "
                "the support"
            )
        return {
            "features": _transformed(transform, frozen, features),
            "member": member,
        }

    def score(classifier, frozen, features):
        member = classifier["member"]
        features = _transformed(transform, frozen, features)
        distances = squared_distances(classifier["features"], features).T
        near = jnp.where(member.any(axis=1), -distances, -jnp.inf)
        _, which = jax.lax.top_k(near, neighbors)
        weights = 1 + 0.5 ** jnp.arange(1, neighbors + 1, dtype=features.dtype)
        votes = product(weights, member[which].astype(features.dtype))
        unknown = jnp.isnan(near).any(axis=1, keepdims=True)
        return jnp.where(unknown, jnp.nan, jnp.log(votes + 1))

    return comparing(
        model, ways=ways, tap=tap, statistics=statistics, fit=fit, score=score
    )


def fine_tuning(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    ways: int,
    steps: int,
    tap: str | None = None,
    body: Body = "held",
    statistics: Statistics = "running",
) -> Learner:
    r"""Fine-tuning (Baseline): a fresh linear head trained on the support.

    .. math:: z(x) = f(x) W + b, \qquad \min_{W, b\,(, \theta)} \frac1{|S|}
              \sum_{(x, y) \in S} -\log \mathrm{softmax}(z(x))_y

    :math:`W` begins uniformly in :math:`\pm 1 / \sqrt{\text{features}}`, drawn from the
    key, and :math:`b` at 0. Every step takes all support examples.

    Args:
        model: the network.
        optimizer: of a task, any.
        ways: classes, as for :func:`simple_shot`.
        steps: 0 or more.
        tap: as for :func:`simple_shot`.
        body: ``"held"``: the head alone is trained, on features that are computed
            once; ``"tuned"``: all of it (but what is in ``frozen["params"]``).
        statistics: as for :func:`simple_shot`.

    Returns:
        The learner; its meta-parameters are the network's, and ``visit`` sees every
        step.

    Raises:
        ValueError: as :func:`simple_shot`; ``steps`` is negative.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, optax
        >>> from jaxtransfer.model import from_linen
        >>> net = from_linen(nn.Dense(4))
        >>> start = net.init(jax.random.key(0), jnp.ones((1, 2)))
        >>> support = {"inputs": jnp.eye(2), "labels": jnp.array([1, 0])}
        >>> learner = fine_tuning(net, optax.sgd(0.5), ways=2, steps=50)
        >>> adapted = learner.adapt(start.params, {}, {}, support, jax.random.key(1))
        >>> learner.predict(adapted.params, {}, {}, jnp.eye(2)).argmax(-1).tolist()
        [1, 0]

    References:
        Chen et al., *A closer look at few-shot classification*, ICLR 2019, section 3.2
        (Baseline).
    """

    def start(key, features, member):
        bias = jnp.zeros(member.shape[1], features.dtype)
        return {**uniform_kernel(key, features, member), "bias": bias}

    def score(params, features):
        return product(features, params["kernel"]) + params["bias"][None]

    return tuned(
        model,
        optimizer,
        Head(start, score),
        ways=ways,
        steps=steps,
        tap=tap,
        body=body,
        statistics=statistics,
    )


def cosine_head(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    ways: int,
    steps: int,
    scale: float = 2.0,
    tap: str | None = None,
    body: Body = "held",
    statistics: Statistics = "running",
) -> Learner:
    r"""Cosine classifier (Baseline++): as :func:`fine_tuning`, with cosines.

    .. math:: z_k(x) = s \cos(f(x), w_k)

    Args:
        model: the network.
        optimizer: of a task, any.
        ways: classes, as for :func:`simple_shot`.
        steps: 0 or more.
        scale: :math:`s > 0`, fixed. The released code takes 2 for up to 200 classes;
            there, unlike here and in the paper, each class's weight has a learned
            length as well.
        tap: as for :func:`simple_shot`.
        body: as for :func:`fine_tuning`.
        statistics: as for :func:`simple_shot`.

    Returns:
        The learner; its meta-parameters are the network's.

    Raises:
        ValueError: as :func:`fine_tuning`; ``scale`` is not positive.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, optax
        >>> from jaxtransfer.model import from_linen
        >>> net = from_linen(nn.Dense(4))
        >>> start = net.init(jax.random.key(0), jnp.ones((1, 2)))
        >>> support = {"inputs": jnp.eye(2), "labels": jnp.array([1, 0])}
        >>> learner = cosine_head(net, optax.sgd(0.5), ways=2, steps=50)
        >>> adapted = learner.adapt(start.params, {}, {}, support, jax.random.key(1))
        >>> learner.predict(adapted.params, {}, {}, jnp.eye(2)).argmax(-1).tolist()
        [1, 0]

    References:
        Chen et al., *A closer look at few-shot classification*, ICLR 2019, section 3.2
        (Baseline++).
    """
    if not scale > 0:
        raise ValueError(f"scale: got {scale}; it must be positive")
    scale = number(scale)

    def score(params, features):
        return scale * cosines(features, params["kernel"].T)

    return tuned(
        model,
        optimizer,
        Head(uniform_kernel, score),
        ways=ways,
        steps=steps,
        tap=tap,
        body=body,
        statistics=statistics,
    )


__all__ = [
    "Transform",
    "cosine_head",
    "fine_tuning",
    "nearest_neighbors",
    "simple_shot",
]
