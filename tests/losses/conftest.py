"""Golden inputs, and one way to run a function under every transformation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.losses.case import det


@pytest.fixture(scope="session")
def student_logits():
    return det((8, 10), 1, 3.0)


@pytest.fixture(scope="session")
def teacher_logits():
    return det((8, 10), 2, 4.0)


@pytest.fixture(scope="session")
def domains():
    """Source and target features [6, 4] of the alignment goldens."""
    i, j = np.meshgrid(np.arange(1, 7), np.arange(1, 5), indexing="ij")
    source = np.sin(0.7 * i + 1.3 * j + 0.37 * i * j)
    target = np.cos(0.5 * i - 0.9 * j + 0.23 * i * j) + 0.3
    assert abs(source.sum() + 0.47397164040805406) < 1e-12
    assert abs(target.sum() - 6.660704438635431) < 1e-12
    return source, target


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def _vmapped(fn):
    def run(*args):
        stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), args)
        return jax.tree.map(lambda leaf: leaf[1], jax.vmap(fn)(*stacked))

    return run


def _pmapped(fn):
    def run(*args):
        count = jax.local_device_count()
        stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * count), args)
        return jax.tree.map(lambda leaf: leaf[-1], jax.pmap(fn)(*stacked))

    return run


@pytest.fixture(params=["jit", "vmap", "pmap"])
def transform(request):
    """A transformation of a function of arrays that must not change its result."""
    return {"jit": jax.jit, "vmap": _vmapped, "pmap": _pmapped}[request.param]
