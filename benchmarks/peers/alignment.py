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
    norms = x.square().sum(1, keepdim=True) + y.square().sum(1)
    return torch.addmm(norms, x, y.T, alpha=-2).clamp_min(0)


def _own(x):
    """`_gram` of rows with themselves, whose gradient takes one product, not two."""
    products = x @ x.detach().T
    half = torch.sub(x.square().sum(1, keepdim=True), products, alpha=2)
    return torch.add(half + half.T, products.detach(), alpha=2).clamp_min(0)


def _blocks(source, target):
    """Within the source, within the target, and between them."""
    return _own(source), _own(target), _gram(source, target)


def _several(distances, mean):
    """The sum of the kernels, of which each is the square of the one before."""
    kernel = torch.exp(distances * (-1 / (POWERS[-1] * mean)))
    total = kernel
    for _ in POWERS[1:]:
        kernel = kernel * kernel
        total = total + kernel
    return total


def _mean_distance(source, target):
    rows = torch.cat([source, target]).detach()
    return 2 * (rows - rows.mean(0)).square().sum() / (len(rows) - 1)


def _kernels(source, target):
    mean = _mean_distance(source, target)
    return [_several(distances, mean) for distances in _blocks(source, target)]


def _biased_of(own, other, between):
    return own.mean() + other.mean() - 2 * between.mean()


def _biased(source, target):
    return _biased_of(*_kernels(source, target))


def _unbiased_of(own, other, between):
    def within(kernel):
        n = len(kernel)
        return (kernel.sum() - kernel.diagonal().sum()) / (n * (n - 1))

    return within(own) + within(other) - 2 * between.mean()


def _unbiased(source, target):
    return _unbiased_of(*_kernels(source, target))


def _median(source, target):
    blocks = own, other, between = _blocks(source, target)
    with torch.no_grad():
        upper = torch.ones_like(own, dtype=torch.bool).triu(1)
        pairs = torch.cat([own[upper], other[upper], between.flatten()])
    return _biased_of(*(_several(distances, pairs.median()) for distances in blocks))


def _of_pairs(s, s_next, t, t_next):
    """Squared distances: two rows for what is added, two for what is subtracted."""
    pairs = (s, s_next), (t, t_next), (s, t_next), (s_next, t)
    return torch.stack([(x - y).square().sum(1) for x, y in pairs])


def _linear_of(kernel):
    return (kernel[:2] - kernel[2:]).sum() / kernel.shape[1]


def _linear(source, target):
    distances = _of_pairs(source[::2], source[1::2], target[::2], target[1::2])
    return _linear_of(_several(distances, _mean_distance(source, target)))


def _block(source, target, size=16):
    mean = _mean_distance(source, target)
    s, t = (x.reshape(-1, size, x.shape[1]) for x in (source, target))

    def kernel(x, y):
        norms = x.square().sum(2)[:, :, None] + y.square().sum(2)[:, None]
        distances = torch.baddbmm(norms, x, y.mT, alpha=-2).clamp_min(0)
        kernel = _several(distances, mean)
        return kernel.sum() - kernel.diagonal(dim1=1, dim2=2).sum()

    total = kernel(s, s) + kernel(t, t) - 2 * kernel(s, t)
    return total / (len(s) * size * (size - 1))


def _tllib_mean(source, target):
    """The mean with the pairs of a row and itself."""
    count = len(source) + len(target)
    return (1 - 1 / count) * _mean_distance(source, target)


def _tllib(source, target):
    mean = _tllib_mean(source, target)
    kernels = [_several(distances, mean) for distances in _blocks(source, target)]
    return _unbiased_of(*kernels) + 2 / (len(source) - 1)


def _tllib_linear(source, target):
    following = source.roll(-1, 0), target.roll(-1, 0)
    distances = _of_pairs(source, following[0], target, following[1])
    kernel = _several(distances, _tllib_mean(source, target))
    return _linear_of(kernel) + 2 / (len(source) - 1)


def _pytorch_adapt(source, target):
    blocks = _blocks(source, target)
    scale = -1 / blocks[0].detach().median()
    return _unbiased_of(*(torch.exp(distances * scale) for distances in blocks))


def _pytorch_adapt_linear(source, target):
    with torch.no_grad():
        scale = -1 / _gram(source, source).median()
    distances = _of_pairs(source[::2], source[1::2], target[::2], target[1::2])
    return _linear_of(torch.exp(distances * scale))


def _domainbed(source, target):
    def kernel(distances):
        total = torch.exp(distances * -0.001)
        for gamma in (0.01, 0.1, 1, 10, 100, 1000):
            # Not so far that the numbers are denormal, which are slow.
            total = total + torch.exp((distances * -gamma).clamp_min(-87.0))
        return total

    return _biased_of(*map(kernel, _blocks(source, target)))


def _dassl(source, target):
    def kernel(distances):
        return sum(torch.exp(distances * (-0.5 / scale**2)) for scale in (1, 5, 10))

    return _unbiased_of(*map(kernel, _blocks(source, target)))


