import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxtransfer import losses
from jaxtransfer.losses import discrepancy

# What the libraries themselves return for the `domains` of conftest.
PEERS = {
    "xlearn": 1.0376448061186854,
    "deepda": 1.0376448061186854,
    "tllib": 0.5110751394471663,
    "tllib_linear": 1.0997771650546118,
    "pytorch_adapt": 0.0334753135928495,
    "pytorch_adapt_linear": 0.23786553488377635,
    "domainbed": 1.4785002804652745,
    "dassl": 0.04655318685627563,
}
POWERS = np.array([0.25, 0.5, 1.0, 2.0, 4.0])


@pytest.fixture
def predictions():
    """Labels [6], softmax of the golden logits of both domains [6, 3]."""
    i, c = np.meshgrid(np.arange(1, 7), np.arange(1, 4), indexing="ij")
    source = 2 * np.sin(1.1 * i + 0.6 * c + 0.31 * i * c)
    target = 2 * np.cos(0.8 * i - 0.7 * c + 0.19 * i * c)
    soft = [np.exp(z) / np.exp(z).sum(axis=1, keepdims=True) for z in (source, target)]
    return np.arange(6) % 3, *soft


@pytest.mark.parametrize("preset", PEERS)
def test_presets_are_what_the_libraries_return(float64, domains, preset):
    value = losses.mmd_preset(*map(jnp.asarray, domains), preset=preset)
    np.testing.assert_allclose(value, PEERS[preset], rtol=1e-9)
    half = [jnp.asarray(domain, jnp.float32) for domain in domains]
    value = losses.mmd_preset(*half, preset=preset)
    np.testing.assert_allclose(value, PEERS[preset], rtol=1e-5)


def test_presets_of_equal_sets(float64, domains):
    source = jnp.asarray(domains[0])
    value = functools.partial(losses.mmd_preset, source, source)
    np.testing.assert_allclose(value(preset="tllib"), -0.6106705284681425, rtol=1e-9)
    np.testing.assert_allclose(value(preset="tllib_linear"), 0.4, rtol=1e-9)


