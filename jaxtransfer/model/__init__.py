"""The seam to networks: Linen and NNX modules as pairs of pure functions.

Both adapters give the same paths for the same network: parameters, model state and
taps are named by the modules' attribute names joined by ``/``, items of a list by
``name_0, name_1, …``.
"""

from jaxtransfer.model.heads import with_head as with_head
from jaxtransfer.model.linen import from_linen as from_linen
from jaxtransfer.model.nnx import from_nnx as from_nnx
