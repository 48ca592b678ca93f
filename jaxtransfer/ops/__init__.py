"""Array operations that the losses, networks and methods are built from."""

from jaxtransfer.ops.chunked import chunked_mean
from jaxtransfer.ops.depthwise import depthwise_conv
from jaxtransfer.ops.fourier import fourier_sums
from jaxtransfer.ops.kernels import (
    mean_squared_distance,
    self_squared_distances,
    squared_distances,
)
from jaxtransfer.ops.pairwise import gaussian_kernel_sum
from jaxtransfer.ops.patches import conv, extract_patches, max_pool
from jaxtransfer.ops.pooling import adaptive_average_pool
from jaxtransfer.ops.products import gram, product
from jaxtransfer.ops.ramps import cosine, dann, linear, progress
from jaxtransfer.ops.reversal import gradient_reversal
from jaxtransfer.ops.search import Beams, beam_search, sample_tokens
from jaxtransfer.ops.shuffle import shuffled
from jaxtransfer.ops.sums import sum_first
from jaxtransfer.ops.varying import vary, varying_axes
from jaxtransfer.ops.winograd import winograd_conv

__all__ = [
    "Beams",
    "adaptive_average_pool",
    "beam_search",
    "chunked_mean",
    "conv",
    "cosine",
    "dann",
    "depthwise_conv",
    "extract_patches",
    "fourier_sums",
    "gaussian_kernel_sum",
    "gradient_reversal",
    "gram",
    "linear",
    "max_pool",
    "mean_squared_distance",
    "product",
    "progress",
    "sample_tokens",
    "self_squared_distances",
    "shuffled",
    "squared_distances",
    "sum_first",
    "vary",
    "varying_axes",
    "winograd_conv",
]
