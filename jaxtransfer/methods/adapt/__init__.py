"""Domain adaptation: one function for a labelled source and an unlabelled target.

Learned: the network (``params["model"]``) and, for adversarial terms, a critic
(``params["critic"]``). The model state counts updates, which ramps read.
"""

from jaxtransfer.methods.adapt.objective import init, objective, predict
from jaxtransfer.methods.adapt.terms import (
    Domain,
    Term,
    Weight,
    align,
    cdan,
    compare,
    dann,
)

__all__ = [
    "Domain",
    "Term",
    "Weight",
    "align",
    "cdan",
    "compare",
    "dann",
    "init",
    "objective",
    "predict",
]
