"""Losses of the norms and singular values of a batch; scalars over a set."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxtransfer.losses.directions import root
from jaxtransfer.losses.sets import check_widths, weighted_rows
from jaxtransfer.ops.products import gram, product
from jaxtransfer.typing import AnyArray


def batch_nuclear_norm(
    logits: Float[AnyArray, "batch classes"],
    *,
    form: Literal["paper", "code"] = "paper",
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, ""]:
    """Batch nuclear-norm maximisation (BNM): sure and varied predictions in one number.

    ``-|P|_* / batch``, minus the sum of the singular values of ``P = softmax(z)``.

    Args:
        logits: [batch, classes], finite.
        form: "paper" divides by the rows that count, "code" by the smaller of rows
            and classes (the authors' mean of the singular values).
        where: Which examples count [batch]; default all.

    Returns:
        Scalar in [-1, 0] for the paper's form, float32 or wider; 0 if no example
        counts. Directions that no prediction takes get no gradient.

    Raises:
        ValueError: If the logits are no matrix, ``form`` is unknown, or ``where`` does
            not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> print(f"{float(batch_nuclear_norm(99.0 * jnp.eye(2))):.4f}")
        -1.0000

    Reference:
        Cui et al., "Towards Discriminability and Diversity: Batch Nuclear-norm
        Maximization under Label Insufficient Situations", CVPR 2020, eq. 10.
    """
    if form not in ("paper", "code"):
        raise ValueError(f'form must be "paper" or "code", got {form!r}.')
    rows, weights = weighted_rows("logits", logits, where, 1, "where")
    count = jnp.sum(weights)
    if form == "code":
        count = jnp.minimum(count, rows.shape[1])
    predictions = jax.nn.softmax(rows) * weights[:, None]
    return -_nuclear_norm(predictions) / jnp.maximum(count, 1.0)


def adaptive_feature_norm(
    features: Float[AnyArray, "batch features"],
    *,
    step: float | Float[AnyArray, ""] = 1.0,
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, " batch"]:
    """Adaptive feature norm (AFN, SAFN): every feature vector a step longer.

    ``(|f| - sg(|f|) - step)^2`` per example: the value is ``step^2`` throughout, the
    gradient ``-2 step f / |f|``.

    Args:
        features: [batch, features], of source and target alike.
        step: By how much the norm should grow.
        where: Which examples count [batch]; the others give 0 and no gradient.

    Returns:
        Losses [batch], float32 or wider.

    Raises:
        ValueError: If the features are no matrix, or ``where`` does not fit.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> f = jnp.array([[3.0, 4.0]])
        >>> gradient = jax.grad(lambda f: adaptive_feature_norm(f).sum())(f)
        >>> print([f"{v:.1f}" for v in gradient[0].tolist()])
        ['-1.2', '-1.6']

    Reference:
        Xu et al., "Larger Norm More Transferable: An Adaptive Feature Norm Approach for
        Unsupervised Domain Adaptation", ICCV 2019, eq. 6. Deviation: a vector of length
        0 has no direction to grow in and gets no gradient.
    """
    rows, weights = weighted_rows("features", features, where, 1, "where")
    norms = root(jnp.sum(rows**2, axis=1))
    losses = (norms - jax.lax.stop_gradient(norms) - step) ** 2
    return jnp.where(weights > 0, losses, 0.0)


def batch_spectral_penalization(
    source: Float[AnyArray, "n features"],
    target: Float[AnyArray, "m features"],
    *,
    largest: int = 1,
    source_where: Bool[AnyArray, " n"] | None = None,
    target_where: Bool[AnyArray, " m"] | None = None,
) -> Float[Array, ""]:
    """Batch spectral penalisation (BSP): the largest squared singular values.

    ``sum_{i <= k} s_i(F_s)^2 + s_i(F_t)^2``: keeps adversarial alignment from resting
    on a few directions.

    Args:
        source: Features [n, features].
        target: Features [m, features].
        largest: k, at least 1.
        source_where: Which source rows count [n]; default all.
        target_where: Which target rows count [m]; default all.

    Returns:
        Scalar, not negative, float32 or wider. The authors' weight is 1e-4.

    Raises:
        ValueError: If the inputs are not matrices of equal width or ``largest`` is
            below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> rows = jnp.diag(jnp.array([3.0, 1.0]))
        >>> print(f"{float(batch_spectral_penalization(rows, rows)):.4f}")
        18.0000

    Reference:
        Chen et al., "Transferability vs. Discriminability: Batch Spectral Penalization
        for Adversarial Domain Adaptation", ICML 2019, eq. 5.
    """
    _check_number("largest", largest)
    source, _ = weighted_rows("source", source, source_where, 1)
    target, _ = weighted_rows("target", target, target_where, 1)
    check_widths(source, target)
    return _largest_squares(source, largest) + _largest_squares(target, largest)


def batch_spectral_shrinkage(
    features: Float[AnyArray, "batch features"],
    *,
    smallest: int = 1,
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, ""]:
    """Batch spectral shrinkage (BSS): the smallest squared singular values.

    ``sum_{i <= k} s_{-i}(F)^2``, of the min(batch, features) singular values: takes
    what a source network knows but the target task does not need out of the features.

    Args:
        features: [batch, features].
        smallest: k, at least 1.
        where: Which examples count [batch]; default all.

    Returns:
        Scalar, not negative, float32 or wider. The authors' weight is 1e-3.

    Raises:
        ValueError: If the features are no matrix or ``smallest`` is below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> rows = jnp.diag(jnp.array([3.0, 0.5]))
        >>> print(f"{float(batch_spectral_shrinkage(rows)):.4f}")
        0.2500

    Reference:
        Chen et al., "Catastrophic Forgetting Meets Negative Transfer: Batch Spectral
        Shrinkage for Safe Transfer Learning", NeurIPS 2019, sec. 4.
    """
    _check_number("smallest", smallest)
    rows, weights = weighted_rows("features", features, where, 1, "where")
    # Masked rows are rows of zeros, whose singular values don't count.
    count = jnp.minimum(jnp.sum(weights), rows.shape[1])
    rows = _tall(rows)
    place = jnp.arange(rows.shape[1], dtype=count.dtype)
    return _sum_of_values(rows, (place < count) & (place >= count - smallest), 2)


def nuclear_wasserstein_discrepancy(
    source_logits: Float[AnyArray, "n classes"],
    target_logits: Float[AnyArray, "m classes"],
    *,
    source_where: Bool[AnyArray, " n"] | None = None,
    target_where: Bool[AnyArray, " m"] | None = None,
) -> Float[Array, ""]:
    """Nuclear-norm Wasserstein discrepancy (NWD, DALN): the classifier as the critic.

    ``|P_s|_* / n - |P_t|_* / m`` with ``P = softmax(z)``. The classifier raises it and
    the features lower it: through `jaxtransfer.ops.gradient_reversal` under the
    features, minimise its negative.

    Args:
        source_logits: [n, classes], finite.
        target_logits: [m, classes], finite.
        source_where: Which source examples count [n]; default all.
        target_where: Which target examples count [m]; default all.

    Returns:
        Scalar in [-1, 1], float32 or wider. A side without any example that counts
        adds 0.

    Raises:
        ValueError: If the logits are not matrices of equal width.

    Example:
        >>> import jax.numpy as jnp
        >>> sure, unsure = 99.0 * jnp.eye(2), jnp.zeros((2, 2))
        >>> print(f"{float(nuclear_wasserstein_discrepancy(sure, unsure)):.4f}")
        0.5000

    Reference:
        Chen et al., "Reusing the Task-specific Classifier as a Discriminator:
        Discriminator-free Adversarial Domain Adaptation", CVPR 2022, sec. 3.
    """
    source, _ = weighted_rows("source_logits", source_logits, None, 1)
    target, _ = weighted_rows("target_logits", target_logits, None, 1)
    check_widths(source, target)
    return batch_nuclear_norm(target, where=target_where) - batch_nuclear_norm(
        source, where=source_where
    )


def _tall(rows):
    """What LAPACK is quicker with."""
    return rows.T if rows.shape[0] < rows.shape[1] else rows


def _decomposed(rows, chosen, power):
    """Singular vectors, values, which of them count, and the slope of each."""
    left, values, right = jnp.linalg.svd(rows, full_matrices=False)
    chosen = _counted(rows, values, chosen, power)
    slopes = jnp.where(chosen, power * values ** (power - 1), 0.0)
    return left, values, right, chosen, slopes


def _counted(rows, values, chosen, power):
    """The chosen singular values; those that vanish not, where the norm has a kink.

    0 is the shortest slope there. Not-a-number stays.
    """
    if power > 1:
        return chosen
    floor = len(rows) * jnp.finfo(values.dtype).eps * jnp.max(values, initial=0.0)
    return chosen & ~(values <= floor)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _sum_of_values(rows, chosen, power):
    """``sum_i s_i^p`` of chosen singular values of tall rows, the largest first.

    Derivatives of first and second order are finite at ties and zeros.
    """
    values = jnp.linalg.svd(rows, full_matrices=False, compute_uv=False)
    return jnp.sum(jnp.where(_counted(rows, values, chosen, power), values**power, 0.0))


@_sum_of_values.defjvp
def _sum_of_values_jvp(power, primals, tangents):
    total, slopes = _sum_and_slopes(*primals, power)
    return total, jnp.sum(slopes * tangents[0])


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _sum_and_slopes(rows, chosen, power):
    """The sum, and ``U diag(p s^(p - 1)) V'`` over what is chosen."""
    left, values, right, chosen, slopes = _decomposed(rows, chosen, power)
    total = jnp.sum(jnp.where(chosen, values**power, 0.0))
    return total, product(left * slopes[None], right)


@_sum_and_slopes.defjvp
def _sum_and_slopes_jvp(power, primals, tangents):
    # In the basis of the singular vectors: divided differences of the slopes, which
    # are an odd function of the values. Ties within what is chosen are no matter.
    rows, chosen = primals
    change = tangents[0]
    total, slopes = _sum_and_slopes(rows, chosen, power)
    left, values, right, chosen, own = _decomposed(rows, chosen, power)
    both = chosen[:, None] & chosen[None]
    one = chosen[:, None] ^ chosen[None]

    def over(numbers, by, where):
        return jnp.where(where, numbers, 0.0) / jnp.where(where, by, 1.0)

    apart, together = (
        values[:, None] - values[None],
        values[:, None] + values[None],
    )
    even = over(own[:, None] - own[None], apart, one & (apart != 0.0))
    even = jnp.where(both, 0.0 if power == 1 else 2.0, even)
    odd = over(own[:, None] + own[None], together, (both | one) & (together > 0.0))
    to_right = product(change, right.T)
    inner = product(left.T, to_right)
    turned = 0.5 * (even * (inner + inner.T) + odd * (inner - inner.T))
    outside = to_right - product(left, inner)
    outside = outside * over(own, values, chosen & (values > 0.0))[None]
    moved = product(product(left, turned) + outside, right)
    return (total, slopes), (jnp.sum(slopes * change), moved)


def _largest_squares(rows, count):
    """Sum of the largest squared singular values, as eigenvalues of the products.

    Several times quicker; only the smallest would lose digits.
    """
    if rows.shape[0] > rows.shape[1]:
        rows = rows.T
    return _sum_of_largest(gram(rows), count)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _sum_of_largest(products, count):
    """Of the eigenvalues of a symmetric matrix."""
    return jnp.sum(jnp.linalg.eigvalsh(products)[-count:])


@_sum_of_largest.defjvp
def _sum_of_largest_jvp(count, primals, tangents):
    total, projector = _sum_and_projector(*primals, count)
    return total, jnp.sum(projector * tangents[0])


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _sum_and_projector(products, count):
    """The sum, and the projector on the eigenvectors, which is its slope."""
    values, vectors = jnp.linalg.eigh(products)
    largest = vectors[:, -count:]
    return jnp.sum(values[-count:]), product(largest, largest.T)


@_sum_and_projector.defjvp
def _sum_and_projector_jvp(count, primals, tangents):
    # Only what is turned from the largest to the others moves the projector: a tie
    # among the others, such as zeros of rows that don't count, is no matter.
    (products,), (change,) = primals, tangents
    total, projector = _sum_and_projector(products, count)
    values, vectors = jnp.linalg.eigh(products)
    largest = jnp.arange(len(values)) >= len(values) - count
    apart = jnp.abs(values[:, None] - values)
    crosses = (largest[:, None] ^ largest) & (apart > 0.0)
    inner = product(product(vectors.T, 0.5 * (change + change.T)), vectors)
    turned = jnp.where(crosses, inner, 0.0) / jnp.where(crosses, apart, 1.0)
    moved = product(product(vectors, turned), vectors.T)
    return (total, projector), (jnp.sum(projector * change), moved)


def _nuclear_norm(rows):
    rows = _tall(rows)
    return _sum_of_values(rows, jnp.ones(rows.shape[1], bool), 1)


def _check_number(name, value):
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")
