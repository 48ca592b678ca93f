"""Small reference networks."""

from jaxtransfer.nets.layers import NNXPatchConv, PatchConv
from jaxtransfer.nets.vision import MLP, Conv4, Critic, LeNet, ResNet

__all__ = ["Conv4", "Critic", "LeNet", "MLP", "NNXPatchConv", "PatchConv", "ResNet"]
