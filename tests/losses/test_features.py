import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

from jaxtransfer.losses import factors, features
from tests.losses.case import det


def _maps(shape, seed):
    """The golden maps, which are numbered with channels second."""
    return np.moveaxis(det(shape, seed), 1, -1)


STUDENT, TEACHER = _maps((8, 6, 4, 4), 3), _maps((8, 6, 4, 4), 4)
FOUR, LARGE = _maps((8, 4, 4, 4), 5), _maps((8, 6, 8, 8), 6)
LARGE_STUDENT = _maps((8, 6, 8, 8), 15)
PAIR = (STUDENT, TEACHER)
KERNELS = det((6, 4), 100, 0.5), det((6, 6), 101, 0.5), det((6, 6), 102, 0.5)
paper = functools.partial(factors.attention_transfer, form="paper")


def _variational(student, teacher):
    """With the reference's regressor of three 1 x 1 convolutions, all variances 5."""
    for kernel in KERNELS[:2]:
        student = jax.nn.relu(student @ kernel.T.astype(student.dtype))
    means = student @ KERNELS[2].T.astype(student.dtype)
    params = jnp.full(6, np.log(np.exp(5.0 - 1e-5) - 1.0), student.dtype)
    return features.variational_information_distillation(means, teacher, params)


GOLDEN = {
    "hint": (features.hint, PAIR, 0.643158132437, 0.05787730073),
    "attention": (
        factors.attention_transfer,
        (FOUR, TEACHER),
        0.0161126613445,
        0.008028350089,
    ),
    "attention, pooled": (
        factors.attention_transfer,
        (FOUR, LARGE),
        0.0221561580856,
        0.00956517462,
    ),
    "attention, paper": (paper, (FOUR, TEACHER), 0.502280560226, 0.129223681),
    "boundary": (
        lambda s, t: 8 * features.activation_boundary(s, t),
        PAIR,
        1008.15968401,
        63.50306084,
    ),
    "variational": (_variational, (FOUR, TEACHER), 0.838038122012, 0.000556435412),
    "factor, attention": (
        functools.partial(factors.factor_transfer, form="attention"),
        PAIR,
        0.0988033410967,
        0.02808843824,
    ),
    "context": (
        features.hierarchical_context,
        (LARGE_STUDENT, LARGE),
        0.393962730125,
        0.01812649537,
    ),
    "context, small": (
        features.hierarchical_context,
        PAIR,
        0.430186447908,
        0.03973744185,
    ),
    "reused classifier": (
        features.reused_classifier,
        PAIR,
        0.643158132437,
        0.05787730073,
    ),
    "channels": (factors.channel_distillation, PAIR, 0.290765433696, 0.02755327649),
    "pearson": (
        factors.pearson_feature_distillation,
        PAIR,
        0.979426640599,
        0.06332342584,
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(float64, name):
    loss, arrays, golden, length = GOLDEN[name]
    of = jax.jit(jax.value_and_grad(lambda s, t: jnp.mean(loss(s, t))))
    value, gradient = of(*map(jnp.asarray, arrays))
    np.testing.assert_allclose(value, golden, rtol=1e-9)
    np.testing.assert_allclose(jnp.linalg.norm(gradient), length, rtol=1e-9)
    narrow = [jnp.asarray(array, jnp.float32) for array in arrays]
    value, gradient = of(*narrow)
    np.testing.assert_allclose(value, golden, rtol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(gradient), length, rtol=1e-5)


def test_attention_of_masked_rows_is_zero_without_gradient():
    where = jnp.arange(8) != 2
    given = jnp.asarray(STUDENT, jnp.float32)
    weights = jnp.asarray(det((8, 4, 4), 103), jnp.float32)

    def total(maps, **options):
        attention = factors.attention_map(maps, **options)
        return jnp.sum(attention * weights), attention

    run = jax.value_and_grad(total, has_aux=True)
    (_, expected), slope = run(given)
    (value, got), gradient = run(given.at[2].set(jnp.nan), where=where)
    assert np.isfinite(value)
    np.testing.assert_array_equal(got, expected.at[2].set(0.0))
    np.testing.assert_array_equal(gradient, slope.at[2].set(0.0))


def test_pearson_of_constant_channels_is_zero():
    loss = jax.jit(jax.value_and_grad(factors.pearson_feature_distillation))
    for shape in ((8, 4, 4, 1), (8, 4, 4, 3), (64, 16, 16, 8)):
        value, gradient = loss(jnp.full(shape, 100.1), jnp.full(shape, 1000.1))
        assert value == 0.0 and not np.any(gradient)
        rounding = 1e-5 * np.sign(det(shape, 33))
        value, gradient = loss(100.1 + rounding, jnp.full(shape, 1000.1))
        assert value == 0.0 and not np.any(gradient)


def test_pearson_of_constant_channels_under_a_mask():
    maps, where = jnp.full((4, 3, 2), 100.1), jnp.array([False, True, True, False])
    loss = factors.pearson_feature_distillation
    assert loss(maps.at[0].set(7.0), 10.0 * maps, where=where) == 0.0


def test_pearson_of_a_constant_channel_beside_others():
    student, teacher = (maps[..., :3].astype(np.float32) + 33.3 for maps in PAIR)
    student[..., 1], teacher[..., 1:] = 100.1, 1000.1

    def run(dtype):
        with jax.enable_x64(dtype == "float64"):
            return jax.jit(jax.value_and_grad(factors.pearson_feature_distillation))(
                jnp.asarray(student, dtype), jnp.asarray(teacher, dtype)
            )

    got, exact = run("float32"), run("float64")
    np.testing.assert_allclose(got[0], exact[0], rtol=1e-5)
    # Of a constant channel every change is up, without limit but for epsilon.
    got, exact = (np.delete(gradient, 1, axis=-1) for _, gradient in (got, exact))
    np.testing.assert_allclose(got, exact, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize(
    ("scale", "bias", "golden"),
    [
        (1.0, 0.0, -0.797884560803),
        (0.5, 0.3, -0.307512880119),
        (-2.0, -1.0, -2.018320867674),
        (0.1, 1.0, -0.3),
    ],
)
def test_margin_golden(float64, scale, bias, golden):
    margin = features.overhaul_margin(jnp.array(scale), jnp.array(bias))
    np.testing.assert_allclose(margin, golden, rtol=1e-9)


@pytest.mark.parametrize(
    ("scale", "bias"), [(1.0, 0.5), (0.3, -0.2), (-2.0, 1.0), (0.5, 4.0)]
)
def test_margin_is_the_mean_below_zero(float64, scale, bias):
    def density(x):
        return np.exp(-0.5 * ((x - bias) / scale) ** 2)

    def integral(function):
        below = -20.0 * abs(scale)
        return scipy.integrate.quad(function, below, 0.0, epsabs=0.0, epsrel=1e-11)[0]

    expected = integral(lambda x: x * density(x)) / integral(density)
    margin = features.overhaul_margin(jnp.array(scale), jnp.array(bias), form="paper")
    np.testing.assert_allclose(margin, expected, rtol=1e-9)
