"""Relation network: a second network is learned to compare a query with a class."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxtransfer import losses
from jaxtransfer.losses.reduction import integers
from jaxtransfer.methods.meta.embedding import (
    at_once,
    check_choice,
    check_ways,
    class_means,
    counted,
    embedding,
    flat,
    judged,
    membership,
    only_present,
)
from jaxtransfer.methods.meta.learner import (
    Adapted,
    Learner,
    Statistics,
    Visit,
    check_parts,
    check_support,
)
from jaxtransfer.ops.dtypes import common_dtype
from jaxtransfer.ops.products import product
from jaxtransfer.typing import Batch, Frozen, Model, ModelState, Params, Variables


def relation(
    model: Model,
    module: Model,
    *,
    start: Variables,
    ways: int,
    tap: str | None = None,
    combine: Literal["sum", "mean"] = "sum",
    loss: Literal["mean_squared_error", "cross_entropy"] = "mean_squared_error",
    statistics: Statistics = "support",
) -> Learner:
    r"""Relation network: a second network judges how well a query fits a class.

    .. math:: r_k(x) = g\Big(\Big[\sum_{x_i \in S_k} f(x_i),\; f(x)\Big]\Big), \qquad
              L = \sum_k \big(\mathrm{sigmoid}(r_k(x)) - 1[k = y]\big)^2

    Both embeddings are joined along their last axis, so that maps of features stay
    maps. Outputs are :math:`r`, before the sigmoid, which is part of the loss.

    Args:
        model: the embedding :math:`f`.
        module: the relation module :math:`g`, from pairs ``[pairs, ..., 2 features]``
            to ``[pairs, 1]``.
        start: variables that the module begins with: ``module.init(key, pairs)``.
        ways: classes, as for :func:`~jaxtransfer.methods.meta.prototypical`.
        tap: as for :func:`~jaxtransfer.methods.meta.prototypical`.
        combine: the embeddings of a class's examples: their sum, as published, or
            their mean, which doesn't grow with their number.
        loss: ``"mean_squared_error"`` of sigmoid scores, as published, or
            ``"cross_entropy"`` of the softmax of :math:`r`.
        statistics: as for :func:`~jaxtransfer.methods.meta.prototypical`. Those of the
            support, for the module, are of the pairs of every support example with
            every class.

    Returns:
        The learner; meta-parameters and state are ``{"network": …, "relation": …}``.

    Raises:
        ValueError: as :func:`~jaxtransfer.methods.meta.prototypical`; (at the
            call) the module's outputs are no number a pair.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from jaxtransfer.model import from_linen
        >>> net, module = from_linen(nn.Dense(4)), from_linen(nn.Dense(1))
        >>> first = module.init(jax.random.key(0), jnp.ones((1, 2 * 4)))
        >>> learner = relation(net, module, start=first, ways=2)
        >>> start = learner.init(net.init(jax.random.key(1), jnp.ones((1, 2))))
        >>> sorted(start.params)
        ['network', 'relation']

    References:
        Sung et al., *Learning to compare: relation network for few-shot learning*, CVPR
        2018, eqs. 1-2. Their equation 2 sums over all pairs; here it is summed over
        classes and averaged over queries.
    """
    check_ways(ways)
    check_choice("combine", combine, ("sum", "mean"))
    check_choice("loss", loss, ("mean_squared_error", "cross_entropy"))
    embed = embedding(model, tap, statistics)
    compare = embedding(module, None, statistics)

    def init(variables: Variables) -> Variables:
        return Variables(
            {"network": variables.params, "relation": start.params},
            {"network": variables.model_state, "relation": start.model_state},
        )

    def of_classes(features: jax.Array, member: jax.Array) -> jax.Array:
        rows = flat(features)
        if combine == "sum":
            found = product(member.T.astype(rows.dtype), rows)
        else:
            found = class_means(rows, member)
        return found.reshape(ways, *features.shape[1:])

    def pairs(classes: jax.Array, features: jax.Array) -> jax.Array:
        """``[rows * ways, ..., 2 features]``: of every row with every class."""
        rows = len(features)
        shape = (rows, *classes.shape)
        dtype = common_dtype(classes, features)
        both = (
            jnp.broadcast_to(classes, shape).astype(dtype),
            jnp.broadcast_to(features[:, None], shape).astype(dtype),
        )
        return jnp.concatenate(both, axis=-1).reshape(
            rows * ways, *classes.shape[1:-1], -1
        )

    def settle(maps, params, frozen, model_state, support, key):
        """State of both networks on the support, by the maps of each."""
        state = {
            "network": maps[0](
                params["network"], frozen, model_state["network"], support, key
            )
        }
        features, classes, _ = described(params, frozen, model_state, support, key)
        batch = {"inputs": pairs(classes, features)}
        state["relation"] = maps[1](
            params["relation"], {}, model_state["relation"], batch, key
        )
        return state

    def described(params, frozen, model_state, support, key):
        member = membership(support, ways)
        features = embed.support(
            params["network"], frozen, model_state["network"], support["inputs"], key
        )
        features = counted(features, support, ways)
        return features, of_classes(features, member), member.any(axis=0)

    def adapt(
        params: Params,
        frozen: Frozen,
        model_state: ModelState,
        support: Batch,
        key: jax.Array,
        visit: Visit | None = None,
    ) -> Adapted:
        check_support(support)
        check_parts(params, ("network", "relation"))
        _, classes, present = described(params, frozen, model_state, support, key)
        found = {**params, "classes": classes, "present": present}
        maps = embed.settle, compare.settle
        state = settle(maps, params, frozen, model_state, support, key)
        return at_once(found, state, visit)

    def judge(params, frozen, model_state, inputs, key):
        features = embed.query(
            params["network"], frozen, model_state["network"], inputs, key
        )
        joined = pairs(params["classes"], features)
        scores = compare.query(
            params["relation"], {}, model_state["relation"], joined, key
        )
        if scores.size != len(joined):
            raise ValueError(
                f"module: its outputs for {len(joined)} pairs have shape "
                f"{scores.shape}; it must give one number a pair, [pairs, 1]"
            )
        return only_present(scores.reshape(-1, ways), params["present"])

    def squares(outputs: jax.Array, labels: Any) -> jax.Array:
        wanted = jax.nn.one_hot(labels, ways, dtype=outputs.dtype)
        error = jnp.sum((jax.nn.sigmoid(outputs) - wanted) ** 2, axis=-1)
        # As of the other losses: what is out of range is not hidden.
        labels = integers(labels)
        return jnp.where((labels >= 0) & (labels < ways), error, jnp.nan)

    def of_support(params, frozen, model_state, support, key):
        maps = embed.statistics, compare.statistics
        return settle(maps, params, frozen, model_state, support, key)

    outside = losses.cross_entropy if loss == "cross_entropy" else squares
    return Learner(init, adapt, *judged(judge, outside), of_support)


__all__ = ["relation"]
