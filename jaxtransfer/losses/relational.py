"""Distillation of relations between the examples of a batch."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from jaxtransfer.losses.directions import root, scaled, unit
from jaxtransfer.losses.reduction import check_mask, widen
from jaxtransfer.ops.dtypes import common_dtype
from jaxtransfer.ops.products import gram, product
from jaxtransfer.typing import AnyArray


def similarity_preserving(
    student_features: Float[AnyArray, "batch ..."],
    teacher_features: Float[AnyArray, "batch ..."],
    *,
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, ""]:
    """Similarity-preserving distillation (SP): alike pairs of examples stay alike.

    ``|G_t - G_s|_F^2 / batch^2`` with G the matrix of inner products ``F F'`` of the
    flattened features, every row scaled to length 1.

    Args:
        student_features: [batch, ...]; any shape, not the teacher's.
        teacher_features: [batch, ...]; no gradient flows into them.
        where: Which examples count [batch]; default all.

    Returns:
        Scalar, not negative, float32 or wider. The paper's weight is 3000.

    Raises:
        ValueError: If the numbers of examples differ, or ``where`` does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> features = jnp.array([[1.0, 0.0], [0.0, 1.0]])
        >>> float(similarity_preserving(features, 2.0 * features))
        0.0

    Reference:
        Tung and Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019,
        eqs. 1-4.
    """
    student, teacher, counts = _pair(student_features, teacher_features, where)
    grams = [unit(gram(rows), axis=1, moderate=True) for rows in (student, teacher)]
    total = jnp.maximum(jnp.sum(counts), 1.0)
    return jnp.sum((grams[0] - grams[1]) ** 2) / total**2


def correlation_congruence(
    student_embeddings: Float[AnyArray, "batch features"],
    teacher_embeddings: Float[AnyArray, "batch _"],
    *,
    form: Literal["paper", "code"] = "paper",
    gamma: float = 0.4,
    order: int = 2,
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, ""]:
    """Correlation congruence (CC, CCKD): the correlations of a batch, kept.

    Form "paper": ``|K_s - K_t|_F^2 / batch^2`` under the Taylor expansion of a
    Gaussian kernel on unit vectors, ``K(x, y) = exp(-2 g) sum_{p <= P} (2 g)^p / p!
    (x.y)^p``. Form "code", as in a much used implementation: with ``d = |e_s - e_t|``
    by coordinate, the mean of ``d_i . d_{i+1}`` over adjacent examples.

    Args:
        student_embeddings: [batch, features]; of the teacher's width for "code".
        teacher_embeddings: [batch, features]; no gradient flows into them.
        form: Which of the two, which are different losses.
        gamma: g, of the paper's form.
        order: P, of the paper's form.
        where: Which examples count [batch]; default all.

    Returns:
        Scalar, not negative, float32 or wider; 0 if too few examples count.

    Raises:
        ValueError: If ``form`` is unknown, shapes do not match, or ``where`` does not
            fit.

    Example:
        >>> import jax.numpy as jnp
        >>> rows = jnp.array([[1.0, 0.0], [0.0, 1.0]])
        >>> float(correlation_congruence(rows, rows))
        0.0

    Reference:
        Peng et al., "Correlation Congruence for Knowledge Distillation", ICCV 2019,
        sec. 3; form "code": the library of Tian et al., 2020.
    """
    student, teacher, counts = _pair(student_embeddings, teacher_embeddings, where)
    if form == "code":
        if student.shape != teacher.shape:
            raise ValueError(
                'form "code" needs embeddings of one width, got shapes '
                f"{student.shape} and {teacher.shape}; embed both linearly first."
            )
        return _adjacent(_absolute(student - teacher), counts)
    if form != "paper":
        raise ValueError(f'form must be "paper" or "code", got {form!r}.')

    def kernel(rows):
        rows = unit(rows, axis=1, moderate=True)
        cosines = gram(rows)
        term, total = jnp.ones_like(cosines), jnp.ones_like(cosines)
        for p in range(1, order + 1):
            term = term * (2.0 * gamma / p) * cosines
            total = total + term
        return jnp.exp(-2.0 * gamma) * total

    pairs = counts[:, None] * counts[None]
    difference = kernel(student) - kernel(teacher)
    return jnp.sum(pairs * difference**2) / jnp.maximum(jnp.sum(counts), 1.0) ** 2


def relational_distance(
    student_embeddings: Float[AnyArray, "batch features"],
    teacher_embeddings: Float[AnyArray, "batch _"],
    *,
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, ""]:
    """Distance-wise relational distillation (RKD-D): distances up to their scale.

    Mean over all pairs of the Huber loss between the distances of the student and of
    the teacher, each divided by the mean of its positive ones. Equal examples have
    distance 0 without gradient: those with ``|e_i - e_j|^2`` at most
    ``16 u (|e_i - m|^2 + |e_j - m|^2)``, with m the mean example and u the machine
    epsilon (in float32, nearer to each other than 0.2% of their distance from m), or
    at most 1e-12 of the largest square of an entry of all ``e_i - m``.

    Args:
        student_embeddings: [batch, features].
        teacher_embeddings: [batch, features], of any width; no gradient flows there.
        where: Which examples count [batch]; default all.

    Returns:
        Scalar, not negative, float32 or wider; 0 if no example counts.

    Raises:
        ValueError: If the numbers of examples differ, or ``where`` does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> rows = jnp.array([[0.0], [1.0], [3.0]])
        >>> print(f"{abs(float(relational_distance(rows, 2.0 * rows))):.4f}")
        0.0000

    Reference:
        Park et al., "Relational Knowledge Distillation", CVPR 2019, eqs. 5-7.
    """
    student, teacher, counts = _pair(student_embeddings, teacher_embeddings, where)
    pairs = counts[:, None] * counts[None]
    distances = [_scaled_distances(rows, counts) for rows in (student, teacher)]
    losses = pairs * optax.losses.huber_loss(*distances)
    return jnp.sum(losses) / jnp.maximum(jnp.sum(pairs), 1.0)


def relational_angle(
    student_embeddings: Float[AnyArray, "batch features"],
    teacher_embeddings: Float[AnyArray, "batch _"],
    *,
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, ""]:
    """Angle-wise relational distillation (RKD-A): the angles of all triplets.

    Mean over i, j, k of the Huber loss between the cosines ``<v_ij, v_ik>``, with
    ``v_ij = (e_i - e_j) / |e_i - e_j|`` and 0 for equal examples, which are those
    equal up to rounding in the sense of `relational_distance`.

    Args:
        student_embeddings: [batch, features].
        teacher_embeddings: [batch, features], of any width; no gradient flows there.
        where: Which examples count [batch]; default all.

    Returns:
        Scalar, not negative, float32 or wider; 0 if no example counts. Memory is
        O(batch^3), without the features.

    Raises:
        ValueError: If the numbers of examples differ, or ``where`` does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> rows = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> print(f"{abs(float(relational_angle(rows, 2.0 * rows))):.4f}")
        0.0000

    Reference:
        Park et al., "Relational Knowledge Distillation", CVPR 2019, eqs. 8-10.
    """
    student, teacher, counts = _pair(student_embeddings, teacher_embeddings, where)
    angles = [_angles(rows, counts) for rows in (student, teacher)]
    errors = optax.losses.huber_loss(*angles)
    total = product(product(product(errors, counts), counts), counts)
    return total / jnp.maximum(jnp.sum(counts), 1.0) ** 3


def relational_knowledge_distillation(
    student_embeddings: Float[AnyArray, "batch features"],
    teacher_embeddings: Float[AnyArray, "batch _"],
    *,
    distance_weight: float | Float[AnyArray, ""] = 25.0,
    angle_weight: float | Float[AnyArray, ""] = 50.0,
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, ""]:
    """Relational knowledge distillation (RKD): distances and angles together.

    ``w_d RKD-D + w_a RKD-A``; see `relational_distance` and `relational_angle`. A
    weight of 0 leaves its part out.

    Args:
        student_embeddings: [batch, features].
        teacher_embeddings: [batch, features], of any width; no gradient flows there.
        distance_weight: w_d; 25 for classification, 1 in the authors' metric learning.
        angle_weight: w_a; 50 for classification, 2 in the authors' metric learning.
        where: Which examples count [batch]; default all.

    Returns:
        Scalar, not negative, float32 or wider.

    Raises:
        ValueError: If the numbers of examples differ, or ``where`` does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> rows = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> loss = relational_knowledge_distillation(rows, 2.0 * rows)
        >>> print(f"{abs(float(loss)):.4f}")
        0.0000

    Reference:
        Park et al., "Relational Knowledge Distillation", CVPR 2019, sec. 3.
    """
    pair = (student_embeddings, teacher_embeddings)
    total: Any = 0.0
    if not _is_zero(distance_weight):
        total = distance_weight * relational_distance(*pair, where=where)
    if not _is_zero(angle_weight):
        total = total + angle_weight * relational_angle(*pair, where=where)
    return jnp.asarray(total, common_dtype(total, jnp.float32))


def probabilistic_knowledge_transfer(
    student_embeddings: Float[AnyArray, "batch features"],
    teacher_embeddings: Float[AnyArray, "batch _"],
    *,
    epsilon: float = 1e-7,
    where: Bool[AnyArray, " batch"] | None = None,
) -> Float[Array, ""]:
    """Probabilistic knowledge transfer (PKT): who is likely to be whose neighbour.

    ``mean_ij P_t log((P_t + e) / (P_s + e))`` with P the similarities
    ``(cos(x_i, x_j) + 1) / 2``, every row divided by its sum.

    Args:
        student_embeddings: [batch, features].
        teacher_embeddings: [batch, features], of any width; no gradient flows there.
        epsilon: e, also added to the lengths in the cosines.
        where: Which examples count [batch]; default all.

    Returns:
        Scalar, float32 or wider; 0 if no example counts. The mean over batch^2 pairs
        makes it small: the authors' weight is 30000.

    Raises:
        ValueError: If the numbers of examples differ, or ``where`` does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> rows = jnp.array([[1.0, 0.0], [1.0, 1.0]])
        >>> print(f"{abs(float(probabilistic_knowledge_transfer(rows, rows))):.4f}")
        0.0000

    Reference:
        Passalis and Tefas, "Learning Deep Representations with Probabilistic Knowledge
        Transfer", ECCV 2018, sec. 3.
    """
    student, teacher, counts = _pair(student_embeddings, teacher_embeddings, where)
    pairs = counts[:, None] * counts[None]

    def neighbours(rows):
        lengths = root(jnp.sum(rows**2, axis=1, keepdims=True))
        rows = rows / (lengths + epsilon)
        similar = pairs * (gram(rows) + 1.0) / 2.0
        total = jnp.sum(similar, axis=1, keepdims=True)
        return similar / jnp.where(total > 0, total, 1.0)

    p, q = neighbours(teacher), neighbours(student)
    losses = p * jnp.log((p + epsilon) / (q + epsilon))
    return jnp.sum(pairs * losses) / jnp.maximum(jnp.sum(counts), 1.0) ** 2


def _pair(student, teacher, where):
    """Both flattened to rows, 0 where masked; the target held; weights 0 or 1."""
    student, teacher = widen(student), jax.lax.stop_gradient(widen(teacher))
    if student.ndim < 2 or teacher.ndim < 2 or len(student) != len(teacher):
        raise ValueError(
            "student and teacher must be [batch, ...] of the same examples, got shapes "
            f"{student.shape} and {teacher.shape}."
        )
    rows = [values.reshape(len(values), -1) for values in (student, teacher)]
    if where is None:
        return *rows, jnp.ones(len(student), student.dtype)
    where = check_mask("where", where, student.shape[:1])
    rows = [jnp.where(where[:, None], values, 0.0) for values in rows]
    return *rows, where.astype(student.dtype)


def _adjacent(difference, counts):
    """Mean of d_i . d_{i+1} over adjacent examples that count, in their order."""
    order = jnp.argsort(1.0 - counts)  # stable: those that count come first
    d, counts = difference[order], counts[order]
    pairs = counts[:-1] * counts[1:]
    total = jnp.sum(pairs * jnp.sum(d[:-1] * d[1:], axis=1))
    return total / jnp.maximum(jnp.sum(pairs), 1.0)


def _is_zero(weight):
    """Whether the weight is a number that leaves its part out."""
    return isinstance(weight, int | float) and weight == 0


def _absolute(values):
    """Absolute values with slope 0 at 0."""
    return jnp.where(values == 0, 0.0, jnp.abs(values))


def _products(rows, counts):
    """Inner products and squared distances of the rows, centred, and which are apart.

    All up to the scale of the rows. Pairs that are equal but for rounding have no
    direction to move apart in, and their distances would be noise.
    """
    mean = product(counts, rows) / jnp.maximum(jnp.sum(counts), 1.0)
    rows = counts[:, None] * (rows - jax.lax.stop_gradient(mean)[None])
    products = gram(scaled(rows, (0, 1)))
    own = jnp.diagonal(products)
    sums = own[:, None] + own[None]
    squares = sums - 2.0 * products
    smallest = 16 * jnp.finfo(rows.dtype).eps * jax.lax.stop_gradient(sums)
    return products, squares, ~(squares <= jnp.maximum(smallest, 1e-12))


def _scaled_distances(rows, counts):
    """Distances divided by the mean of the positive ones, with a finite gradient."""
    _, squares, apart = _products(rows, counts)
    apart = apart & (counts[:, None] * counts[None] > 0)
    distances = root(jnp.where(apart, squares, 0.0))
    count = jnp.sum(apart, dtype=distances.dtype)
    mean = jnp.sum(distances) / jnp.maximum(count, 1.0)
    return distances / jnp.where(count > 0, mean, 1.0)


def _angles(rows, counts):
    """Cosines [i, j, k] of the angles at i, from inner products alone."""
    products, squares, apart = _products(rows, counts)
    inverse = jnp.where(apart, 1.0 / jnp.sqrt(jnp.where(apart, squares, 1.0)), 0.0)
    own = jnp.diagonal(products)
    # (e_i - e_j) . (e_i - e_k)
    inner = own[:, None, None] - products[:, :, None] - products[:, None, :]
    inner = inner + products[None]
    return inner * inverse[:, :, None] * inverse[:, None, :]
