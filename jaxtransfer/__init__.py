"""Knowledge transfer between deep models in pure JAX."""

__version__ = "0.1.0"
