"""Losses of the norms and singular values of a batch; scalars over a set."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxtransfer.losses.directions import root
from jaxtransfer.losses.sets import check_widths, weighted_rows
from jaxtransfer.ops.products import gram
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
    values = _values(rows)
    # Masked rows are rows of zeros, whose singular values don't count.
    count = jnp.minimum(jnp.sum(weights), rows.shape[1])
    place = jnp.arange(len(values))
    chosen = (place < count) & (place >= count - smallest)
    return jnp.sum(jnp.where(chosen, values**2, 0.0))


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


def _values(rows):
    """Singular values, largest first; their gradient is finite at ties and zeros."""
    if rows.shape[0] < rows.shape[1]:
        rows = rows.T  # what LAPACK is quicker with
    return jnp.linalg.svd(rows, full_matrices=False, compute_uv=False)


def _largest_squares(rows, count):
    """Sum of the largest squared singular values, as eigenvalues of the products.

    Several times quicker; only the smallest would lose digits.
    """
    if rows.shape[0] > rows.shape[1]:
        rows = rows.T
    products = gram(rows)
    return jnp.sum(jnp.linalg.eigvalsh(products)[-count:])


def _nuclear_norm(rows):
    values = _values(rows)
    # Where a value vanishes the norm has a kink; 0 is its shortest slope.
    floor = max(rows.shape) * jnp.finfo(rows.dtype).eps * jnp.max(values, initial=0.0)
    return jnp.sum(jnp.where(values <= floor, 0.0, values))  # not-a-number stays


def _check_number(name, value):
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")
