"""Losses written from their formulas in NumPy, one number after the other: twins.

Slow on purpose, and as unlike the library as can be. What a gradient holds constant
(weights, peers, bandwidths) is an argument of its own here.
"""

import functools
import itertools
import math

import numpy as np


def softmax(z):
    exponentials = [math.exp(x - max(z)) for x in z]
    return np.array(exponentials) / sum(exponentials)


def divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def length(values):
    return math.sqrt(sum(x * x for x in np.ravel(values)))


def squared(x, y):
    return sum((a - b) ** 2 for a, b in zip(np.ravel(x), np.ravel(y), strict=True))


def huber(x):
    return 0.5 * x * x if abs(x) <= 1 else abs(x) - 0.5


def pool(image, size):
    """Adaptive average pooling: cell i of n takes places floor to ceiling."""
    result = np.zeros((*size, image.shape[-1]))
    for i, j in np.ndindex(*size):
        (top, bottom), (left, right) = (
            (math.floor(k * n / m), math.ceil((k + 1) * n / m))
            for k, n, m in zip((i, j), image.shape[:2], size, strict=True)
        )
        result[i, j] = image[top:bottom, left:right].mean(axis=(0, 1))
    return result


def each(of_one):
    """A twin of a loss that has one value an example."""

    def twin(student, *others, **options):
        examples = zip(student, *others, strict=True)
        return np.array([of_one(*example, **options) for example in examples])

    return twin


# Features: one example's maps [height, width, channels] at a time.


@each
def mean_square(s, t):
    return squared(s, t) / s.size


def variational(s, t, params):
    variances = [math.log1p(math.exp(a)) + 1e-5 for a in params]
    result = np.zeros(len(s))
    for i, h, w, c in np.ndindex(s.shape):
        error = (s[i, h, w, c] - t[i, h, w, c]) ** 2
        result[i] += 0.5 * (error / variances[c] + math.log(variances[c]))
    return result / s[0].size


@each
def boundary(s, t, margin):
    total = 0.0
    for a, b in zip(s.ravel(), t.ravel(), strict=True):
        total += max(0.0, margin - a if b > 0 else margin + a) ** 2
    return total


@each
def overhaul(s, t, margins):
    total = 0.0
    for h, w, c in np.ndindex(s.shape):
        a, b = s[h, w, c], max(t[h, w, c], margins[c])
        if not (b <= 0 and a <= b):
            total += (a - b) ** 2
    return total


@each
def context(s, t, levels):
    sizes = [s.shape[:2], *((n, n) for n in levels if n < min(s.shape[:2]))]
    terms = [squared(pool(s, n), pool(t, n)) / (n[0] * n[1] * 2) for n in sizes]
    weights = [0.5**j for j in range(len(sizes))]
    return np.dot(weights, terms) / sum(weights)


def attention(image, power=2.0):
    mean = [sum(abs(x) ** power for x in place) for row in image for place in row]
    return np.array(mean) / length(mean)


@each
def attention_maps(s, power):
    return attention(s, power).reshape(s.shape[:2])


@each
def attention_transfer(s, t, power=2.0, form="code"):
    size = tuple(min(a, b) for a, b in zip(s.shape, t.shape, strict=True))[:2]
    error = squared(attention(pool(s, size), power), attention(pool(t, size), power))
    return error / (size[0] * size[1]) if form == "code" else math.sqrt(error)


@each
def factors(s, t, power):
    a, b = s.ravel() / length(s), t.ravel() / length(t)
    return sum(abs(x - y) ** power for x, y in zip(a, b, strict=True)) / len(a)


@each
def attention_factors(s, t):
    a, b = attention(s), attention(pool(t, s.shape[:2]))
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a)


@each
def channels(s, t, temperature):
    total = 0.0
    for c in range(s.shape[-1]):
        p, q = (softmax(x[..., c].ravel() / temperature) for x in (t, s))
        total += temperature**2 * divergence(p, q)
    return total / s.shape[-1]


