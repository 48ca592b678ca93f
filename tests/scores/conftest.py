"""Golden inputs of the scores."""

import jax
import numpy as np
import pytest


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def ranking():
    """Features [12, 5], source probabilities [12, 4] and labels of the goldens."""
    i, j = np.meshgrid(np.arange(1, 13), np.arange(1, 6), indexing="ij")
    features = np.sin(0.7 * i + 1.3 * j + 0.37 * i * j)
    i, j = i[:, :4], j[:, :4]
    source = np.exp(2 * np.sin(1.1 * i + 0.6 * j + 0.31 * i * j))
    return features, source / source.sum(axis=1, keepdims=True), np.arange(12) % 3
