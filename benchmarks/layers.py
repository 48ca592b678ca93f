"""Layers that XLA is slow at on a CPU: depthwise convolutions and pools.

``python -m benchmarks.layers``: value and gradients by the library's form, by JAX's own
and by PyTorch's where it is installed; then MobileNetV2, ResNet-18 and VGG-11 in
evaluation and in a step of fine-tuning, with the first form and with the second.
"""

import contextlib
import functools
import importlib.util
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.common import interleave, parser_of, report
from jaxtransfer import model, nets, ops, parallel, train
from jaxtransfer.methods import finetune
from jaxtransfer.nets import mobilenet, resnet, vgg

HERE, JAX, TORCH = "here", "JAX's own", "PyTorch"
_AROUND = ((1, 1), (1, 1))


class Layer(NamedTuple):
    """A layer: shapes of its arrays and its forms, of arrays as JAX has them."""

    shapes: tuple[tuple[int, ...], ...]
    here: Callable[..., jax.Array]
    jax: Callable[..., jax.Array]
    torch: Callable[..., Any]
    """Of tensors ``[n, channels, height, width]`` and ``[channels, 1, 3, 3]``."""


def depthwise(shape: tuple[int, ...], strides: int = 1) -> Layer:
    """A window of 3 x 3 for each channel."""

    def of_torch(x: Any, kernel: Any) -> Any:
        import torch.nn.functional as F

        return F.conv2d(x, kernel, stride=strides, padding=1, groups=x.shape[1])

    return Layer(
        (shape, (3, 3, 1, shape[-1])),
        functools.partial(ops.depthwise_conv, strides=strides, padding=1),
        functools.partial(
            jax.lax.conv_general_dilated,
            window_strides=(strides, strides),
            padding=_AROUND,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=shape[-1],
        ),
        of_torch,
    )


def pool(shape: tuple[int, ...], window: int, padding: int) -> Layer:
    """A maximum over windows, of step 2."""
    pads: Any = ((padding, padding),) * 2  # Flax's annotation knows only names

    def of_torch(x: Any) -> Any:
        import torch.nn.functional as F

        return F.max_pool2d(x, window, 2, padding)

    return Layer(
        (shape,),
        functools.partial(ops.max_pool, window=window, strides=2, padding=padding),
        functools.partial(
            nn.max_pool,
            window_shape=(window, window),
            strides=(2, 2),
            padding=pads,
        ),
        of_torch,
    )


LAYERS = {
    "depthwise, 144 channels of 56 x 56": depthwise((16, 56, 56, 144)),
    "depthwise, the same with step 2": depthwise((16, 56, 56, 144), 2),
    "depthwise, 384 channels of 14 x 14": depthwise((16, 14, 14, 384)),
    "depthwise, 960 channels of 7 x 7": depthwise((16, 7, 7, 960)),
    "pool 3 x 3, 64 channels of 112 x 112": pool((16, 112, 112, 64), 3, 1),
    "pool 2 x 2, 64 channels of 112 x 112": pool((16, 112, 112, 64), 2, 0),
}
NETWORKS = {
    "MobileNetV2": nets.MobileNetV2(10),
    "ResNet-18": nets.ImageNetResNet(10, depth=18),
    "VGG-11": nets.VGG(10, depth=11, width=512),
}


def by_jax(form: Callable[..., jax.Array], arrays: list[np.ndarray]) -> Callable:
    """A call of the mean square and its gradients."""
    places = tuple(range(len(arrays)))
    compiled = jax.jit(
        jax.value_and_grad(lambda *given: jnp.mean(form(*given) ** 2), places)
    )
    return functools.partial(compiled, *map(jnp.asarray, arrays))


