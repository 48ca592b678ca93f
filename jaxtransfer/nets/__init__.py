"""Small reference networks."""

from jaxtransfer.nets.layers import NNXPatchConv, PatchConv
from jaxtransfer.nets.normalization import NNXStochNorm, StochNorm
from jaxtransfer.nets.vision import MLP, Conv4, Critic, LeNet, ResNet

__all__ = [
    "Conv4",
    "Critic",
    "LeNet",
    "MLP",
    "NNXPatchConv",
    "NNXStochNorm",
    "PatchConv",
    "ResNet",
    "StochNorm",
]
