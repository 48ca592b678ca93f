"""Alignment of two sets of features."""

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.peers import (
    LABELS,
    STUDENT_FEATURES,
    STUDENT_LOGITS,
    TEACHER_FEATURES,
    TEACHER_LOGITS,
    WIDTH,
    Row,
    Rows,
    integers,
    normal,
)
from jaxtransfer import losses

POWERS = (0.25, 0.5, 1.0, 2.0, 4.0)
FEW_CLASSES = 31
SOURCE = STUDENT_FEATURES
TARGET = np.float32(0.8) * TEACHER_FEATURES + np.float32(0.2)
PAIR = (SOURCE, TARGET)


def _softmax(logits):
    raised = np.exp(logits - logits.max(1, keepdims=True))
    return raised / raised.sum(1, keepdims=True)


def _sigmoid(values):
    return np.float32(1.0) / (np.float32(1.0) + np.exp(-values))


SOURCE_PREDICTIONS, TARGET_PREDICTIONS = map(_softmax, (STUDENT_LOGITS, TEACHER_LOGITS))
FEW_LABELS = [integers(len(SOURCE), high=FEW_CLASSES, seed=seed) for seed in (7, 8)]
DIRECTIONS = normal(128, WIDTH, seed=9)
DIRECTIONS /= np.linalg.norm(DIRECTIONS, axis=1, keepdims=True)
CRITIC = {
    "first": normal(WIDTH, 256, seed=10, scale=0.05),
    "second": normal(256, 1, seed=11, scale=0.1),
}


def _gram(x, y):
    norms = (x**2).sum(1, keepdim=True) + (y**2).sum(1)
    return (norms - 2 * x @ y.T).clamp_min(0)


def _several(distances, mean):
    return sum(torch.exp(-distances / (power * mean)) for power in POWERS)


def _all_pairs(source, target):
    rows = torch.cat([source, target])
    distances = _gram(rows, rows)
    count = len(rows)
    return _several(distances, distances.detach().sum() / (count**2 - count))


def _biased(source, target):
    n, kernel = len(source), _all_pairs(source, target)
    return (kernel[:n, :n] + kernel[n:, n:] - kernel[:n, n:] - kernel[n:, :n]).mean()


def _unbiased_of(own, other, between):
    def within(kernel):
        n = len(kernel)
        return (kernel.sum() - kernel.diagonal().sum()) / (n * (n - 1))

    return within(own) + within(other) - 2 * between.mean()


def _unbiased(source, target):
    n, kernel = len(source), _all_pairs(source, target)
    return _unbiased_of(kernel[:n, :n], kernel[n:, n:], kernel[:n, n:])


def _median(source, target):
    rows = torch.cat([source, target])
    distances = _gram(rows, rows)
    n = len(source)
    pairs = torch.triu_indices(2 * n, 2 * n, 1, device=rows.device)
    kernel = _several(distances, distances.detach()[pairs[0], pairs[1]].median())
    return (kernel[:n, :n] + kernel[n:, n:] - kernel[:n, n:] - kernel[n:, :n]).mean()


def _mean_distance(source, target):
    rows = torch.cat([source, target]).detach()
    return 2 * ((rows - rows.mean(0)) ** 2).sum() / (len(rows) - 1)


def _linear(source, target):
    mean = _mean_distance(source, target)
    (s, s_next), (t, t_next) = ((x[::2], x[1::2]) for x in (source, target))

    def kernel(x, y):
        return _several(((x - y) ** 2).sum(1), mean)

    terms = kernel(s, s_next) + kernel(t, t_next) - kernel(s, t_next)
    return (terms - kernel(s_next, t)).mean()


def _block(source, target, size=16):
    mean = _mean_distance(source, target)
    s, t = (x.reshape(-1, size, x.shape[1]) for x in (source, target))

    def kernel(x, y):
        norms = (x**2).sum(2)[:, :, None] + (y**2).sum(2)[:, None]
        kernel = _several((norms - 2 * x @ y.mT).clamp_min(0), mean)
        return kernel.sum() - kernel.diagonal(dim1=1, dim2=2).sum()

    total = kernel(s, s) + kernel(t, t) - 2 * kernel(s, t)
    return total / (len(s) * size * (size - 1))


def _tllib(source, target):
    n = len(source)
    rows = torch.cat([source, target])
    distances = ((rows.unsqueeze(0) - rows.unsqueeze(1)) ** 2).sum(2)
    kernel = _several(distances, distances.detach().mean())
    weights = torch.full_like(kernel, -1 / n**2)
    weights[:n, :n] = weights[n:, n:] = 1 / (n * (n - 1))
    weights.fill_diagonal_(0)
    return (kernel * weights).sum() + 2 / (n - 1)


