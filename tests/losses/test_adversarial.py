import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax.test_util import check_grads

from jaxtransfer import losses, ops
from jaxtransfer.losses import adversarial

SOURCE = np.array([0.3, -1.2, 2.0])
TARGET = np.array([-0.7, 0.4])
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def class_logits():
    """The classifier's logits [6, 3] of the goldens, source and target."""
    i, c = np.meshgrid(np.arange(1, 7), np.arange(1, 4), indexing="ij")
    source = 2 * np.sin(1.1 * i + 0.6 * c + 0.31 * i * c)
    target = 2 * np.cos(0.8 * i - 0.7 * c + 0.19 * i * c)
    assert abs(source.sum() + 0.2812481432002274) < 1e-12
    return source, target


@pytest.fixture(params=[(jnp.float64, 1e-9), (jnp.float32, 1e-5)])
def precision(request, float64):
    return request.param


def _twin(source, target):
    def sigmoid(z):
        return 1 / (1 + np.exp(-z))

    return -0.5 * (np.log(sigmoid(source)).mean() + np.log(1 - sigmoid(target)).mean())


def test_equals_its_definition_and_gradient(float64):
    source, target = jnp.asarray(SOURCE), jnp.asarray(TARGET)
    result = losses.domain_adversarial(source, target)
    np.testing.assert_allclose(result, _twin(SOURCE, TARGET), rtol=1e-13)
    with_axis = losses.domain_adversarial(source[:, None], target[:, None])
    np.testing.assert_allclose(with_axis, result, rtol=1e-15)

    @jax.jit
    def loss(s, t):
        return losses.domain_adversarial(jnp.asarray(s), jnp.asarray(t))

    check_grads(loss, (source, target), order=2)


def test_swapping_the_domains_flips_the_logits():
    source, target = jnp.asarray(SOURCE), jnp.asarray(TARGET)
    swapped = losses.domain_adversarial(-target, -source)
    expected = losses.domain_adversarial(source, target)
    np.testing.assert_allclose(swapped, expected, rtol=1e-6)


def test_masks_and_transformations(transform):
    source, target = jnp.asarray(SOURCE), jnp.asarray(TARGET).at[1].set(jnp.nan)
    where = jnp.array([True, False])

    def both(s, t, w):
        return jax.value_and_grad(
            lambda s, t: losses.domain_adversarial(s, t, target_where=w),
            argnums=(0, 1),
        )(s, t)

    value, gradients = transform(both)(source, target, where)
    np.testing.assert_allclose(value, _twin(SOURCE, TARGET[:1]), rtol=1e-5)
    assert all(jnp.isfinite(g).all() for g in gradients)
    assert gradients[1][1] == 0.0
    nobody = jnp.zeros(2, bool)
    value, gradients = transform(both)(source, target, nobody)
    np.testing.assert_allclose(value, _twin(SOURCE, np.full(1, -99.0)), rtol=1e-5)
    np.testing.assert_array_equal(gradients[1], 0.0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_finite_at_extreme_logits(dtype):
    logits = jnp.array([1e4, -1e4], dtype)
    value, gradient = jax.value_and_grad(losses.domain_adversarial)(logits, logits)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, 5e3, rtol=1e-2)
    assert jnp.isfinite(gradient.astype(jnp.float32)).all()


def test_reversed_features_climb_what_the_critic_descends():
    features = jnp.array([[0.5, 1.0], [-1.0, 2.0]])
    weights = jnp.array([1.0, -2.0])

    def loss(f, w, strength):
        logits = ops.gradient_reversal(f, strength) @ w
        return losses.domain_adversarial(logits, -logits)

    gradients = jax.grad(loss, argnums=(0, 1))
    reversed_features, critic = gradients(features, weights, 0.25)
    plain_features, plain_critic = gradients(features, weights, -1.0)
    np.testing.assert_allclose(reversed_features, -0.25 * plain_features, rtol=1e-6)
    np.testing.assert_allclose(critic, plain_critic, rtol=1e-6)