def pearson(s, t):
    total = 0.0
    for c in range(s.shape[-1]):
        a, b = (
            (x[..., c] - x[..., c].mean()) / (x[..., c].std(ddof=1) + 1e-6)
            for x in (s, t)
        )
        total += squared(a, b)
    return total / (2 * s.size)


# Relations: one pair, or triplet, of examples at a time.


def gram(rows):
    return np.array([[sum(x * y) for y in rows] for x in rows])


def similarity(s, t):
    a, b = ([row / length(row) for row in gram(rows)] for rows in (s, t))
    return squared(a, b) / len(s) ** 2


def congruence(s, t, gamma, order):
    total = 0.0
    for i, j in itertools.product(range(len(s)), repeat=2):
        kernels = []
        for rows in (s, t):
            cosine = rows[i] @ rows[j] / length(rows[i]) / length(rows[j])
            terms = [
                (2 * gamma) ** p / math.factorial(p) * cosine**p
                for p in range(order + 1)
            ]
            kernels.append(math.exp(-2 * gamma) * sum(terms))
        total += (kernels[0] - kernels[1]) ** 2
    return total / len(s) ** 2


def adjacent(s, t):
    difference = [abs(a - b) for a, b in zip(s, t, strict=True)]
    return np.mean([d @ e for d, e in itertools.pairwise(difference)])


def distances(s, t):
    tables = []
    for rows in (s, t):
        table = np.array([[length(x - y) for y in rows] for x in rows])
        tables.append(table / table[table > 0].mean())
    return np.mean([huber(a - b) for a, b in zip(*map(np.ravel, tables), strict=True)])


def angles(s, t):
    def cosine(rows, i, j, k):
        if i in (j, k):
            return 0.0
        v, w = rows[i] - rows[j], rows[i] - rows[k]
        return v @ w / length(v) / length(w)

    triplets = itertools.product(range(len(s)), repeat=3)
    return np.mean([huber(cosine(s, *ijk) - cosine(t, *ijk)) for ijk in triplets])


def neighbours(s, t, epsilon=1e-7):
    tables = []
    for rows in (s, t):
        unit = [row / (length(row) + epsilon) for row in rows]
        table = np.array([[(x @ y + 1) / 2 for y in unit] for x in unit])
        tables.append([row / sum(row) for row in table])
    total = 0.0
    for q, p in zip(*map(np.ravel, tables), strict=True):
        total += p * math.log((p + epsilon) / (q + epsilon))
    return total / len(s) ** 2


@each
def flow(s, s_next, t, t_next, form):
    def matrix(a, b):
        places = np.ndindex(a.shape[:2])
        return sum(np.outer(a[i], b[i]) for i in places) / (a.shape[0] * a.shape[1])

    difference = matrix(s, s_next) - matrix(t, t_next)
    if form == "norms":
        return sum(length(column) for column in difference.T)
    return squared(difference, 0 * difference) / difference.size


@each
def selectivity(s, t):
    a, b = (
        [x[..., c].ravel() / length(x[..., c]) for c in range(x.shape[-1])]
        for x in (s, t)
    )

    def mean(first, second):
        return np.mean([(x @ y) ** 2 for x in first for y in second])

    return mean(b, b) + mean(a, a) - 2 * mean(a, b)


@each
def together(s, t):
    total, channels = 0.0, range(s.shape[-1])
    for c in channels:
        a, b = ([(x[..., c] * x[..., d]).sum() for d in channels] for x in (s, t))
        a, b = np.array(a), np.array(b)
        total += squared(a / length(a), b / length(b))
    return total / s.shape[-1]


# Predictions without labels.


def entropy_of_one(z):
    return -sum(p * math.log(p) for p in softmax(z))


entropy = each(entropy_of_one)


def diversity(z):
    return sum(q * math.log(q) for q in np.mean([softmax(row) for row in z], axis=0))