def _tllib_linear(source, target):
    n = len(source)
    rows = torch.cat([source, target])
    distances = ((rows.unsqueeze(0) - rows.unsqueeze(1)) ** 2).sum(2)
    kernel = _several(distances, distances.detach().mean())
    weights = torch.zeros_like(kernel)
    for i in range(n):
        s, t = (i + 1) % n, (i + 1) % n + n
        weights[i, s] += 1 / n
        weights[i + n, t] += 1 / n
        weights[i, t] -= 1 / n
        weights[s, i + n] -= 1 / n
    return (kernel * weights).sum() + 2 / (n - 1)


def _pytorch_adapt(source, target):
    def distances(x, y):
        return torch.cdist(x, y)

    own = distances(source, source) ** 2
    scale = own.detach().median()
    kernels = [
        torch.exp(-squares / scale)
        for squares in (
            own,
            distances(target, target) ** 2,
            distances(source, target) ** 2,
        )
    ]
    return _unbiased_of(*kernels)


def _pytorch_adapt_linear(source, target):
    scale = (torch.cdist(source, source) ** 2).detach().median()
    (s, s_next), (t, t_next) = ((x[::2], x[1::2]) for x in (source, target))

    def kernel(x, y):
        return torch.exp(-((x - y) ** 2).sum(1) / scale)

    terms = kernel(s, s_next) + kernel(t, t_next) - kernel(s, t_next)
    return (terms - kernel(s_next, t)).mean()


def _domainbed(source, target):
    def kernel(x, y):
        distances = _gram(x, y)
        total = torch.zeros_like(distances)
        for gamma in (0.001, 0.01, 0.1, 1, 10, 100, 1000):
            total.add_(torch.exp(distances.mul(-gamma)))
        return total.mean()

    within = kernel(source, source) + kernel(target, target)
    return within - 2 * kernel(source, target)


def _dassl(source, target):
    def kernel(x, y):
        distances = _gram(x, y)
        return sum(torch.exp(-distances / (2 * scale**2)) for scale in (1, 5, 10))

    return _unbiased_of(
        kernel(source, source), kernel(target, target), kernel(source, target)
    )


def _joint(source_layers, target_layers):
    n = len(source_layers[0])
    kernel = 1
    for source, target in zip(source_layers, target_layers, strict=True):
        kernel = kernel * _all_pairs(source, target)
    return (kernel[:n, :n] + kernel[n:, n:] - kernel[:n, n:] - kernel[n:, :n]).mean()


def _local(source, target, labels, probabilities):
    n, classes = len(source), probabilities.shape[1]
    own = F.one_hot(labels, classes).float()
    likeliest = F.one_hot(probabilities.argmax(1), classes).float()
    both = ((own.sum(0) > 0) & (likeliest.sum(0) > 0)).float()
    own = own / own.sum(0).clamp_min(1) * both
    other = probabilities / probabilities.sum(0) * both
    kernel = _all_pairs(source, target)
    total = ((own @ own.T) * kernel[:n, :n]).sum()
    total = total + ((other @ other.T) * kernel[n:, n:]).sum()
    return (total - 2 * ((own @ other.T) * kernel[:n, n:]).sum()) / both.sum()


def _contrastive(source, target, labels, pseudo_labels):
    n, kernel = len(source), _all_pairs(source, target)
    own, other = (F.one_hot(x, FEW_CLASSES).float() for x in (labels, pseudo_labels))
    own, other = own / own.sum(0), other / other.sum(0)
    by_source = (own * (kernel[:n, :n] @ own)).sum(0)
    by_target = (other * (kernel[n:, n:] @ other)).sum(0)
    table = by_source[:, None] + by_target - 2 * own.T @ kernel[:n, n:] @ other
    same = table.diagonal().sum()
    return same / FEW_CLASSES - (table.sum() - same) / (FEW_CLASSES * (FEW_CLASSES - 1))


def _coral(source, target):
    def covariance(x):
        centred = x.mean(0, keepdim=True) - x
        return centred.T @ centred / (len(x) - 1)

    difference = covariance(source) - covariance(target)
    return (difference * difference).sum() / (4 * source.shape[1] ** 2)


def _mean_coral(source, target):
    def moments(x):
        mean = x.mean(0, keepdim=True)
        return mean, (x - mean).t() @ (x - mean) / (len(x) - 1)

    (mean, covariance), (other_mean, other_covariance) = (
        moments(source),
        moments(target),
    )
    by_mean = (mean - other_mean).pow(2).mean()
    return by_mean + (covariance - other_covariance).pow(2).mean()