def test_domain_accuracy(transform):
    source, target = jnp.asarray(SOURCE), jnp.asarray(TARGET)
    result = transform(losses.domain_accuracy)(source, target)
    np.testing.assert_allclose(result, (2 / 3 + 1 / 2) / 2, rtol=1e-6)
    constant = losses.domain_accuracy(jnp.zeros(5), jnp.zeros(3))
    assert constant == 0.5
    masked = losses.domain_accuracy(source, target, source_where=source > 0)
    np.testing.assert_allclose(masked, 0.75)


def test_says_what_is_wrong():
    for loss in (losses.domain_adversarial, losses.domain_accuracy):
        with pytest.raises(ValueError, match=r"source_logits must be .* \(3, 2\)"):
            inspect.unwrap(loss)(jnp.ones((3, 2)), jnp.ones(3))


def _entropies(*arrays):
    probabilities = scipy.special.softmax(np.concatenate(arrays), axis=1)
    entropy = scipy.special.entr(probabilities).sum(axis=1)
    return np.split(entropy, [len(arrays[0])])


def test_weights_of_one_change_nothing():
    source, target = jnp.asarray(SOURCE), jnp.asarray(TARGET)
    weighted = adversarial.domain_adversarial(
        source, target, source_weights=jnp.ones(3), target_weights=jnp.ones(2)
    )
    assert weighted == adversarial.domain_adversarial(source, target)


@pytest.mark.parametrize("normalization", ["per_domain", "joint"])
def test_entropy_weights_in_the_loss_are_those_of_the_codes(
    float64, class_logits, normalization
):
    classes = class_logits[0][:3], class_logits[1][:3]
    raw = [1 + np.exp(-entropy) for entropy in _entropies(*classes)]
    logits = SOURCE, -SOURCE[::-1] + 0.5
    losses_of = -np.log(scipy.special.expit([logits[0], -logits[1]]))
    if normalization == "per_domain":  # a weighted mean of each side
        sides = zip(losses_of, raw, strict=True)
        expected = np.mean([np.average(values, weights=w) for values, w in sides])
    else:  # one of both together
        expected = np.average(losses_of.ravel(), weights=np.concatenate(raw))
    source, target = adversarial.entropy_weights(*classes, normalization=normalization)
    value = adversarial.domain_adversarial(
        *map(jnp.asarray, logits), source_weights=source, target_weights=target
    )
    np.testing.assert_allclose(value, expected, rtol=1e-12)


def test_weights_are_constants_and_masked():
    source, target = jnp.asarray(SOURCE), jnp.asarray(TARGET)
    where = jnp.array([True, True, False])

    def loss(logits, weights):
        return adversarial.domain_adversarial(
            logits, target, source_weights=weights, source_where=where
        )

    weights = jnp.array([0.5, 1.5, jnp.nan])
    value, (of_logits, of_weights) = jax.value_and_grad(loss, (0, 1))(source, weights)
    expected = adversarial.domain_adversarial(
        source[:2], target, source_weights=weights[:2]
    )
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert jnp.isfinite(of_logits).all() and of_logits[2] == 0.0
    np.testing.assert_array_equal(of_weights, 0.0)


@pytest.mark.parametrize(
    ("normalization", "golden"),
    [("joint", 1.007181291580917), ("per_domain", 1.0017970840646722)],
)
def test_entropy_weights_golden(precision, class_logits, normalization, golden):
    dtype, tolerance = precision
    logits = [jnp.asarray(z, dtype) for z in class_logits]
    weights = adversarial.entropy_weights(
        *logits, normalization=normalization, epsilon=1e-5
    )
    squares = jnp.mean(jnp.concatenate(weights) ** 2)
    np.testing.assert_allclose(squares, golden, rtol=tolerance)
    traced = jax.jit(
        lambda e: adversarial.entropy_weights(
            *logits, normalization=normalization, epsilon=e
        )
    )(jnp.asarray(1e-5, dtype))
    np.testing.assert_allclose(traced[0], weights[0], rtol=1e-5)


