"""Weights of trained networks: from a file to variables and back, without PyTorch.

:func:`load` reads a file into the variables of a network, under strict rules, and
:func:`save` writes it back in the names and layout it was read in.

| network of `nets` | file | `names=` |
|---|---|---|
| `ResNet` (CIFAR) | the usual PyTorch names, head `linear` | `torch()` |
| `ImageNetResNet` | torchvision, timm | `torch()` |
| `VGG` | torchvision | `torch()` |
| `MobileNetV2` | timm; torchvision | `torch()`; `torchvision_mobilenet_v2()` |
| `MobileNetV2`, "same", no norm | Keras, folded | `keras_mobilenet_v2()` |
| `ViT` | timm; torchvision | `torch()`; `torchvision_vit()` |
| `ViT(activation=jax.nn.gelu)` | released with JAX | `jax_vit(heads=…)` |
| any | written by Flax or :func:`save` | `flax()` |

Names say nothing of what a network computes: its padding, the epsilon of its
normalisation and its activation must be those it was trained with, and so must the
preparation of its inputs. Nor do they say in which order a map is flattened: a dense
layer on one, as in `LeNet` and the unpooled `Conv4`, needs :func:`flattened`.
"""

from jaxtransfer.pretrained.adapt import (
    Adapter,
    classes,
    flattened,
    input_channels,
    position_embeddings,
)
from jaxtransfer.pretrained.families import (
    jax_vit,
    keras_mobilenet_v2,
    torchvision_mobilenet_v2,
    torchvision_vit,
)
from jaxtransfer.pretrained.files import read
from jaxtransfer.pretrained.loading import load, save
from jaxtransfer.pretrained.names import Entry, Leaf, Naming, Renames, flax, torch
from jaxtransfer.pretrained.report import Report

__all__ = [
    "Adapter",
    "Entry",
    "Leaf",
    "Naming",
    "Renames",
    "Report",
    "classes",
    "flattened",
    "flax",
    "input_channels",
    "jax_vit",
    "keras_mobilenet_v2",
    "load",
    "position_embeddings",
    "read",
    "save",
    "torch",
    "torchvision_mobilenet_v2",
    "torchvision_vit",
]
