"""Small reference networks."""

from jaxtransfer.nets.context import ConcatenatedContext, Context
from jaxtransfer.nets.folding import FoldedBatchNorm
from jaxtransfer.nets.layers import NNXPatchConv, PatchConv
from jaxtransfer.nets.mobilenet import MobileNetV2
from jaxtransfer.nets.normalization import NNXStochNorm, StochNorm
from jaxtransfer.nets.recommendation import UserPreference
from jaxtransfer.nets.resnet import ImageNetResNet
from jaxtransfer.nets.task_norm import TaskNorm
from jaxtransfer.nets.transformer import Transformer, decoding
from jaxtransfer.nets.vgg import VGG
from jaxtransfer.nets.vision import MLP, Conv4, Critic, LeNet, ResNet
from jaxtransfer.nets.vit import ViT

__all__ = [
    "ConcatenatedContext",
    "Context",
    "Conv4",
    "Critic",
    "FoldedBatchNorm",
    "ImageNetResNet",
    "LeNet",
    "MLP",
    "MobileNetV2",
    "NNXPatchConv",
    "NNXStochNorm",
    "PatchConv",
    "ResNet",
    "StochNorm",
    "TaskNorm",
    "Transformer",
    "UserPreference",
    "VGG",
    "ViT",
    "decoding",
]
