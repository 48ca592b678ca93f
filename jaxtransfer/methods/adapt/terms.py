"""Terms of an adaptation objective: what draws source and target together."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtransfer import losses, ops
from jaxtransfer.methods._domains import check_gathered_once, gather, join
from jaxtransfer.typing import Metrics, Model, ModelState, Params, Scalar, Variables

Weight = float | Callable[[jax.Array], jax.Array]
"""A number, or a ramp: a function of the progress 0 … 1."""


class Domain(NamedTuple):
    """What a term sees of a domain.

    Attributes:
        features: rows ``[n, features]`` of the tapped layer; a tuple of them if the
            term has a tuple of taps.
        outputs: of the network, ``[n, ...]``.
        labels: of the source, ``[n, ...]``; None of the target, whose labels are never
            read.
    """

    features: Any
    outputs: Any
    labels: jax.Array | None


class Term(NamedTuple):
    """One term of an objective; see :func:`align`, :func:`compare`, :func:`dann`.

    Attributes:
        name: name of its metric.
        tap: path of the layer it reads, or several.
        weight: its weight in the objective.
        value: ``(params, model_state, source, target, progress, key, axis_name) ->
            (scalar, metrics, model_state)`` of two :class:`Domain`.
        ramped: whether the weight or the value follows the progress.
        critic: whether it trains ``params["critic"]``, of which there is one.
    """

    name: str
    tap: str | tuple[str, ...]
    weight: Weight
    value: Callable[..., tuple[Scalar, Metrics, ModelState]]
    ramped: bool = False
    critic: bool = False

    @property
    def taps(self) -> tuple[str, ...]:
        """The layers it reads."""
        return (self.tap,) if isinstance(self.tap, str) else self.tap

    def seen(self, found: dict[str, Any], outputs: Any, labels: Any) -> Domain:
        """The domain as this term sees it, of all that was tapped."""
        features = tuple(rows(found[tap]) for tap in self.taps)
        one = isinstance(self.tap, str)
        labels = None if labels is None else jnp.asarray(labels)
        return Domain(features[0] if one else features, outputs, labels)


def rows(features: jax.Array) -> jax.Array:
    """Features of any shape as ``[n, features]``."""
    return features.reshape(len(features), -1)


def compare(
    loss: Callable[[Domain, Domain], Scalar],
    *,
    tap: str | tuple[str, ...] = (),
    weight: Weight = 1.0,
    name: str,
) -> Term:
    r"""Any loss of what the network makes of both domains.

    .. math:: \lambda\, \ell(\text{source}, \text{target})

    For distances that see classes (local and joint MMD, contrastive discrepancy), and
    for losses of the target's predictions alone (class confusion, entropy, nuclear
    norm).

    Args:
        loss: ``(source, target) -> scalar`` of two :class:`Domain`.
        tap: path of a layer, or of several.
        weight: :math:`\lambda`, a number or a ramp of the progress.
        name: name of its metric.

    Returns:
        A term for :func:`objective`.

    Example:
        >>> import functools, jax
        >>> from jaxtransfer import losses
        >>> local = compare(
        ...     lambda source, target: losses.local_maximum_mean_discrepancy(
        ...         source.features, target.features,
        ...         source.labels, jax.nn.softmax(target.outputs)),
        ...     tap="features", name="local")
        >>> sure = compare(
        ...     lambda source, target: losses.minimum_class_confusion(target.outputs),
        ...     name="confusion", weight=0.1)
        >>> local.taps, sure.taps
        (('features',), ())

    References:
        DSAN: Zhu et al., TNNLS 2020. JAN: Long et al., ICML 2017. Minimum class
        confusion: Jin et al., ECCV 2020.
    """
    return _of_sets(loss, loss, tap, weight, name)


def align(
    distance: Callable[[jax.Array, jax.Array], Scalar] = (
        losses.maximum_mean_discrepancy
    ),
    *,
    tap: str,
    weight: Weight = 1.0,
    name: str = "alignment",
) -> Term:
    r"""Draw the tapped features together under a distance of sets.

    .. math:: \lambda\, d(\{\phi(x^S_i)\}, \{\phi(x^T_j)\})

    Args:
        distance: ``(source [n, features], target [m, features]) -> scalar``, e.g.
            ``losses.mmd``, ``losses.coral`` or a ``functools.partial`` of one, without
            ``axis_name`` where :func:`objective` has it. One that takes labels or
            outputs goes into :func:`compare`.
        tap: path of the layer.
        weight: :math:`\lambda`, a number or a ramp of the progress.
        name: name of its metric.

    Returns:
        A term for :func:`objective`.

    References:
        DAN: Long et al., ICML 2015, eq. 4. Deep CORAL: Sun and Saenko, ECCV
        workshops 2016, eq. 6.
    """

    def apart(source: Domain, target: Domain) -> Scalar:
        return distance(source.features, target.features)

    return _of_sets(apart, distance, tap, weight, name)


def _of_sets(
    loss: Callable[[Domain, Domain], Scalar],
    given: Callable[..., Scalar],
    tap: str | tuple[str, ...],
    weight: Weight,
    name: str,
) -> Term:
    """A term of the rows of all devices; ``given`` is what might gather them again."""

    def value(
        params: Params,
        model_state: ModelState,
        source: Domain,
        target: Domain,
        progress: jax.Array,
        key: jax.Array,
        axis_name: str | None,
    ) -> tuple[Scalar, Metrics, ModelState]:
        del params, progress, key
        check_gathered_once(given, axis_name, name)
        return loss(*gather((source, target), axis_name)), {}, model_state

    return Term(name, tap, weight, value, ramped=callable(weight))


def dann(
    critic: Model,
    *,
    tap: str,
    weight: Weight = 1.0,
    reversal: Weight = ops.dann,
    name: str = "domain",
) -> Term:
    r"""Fool a critic that tells the domains apart, by gradient reversal.

    .. math:: \min_{\phi, c} \mathrm{BCE}(c(R_\lambda(\phi(x))), d)

    in one update: the critic minimises its own cross-entropy; on the way back to the
    features :math:`R_\lambda`, which changes no value, multiplies the gradient by
    :math:`-\lambda` (the ramp ``reversal``).

    Args:
        critic: network of ``params["critic"]``: features ``[rows, features]`` to one
            logit ``[rows, 1]``, source positive.
        tap: path of the layer.
        weight: weight of the critic's loss, a number or a ramp of progress.
        reversal: strength of the reversed gradient, a number or a ramp of progress.
        name: name of its metric; ``name_accuracy`` is the critic's accuracy.

    Returns:
        A term for :func:`objective`.

    References:
        Ganin et al., *Domain-adversarial training of neural networks*, JMLR 2016,
        eqs. 9–10; the ramp in section 5.2.2.
    """

    def judged(source: Domain, target: Domain) -> tuple[jax.Array, dict[str, Any]]:
        return join(source.features, target.features), {}

    return _adversarial(critic, tap, weight, reversal, name, judged)


def cdan(
    critic: Model,
    *,
    tap: str,
    entropy: bool = False,
    weight: Weight = 1.0,
    reversal: Weight = ops.dann,
    name: str = "domain",
) -> Term:
    r"""Fool a critic that sees features and predictions together.

    As :func:`dann` with :math:`\phi(x) \otimes \mathrm{softmax}(f(x))` for the features
    :math:`\phi(x)`: the critic compares the domains class by class.

    Args:
        critic: network of ``params["critic"]``: ``[rows, classes * features]`` to one
            logit ``[rows, 1]``, source positive; made by :func:`init` with
            ``conditional=True``.
        tap: path of the layer.
        entropy: weigh the examples by how sure the predictions are (CDAN+E).
        weight: weight of the critic's loss, a number or a ramp of progress.
        reversal: strength of the reversed gradient, a number or a ramp of progress.
        name: name of its metric; ``name_accuracy`` is the critic's accuracy.

    Returns:
        A term for :func:`objective`.

    Example:
        >>> import flax.linen as nn
        >>> from jaxtransfer.model import from_linen
        >>> term = cdan(from_linen(nn.Dense(1)), tap="features", entropy=True)
        >>> term.taps, term.critic
        (('features',), True)

    References:
        Long et al., *Conditional adversarial domain adaptation*, NeurIPS 2018, eqs.
        5-9; :func:`jaxtransfer.losses.multilinear_map`, ``.entropy_weights``.
    """

    def judged(source: Domain, target: Domain) -> tuple[jax.Array, dict[str, Any]]:
        outputs = join(source.outputs, target.outputs)
        seen = conditioned(join(source.features, target.features), outputs)
        if not entropy:
            return seen, {}
        of_source, of_target = losses.entropy_weights(source.outputs, target.outputs)
        return seen, {"source_weights": of_source, "target_weights": of_target}

    return _adversarial(critic, tap, weight, reversal, name, judged)


def conditioned(features: jax.Array, outputs: jax.Array) -> jax.Array:
    """What the critic of :func:`cdan` sees, ``[rows, classes * features]``."""
    return losses.multilinear_map(features, jax.nn.softmax(outputs))


def _adversarial(
    critic: Model,
    tap: str,
    weight: Weight,
    reversal: Weight,
    name: str,
    judged: Callable[[Domain, Domain], tuple[jax.Array, dict[str, Any]]],
) -> Term:
    def value(
        params: Params,
        model_state: ModelState,
        source: Domain,
        target: Domain,
        progress: jax.Array,
        key: jax.Array,
        axis_name: str | None,
    ) -> tuple[Scalar, Metrics, ModelState]:
        del axis_name
        if "critic" not in params:
            raise ValueError(
                "critic: the parameters have none; make them by adapt.init(..., "
                "critic=critic, tap=...)"
            )
        strength = reversal(progress) if callable(reversal) else reversal
        seen, weights = judged(source, target)
        try:
            logits, _, critic_state = critic.apply(
                Variables(params["critic"], model_state["critic"]),
                ops.gradient_reversal(seen, strength),
                train=True,
                key=key,
            )
        except Exception as error:
            error.add_note(
                f"The critic of {name!r} was given {seen.shape}; adapt.init makes one "
                "for it with critic=, tap= and, for cdan, conditional=True."
            )
            raise
        count = len(jax.tree.leaves(source)[0])
        parts = logits[:count], logits[count:]
        return (
            losses.domain_adversarial(*parts, **weights),
            {f"{name}_accuracy": losses.domain_accuracy(*parts)},
            {**model_state, "critic": critic_state},
        )

    ramped = callable(reversal) or callable(weight)
    return Term(name, tap, weight, value, ramped=ramped, critic=True)


__all__ = ["Domain", "Term", "align", "cdan", "compare", "dann"]