@pytest.mark.parametrize("normalization", ["joint", "per_domain"])
def test_entropy_weights_masks(class_logits, normalization):
    source, target = (jnp.asarray(z, jnp.float32) for z in class_logits)
    where = jnp.array([True, False, True, True, False, True])
    options = {"normalization": normalization}
    got = adversarial.entropy_weights(
        jnp.where(where[:, None], source, jnp.nan),
        target,
        source_where=where,
        **options,
    )
    expected = adversarial.entropy_weights(source[where], target, **options)
    np.testing.assert_allclose(got[0][where], expected[0], rtol=1e-6)
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-6)
    np.testing.assert_array_equal(got[0][~where], 0.0)
    np.testing.assert_allclose(jnp.sum(got[0]) + jnp.sum(got[1]), 4 + 6, rtol=1e-6)
    nobody = jnp.zeros(6, bool)
    for weights in adversarial.entropy_weights(
        source, target, source_where=nobody, target_where=nobody, **options
    ):
        np.testing.assert_array_equal(weights, 0.0)


def test_multilinear_map_golden(precision, domains, class_logits):
    dtype, tolerance = precision
    probabilities = jax.nn.softmax(jnp.asarray(class_logits[0], dtype))
    joint = adversarial.multilinear_map(jnp.asarray(domains[0], dtype), probabilities)
    assert joint.shape == (6, 12)
    np.testing.assert_allclose(jnp.sum(joint**2), 7.903964741149341, rtol=tolerance)
    np.testing.assert_allclose(
        jnp.sum(joint[0, :4]), 0.20185716600551634, rtol=tolerance
    )


def test_multilinear_map_of_a_certain_class_is_the_features(domains):
    features = jnp.asarray(domains[0], jnp.float32)
    joint = adversarial.multilinear_map(features, jax.nn.one_hot(jnp.full(6, 1), 3))
    np.testing.assert_array_equal(joint.reshape(6, 3, 4)[:, 1], features)
    np.testing.assert_array_equal(joint.reshape(6, 3, 4)[:, ::2], 0.0)


def test_randomized_multilinear_map_keeps_inner_products(domains, class_logits):
    features = jnp.asarray(domains[0], jnp.float32)
    probabilities = jax.nn.softmax(jnp.asarray(class_logits[0], jnp.float32))
    exact = adversarial.multilinear_map(features, probabilities)
    drawn = adversarial.randomized_multilinear_map(
        features, probabilities, key=KEY, width=100_000
    )
    np.testing.assert_allclose(drawn @ drawn.T, exact @ exact.T, atol=0.05)
    # Rows are mapped by the key alone: both domains by the same matrices.
    alone = adversarial.randomized_multilinear_map(
        features[2:3], probabilities[2:3], key=KEY, width=100_000
    )
    np.testing.assert_allclose(alone[0], drawn[2], rtol=1e-4, atol=1e-6)


def test_randomized_multilinear_map_by_given_matrices(float64, domains, class_logits):
    features, probabilities = domains[0], scipy.special.softmax(class_logits[0], axis=1)
    matrices = (
        np.sin(np.arange(20.0)).reshape(4, 5),
        np.cos(np.arange(15.0).reshape(3, 5)),
    )
    got = adversarial.randomized_multilinear_map(
        features, probabilities, projections=matrices
    )
    expected = (features @ matrices[0]) * (probabilities @ matrices[1]) / np.sqrt(5)
    np.testing.assert_allclose(got, expected, rtol=1e-12)


@pytest.mark.parametrize(
    "joint",
    [
        adversarial.multilinear_map,
        functools.partial(adversarial.randomized_multilinear_map, key=KEY, width=8),
    ],
    ids=["exact", "randomized"],
)
def test_multilinear_maps_mask_rows(domains, joint):
    features = jnp.asarray(domains[0], jnp.float32).at[2].set(jnp.nan)
    probabilities = jnp.full((6, 3), 1 / 3).at[2].set(jnp.nan)
    where = jnp.arange(6) != 2
    expected = joint(features[where], probabilities[where])

    def total(features):
        rows = joint(features, probabilities, where=where)
        return jnp.sum(rows * jnp.cos(rows)), rows

    gradient, rows = jax.grad(total, has_aux=True)(features)
    np.testing.assert_allclose(rows[where], expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(rows[2], 0.0)
    assert jnp.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[2], 0.0)