def _median(rows):
    distances = ((rows[:, None] - rows) ** 2).sum(-1).ravel()
    return np.sort(distances)[(len(distances) - 1) // 2]


def test_several_scales_of_the_median(float64, domains):
    bandwidths = tuple(float(b) for b in _median(domains[0]) * POWERS)
    for estimator, golden in (
        ("unbiased", 0.027161702356552686),
        ("linear", 0.1711541714606081),
    ):
        value = losses.mmd(*domains, estimator=estimator, bandwidth=bandwidths)
        np.testing.assert_allclose(value / 5, golden, rtol=1e-9)


def test_joint_goldens(float64, domains, predictions):
    _, source, target = predictions
    layers = [domains[0], source], [domains[1], target]
    value = functools.partial(
        losses.joint_maximum_mean_discrepancy, *layers, estimator="unbiased"
    )
    rows = np.concatenate(domains)
    mean = ((rows[:, None] - rows) ** 2).sum(-1).mean()
    as_tllib = [tuple(map(float, mean * POWERS)), (2 * 0.92**2,)]
    golden = 0.6202460528234328 - 2 / 5
    np.testing.assert_allclose(value(bandwidth=as_tllib), golden, rtol=1e-9)
    medians = [tuple(map(float, _median(x) * POWERS)) for x in layers[0]]
    golden = 25 * 0.1405421052610079
    np.testing.assert_allclose(value(bandwidth=medians), golden, rtol=1e-9)


def test_joint_of_one_layer_is_the_discrepancy(float64, domains):
    for estimator in ("biased", "unbiased"):
        options = {"estimator": estimator, "bandwidth": [2.0]}
        joint = losses.joint_maximum_mean_discrepancy(
            domains[:1], domains[1:], **options
        )
        alone = losses.mmd(*domains, estimator=estimator, bandwidth=2.0)
        np.testing.assert_allclose(joint, alone, rtol=1e-12)


def test_joint_of_close_sets_keeps_its_digits():
    random = np.random.default_rng(0)
    errors = []
    for _ in range(8):
        source = np.float32(random.standard_normal((64, 512)))
        target = source + np.float32(1e-2)
        values = []
        for x64 in (False, True):
            with jax.enable_x64(x64):
                dtype = jnp.float64 if x64 else jnp.float32
                layers = [[jnp.asarray(rows, dtype)] for rows in (source, target)]
                values.append(float(losses.joint_maximum_mean_discrepancy(*layers)))
        errors.append(abs(values[0] / values[1] - 1))
    assert np.mean(errors) < 4e-4, errors


def test_local_golden(float64, domains, predictions):
    labels, _, target = predictions
    value = losses.local_maximum_mean_discrepancy(*domains, labels, target)
    # The golden value was computed in float32.
    np.testing.assert_allclose(value, 2.036651372909546, rtol=1e-6)


def test_contrastive_equals_its_definition(float64, domains):
    source, target = domains
    own, other = np.arange(6) % 3, np.array([0, 1, 2, 2, 0, 1])
    rows = np.concatenate(domains)
    bandwidths = POWERS * ((rows[:, None] - rows) ** 2).sum() / (12 * 11)

    def kernel(a, b):
        distances = ((a[:, None] - b) ** 2).sum(-1)
        return np.exp(-distances[..., None] / bandwidths).sum(-1).mean()

    table = np.array(
        [
            [
                kernel(source[own == c], source[own == c])
                + kernel(target[other == d], target[other == d])
                - 2 * kernel(source[own == c], target[other == d])
                for d in range(3)
            ]
            for c in range(3)
        ]
    )
    expected = table.trace() / 3 - (table.sum() - table.trace()) / 6
    value = losses.contrastive_domain_discrepancy(*domains, own, other, classes=3)
    np.testing.assert_allclose(value, expected, rtol=1e-11)
    # A class without rows changes nothing.
    value = losses.contrastive_domain_discrepancy(*domains, own, other, classes=5)
    np.testing.assert_allclose(value, expected, rtol=1e-11)


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_tiles_and_all_pairs_agree(float64, domains, estimator, monkeypatch):
    loss = functools.partial(losses.mmd, estimator=estimator, bandwidth=2.0)
    run = jax.value_and_grad(loss, (0, 1))
    arrays = [jnp.asarray(domain) for domain in domains]
    where = {"source_where": jnp.arange(6) != 2, "target_where": jnp.arange(6) > 0}
    expected = run(*arrays, **where)
    tiled = functools.partial(discrepancy.gaussian_kernel_sum, tile=4)
    monkeypatch.setattr(discrepancy, "gaussian_kernel_sum", tiled)
    got = run(*arrays, **where)
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, 1e-10), got, expected)


def test_large_sets_are_not_copied():
    def temporary(n):
        rows = jax.ShapeDtypeStruct((n, 64), jnp.float32)
        run = jax.jit(jax.grad(functools.partial(losses.mmd, bandwidth=9.0), (0, 1)))
        return run.lower(rows, rows).compile().memory_analysis().temp_size_in_bytes

    more = 2 * (16384 - 4096)
    assert temporary(16384) - temporary(4096) < 1.2 * more * (64 + 2) * 4


def test_large_sets_keep_their_digits():
    random = np.random.default_rng(0)
    source = random.standard_normal((900, 40))
    target = random.standard_normal((700, 40)) + 0.1
    with jax.enable_x64(True):
        exact = losses.mmd(source, target, bandwidth=80.0)
    narrow = [jnp.asarray(rows, jnp.float32) for rows in (source, target)]
    np.testing.assert_allclose(losses.mmd(*narrow, bandwidth=80.0), exact, rtol=1e-6)


FOURIER = {"estimator": "fourier", "frequencies": 64, "key": jax.random.key(2)}


