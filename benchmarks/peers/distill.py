"""Steps of knowledge distillation in PyTorch: the CIFAR ResNet, SGD with momentum."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.peers import Rows
from benchmarks.pytorch import device, waited_for

ROWS: Rows = {}
"""None: these are no losses."""

FORMATS = {
    "contiguous": torch.contiguous_format,
    "channels last": torch.channels_last,
}
"""Layouts of images in memory: PyTorch's default, and the one it is quicker in."""


class Settings(NamedTuple):
    """Of the loss and of the update.

    Attributes:
        temperature: of both predictions.
        alpha: weight of the teacher, the labels have the rest.
        rate: learning rate.
        momentum: of SGD.
    """

    temperature: float = 4.0
    alpha: float = 0.9
    rate: float = 0.05
    momentum: float = 0.9


class _Block(nn.Module):
    def __init__(self, before: int, filters: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(before, filters, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(filters)
        self.stride, self.more = stride, filters - before

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = F.relu(self.bn1(self.conv1(x)))
        inner = self.bn2(self.conv2(inner))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if self.more:
            half = self.more // 2
            shortcut = F.pad(shortcut, (0, 0, 0, 0, half, self.more - half))
        return F.relu(inner + shortcut)


class ResNet(nn.Module):
    """Depth 6n + 2 with shortcuts without parameters, as ``nets.ResNet``."""

    def __init__(self, classes: int, depth: int, filters: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, filters, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(filters)
        before, self.blocks = filters, []
        for stage in range(3):
            for number in range((depth - 2) // 6):
                after, name = filters * 2**stage, f"layer{stage + 1}_{number}"
                stride = 2 if stage and not number else 1
                self.add_module(name, _Block(before, after, stride))
                self.blocks.append(name)
                before = after
        self.linear = nn.Linear(before, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for name in self.blocks:
            x = getattr(self, name)(x)
        return self.linear(x.mean((2, 3)))


def network(depth: int, filters: int, weights: Mapping[str, np.ndarray]) -> ResNet:
    """The network with given weights, in the layout of PyTorch."""
    net = ResNet(len(weights["linear.bias"]), depth, filters)
    given = {name: torch.tensor(array) for name, array in weights.items()}
    missing, unknown = net.load_state_dict(given, strict=False)
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unknown:
        raise ValueError(f"weights: missing {missing}, unknown {unknown}")
    return net.to(device())


class Step(NamedTuple):
    """An update of the student, to be called again and again.

    Attributes:
        online: runs the teacher too; returns the loss.
        cached: takes logits that are there already.
        gradient: of the last update, by name.
    """

    online: Callable[[], Any]
    cached: Callable[[], Any]
    gradient: Callable[[], dict[str, np.ndarray]]


def make_step(
    teacher: ResNet,
    student: ResNet,
    images: np.ndarray,
    labels: np.ndarray,
    layout: str,
    settings: Settings,
) -> Step:
    """Both forms of an update.

    Args:
        teacher: in evaluation mode from now on.
        student: changed by every update.
        images: ``[batch, height, width, channels]``.
        labels: ``[batch]``.
        layout: one of :data:`FORMATS`.
        settings: of loss and update.
    """
    order: Any = FORMATS[layout]
    teacher.to(memory_format=order).eval()  # pyright: ignore[reportCallIssue]
    student.to(memory_format=order).train()  # pyright: ignore[reportCallIssue]
    inputs = torch.tensor(np.ascontiguousarray(np.moveaxis(images, -1, 1)))
    inputs = inputs.to(device(), memory_format=order)
    goals = torch.tensor(labels.astype(np.int64), device=device())
    optimizer = torch.optim.SGD(
        student.parameters(), lr=settings.rate, momentum=settings.momentum
    )

    @torch.no_grad()
    def taught() -> torch.Tensor:
        return teacher(inputs)

    def update(logits: torch.Tensor) -> torch.Tensor:
        own = student(inputs)
        heat = settings.temperature
        soft = F.kl_div(
            F.log_softmax(own / heat, -1),
            F.log_softmax(logits / heat, -1),
            log_target=True,
            reduction="batchmean",
        )
        loss = settings.alpha * heat**2 * soft
        loss = loss + (1 - settings.alpha) * F.cross_entropy(own, goals)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    stored = taught()

    def gradient() -> dict[str, np.ndarray]:
        return {
            name: parameter.grad.cpu().numpy().copy()
            for name, parameter in student.named_parameters()
            if parameter.grad is not None
        }

    online, cached = lambda: update(taught()), lambda: update(stored)
    return Step(waited_for(online), waited_for(cached), gradient)
