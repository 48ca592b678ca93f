"""Transferability from features: how far apart and how compact the classes lie."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Integer

from jaxtransfer.losses.softened import check_positive
from jaxtransfer.ops.products import product
from jaxtransfer.scores.labelled import (
    centred,
    decomposed,
    labelled_rows,
    mean_of_present,
)
from jaxtransfer.typing import AnyArray


def transrate(
    features: Float[AnyArray, "batch features"],
    labels: Integer[AnyArray, " batch"],
    *,
    distortion: float = 1e-4,
    average: Literal["classes", "examples"] = "classes",
    classes: int | None = None,
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, ""]:
    r"""TransRate: information of features about labels, measured by coding rates.

    :math:`R(F) - \mathrm{mean}_c R(F_c)` with the centred features, their rows of class
    c, and the rate of n rows :math:`R(F) = \frac12 \log\det(I + F^\top F / (n
    \epsilon))`. It grows with the scale of the features: compare networks whose
    features are of one scale.

    Args:
        features: F [batch, features], centred here.
        labels: Classes [batch] in [0, classes).
        distortion: The distortion epsilon, positive, in squared units of the features.
        average: "classes" weighs the classes that occur alike, "examples" each by its
            number of examples, as a conditional entropy does.
        classes: Number of classes; default one more than the largest label. Needed
            under ``jit``, where the classes cost as if each had all the rows.
        where: Which examples count [batch]; default all.

    Returns:
        Scalar in nats, float32 or wider; larger is better. 0 if no example counts.

    Raises:
        ValueError: If shapes do not match, labels are out of range, or traced without
            ``classes``; if the distortion is not positive or the average unknown.

    Example:
        >>> import jax.numpy as jnp
        >>> features = jnp.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> print(f"{float(transrate(features, jnp.array([0, 0, 1, 1]))):.3f}")
        3.912
        >>> print(f"{float(transrate(features, jnp.array([0, 1, 0, 1]))):.3f}")
        0.000

    Reference:
        Huang et al., "Frustratingly Easy Transferability Estimation", ICML 2022, sec. 3
        ("classes" is its listing). Deviation: a class without any example does not
        enter the mean.
    """
    check_positive("distortion", distortion)
    if average not in ("classes", "examples"):
        raise ValueError(f'average must be "classes" or "examples", got {average!r}.')
    rows, member, weights = labelled_rows("features", features, labels, classes, where)
    rows = centred(rows, weights)
    sizes = jnp.sum(member, axis=0)
    most = len(rows) if isinstance(sizes, Tracer) else max(int(jnp.max(sizes)), 1)
    rates = _class_rates(rows, member, distortion, most)
    total = jnp.sum(weights)
    if average == "classes":
        within = mean_of_present(rates, member)
    else:
        within = jnp.sum(sizes * rates) / jnp.maximum(total, 1.0)
    return _coding_rate(rows, total, distortion) - within


@functools.partial(jax.jit, static_argnames="most")
def _class_rates(rows, member, distortion, most):
    """The coding rate of each class, of so many rows at most."""
    # One row of zeros more, which fills up the smaller classes.
    padded = jnp.pad(rows, ((0, 1), (0, 0)))

    def of_class(column):
        chosen = jnp.nonzero(column, size=most, fill_value=len(rows))[0]
        return _coding_rate(padded[chosen], jnp.sum(column), distortion)

    return jax.lax.map(of_class, member.T)


def _coding_rate(rows, count, distortion):
    values = jnp.linalg.svd(rows, full_matrices=False, compute_uv=False)
    scaled = values**2 / (jnp.where(count == 0, 1.0, count) * distortion)
    return jnp.sum(jnp.log1p(scaled)) / 2


def gaussian_bhattacharyya(
    features: Float[AnyArray, "batch features"],
    labels: Integer[AnyArray, " batch"],
    *,
    covariance: Literal["spherical", "diagonal", "spherical_code"] = "spherical",
    components: int | None = None,
    least_variance: float = 1e-4,
    classes: int | None = None,
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, ""]:
    r"""Gaussian Bhattacharyya coefficient (GBC): how little the classes overlap.

    :math:`-\sum_{i \ne j} \exp(-D_{ij})` over ordered pairs of classes that occur, with
    a Gaussian of mean m and covariance S for each and their Bhattacharyya distance

    .. math:: D_{ij} = \tfrac18 (m_i - m_j)^\top S^{-1} (m_i - m_j)
              + \tfrac12 \log \frac{|S|}{\sqrt{|S_i| |S_j|}},
              \quad S = \tfrac12 (S_i + S_j).

    Args:
        features: [batch, features].
        labels: Classes [batch] in [0, classes).
        covariance: "diagonal", or "spherical" with one variance a class;
            "spherical_code" counts the logarithm of that variance once, not once a
            feature, as the authors' code does.
        components: Project the features on so many principal components first (the
            paper takes 64); default none, which a diagonal covariance notices.
        least_variance: What the variances of single features are raised to, positive.
        classes: Number of classes; default one more than the largest label. Needed
            under ``jit``.
        where: Which examples count [batch]; default all.

    Returns:
        Scalar in [-classes (classes - 1), 0], float32 or wider; larger is better. 0
        with fewer than two classes.

    Raises:
        ValueError: If shapes do not match, labels are out of range, or traced without
            ``classes``; if the covariance is unknown, ``components`` below 1 or
            ``least_variance`` not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> features = jnp.array([[0.0], [2.0], [0.0], [2.0]])
        >>> print(f"{float(gaussian_bhattacharyya(features, jnp.array([0, 0, 1, 1])))}")
        -2.0

    Reference:
        Pandy et al., "Transferability Estimation using Bhattacharyya Class
        Separability", CVPR 2022, sec. 3.
    """
    if covariance not in ("spherical", "diagonal", "spherical_code"):
        raise ValueError(
            'covariance must be "spherical", "diagonal" or "spherical_code", got '
            f"{covariance!r}."
        )
    if components is not None and components < 1:
        raise ValueError(f"components must be at least 1 or None, got {components}.")
    check_positive("least_variance", least_variance)
    rows, member, weights = labelled_rows("features", features, labels, classes, where)
    rows = centred(rows, weights)
    if components is not None:
        left, values = decomposed(rows)
        rows = (left * values[None])[:, :components]
    sizes = jnp.maximum(jnp.sum(member, axis=0), 1.0)[:, None]
    means = product(member.T, rows) / sizes
    apart = rows - product(member, means)
    variances = product(member.T, apart**2) / sizes
    variances = jnp.maximum(variances, least_variance)
    times = 1
    if covariance != "diagonal":
        variances = jnp.mean(variances, axis=1, keepdims=True)
        times = rows.shape[1] if covariance == "spherical" else 1
    present = ~(jnp.sum(member, axis=0) == 0)  # not-a-number stays seen
    overlaps = _overlaps(means, variances, present, times)
    return -jnp.sum(jnp.where(present, overlaps, 0.0))


gbc = gaussian_bhattacharyya


@jax.jit
def _overlaps(means, variances, present, times):
    """The sum of the Bhattacharyya coefficients of each class with the others."""
    logs = jnp.log(variances)

    def of_class(one):
        mean, variance, log, number = one
        both = (variance + variances) / 2
        mahalanobis = jnp.sum((mean - means) ** 2 / both, axis=1)
        determinants = jnp.sum(jnp.log(both) - (log + logs) / 2, axis=1)
        distance = mahalanobis / 8 + times * determinants / 2
        others = present & (number != jnp.arange(len(means)))
        return jnp.sum(jnp.where(others, jnp.exp(-distance), 0.0))

    each = means[:, None], variances[:, None], logs[:, None], jnp.arange(len(means))
    return jax.lax.map(of_class, each)