def test_inverted_labels_make_targets_source():
    target = jnp.asarray(TARGET)
    value = adversarial.inverted_label_adversarial(target)
    np.testing.assert_allclose(value, np.log1p(np.exp(-TARGET)), rtol=1e-6)
    as_source = adversarial.domain_adversarial(
        target, target, target_where=jnp.zeros(2, bool)
    )
    np.testing.assert_allclose(losses.mean(value), 2 * as_source, rtol=1e-6)
    lost = jax.grad(lambda z: adversarial.inverted_label_adversarial(z)[0])
    np.testing.assert_allclose(lost(jnp.array([-50.0])), [-1.0])


def test_domain_confusion_is_the_cross_entropy_with_uniform(float64, class_logits):
    logits = class_logits[0]
    expected = -np.log(scipy.special.softmax(logits, axis=1)).mean(axis=1)
    value = adversarial.domain_confusion(logits)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    binary = adversarial.domain_confusion(logits[:, 0])
    two = np.stack([np.zeros(6), logits[:, 0]], axis=1)
    np.testing.assert_allclose(binary, adversarial.domain_confusion(two), rtol=1e-12)
    value, gradient = jax.value_and_grad(
        lambda z: jnp.sum(adversarial.domain_confusion(z))
    )(jnp.full((1, 5), 7.0))
    np.testing.assert_allclose(value, np.log(5), rtol=1e-12)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-15)


@pytest.mark.parametrize(
    ("iteration", "golden"),
    [
        (0, 0.0),
        (100, 0.049958374957880025),
        (500, 0.2449186624037092),
        (1000, 0.4621171572600098),
    ],
)
def test_warm_start_of_tllib_is_the_ramp_over_ten_thousand_steps(
    float64, iteration, golden
):
    ramp = ops.dann(ops.progress(iteration, 10_000))
    np.testing.assert_allclose(ramp, golden, rtol=1e-12)


@pytest.mark.usefixtures("types_unchecked")
def test_says_what_is_wrong_with_conditioning():
    rows, logits = jnp.ones((4, 3)), jnp.zeros((4, 2))
    randomized = adversarial.randomized_multilinear_map
    with pytest.raises(ValueError, match="source_weights must be one an example"):
        adversarial.domain_adversarial(rows[:, 0], rows[:, 0], source_weights=rows)
    for joint in (adversarial.multilinear_map, randomized):
        with pytest.raises(ValueError, match=r"shapes \(4, 3\) and \(3, 2\)"):
            joint(rows, logits[:3])
    with pytest.raises(ValueError, match="or projections, got neither"):
        randomized(rows, logits)
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        randomized(rows, logits, key=KEY, width=0)
    with pytest.raises(ValueError, match=r"shapes \[\(3, 8\), \(2, 8\)\], got"):
        randomized(rows, logits, projections=(jnp.ones((3, 8)), jnp.ones((2, 7))))
    with pytest.raises(ValueError, match="normalization must be .* got 'none'"):
        adversarial.entropy_weights(logits, logits, normalization="none")
    with pytest.raises(ValueError, match="epsilon must not be negative, got -1"):
        adversarial.entropy_weights(logits, logits, epsilon=-1.0)
    with pytest.raises(ValueError, match=r"target_logits must be .* \(4,\)"):
        adversarial.entropy_weights(logits, logits[:, 0])
    with pytest.raises(ValueError, match=r"target_logits must be .* \(4, 2\)"):
        adversarial.inverted_label_adversarial(logits)
    with pytest.raises(ValueError, match=r"logits must be \[examples\] or"):
        adversarial.domain_confusion(jnp.ones((2, 2, 2)))