def confusion(z, held, temperature=2.5):
    weights = [1 + math.exp(-entropy_of_one(row / temperature)) for row in held]
    table = np.zeros((z.shape[1],) * 2)
    for weight, row in zip(weights, z, strict=True):
        p = softmax(row / temperature)
        table += len(z) * weight / sum(weights) * np.outer(p, p)
    shares = [row / sum(row) for row in table]
    return (np.sum(shares) - np.trace(shares)) / len(table)


def pseudo(z, sure, threshold):
    result = np.zeros(len(z))
    for i, row in enumerate(sure):
        if max(softmax(row)) >= threshold:
            result[i] = -math.log(softmax(z[i])[np.argmax(row)])
    return result


def nuclear(z):
    return np.linalg.svd([softmax(row) for row in z], compute_uv=False).sum()


def largest(rows, k):
    return sum(np.sort(np.linalg.eigvalsh(gram(rows.T)))[-k:])


def smallest(rows, k):
    return sum(np.sort(np.linalg.eigvalsh(gram(rows.T)))[:k])


def norms(rows, held, step):
    pairs = zip(rows, held, strict=True)
    return np.array([(length(a) - length(b) - step) ** 2 for a, b in pairs])


@each
def disagreement(a, b):
    return np.mean([abs(p - q) for p, q in zip(softmax(a), softmax(b), strict=True)])


def balance(z, epsilon):
    mean = np.mean([softmax(row) for row in z], axis=0)
    return -np.mean([math.log(q + epsilon) for q in mean])


def margin_disparity_discrepancy(source, of_source, target, of_target, form):
    total = 0.0
    for first, second in zip(source, of_source, strict=True):
        total += 4.0 * math.log(softmax(second)[np.argmax(first)]) / len(source)
    for first, second in zip(target, of_target, strict=True):
        apart = 1 - softmax(second)[np.argmax(first)]
        apart = apart if form == "paper" else min(apart + 1e-6, 1)
        total += math.log(apart) / len(target)
    return total


# Several teachers, and peers.


def ensemble(z, teachers, combine, routing):
    result = []
    for i, row in enumerate(z):
        shares = routing[:, i] / sum(routing[:, i])
        q, each_p = softmax(row / 2), [softmax(t[i] / 2) for t in teachers]
        if combine == "divergences":
            value = sum(
                w * divergence(p, q) for w, p in zip(shares, each_p, strict=True)
            )
        elif combine == "logits":
            mean = sum(w * t[i] for w, t in zip(shares, teachers, strict=True))
            value = divergence(softmax(mean / 2), q)
        else:
            mean = sum(w * p for w, p in zip(shares, each_p, strict=True))
            value = divergence(mean, q)
        result.append(4 * value)
    return np.array(result)


def peers(cohort, held):
    result = np.zeros(cohort.shape[:2])
    for i, row in np.ndindex(result.shape):
        for j in set(range(len(cohort))) - {i}:
            p, q = softmax(held[j, row]), softmax(cohort[i, row])
            result[i, row] += divergence(p, q) / (len(cohort) - 1)
    return result


# Two sets.


def covariance(rows):
    centred = rows - sum(rows) / len(rows)
    return sum(np.outer(row, row) for row in centred) / (len(rows) - 1)


def coral(x, y, form):
    error = squared(covariance(x), covariance(y)) / x.shape[1] ** 2
    if form == "paper":
        return error / 4
    return error + squared(x.mean(axis=0), y.mean(axis=0)) / x.shape[1]


def log_coral(x, y, epsilon):
    logs = []
    for rows in (x, y):
        values, vectors = np.linalg.eigh(covariance(rows))
        logs.append(vectors @ np.diag(np.log(values + epsilon)) @ vectors.T)
    return squared(*logs) / (4 * x.shape[1] ** 2)


