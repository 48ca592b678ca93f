"""Meta-gradients of a small convolutional network by PyTorch, in float64.

``python tests/golden/make_maml.py`` writes ``maml.npz`` beside itself (needs PyTorch).
It holds the episodes, the weights and, for ``{net}/{steps}/{order}``, the outer loss
followed by its gradient. Weights, rates and gradients are vectors: the leaves in the
order of their names, kernels as ``[height, width, channels, features]``. After the loss
``meta_sgd/3/second`` holds the gradient by the weights, then that by the rates.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

TASKS, WAYS, SHOTS, QUERIES, SIZE = 2, 3, 1, 2, 6
RATE = 0.4
FILTERS = (2, 3)
SHAPES = {
    "conv_0/bias": (2,),
    "conv_0/kernel": (3, 3, 1, 2),
    "conv_1/bias": (3,),
    "conv_1/kernel": (3, 3, 2, 3),
    "head/bias": (WAYS,),
    "head/kernel": (3, WAYS),
    "norm_0/bias": (2,),
    "norm_0/scale": (2,),
}
CASES = [("strided", steps, order) for steps in (1, 3, 5) for order in (2, 1)]
CASES += [("pooled", 3, 2)]


def outputs(weights, images, net):
    """The network on ``[rows, 1, height, width]``, normalised by their statistics."""
    x = images
    for number in range(len(FILTERS)):
        kernel = weights[f"conv_{number}/kernel"].permute(3, 2, 0, 1)
        if net == "strided":  # one more row and column where the size is even
            before = x.shape[-1] % 2
            x = F.pad(x, (before, 1, before, 1))
        x = F.conv2d(
            x,
            kernel,
            weights[f"conv_{number}/bias"],
            stride=2 if net == "strided" else 1,
            padding=0 if net == "strided" else 1,
        )
        if number == 0:
            mean = x.mean((0, 2, 3), keepdim=True)
            variance = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
            x = (x - mean) / (variance + 1e-5).sqrt()
            scale, shift = (weights[f"norm_0/{name}"] for name in ("scale", "bias"))
            x = x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
        x = F.relu(x)
        if net == "pooled":
            x = F.max_pool2d(x, 2)
    return x.mean((2, 3)) @ weights["head/kernel"] + weights["head/bias"]


def outer_loss(weights, rates, episodes, net, steps, order):
    """Mean query loss after ``steps`` of gradient descent on each task's support."""
    total = 0.0
    for task in range(TASKS):
        (images, labels), (query, goals) = (
            (episodes[f"{part}/inputs"][task], episodes[f"{part}/labels"][task])
            for part in ("support", "query")
        )
        fast = dict(weights)
        for _ in range(steps):
            loss = F.cross_entropy(outputs(fast, images, net), labels)
            slopes = torch.autograd.grad(
                loss, list(fast.values()), create_graph=order == 2
            )
            fast = {
                name: fast[name] - rates[name] * slope
                for name, slope in zip(fast, slopes, strict=True)
            }
        total = total + F.cross_entropy(outputs(fast, query, net), goals)
    return total / TASKS


def flat(leaves):
    return torch.cat([leaf.detach().reshape(-1) for leaf in leaves]).numpy()


def main() -> None:
    random = np.random.default_rng(0)
    arrays = {}
    for part, rows in (("support", WAYS * SHOTS), ("query", WAYS * QUERIES)):
        # float16 to keep the file small: exact in every wider format.
        images = random.standard_normal((TASKS, rows, SIZE, SIZE)).astype(np.float16)
        arrays[f"{part}/inputs"] = images
        arrays[f"{part}/labels"] = np.tile(
            np.arange(rows, dtype=np.int8) % WAYS, (TASKS, 1)
        )
    episodes = {
        name: torch.from_numpy(array.astype(np.int64))
        if name.endswith("labels")
        else torch.from_numpy(array.astype(np.float64))[:, :, None]
        for name, array in arrays.items()
    }
    weights, rates = {}, {}
    for name, shape in SHAPES.items():
        value = 0.5 * random.standard_normal(shape) + name.endswith("scale")
        weights[name] = torch.from_numpy(value).requires_grad_()
        rates[name] = torch.from_numpy(random.uniform(0.1, 0.6, shape)).requires_grad_()
    fixed = {name: torch.tensor(RATE, dtype=torch.float64) for name in SHAPES}
    arrays |= {"weights": flat(weights.values()), "rates": flat(rates.values())}
    for net, steps, order in CASES:
        loss = outer_loss(weights, fixed, episodes, net, steps, order)
        case = f"{net}/{steps}/{'second' if order == 2 else 'first'}"
        arrays[case] = flat([loss, *torch.autograd.grad(loss, list(weights.values()))])
    loss = outer_loss(weights, rates, episodes, "strided", 3, 2)
    wrt = [*weights.values(), *rates.values()]
    arrays["meta_sgd/3/second"] = flat([loss, *torch.autograd.grad(loss, wrt)])
    np.savez_compressed(Path(__file__).with_name("maml.npz"), **arrays)


if __name__ == "__main__":
    main()
