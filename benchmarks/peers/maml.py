"""Meta-steps of MAML in PyTorch, by its own means and by two libraries.

Each of :data:`FORMS` makes, of weights and episodes, a :class:`MetaStep`: Adam outside,
gradient descent inside, second order, batch statistics of the examples at hand.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.peers import Rows
from benchmarks.pytorch import device, waited_for

ROWS: Rows = {}
"""None: these are no losses."""

OUTER_RATE = 1e-3


class Setting(NamedTuple):
    """What is learned how.

    Attributes:
        strided: stride 2, or max pooling.
        steps: inner steps.
        rate: of the inner steps.
        filters: filters of each convolution.
        ways: classes of a task.
        tasks: of a meta-step.
    """

    strided: bool
    steps: int
    rate: float = 0.1
    filters: int = 64
    ways: int = 5
    tasks: int = 16


class MetaStep(NamedTuple):
    """A meta-step, to be called again and again.

    Attributes:
        run: does one and returns the outer loss.
        gradient: the outer gradient of the last one, by name.
    """

    run: Callable[[], Any]
    gradient: Callable[[], dict[str, np.ndarray]]


class Conv4(nn.Module):
    """Four 3x3 convolutions with batch statistics and ReLU, the mean, a linear head."""

    def __init__(self, setting: Setting, ways: int):
        super().__init__()
        stride, channels = 2 if setting.strided else 1, 1
        blocks = {}
        for number in range(4):
            layers: dict[str, nn.Module] = {
                "conv": nn.Conv2d(channels, setting.filters, 3, stride, padding=1),
                "norm": nn.BatchNorm2d(setting.filters, track_running_stats=False),
                "relu": nn.ReLU(),
            }
            if not setting.strided:
                layers["pool"] = nn.MaxPool2d(2)
            blocks[f"block_{number}"] = nn.Sequential(OrderedDict(layers))
            channels = setting.filters
        self.features = nn.Sequential(OrderedDict(blocks))
        self.head = nn.Linear(setting.filters, ways)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images).mean((2, 3)))


def network(setting: Setting, weights: dict[str, np.ndarray]) -> Conv4:
    """The network with given weights, in the layout of PyTorch."""
    net = Conv4(setting, len(weights["head.bias"]))
    net.load_state_dict({name: torch.tensor(w) for name, w in weights.items()})
    return net.to(device())


def episodes(arrays: dict[str, np.ndarray]) -> list[torch.Tensor]:
    """Support images and labels, then those of the query, with an axis of tasks."""
    return [torch.tensor(array, device=device()) for array in arrays.values()]


def with_adam(net: nn.Module, meta_loss: Callable[[], torch.Tensor]) -> MetaStep:
    """A meta-step of what leaves the outer gradient in the network's parameters."""
    outer = torch.optim.Adam(net.parameters(), lr=OUTER_RATE)

    def run() -> torch.Tensor:
        outer.zero_grad()
        loss = meta_loss()
        outer.step()
        return loss

    def gradient() -> dict[str, np.ndarray]:
        return {
            name: parameter.grad.cpu().numpy().copy()
            for name, parameter in net.named_parameters()
            if parameter.grad is not None
        }

    return MetaStep(waited_for(run), gradient)


def loop(setting: Setting, weights: Any, arrays: Any) -> MetaStep:
    """One task after the other with ``create_graph=True``: learn2learn's algorithm."""
    net, tasks = network(setting, weights), list(zip(*episodes(arrays), strict=True))
    names = [name for name, _ in net.named_parameters()]

    def meta_loss() -> torch.Tensor:
        total = torch.zeros((), device=device())
        for images, labels, queries, goals in tasks:
            fast = list(net.parameters())
            for _ in range(setting.steps):
                named = dict(zip(names, fast, strict=True))
                outputs = torch.func.functional_call(net, named, (images,))
                loss = F.cross_entropy(outputs, labels)
                slopes = torch.autograd.grad(loss, fast, create_graph=True)
                fast = [
                    weight - setting.rate * slope
                    for weight, slope in zip(fast, slopes, strict=True)
                ]
            named = dict(zip(names, fast, strict=True))
            outputs = torch.func.functional_call(net, named, (queries,))
            loss = F.cross_entropy(outputs, goals) / len(tasks)
            loss.backward()  # here, so that only one task's graph is held
            total += loss.detach()
        return total

    return with_adam(net, meta_loss)


