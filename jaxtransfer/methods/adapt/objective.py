"""The objective over a labelled source and an unlabelled target."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer import losses, ops, prng, tree
from jaxtransfer.methods._domains import domains, join
from jaxtransfer.methods._supervised import added, task_loss
from jaxtransfer.methods.adapt.terms import Term, conditioned, rows
from jaxtransfer.ops.dtypes import common_dtype, number
from jaxtransfer.typing import (
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


def init(
    key: jax.Array,
    model: Model,
    variables: Variables,
    inputs: Inputs,
    *,
    critic: Model | None = None,
    tap: str | None = None,
    conditional: bool = False,
) -> Variables:
    """Give the network (and a fresh critic) their roles.

    Args:
        key: typed key, for the critic.
        model: the network.
        variables: its variables, fresh or pretrained on the source.
        inputs: an example batch ``[batch, ...]``, for the critic's shapes.
        critic: network of :func:`dann` or :func:`cdan`.
        tap: the layer the critic reads.
        conditional: whether it is of :func:`cdan`.

    Returns:
        Variables ``{"model": …, "critic": …}`` for
        :func:`~jaxtransfer.train.init_state`.

    Raises:
        ValueError: a critic without a tap, or a tap that does not exist.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from jaxtransfer.model import from_linen
        >>> net = from_linen(nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)]))
        >>> key, x = jax.random.key(0), jnp.ones((1, 3))
        >>> start = init(key, net, net.init(key, x), x,
        ...              critic=from_linen(nn.Dense(1)), tap="layers_0")
        >>> sorted(start.params)
        ['critic', 'model']
    """
    params: dict[str, Any] = {"model": variables.params}
    state: dict[str, Any] = {
        "model": variables.model_state,
        "updates": jnp.zeros((), jnp.int32),
    }
    if critic is not None:
        if tap is None:
            raise ValueError("tap: name the layer that the critic reads")
        outputs, features, _ = model.apply(variables, inputs, taps=(tap,))
        seen = rows(features[tap])
        seen = conditioned(seen, outputs) if conditional else seen
        fresh = critic.init(prng.stream(key, "critic"), seen)
        params["critic"], state["critic"] = fresh
    return Variables(params, state)


def objective(
    model: Model,
    *terms: Term,
    steps: int | None = None,
    loss: Callable[[Any, Any], jax.Array] = losses.cross_entropy,
    joint: bool = True,
    axis_name: str | None = None,
) -> Objective:
    r"""Source loss plus terms that draw source and target together.

    .. math:: L = \frac1n \sum_i \ell(f(x^S_i), y^S_i) + \sum_k \lambda_k(p)\, T_k

    Target labels are never read. No terms: source only.

    *Batch statistics.* By default source and target go through the network as one
    batch, and batch normalisation sees the mixture of both. With ``joint=False`` each
    domain goes through on its own and is normalised by its own statistics; the running
    ones, which prediction uses, are then the target's.

    *Held layers.* ``finetune.split(init(...), "model/(layer3|head)|critic")`` holds all
    others of the network, which run in evaluation mode; give ``init_state`` both parts.

    Args:
        model: network of ``params["model"]``; see :func:`init`.
        *terms: from :func:`align`, :func:`compare`, :func:`dann` and :func:`cdan`.
        steps: updates of the whole run; the progress that ramps read is
            ``updates / steps``.
        loss: task loss on the source, ``(outputs, labels) -> [batch]``.
        joint: source and target as one batch, or each on its own.
        axis_name: device axis to gather features over under ``pmap`` or
            ``shard_map``; not needed under ``jit`` over a mesh. The distances must not
            gather as well.

    Returns:
        Objective over ``{"source": {"inputs", "labels"}, "target": {"inputs"}}``. The
        source may have ``"classes"``, and of outputs in many places (pixels) ``"where"
        [batch, ...]``; its loss and metrics are those of
        :func:`~jaxtransfer.methods.finetune.objective`.

    Raises:
        ValueError: a ramp without ``steps``; two terms of one name, or of one that the
            objective or the step has; two with a critic, which would share it;
            (at the first call) source and target of different shapes, one of them empty
            or with a ``"where"`` of examples, two metrics of one name, a tap that does
            not exist, ``axis_name`` in a distance too, no network or critic, or
            something held that is of neither.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from jaxtransfer.methods.adapt import align
        >>> from jaxtransfer.model import from_linen
        >>> net = from_linen(nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)]))
        >>> key, x = jax.random.key(0), jnp.arange(12.0).reshape(4, 3)
        >>> start = init(key, net, net.init(key, x), x)
        >>> batch = {"source": {"inputs": x, "labels": jnp.zeros(4, int)},
        ...          "target": {"inputs": x + 1.0}}
        >>> value = objective(net, align(losses.coral, tap="layers_0"))
        >>> loss, (state, measured) = value(
        ...     start.params, {}, start.model_state, batch, key)
        >>> sorted(measured), int(state["updates"])
        (['accuracy', 'alignment', 'task_loss'], 1)
    """
    taps = tuple(dict.fromkeys(tap for term in terms for tap in term.taps))
    names = [term.name for term in terms]
    critics = [term.name for term in terms if term.critic]
    if len(critics) > 1:
        raise ValueError(
            f"terms: {critics} would share one critic, params['critic']; give one of "
            "them"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"terms: names must differ, got {names}; give name=")
    if taken := {"loss", "task_loss", "accuracy", "gradient_norm"} & {*names}:
        raise ValueError(
            f"terms: {min(taken)!r} is the objective's own or the step's; give name="
        )
    ramped = [term.name for term in terms if term.ramped]
    if ramped and steps is None:
        raise ValueError(
            f"steps: term {ramped[0]!r} follows a ramp; give the updates of the run"
        )

    def value(
        params: Params,
        frozen: Frozen,
        model_state: ModelState,
        batch: Batch,
        key: jax.Array,
    ) -> tuple[Scalar, tuple[ModelState, Metrics]]:
        source, target = domains(batch, places=True)
        count = len(jax.tree.leaves(source["inputs"])[0])
        params, held = _whole(params, frozen)
        variables = Variables(params["model"], model_state["model"])
        model_key = prng.stream(key, "model")
        both = source["inputs"]
        if terms:
            both = jax.tree.map(join, both, target["inputs"])
        if terms and not joint:
            outputs, of_source, _ = model.apply(
                variables,
                jax.tree.map(lambda x: x[:count], both),
                train=True,
                key=model_key,
                taps=taps,
                held=held,
            )
            of_others, of_target, network_state = model.apply(
                variables,
                jax.tree.map(lambda x: x[count:], both),
                train=True,
                key=prng.stream(key, "target"),
                taps=taps,
                held=held,
            )
        else:
            outputs, features, network_state = model.apply(
                variables, both, train=True, key=model_key, taps=taps, held=held
            )
            of_source = {tap: features[tap][:count] for tap in taps}
            of_target = {tap: features[tap][count:] for tap in taps}
            of_others = jax.tree.map(lambda x: x[count:], outputs)
            outputs = jax.tree.map(lambda x: x[:count], outputs)
        total, measured = task_loss(loss, outputs, source)
        progress = ops.progress(model_state["updates"], steps or 1)
        model_state = {
            **model_state,
            "model": network_state,
            "updates": model_state["updates"] + 1,
        }
        for term in terms:
            term_value, term_metrics, model_state = term.value(
                params,
                model_state,
                term.seen(of_source, outputs, source.get("labels")),
                term.seen(of_target, of_others, None),
                progress,
                prng.stream(key, term.name),
                axis_name,
            )
            weight = number(term.weight)
            if callable(weight):
                wide = common_dtype(term_value, jnp.float32)
                weight = jnp.asarray(weight(progress), wide)
            total = added(total, weight * term_value)
            found = {term.name: term_value, **term_metrics}
            if twice := found.keys() & measured.keys():
                raise ValueError(
                    f"terms: two give a metric {min(twice)!r}; give one another name="
                )
            measured |= found
        return total, (model_state, measured)

    return value


def _whole(params: Params, frozen: Frozen) -> tuple[Params, tuple[str, ...]]:
    """What is trained and what is held, and the network's modules that are held.

    Raises:
        ValueError: there is no network, or something else is held.
    """
    held = frozen.get("params", {})
    if other := sorted({*held} - {"model", "critic"}):
        raise ValueError(
            f"frozen['params']: got {other[0]!r}; split what adapt.init returns, whose "
            "paths begin with model/ or critic/"
        )
    whole = tree.combine(params, held)
    if "model" not in whole:
        raise ValueError(
            f"params: got {sorted(params)}, but no 'model'; begin with "
            "adapt.init(key, model, variables, inputs)"
        )
    modules = tree.held_modules(params.get("model", {}), held.get("model", {}))
    return whole, modules if held else ()


def predict(model: Model) -> Predict:
    """Outputs of the network, the same for both domains.

    Args:
        model: the network given to :func:`objective`.

    Returns:
        ``(params, frozen, model_state, inputs) -> outputs`` in evaluation mode.
    """

    def run(
        params: Params, frozen: Frozen, model_state: ModelState, inputs: Inputs
    ) -> Any:
        params, _ = _whole(params, frozen)
        return model.apply(Variables(params["model"], model_state["model"]), inputs)[0]

    return run


__all__ = ["init", "objective", "predict"]