def _joint(source_layers, target_layers):
    layers = zip(source_layers, target_layers, strict=True)
    kernels = [_kernels(source, target) for source, target in layers]
    return _biased_of(*map(torch.mul, *kernels))


def _local(source, target, labels, probabilities):
    with torch.no_grad():
        classes = probabilities.shape[1]
        counts = labels.bincount(minlength=classes)
        likeliest = probabilities.argmax(1).bincount(minlength=classes)
        both = (counts > 0) & (likeliest > 0)
        share = (both / counts.clamp_min(1))[labels]
        other = probabilities * (both / probabilities.sum(0))
        weights = (
            (labels[:, None] == labels) * share * share,
            other @ other.T,
            other.T[labels] * (-2 * share[:, None]),
        )
    kernels = _kernels(source, target)
    return sum(map(torch.sum, map(torch.mul, weights, kernels))) / both.sum()


def _contrastive(source, target, labels, pseudo_labels):
    of_source, of_target, between = _kernels(source, target)
    own, other = (F.one_hot(x, FEW_CLASSES).float() for x in (labels, pseudo_labels))
    own, other = own / own.sum(0), other / other.sum(0)
    by_source = (own * (of_source @ own)).sum(0)
    by_target = (other * (of_target @ other)).sum(0)
    table = by_source[:, None] + by_target - 2 * own.T @ (between @ other)
    same = table.diagonal().sum()
    return same / FEW_CLASSES - (table.sum() - same) / (FEW_CLASSES * (FEW_CLASSES - 1))


def _coral(source, target):
    def covariance(x):
        centred = x - x.mean(0)
        return centred.T @ centred / (len(x) - 1)

    difference = F.mse_loss(covariance(source), covariance(target))
    return difference / 4


def _mean_coral(source, target):
    def moments(x):
        mean = x.mean(0)
        centred = x - mean
        return mean, centred.T @ centred / (len(x) - 1)

    pairs = zip(moments(source), moments(target), strict=True)
    return sum(F.mse_loss(of_source, of_target) for of_source, of_target in pairs)


def _log_coral(source, target, epsilon=1e-5):
    def logarithm(x):
        centred = x - x.mean(0)
        values, vectors = torch.linalg.eigh(centred.T @ centred / (len(x) - 1))
        return (vectors * torch.log(values + epsilon)) @ vectors.T

    return F.mse_loss(logarithm(source), logarithm(target)) / 4


def _central_moments(source, target, moments=5):
    means = source.mean(0), target.mean(0)
    s, t = source - means[0], target - means[1]
    total, powers = (means[0] - means[1]).norm(), (s, t)
    for _ in range(2, moments + 1):
        powers = powers[0] * s, powers[1] * t
        total = total + (powers[0].mean(0) - powers[1].mean(0)).norm()
    return total


def _sliced(source, target, directions):
    lines, others = (torch.sort(directions @ x.T, 1)[0] for x in (source, target))
    return F.mse_loss(lines, others)


def _plan(costs, epsilon, threshold=1e-3, limit=2000):
    """Sinkhorn's plan between uniform weights, and its logarithm.

    The scalings are taken into the kernel after ten steps, the first one is of logs.
    """
    n, m = costs.shape
    logs = costs / -epsilon
    logs = logs - torch.logsumexp(logs, 1, keepdim=True) - np.log(n)
    logs = logs - torch.logsumexp(logs, 0) - np.log(m)
    for _ in range(0, limit, 10):
        kernel, v = logs.exp(), logs.new_ones(m)
        for _ in range(10):
            u = 1 / (n * (kernel @ v))
            v = 1 / (m * (u @ kernel))
        logs = logs + u.log()[:, None] + v.log()
        if (u * (kernel @ v) - 1 / n).abs().sum() < threshold:
            break
    return logs.exp(), logs


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


def _strength(costs):
    return 0.05 * costs.std(correction=0)


def _sinkhorn_divergence(source, target):
    own, other, between = _blocks(source, target)
    epsilon = _strength(between.detach())

    def value(costs):
        with torch.no_grad():
            plan, logs = _plan(costs, epsilon)
            entropy = (plan * (logs + np.log(costs.numel()))).sum()
        return (plan * costs).sum() + epsilon * entropy

    return value(between) - 0.5 * (value(own) + value(other))


def _deep_joint(source, target, labels, logits, alpha=0.001, beta=0.0001):
    cost = alpha * _gram(source, target)
    cost = cost - beta * F.log_softmax(logits, 1)[:, labels].T
    with torch.no_grad():
        plan, _ = _plan(cost, _strength(cost))
    return (plan * cost).sum()


def _permutations(source, target, count=1000):
    n, rows = len(source), torch.cat([source, target])
    kernel = _several(_own(rows), _mean_distance(source, target))

    def value(signed):
        return ((signed @ kernel) * signed).sum(1)

    signs = kernel.new_full((len(rows),), 1 / n)
    signs[n:] *= -1
    observed = value(signs[None])[0]
    with torch.no_grad():
        draws = torch.rand(count, len(rows), device=rows.device)
        first = draws <= draws.kthvalue(n, 1, keepdim=True)[0]
        rarer = (value((2 * first - 1.0) / n) >= observed).sum()
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
