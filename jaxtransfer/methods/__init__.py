"""Ways of transferring knowledge: each a function that returns an objective."""

from jaxtransfer.methods import adapt, distill, features, finetune, meta

__all__ = ["adapt", "distill", "features", "finetune", "meta"]
