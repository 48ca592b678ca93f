"""The cases of every public loss and score, one file a family."""

import importlib
import pkgutil

from tests.losses.case import Case

CASES: list[Case] = []
# Public functions that take no arrays of data (layers, critics given as functions) or
# return none (predictions of a label): name to reason.
WITHOUT: dict[str, str] = {}

for _module in pkgutil.iter_modules(__path__):
    _family = importlib.import_module(f"{__name__}.{_module.name}")
    CASES += _family.CASES
    WITHOUT |= getattr(_family, "WITHOUT", {})
