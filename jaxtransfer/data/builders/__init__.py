"""TFDS builders of data sets that TFDS doesn't have, without TensorFlow."""
