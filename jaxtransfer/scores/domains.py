"""How far two domains lie apart, by a classifier that tells them apart."""

import functools

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from jaxtransfer.losses.adversarial import domain_accuracy, domain_adversarial
from jaxtransfer.losses.reduction import check_mask
from jaxtransfer.losses.sets import check_widths, critic_outputs, weighted_rows
from jaxtransfer.losses.softened import check_positive
from jaxtransfer.ops.products import product
from jaxtransfer.typing import AnyArray


def proxy_a_distance(
    source_logits: Float[AnyArray, "n ..."],
    target_logits: Float[AnyArray, "m ..."],
    *,
    source_where: Bool[AnyArray, " n"] | None = None,
    target_where: Bool[AnyArray, " m"] | None = None,
) -> Float[Array, ""]:
    """Proxy A-distance of two domains; unlike the scores, smaller is nearer.

    ``2 (1 - 2 err)`` with the balanced error of a domain classifier, whose logits are
    positive for source, on examples that it was not trained on.

    Args:
        source_logits: The domain classifier's logits on held-out source features, [n]
            or [n, 1]; `held_out_domain_logits` makes them.
        target_logits: Its logits on held-out target features, [m] or [m, 1].
        source_where: Which source examples count [n]; default all.
        target_where: Which target examples count [m]; default all.

    Returns:
        Scalar in [-2, 2]; 0 if the classifier can't tell (below by chance only), 2 if
        it always can. 0 if a side has no example that counts.

    Raises:
        ValueError: If the logits are not [n] or [n, 1].

    Example:
        >>> import jax.numpy as jnp
        >>> float(proxy_a_distance(jnp.array([1.0, 2.0]), jnp.array([-1.0, 1.0])))
        1.0

    Reference:
        Ben-David et al., "Analysis of Representations for Domain Adaptation", NeurIPS
        2006; as a formula in Ganin et al., "Domain-Adversarial Training of Neural
        Networks", JMLR 17, 2016, sec. 3.2.
    """
    accuracy = domain_accuracy(
        source_logits,
        target_logits,
        source_where=source_where,
        target_where=target_where,
    )
    distance = 2.0 * (2.0 * accuracy - 1.0)
    for where in (source_where, target_where):
        if where is not None:
            distance = jnp.where(jnp.any(jnp.asarray(where)), distance, 0.0)
    return distance


def density_ratio(
    source_logits: Float[AnyArray, "n ..."],
    *,
    size_ratio: float | Float[AnyArray, ""] = 1.0,
    cut: float = 30.0,
    where: Bool[AnyArray, " n"] | None = None,
) -> Float[Array, " n"]:
    """Weights of source examples by which they stand for the target.

    ``w(x) = p_t(x) / p_s(x) = (n_s / n_t) exp(-c(x))`` with the logit c of a domain
    classifier that is positive for source, as in
    `jaxtransfer.losses.domain_adversarial`.

    Args:
        source_logits: The domain classifier's logits c on source examples that it was
            not trained on, [n] or [n, 1].
        size_ratio: ``n_s / n_t``, by numbers of examples, for a classifier trained on
            both sets thrown together; 1 for one that weighs both sides alike.
        cut: Logits are cut off at plus and minus this, which bounds the weights.
        where: Which examples count [n]; the others give 0.

    Returns:
        Weights [n], positive, float32 or wider.

    Raises:
        ValueError: If the logits are not [n] or [n, 1], or ``size_ratio`` or ``cut``
            is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> print([f"{w:.2f}" for w in density_ratio(jnp.array([0.0, 2.0])).tolist()])
        ['1.00', '0.14']

    Reference:
        Bickel, Bruckner and Scheffer, "Discriminative Learning for Differing Training
        and Test Distributions", ICML 2007, sec. 3. Deviation: the logits are cut off.
    """
    check_positive("size_ratio", size_ratio)
    check_positive("cut", cut)
    if where is not None:
        where = check_mask("where", where, jnp.shape(source_logits)[:1])
    logits, where = critic_outputs("source", source_logits, where)
    weights = jnp.exp(-jnp.clip(logits, -cut, cut)) * jnp.asarray(size_ratio)
    return weights if where is None else jnp.where(where, weights, 0.0)