def vmapped(setting: Setting, weights: Any, arrays: Any) -> MetaStep:
    """All tasks at once, by ``torch.func``: ``vmap`` of ``grad``."""
    net, tensors = network(setting, weights), episodes(arrays)

    def task_loss(named, images, labels):
        outputs = torch.func.functional_call(net, named, (images,))
        return F.cross_entropy(outputs, labels)

    def query_loss(named, images, labels, queries, goals):
        for _ in range(setting.steps):
            slopes = torch.func.grad(task_loss)(named, images, labels)
            named = {name: named[name] - setting.rate * slopes[name] for name in named}
        return task_loss(named, queries, goals)

    # The outer gradient within ``vmap`` as well: outside it, that of batch norm in
    # training mode is wrong (by 1 % in PyTorch 2.13, in float64 too).
    of_tasks = torch.func.vmap(
        torch.func.grad_and_value(query_loss), (None, 0, 0, 0, 0)
    )

    def meta_loss() -> torch.Tensor:
        named = {name: weight.detach() for name, weight in net.named_parameters()}
        slopes, losses = of_tasks(named, *tensors)
        for name, parameter in net.named_parameters():
            parameter.grad = slopes[name].mean(0)
        return losses.mean()

    return with_adam(net, meta_loss)


def by_higher(setting: Setting, weights: Any, arrays: Any) -> MetaStep:
    """One task after the other, by ``higher.innerloop_ctx``."""
    import higher

    net, tasks = network(setting, weights), list(zip(*episodes(arrays), strict=True))
    inner = torch.optim.SGD(net.parameters(), lr=setting.rate)

    def meta_loss() -> torch.Tensor:
        total = torch.zeros((), device=device())
        for images, labels, queries, goals in tasks:
            with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as pair:
                fast, descent = pair
                for _ in range(setting.steps):
                    descent.step(F.cross_entropy(fast(images), labels))
                loss = F.cross_entropy(fast(queries), goals) / len(tasks)
                loss.backward()
            total += loss.detach()
        return total

    return with_adam(net, meta_loss)


def by_torchopt(setting: Setting, weights: Any, arrays: Any) -> MetaStep:
    """One task after the other, by ``torchopt.MetaSGD``."""
    import torchopt

    net, tasks = network(setting, weights), list(zip(*episodes(arrays), strict=True))
    inner = torchopt.MetaSGD(net, lr=setting.rate)
    own = dict(net.named_parameters())

    def meta_loss() -> torch.Tensor:
        total = torch.zeros((), device=device())
        start = torchopt.extract_state_dict(net, by="reference")
        slots = torchopt.extract_state_dict(inner, by="reference")
        for images, labels, queries, goals in tasks:
            for _ in range(setting.steps):
                inner.step(F.cross_entropy(net(images), labels))
            loss = F.cross_entropy(net(queries), goals) / len(tasks)
            loss.backward()
            total += loss.detach()
            torchopt.recover_state_dict(net, start)
            torchopt.recover_state_dict(inner, slots)
        assert all(net.get_parameter(name) is weight for name, weight in own.items())
        return total

    return with_adam(net, meta_loss)


AT_ONCE = "torch.func, vmap of grad"
FORMS: dict[str, Callable[[Setting, Any, Any], MetaStep]] = {
    "PyTorch, loop over tasks": loop,
    AT_ONCE: vmapped,
    "higher": by_higher,
    "TorchOpt": by_torchopt,
}
NEEDS = {"higher": "higher", "TorchOpt": "torchopt"}
"""Modules that a form needs beside PyTorch."""