@pytest.mark.parametrize("options", [{}, FOURIER], ids=["biased", "fourier"])
def test_divided_over_devices_is_one_device(options):
    random = np.random.default_rng(0)
    source = jnp.asarray(random.standard_normal((64, 5)), jnp.float32)
    target = jnp.asarray(random.standard_normal((48, 5)) + 0.5, jnp.float32)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    split = PartitionSpec("data")

    def run(axis_name):
        return jax.value_and_grad(
            lambda s, t: losses.mmd(s, t, axis_name=axis_name, **options), (0, 1)
        )

    expected = run(None)(source, target)
    got = jax.jit(
        jax.shard_map(
            run("data"),
            mesh=mesh,
            in_specs=(split, split),
            out_specs=(PartitionSpec(), (split, split)),
        )
    )(source, target)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        atol = 1e-6 * float(jnp.abs(other).max())
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=atol)


@pytest.mark.parametrize("estimator", ["unbiased", "linear", "block"])
def test_unbiased_in_the_mean(estimator):
    def one(key):
        rows = jax.random.normal(key, (24, 2))
        return losses.mmd(
            rows[:12], rows[12:], estimator=estimator, block_size=4, bandwidth=2.0
        )

    values = jax.vmap(one)(jax.random.split(jax.random.key(0), 2000))
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(2000)


def _by_fourier(source, target, key, frequencies=256):
    return losses.mmd(
        source,
        target,
        estimator="fourier",
        bandwidth=(2.0, 8.0),
        kernel_weights=(1.0, 0.5),
        frequencies=frequencies,
        key=key,
    )


def test_fourier_is_its_twin(float64, domains):
    source, target = domains
    key = jax.random.key(4)
    frequencies = np.asarray(jax.random.normal(key, (4, 8), jnp.float64))
    expected = 0.0
    for bandwidth, weight in ((2.0, 1.0), (8.0, 0.5)):
        for w in frequencies.T * np.sqrt(2 / bandwidth):
            waves = [np.exp(1j * rows @ w).mean() for rows in domains]
            expected += weight * abs(waves[0] - waves[1]) ** 2 / 8
    value = _by_fourier(source, target, key, frequencies=8)
    np.testing.assert_allclose(value, expected, rtol=1e-12)


def test_fourier_is_the_biased_estimate_in_the_mean(domains):
    source, target = (jnp.asarray(domain, jnp.float32) for domain in domains)
    keys = jax.random.split(jax.random.key(0), 200)
    values = jax.vmap(functools.partial(_by_fourier, source, target))(keys)
    exact = losses.mmd(source, target, bandwidth=(2.0, 8.0), kernel_weights=(1.0, 0.5))
    assert abs(values.mean() - exact) < 3 * values.std() / np.sqrt(200)
    assert values.std() < 0.15 * exact
    assert _by_fourier(source, source[::-1], keys[0]) < 1e-6


def test_a_kernel_of_weight_zero_is_absent(domains):
    source, target = (jnp.asarray(domain, jnp.float32) for domain in domains)
    for estimator in discrepancy.LEAST_ROWS:
        run = functools.partial(
            losses.mmd,
            source,
            target,
            estimator=estimator,
            block_size=3,
            key=jax.random.key(1),
        )
        both = run(bandwidth=(2.0, 5.0), kernel_weights=(1.0, 0.0))
        assert both == run(bandwidth=(2.0,), kernel_weights=(1.0,))


def test_weights_that_are_known_are_checked_under_jit(domains):
    source, target = (jnp.asarray(domain, jnp.float32) for domain in domains)

    def value(s, weights):
        return losses.mmd(s, target, bandwidth=(2.0, 5.0), kernel_weights=weights)

    weights = jnp.array([1.0, 0.5])
    negative = -weights
    traced = jax.jit(value)(source, negative)
    np.testing.assert_allclose(traced, -value(source, weights), rtol=1e-6)
    with pytest.raises(ValueError, match="kernel_weights must not be negative"):
        jax.jit(lambda s: value(s, negative))(source)


def test_permutation_test_keeps_its_level_and_sees_a_shift():
    def p_value(key, shift):
        rows = jax.random.normal(key, (27, 2))
        source, target = rows[:15], rows[15:] + shift
        return losses.permutation_test(
            source, target, key=jax.random.fold_in(key, 1), permutations=99
        )[1]

    keys = jax.random.split(jax.random.key(5), 400)
    level = (jax.vmap(lambda key: p_value(key, 0.0))(keys) <= 0.05).mean()
    assert 0.02 <= level <= 0.08
    assert (jax.vmap(lambda key: p_value(key, 2.0))(keys[:50]) <= 0.05).mean() > 0.9