def central_moments(x, y, bounds):
    width, means = bounds[1] - bounds[0], (x.mean(axis=0), y.mean(axis=0))
    total = length(means[0] - means[1]) / width
    for k in range(2, 6):
        first, second = (
            sum((row - mean) ** k for row in rows) / len(rows)
            for rows, mean in zip((x, y), means, strict=True)
        )
        total += length(first - second) / width**k
    return total


def table_of(rows):
    return np.array([[squared(x, y) for y in rows] for x in rows])


def mean_distance(*sets, with_diagonal=False):
    n = sum(map(len, sets))
    pairs = n * n if with_diagonal else n * (n - 1)
    return table_of(np.concatenate(sets)).sum() / pairs


def kernel(x, y, bandwidths, weights=None):
    weights = np.ones(len(bandwidths)) if weights is None else weights
    terms = (math.exp(-squared(x, y) / b) for b in bandwidths)
    return sum(w * k for w, k in zip(weights, terms, strict=True))


def mmd(x, y, bandwidths, estimator="biased", weights=None):
    k = functools.partial(kernel, bandwidths=bandwidths, weights=weights)

    def within(rows):
        pairs = itertools.product(range(len(rows)), repeat=2)
        return np.mean(
            [k(rows[i], rows[j]) for i, j in pairs if i != j or estimator == "biased"]
        )

    between = np.mean([k(a, b) for a in x for b in y])
    return within(x) + within(y) - 2 * between


def by_blocks(x, y, bandwidths, size):
    """Mean over whole blocks of the estimate of pairs (i, j), i != j, of both sets."""
    values = []
    for start in range(0, min(len(x), len(y)) - size + 1, size):
        s, t = x[start : start + size], y[start : start + size]
        pairs = itertools.permutations(range(size), 2)
        terms = [
            kernel(s[i], s[j], bandwidths)
            + kernel(t[i], t[j], bandwidths)
            - kernel(s[i], t[j], bandwidths)
            - kernel(s[j], t[i], bandwidths)
            for i, j in pairs
        ]
        values.append(np.mean(terms))
    return np.mean(values)


def neighbouring(x, y, bandwidths):
    """TLlib's linear form: every row with the next one, the last with the first."""
    total = 0.0
    for i in range(len(x)):
        j = (i + 1) % len(x)
        total += kernel(x[i], x[j], bandwidths) + kernel(y[i], y[j], bandwidths)
        total -= kernel(x[i], y[j], bandwidths) + kernel(x[j], y[i], bandwidths)
    return total / len(x)


def joint(layers, other_layers, bandwidths, estimator):
    sets = [list(zip(*layers, strict=True)), list(zip(*other_layers, strict=True))]

    def k(a, b):
        kernels = map(kernel, a, b, bandwidths)
        return math.prod(kernels)

    def mean(first, second, same):
        pairs = itertools.product(range(len(first)), range(len(second)))
        distinct = same and estimator == "unbiased"
        return np.mean(
            [k(first[i], second[j]) for i, j in pairs if i != j or not distinct]
        )

    x, y = sets
    return mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)


def local(x, y, labels, probabilities, bandwidths):
    values = []
    for c in range(probabilities.shape[1]):
        if c in labels and c in probabilities.argmax(axis=1):
            own = (labels == c) / sum(labels == c)
            other = probabilities[:, c] / sum(probabilities[:, c])
            rows, signs = np.concatenate([x, y]), np.concatenate([own, -other])
            pairs = itertools.product(zip(signs, rows, strict=True), repeat=2)
            values.append(
                sum(u * v * kernel(a, b, bandwidths) for (u, a), (v, b) in pairs)
            )
    return np.mean(values)


def contrastive(x, y, labels, others, bandwidths):
    same, different = [], []
    for c, d in itertools.product(range(3), repeat=2):
        value = mmd(x[labels == c], y[others == d], bandwidths)
        (same if c == d else different).append(value)
    return np.mean(same) - np.mean(different)
