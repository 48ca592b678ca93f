"""Small reference networks."""

from jaxtransfer.nets.context import ConcatenatedContext, Context
from jaxtransfer.nets.layers import NNXPatchConv, PatchConv
from jaxtransfer.nets.normalization import NNXStochNorm, StochNorm
from jaxtransfer.nets.recommendation import UserPreference
from jaxtransfer.nets.task_norm import TaskNorm
from jaxtransfer.nets.vision import MLP, Conv4, Critic, LeNet, ResNet

__all__ = [
    "ConcatenatedContext",
    "Context",
    "Conv4",
    "Critic",
    "LeNet",
    "MLP",
    "NNXPatchConv",
    "NNXStochNorm",
    "PatchConv",
    "ResNet",
    "StochNorm",
    "TaskNorm",
    "UserPreference",
]