def test_permutation_test_of_masked_rows(domains):
    source, target = (jnp.asarray(domain, jnp.float32) for domain in domains)
    where = jnp.arange(6) != 2
    filled = source.at[2].set(jnp.nan)
    value, p = losses.permutation_test(filled, target, source_where=where)
    np.testing.assert_allclose(value, losses.mmd(source[where], target), rtol=1e-5)
    assert 0 < p <= 1
    assert losses.permutation_test(source, source)[1] == 1.0
    nobody = jnp.zeros(len(target), bool)
    value, p = losses.permutation_test(source, target, target_where=nobody)
    assert (float(value), float(p)) == (0.0, 1.0)


def test_optimal_weights_are_the_best_on_a_grid():
    keys = jax.random.split(jax.random.key(0))
    source = jax.random.normal(keys[0], (400, 2))
    target = 1.3 * jax.random.normal(keys[1], (400, 2)) + 0.3
    bandwidths = (0.5, 2.0, 8.0)
    weights = losses.optimal_kernel_weights(
        source, target, bandwidth=bandwidths, regularization=0.0
    )

    def terms(b):
        def kernel(a, c):
            return jnp.exp(-((a - c) ** 2).sum(1) / b)

        s, t, s2, t2 = source[::2], target[::2], source[1::2], target[1::2]
        return kernel(s, s2) + kernel(t, t2) - kernel(s, t2) - kernel(s2, t)

    values = np.stack([terms(b) for b in bandwidths])

    def ratio(w):
        mixed = w @ values
        return mixed.mean() / mixed.std(ddof=1)

    steps = np.linspace(0, 1, 21)
    grid = [np.array([a, b, 1 - a - b]) for a in steps for b in steps if a + b <= 1]
    best = max(map(ratio, grid))
    assert ratio(np.asarray(weights)) > best - 1e-3


def test_says_what_is_wrong(types_unchecked):
    rows = jnp.ones((4, 2))
    with pytest.raises(ValueError, match="blocks of 16 rows need as many on each side"):
        losses.mmd(rows, rows, estimator="block")
    with pytest.raises(ValueError, match="kernel_weights must be one a kernel"):
        losses.mmd(rows, rows, kernel_weights=(1.0,))
    negative = (1.0, 0.0, -1.0, 0.0, 1.0)
    for weights in (negative, np.array(negative), jnp.array(negative)):
        with pytest.raises(ValueError, match="kernel_weights must not be negative"):
            losses.mmd(rows, rows, kernel_weights=weights)
    with pytest.raises(ValueError, match="needs a PRNG key: key=jax.random.key"):
        losses.mmd(rows, rows, estimator="fourier")
    with pytest.raises(ValueError, match="frequencies must be positive, got 0"):
        losses.mmd(
            rows, rows, estimator="fourier", key=jax.random.key(0), frequencies=0
        )
    with pytest.raises(ValueError, match="rules are .* got 'mode'"):
        losses.mmd(rows, rows, bandwidth="mode")
    with pytest.raises(ValueError, match="preset 'keras' is not known"):
        losses.mmd_preset(rows, rows, preset="keras")
    with pytest.raises(ValueError, match='"tllib_linear" needs sets of one size'):
        losses.mmd_preset(rows, rows[:3], preset="tllib_linear")
    with pytest.raises(ValueError, match="permutations must be at least 1"):
        losses.permutation_test(rows, rows, permutations=0)
    with pytest.raises(ValueError, match="as many, at least one, got 0 and 1"):
        losses.joint_maximum_mean_discrepancy([], [rows])
    with pytest.raises(ValueError, match="got 2 and 1 after 1 and 2"):
        losses.joint_maximum_mean_discrepancy(
            [rows[:1], rows[:2]], [rows[:2], rows[:1]]
        )