def held_out_domain_logits(
    source: Float[AnyArray, "n features"],
    target: Float[AnyArray, "m features"],
    *,
    folds: int = 2,
    l2: float | Float[AnyArray, ""] = 1e-3,
    iterations: int = 100,
    source_where: Bool[AnyArray, " n"] | None = None,
    target_where: Bool[AnyArray, " m"] | None = None,
) -> tuple[Float[Array, " n"], Float[Array, " m"]]:
    """Logits of logistic regressions of the domain, each on what it has not seen.

    The examples are dealt to the folds in turn. For each fold, ``(mean softplus(-c_s) +
    mean softplus(c_t)) / 2 + l2 |w|^2 / 2`` with ``c = w z + b`` is least over the
    other folds, and the fold gets its logits. z are the features standardised over both
    domains. What comes out fits `proxy_a_distance` and `density_ratio`.

    Args:
        source: Features [n, features].
        target: Features [m, features].
        folds: Number of folds, at least 2.
        l2: Weight of the penalty, not on b; positive.
        iterations: Steps of L-BFGS.
        source_where: Which source rows count [n]; the others give 0.
        target_where: Which target rows count [m]; the others give 0.

    Returns:
        Logits on source [n] and target [m], positive for source, float32 or wider. Rows
        that are sorted by time or camera are dealt evenly; near duplicates that lie
        beside each other get into different folds and look like better separation.

    Raises:
        ValueError: If the inputs are not matrices of equal width, ``folds`` is below 2
            or ``l2`` is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> source = jnp.array([[1.0], [2.0], [3.0], [4.0]])
        >>> of_source, of_target = held_out_domain_logits(source, -source)
        >>> float(proxy_a_distance(of_source, of_target))
        2.0

    Reference:
        You et al., "Towards Accurate Model Selection in Deep Unsupervised Domain
        Adaptation", ICML 2019, sec. 4. Deviation: a linear classifier, and held-out
        folds in place of a split.
    """
    if folds < 2:
        raise ValueError(f"folds must be at least 2, got {folds}.")
    check_positive("l2", l2)
    source, source_weights = weighted_rows("source", source, source_where, 1)
    target, target_weights = weighted_rows("target", target, target_where, 1)
    check_widths(source, target)
    rows = jnp.concatenate([source, target])
    weights = jnp.concatenate([source_weights, target_weights])
    share = weights / jnp.maximum(jnp.sum(weights), 1.0)
    rows = rows - product(share, rows)[None]
    deviation = jnp.sqrt(product(share, rows**2))[None]
    rows = rows / jnp.where(deviation == 0, 1.0, deviation)
    source, target = rows[: len(source)], rows[len(source) :]
    source_folds = _dealt(source_weights, folds)
    target_folds = _dealt(target_weights, folds)

    def of_fold(fold):
        params = _separator(
            source,
            target,
            (source_weights > 0) & (source_folds != fold),
            (target_weights > 0) & (target_folds != fold),
            l2,
            iterations,
        )
        return tuple(
            jnp.where((counts > 0) & (given == fold), _logits(params, z), 0.0)
            for z, counts, given in (
                (source, source_weights, source_folds),
                (target, target_weights, target_folds),
            )
        )

    of_source, of_target = jax.vmap(of_fold)(jnp.arange(folds))
    return jnp.sum(of_source, axis=0), jnp.sum(of_target, axis=0)


def _dealt(weights, folds):
    """The fold of each row: those that count are dealt in turn."""
    return (jnp.cumsum(weights > 0) - 1) % folds


def _logits(params, rows):
    return product(rows, params["kernel"]) + params["bias"]


@functools.partial(jax.jit, static_argnames="iterations")
def _separator(source, target, source_where, target_where, l2, iterations):
    """Kernel and bias of the logistic regression of source against target."""

    def value(params):
        loss = domain_adversarial(
            _logits(params, source),
            _logits(params, target),
            source_where=source_where,
            target_where=target_where,
        )
        return loss + l2 / 2 * jnp.sum(params["kernel"] ** 2)

    solver = optax.lbfgs()
    both = optax.value_and_grad_from_state(value)

    def iterate(carry, _):
        params, state = carry
        loss, gradient = both(params, state=state)
        updates, state = solver.update(
            gradient, state, params, value=loss, grad=gradient, value_fn=value
        )
        return (optax.apply_updates(params, updates), state), None

    zeros = jnp.zeros(source.shape[1], source.dtype)
    start = {"kernel": zeros, "bias": zeros[0]}
    (params, _), _ = jax.lax.scan(
        iterate, (start, solver.init(start)), length=iterations
    )
    return params