def _log_coral(source, target, epsilon=1e-5):
    def logarithm(x):
        centred = x - x.mean(0)
        values, vectors = torch.linalg.eigh(centred.T @ centred / (len(x) - 1))
        return vectors @ torch.diag(torch.log(values + epsilon)) @ vectors.T

    difference = logarithm(source) - logarithm(target)
    return difference.pow(2).sum() / (4 * source.shape[1] ** 2)


def _central_moments(source, target, moments=5):
    means = source.mean(0), target.mean(0)
    s, t = source - means[0], target - means[1]
    total = (means[0] - means[1]).norm()
    for power in range(2, moments + 1):
        total = total + ((s**power).mean(0) - (t**power).mean(0)).norm()
    return total


def _sliced(source, target, directions):
    lines, others = (torch.sort(x @ directions.T, 0)[0] for x in (source, target))
    return ((lines - others) ** 2).mean()


def _critic(critic, rows):
    return torch.relu(rows @ critic["first"]) @ critic["second"]


def _penalty(critic, source, target):
    places = torch.rand(len(source), 1, device=source.device)
    rows = torch.cat([target + places * (source - target), source, target])
    rows.requires_grad_()
    outputs = _critic(critic, rows)
    (slopes,) = torch.autograd.grad(
        outputs, rows, torch.ones_like(outputs), create_graph=True
    )
    return ((slopes.norm(2, dim=1) - 1) ** 2).mean()


def _library_penalty(critic, source, target):
    import jax

    def outputs(rows):
        return jax.nn.relu(rows @ critic["first"]) @ critic["second"]

    return losses.gradient_penalty(source, target, outputs, key=jax.random.key(0))


def _sinkhorn(costs, epsilon, threshold=1e-3, limit=2000):
    """Log-domain Sinkhorn between uniform weights: dual potentials."""
    n, m = costs.shape
    u, v = np.log(1 / n), np.log(1 / m)
    f, g = costs.new_zeros(n), costs.new_zeros(m)
    for step in range(limit):
        f = epsilon * (u - torch.logsumexp((g - costs) / epsilon, 1))
        g = epsilon * (v - torch.logsumexp((f[:, None] - costs) / epsilon, 0))
        if step % 10 == 9:
            rows = torch.exp((f[:, None] + g - costs) / epsilon).sum(1)
            if (rows - 1 / n).abs().sum() < threshold:
                break
    return f, g


def _strength(costs):
    return 0.05 * costs.std(correction=0)


def _sinkhorn_divergence(source, target):
    costs = [
        _gram(x, y) for x, y in ((source, target), (source, source), (target, target))
    ]
    epsilon = _strength(costs[0].detach())
    values = []
    for cost in costs:
        n, m = cost.shape
        with torch.no_grad():
            f, g = _sinkhorn(cost, epsilon)
        plan = torch.exp((f[:, None] + g - cost.detach()) / epsilon)
        entropy = (plan * (torch.log(plan.clamp_min(1e-38)) + np.log(n * m))).sum()
        values.append((plan * cost).sum() + epsilon * entropy)
    return values[0] - 0.5 * (values[1] + values[2])


def _deep_joint(source, target, labels, logits, alpha=0.001, beta=0.0001):
    cost = alpha * _gram(source, target)
    cost = cost - beta * F.log_softmax(logits, 1)[:, labels].T
    with torch.no_grad():
        epsilon = _strength(cost)
        f, g = _sinkhorn(cost, epsilon)
        plan = torch.exp((f[:, None] + g - cost) / epsilon)
    return (plan * cost).sum()


def _permutations(source, target, count=1000):
    n, kernel = len(source), _all_pairs(source, target)

    def value(signed):
        return ((signed @ kernel) * signed).sum(1)

    signed = kernel.new_full((1, len(kernel)), 1 / n)
    signed[:, n:] *= -1
    observed = value(signed)[0]
    with torch.no_grad():
        orders = torch.rand(count, len(kernel), device=kernel.device).argsort(1)
        rarer = (value(signed[0][orders]) >= observed).sum()
    return observed + (1 + rarer) / (1 + count)


def _mmd(**options):
    return lambda *sets: losses.mmd(*sets, **options)


def _preset(name):
    return lambda *sets: losses.mmd_preset(*sets, preset=name)


BOTH = (0, 1)
SMALL_PAIR = (SOURCE[:64], TARGET[:64])
NARROW = tuple(np.ascontiguousarray(rows[:, :128]) for rows in PAIR)
LAYERS = ((SOURCE, SOURCE_PREDICTIONS), (TARGET, TARGET_PREDICTIONS))
OUTPUTS = tuple(normal(len(SOURCE), 1, seed=seed) for seed in (12, 13))

