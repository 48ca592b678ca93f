"""Smaller networks: pruned, in 8-bit integers, measured, and exported.

All of it goes with distillation: :func:`pruned` wraps the optimizer and
:func:`quantized` the student, and the objective stays what it was.
"""

from jaxtransfer.compress.export import Exported as Exported
from jaxtransfer.compress.export import export_student as export_student
from jaxtransfer.compress.magnitude import KERNELS as KERNELS
from jaxtransfer.compress.magnitude import apply_masks as apply_masks
from jaxtransfer.compress.magnitude import masks as masks
from jaxtransfer.compress.magnitude import sparsity as sparsity
from jaxtransfer.compress.pruning import Pruned as Pruned
from jaxtransfer.compress.pruning import cubic_sparsity as cubic_sparsity
from jaxtransfer.compress.pruning import keep_pruned as keep_pruned
from jaxtransfer.compress.pruning import pruned as pruned
from jaxtransfer.compress.quantize import Quantized as Quantized
from jaxtransfer.compress.quantize import quantized as quantized
from jaxtransfer.compress.report import Measured as Measured
from jaxtransfer.compress.report import figure as figure
from jaxtransfer.compress.report import measure as measure
from jaxtransfer.compress.report import table as table
