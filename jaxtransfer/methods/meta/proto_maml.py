"""ProtoMAML: gradient steps whose head begins at the support's prototypes."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer import tree
from jaxtransfer.methods.meta.descent import Optimizer, maml
from jaxtransfer.methods.meta.embedding import (
    class_means,
    counted,
    embedding,
    flat,
    membership,
    of_present,
)
from jaxtransfer.methods.meta.gradients import Backward
from jaxtransfer.methods.meta.learned import Learned
from jaxtransfer.methods.meta.learner import (
    Adapted,
    Learner,
    Statistics,
    Visit,
    check_parts,
    check_support,
    task,
)
from jaxtransfer.train.metrics import ABSENT
from jaxtransfer.typing import Batch, Frozen, Model, ModelState, Params


def proto_maml(
    model: Model,
    optimizer: Optimizer,
    *,
    steps: int,
    tap: str = "features",
    head: str = "head",
    first_order: bool = False,
    rules: tree.Rules | None = None,
    statistics: Statistics = "support",
    backward: Backward = "forward-over-reverse",
) -> Learner:
    r"""Prototypical MAML (ProtoMAML): MAML from a head that is a prototypical network.

    .. math:: w_k = 2 c_k, \quad b_k = -\lVert c_k \rVert^2, \quad
              c_k = \frac{1}{|S_k|} \sum_{x \in S_k} f(x)

    so that before any step :math:`w_k^\top f(x) + b_k` is minus the squared distance
    to the class mean, up to what all classes share. The outer gradient goes through
    :math:`w` and :math:`b` to the embedding; the values of the head that the
    meta-parameters carry are not read, and not learned.

    Args:
        model: a network with a linear head of as many outputs as a task has classes at
            most.
        optimizer: as for :func:`~jaxtransfer.methods.meta.maml`.
        steps: as for :func:`~jaxtransfer.methods.meta.maml`.
        tap: module whose output is the head's input.
        head: path of the head, with parameters ``kernel [features, ways]`` and ``bias
            [ways]``. A class without support examples that count, or out of
            ``"classes"``, has weight 0 and a bias that is never predicted.
        first_order: take the inner gradients as constants; the gradient through the
            head's start is kept.
        rules: paths of the parameters that adapt; all if None.
        statistics: whose batch statistics normalise; see
            :data:`~jaxtransfer.methods.meta.Statistics`.
        backward: as for :func:`~jaxtransfer.methods.meta.maml`.

    Returns:
        The learner; its meta-parameters are those of
        :func:`~jaxtransfer.methods.meta.maml`.

    Raises:
        ValueError: as :func:`~jaxtransfer.methods.meta.maml`; (at the call) no such tap
            or head, or one doesn't fit the other.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from jaxtransfer import nets
        >>> from jaxtransfer.model import from_linen
        >>> net = from_linen(nets.MLP(2, widths=(4,)))
        >>> start = net.init(jax.random.key(0), jnp.ones((1, 3)))
        >>> learner = proto_maml(net, optax.sgd(0.1), steps=1)
        >>> support = {"inputs": jnp.eye(3)[:2], "labels": jnp.array([1, 0])}
        >>> adapted = jax.jit(learner.adapt)(
        ...     start.params, {}, {}, support, jax.random.key(1))
        >>> adapted.params["head"]["bias"].shape
        (2,)

    References:
        Triantafillou et al., *Meta-Dataset: A dataset of datasets for learning to learn
        from few examples*, ICLR 2020, section 3.
    """
    inner = maml(
        task(model, statistics=statistics),
        optimizer,
        steps=steps,
        first_order=first_order,
        rules=rules,
        backward=backward,
    )
    embed = embedding(model, tap, statistics)
    places = f"{head}/kernel", f"{head}/bias"

    def adapt(
        params: Params,
        frozen: Frozen,
        model_state: ModelState,
        support: Batch,
        key: jax.Array,
        visit: Visit | None = None,
    ) -> Adapted:
        check_support(support)
        learned = isinstance(optimizer, Learned)
        if learned:
            check_parts(params, ("network", "optimizer"))
        network = params["network"] if learned else params
        leaves = tree.flatten(network)
        missing = [place for place in places if place not in leaves]
        if missing:
            raise ValueError(
                f"head: no parameter {missing[0]!r} to begin at the prototypes; "
                f"nearest: {tree.nearest(missing[0], leaves)}"
            )
        kernel, bias = (leaves[place] for place in places)
        ways = len(bias)
        member = membership(support, ways)
        features = embed.support(network, frozen, model_state, support["inputs"], key)
        features = counted(flat(features), support, ways)
        if features.shape[1] != len(kernel):
            raise ValueError(
                f"tap: {tap!r} has {features.shape[1]} features where the head "
                f"{head!r} takes {len(kernel)}; tap what goes into the head"
            )
        means, present = class_means(features, member), member.any(axis=0)
        # Absent classes are left out of the steps by "classes"; a bias of ABSENT among
        # what adapts would be all that norms and decay see.
        offsets = jnp.where(present, -jnp.sum(means**2, axis=1), 0)
        start = (2 * means).T.astype(kernel.dtype), offsets.astype(bias.dtype)
        begun = tree.unflatten({**leaves, **dict(zip(places, start, strict=True))})

        def without(network: Params) -> Params:
            """Parameters under which absent classes are never predicted."""
            leaves = tree.flatten(network)
            bias = leaves[places[1]]
            absent = max(ABSENT, float(jnp.finfo(bias.dtype).min))
            return tree.unflatten(
                {**leaves, places[1]: jnp.where(present, bias, absent)}
            )

        def see(network: Params, state: ModelState) -> Any:
            return None if visit is None else visit(without(network), state)

        adapted = inner.adapt(
            {**params, "network": begun} if learned else begun,
            frozen,
            model_state,
            of_present(support, member),
            key,
            None if visit is None else see,
        )
        return adapted._replace(params=without(adapted.params))

    return inner._replace(adapt=adapt)


__all__ = ["proto_maml"]
