"""Studies: one script each, run as ``python -m experiments.NAME``."""