ROWS: Rows = {
    "mmd, biased": Row(_mmd(), _biased, PAIR, BOTH, "DeepDA, Gram form"),
    "mmd, unbiased": Row(
        _mmd(estimator="unbiased"), _unbiased, PAIR, BOTH, "pytorch-adapt, Gram form"
    ),
    "mmd, linear": Row(
        _mmd(estimator="linear"), _linear, PAIR, BOTH, "Gretton et al. 2012"
    ),
    "mmd, block": Row(
        _mmd(estimator="block"), _block, PAIR, BOTH, "Zaremba et al. 2013"
    ),
    "mmd, median": Row(
        _mmd(bandwidth="median"), _median, PAIR, BOTH, "Gretton et al. 2012"
    ),
    "mmd_preset, tllib": Row(
        _preset("tllib"), _tllib, SMALL_PAIR, BOTH, "TLlib, batch 64"
    ),
    "mmd_preset, tllib_linear": Row(
        _preset("tllib_linear"), _tllib_linear, SMALL_PAIR, BOTH, "TLlib, batch 64"
    ),
    "mmd_preset, pytorch_adapt": Row(
        _preset("pytorch_adapt"), _pytorch_adapt, PAIR, BOTH, "pytorch-adapt"
    ),
    "mmd_preset, pytorch_adapt_linear": Row(
        _preset("pytorch_adapt_linear"),
        _pytorch_adapt_linear,
        PAIR,
        BOTH,
        "pytorch-adapt",
    ),
    "mmd_preset, domainbed": Row(
        _preset("domainbed"), _domainbed, PAIR, BOTH, "DomainBed", rtol=0.01
    ),
    "mmd_preset, dassl": Row(_preset("dassl"), _dassl, PAIR, BOTH, "Dassl"),
    "permutation_test": Row(
        lambda *sets: sum(losses.permutation_test(*sets)),
        _permutations,
        PAIR,
        BOTH,
        "Gretton et al. 2012",
        rtol=0.01,
    ),
    "joint_maximum_mean_discrepancy": Row(
        losses.joint_maximum_mean_discrepancy, _joint, LAYERS, BOTH, "TLlib, Gram form"
    ),
    "local_maximum_mean_discrepancy": Row(
        losses.local_maximum_mean_discrepancy,
        _local,
        (*PAIR, LABELS, TARGET_PREDICTIONS),
        BOTH,
        "DeepDA, as matrix products",
    ),
    "contrastive_domain_discrepancy": Row(
        lambda *inputs: losses.contrastive_domain_discrepancy(
            *inputs, classes=FEW_CLASSES
        ),
        _contrastive,
        (*PAIR, *FEW_LABELS),
        BOTH,
        "CAN, as matrix products, 31 classes",
    ),
    "correlation_alignment": Row(losses.coral, _coral, PAIR, BOTH, "DeepDA"),
    "correlation_alignment, mean_covariance": Row(
        lambda *sets: losses.coral(*sets, form="mean_covariance"),
        _mean_coral,
        PAIR,
        BOTH,
        "DomainBed, TLlib",
    ),
    "log_correlation_alignment": Row(
        losses.log_correlation_alignment, _log_coral, NARROW, BOTH, "MECA, width 128"
    ),
    "central_moment_discrepancy": Row(
        losses.central_moment_discrepancy,
        _central_moments,
        tuple(map(_sigmoid, PAIR)),
        BOTH,
        "Zellinger et al. 2017",
    ),
    "sliced_wasserstein": Row(
        lambda *sets: losses.sliced_wasserstein(*sets[:2], directions=sets[2]),
        _sliced,
        (*PAIR, DIRECTIONS),
        BOTH,
        "pytorch-adapt",
    ),
    "sinkhorn_divergence": Row(
        losses.sinkhorn_divergence,
        _sinkhorn_divergence,
        PAIR,
        BOTH,
        "Sinkhorn as in POT",
        rtol=0.02,
    ),
    "deep_joint_distribution_transport": Row(
        losses.deep_joint_distribution_transport,
        _deep_joint,
        (*PAIR, LABELS, TEACHER_LOGITS),
        (0, 1, 3),
        "Sinkhorn as in POT",
        rtol=0.02,
    ),
    "wasserstein_critic": Row(
        losses.wasserstein_critic,
        lambda source, target: target.mean() - source.mean(),
        OUTPUTS,
        BOTH,
        "WDGRL",
    ),
    "gradient_penalty": Row(
        _library_penalty, _penalty, (CRITIC, *PAIR), (0,), "WDGRL", rtol=0.1
    ),
}