def by_torch(form: Callable[..., Any], arrays: list[np.ndarray]) -> Callable:
    """The same by PyTorch, channels last."""
    import torch

    from benchmarks.pytorch import device, waited_for

    x = torch.tensor(arrays[0].transpose(0, 3, 1, 2), device=device())
    given = [x.to(memory_format=torch.channels_last).requires_grad_()]
    for kernel in arrays[1:]:
        moved = torch.tensor(kernel.transpose(3, 2, 0, 1), device=device())
        given.append(moved.contiguous().requires_grad_())
    back = [(0, 2, 3, 1), (2, 3, 1, 0)]

    def run() -> Any:
        loss = (form(*given) ** 2).mean()
        slopes = torch.autograd.grad(loss, given)
        return loss, tuple(
            slope.permute(order) for slope, order in zip(slopes, back, strict=False)
        )

    return waited_for(run)


def layers(rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of each layer, by form; all forms give the same numbers."""
    found, random = {}, np.random.default_rng(0)
    for name, layer in LAYERS.items():
        arrays = [random.normal(size=s).astype(np.float32) for s in layer.shapes]
        runs = {HERE: by_jax(layer.here, arrays), JAX: by_jax(layer.jax, arrays)}
        if importlib.util.find_spec("torch"):
            runs[TORCH] = by_torch(layer.torch, arrays)
        ours, *others = (jax.tree.leaves(run()) for run in runs.values())
        for other in others:
            for one, two in zip(ours, other, strict=True):
                two = two.detach().cpu().numpy() if hasattr(two, "detach") else two
                scale = np.abs(np.asarray(two)).max()
                np.testing.assert_allclose(one, two, atol=1e-5 * scale)
        found[name] = interleave(runs, rounds=rounds)
        report(f"value and gradients, batch 16: {name}", found[name], json_file=None)
    return found


@contextlib.contextmanager
def as_jax_has_them() -> Iterator[None]:
    """While a network is traced: JAX's own forms in place of the library's."""

    def pooled(x: Any, *, window: int = 2, strides: int = 2, padding: int = 0) -> Any:
        pads: Any = ((padding, padding),) * 2
        return nn.max_pool(x, (window, window), (strides, strides), pads)

    with (
        mock.patch.object(mobilenet, "PatchConv", nn.Conv),
        mock.patch.object(resnet, "max_pool", pooled),
        mock.patch.object(vgg, "max_pool", pooled),
    ):
        yield


def network(name: str, rounds: int, size: int, batch: int) -> dict[str, Any]:
    """Median seconds of a network in evaluation and in a step, with both forms."""
    images = jax.random.normal(jax.random.key(0), (batch, size, size, 3))
    net = model.from_linen(NETWORKS[name])
    variables = jax.jit(net.init)(jax.random.key(1), images[:1])
    optimizer = optax.sgd(0.1)
    data = {"inputs": images, "labels": jnp.arange(batch) % 10}
    evaluation, training, memory = {}, {}, {}
    for form, how in ((HERE, contextlib.nullcontext), (JAX, as_jax_has_them)):
        evaluate = parallel.jit(lambda v, x: net.apply(v, x)[0])
        state = train.init_state(jax.random.key(2), variables, optimizer)
        step = parallel.jit_step(
            train.train_step(finetune.objective(net), optimizer), donate=False
        )
        evaluation[form] = functools.partial(evaluate, variables, images)
        training[form] = lambda step=step, state=state: step(state, data)[0].params
        with how():
            program = step.lower(state, data).compile()
            jax.block_until_ready((evaluation[form](), training[form]()))
        memory[form] = program.memory_analysis().temp_size_in_bytes / 1e6
    found: dict[str, Any] = {"temporary megabytes of a step": memory}
    for what, runs in (("evaluation", evaluation), ("a step", training)):
        found[what] = interleave(runs, rounds=rounds)
        about = f"{name}, batch {batch} of {size} x {size}: {what}"
        report(about, found[what], json_file=None)
    print(f"  temporary megabytes of a step: {memory}")
    return found


def main() -> None:
    """Measure and report."""
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--size", type=int, default=224, help="of the images")
    parser.add_argument("--batch", type=int, default=8, help="of the networks")
    options = parser.parse_args()
    record = {"layers": layers(options.rounds)}
    given = options.rounds, options.size, options.batch
    record["networks"] = {name: network(name, *given) for name in NETWORKS}
    if options.json is not None:
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
