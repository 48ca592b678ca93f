"""PyTorch on the device that JAX has: where its tensors lie, its precision, its memory.

On a GPU both multiply matrices and convolve in float32 by TF32 unless told otherwise
(PyTorch: convolutions only). A comparison gives both the same, by
:func:`set_precision`. JAX takes most of a GPU's memory at its start, and as much as it
needs if ``XLA_PYTHON_CLIENT_PREALLOCATE=false`` is set.
"""

import argparse
import functools
import typing
from collections.abc import Callable
from typing import Any, Literal

import jax
import torch

Precision = Literal["tf32", "float32"]
"""Of products and convolutions of float32 on a GPU; a CPU has float32 only."""


def device() -> torch.device:
    """The GPU if JAX computes on one, or the CPU.

    Raises:
        RuntimeError: JAX has a GPU and this PyTorch can't use it.
    """
    if jax.default_backend() != "gpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError(
            "JAX computes on a GPU, PyTorch can't; install a build with CUDA, or set "
            "JAX_PLATFORMS=cpu"
        )
    return torch.device("cuda")


def add_precision(parser: argparse.ArgumentParser, default: Precision) -> None:
    """The option ``--precision`` of a benchmark."""
    parser.add_argument(
        "--precision",
        choices=typing.get_args(Precision),
        default=default,
        help="of products on a GPU",
    )


def set_precision(name: Precision) -> Precision:
    """Give both the same precision; the one they have, for a CPU has one only."""
    if device().type == "cpu":
        return "float32"
    jax.config.update(
        "jax_default_matmul_precision", "tensorfloat32" if name == "tf32" else "float32"
    )
    torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    torch.backends.cudnn.allow_tf32 = name == "tf32"
    return name


def waited_for(run: Callable[[], Any]) -> Callable[[], Any]:
    """The call, at whose end the device has done all of it."""
    if device().type == "cpu":
        return run

    @functools.wraps(run)
    def call() -> Any:
        result = run()
        torch.cuda.synchronize()
        return result

    return call


def megabytes_on_gpu(run: Callable[[], Any]) -> float:
    """The most that a call holds at once beside what is there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    del result
    return (torch.cuda.max_memory_allocated() - before) / 1e6
