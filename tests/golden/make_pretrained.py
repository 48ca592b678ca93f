"""Outputs of small networks of random weights by PyTorch, stage by stage.

``python tests/golden/make_pretrained.py`` writes ``pretrained_{net}.npz`` beside itself
(needs PyTorch). Each holds the ``state_dict`` under ``weights/``, with the names of
torchvision (of timm for the vision transformer), an input ``[batch, channels, height,
width]`` of even size, and the outputs of modules under ``stages/``, at first that
of the first convolution, at last the logits. Weights and input are numbers of 16 bits,
the networks compute with 32. ``pretrained_resampled.npz`` holds resampled grids.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

HERE = Path(__file__).parent


def conv(before, after, size, stride=1, **options):
    options = {"bias": False, **options}
    return nn.Conv2d(before, after, size, stride, padding=size // 2, **options)


# --- ResNet --------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, before, filters, stride, bottleneck):
        super().__init__()
        after = filters * 4 if bottleneck else filters
        plan = [(before, filters, 3, stride), (filters, after, 3, 1)]
        if bottleneck:
            plan = [(before, filters, 1, 1), (filters, filters, 3, stride)]
            plan.append((filters, after, 1, 1))
        for number, step in enumerate(plan, 1):
            setattr(self, f"conv{number}", conv(*step))
            setattr(self, f"bn{number}", nn.BatchNorm2d(step[1]))
        self.count = len(plan)
        self.downsample = None
        if stride > 1 or before != after:
            self.downsample = nn.Sequential(
                conv(before, after, 1, stride), nn.BatchNorm2d(after)
            )

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        for number in range(1, self.count + 1):
            x = getattr(self, f"conv{number}")(x)
            x = getattr(self, f"bn{number}")(x)
            x = F.relu(x) if number < self.count else x
        return F.relu(x + shortcut)


class ResNet(nn.Module):
    def __init__(self, filters, stages, bottleneck):
        super().__init__()
        self.conv1 = conv(3, filters, 7, 2)
        self.bn1 = nn.BatchNorm2d(filters)
        before = filters
        for stage, count in enumerate(stages):
            blocks = []
            for number in range(count):
                stride = 2 if stage and not number else 1
                blocks.append(Residual(before, filters * 2**stage, stride, bottleneck))
                before = filters * 2**stage * (4 if bottleneck else 1)
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.stages = len(stages)
        self.fc = nn.Linear(before, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        return self.fc(x.mean((2, 3)))


# --- VGG-11 --------------------------------------------------------------------------


class VGG(nn.Module):
    def __init__(self, filters, width, normed):
        super().__init__()
        layers, before = [], 3
        for times in (1, "pool", 2, "pool", 4, 4, "pool", 8, 8, "pool", 8, 8, "pool"):
            if times == "pool":
                layers.append(nn.MaxPool2d(2))
                continue
            layers.append(conv(before, times * filters, 3, bias=True))
            before = times * filters
            layers += [nn.BatchNorm2d(before)] if normed else []
            layers.append(nn.ReLU())
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(before * 49, width),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(width, 5),
        )

    def forward(self, x):
        x = F.adaptive_avg_pool2d(self.features(x), (7, 7))
        return self.classifier(torch.flatten(x, 1))


# --- MobileNetV2 ---------------------------------------------------------------------


def normed_conv(before, after, size=1, stride=1, groups=1):
    return nn.Sequential(
        conv(before, after, size, stride, groups=groups),
        nn.BatchNorm2d(after),
        nn.ReLU6(),
    )


class Inverted(nn.Module):
    def __init__(self, before, after, stride, expansion):
        super().__init__()
        wide = before * expansion
        layers = [] if expansion == 1 else [normed_conv(before, wide)]
        layers.append(normed_conv(wide, wide, 3, stride, groups=wide))
        layers += [conv(wide, after, 1), nn.BatchNorm2d(after)]
        self.conv = nn.Sequential(*layers)
        self.adds = stride == 1 and before == after

    def forward(self, x):
        return x + self.conv(x) if self.adds else self.conv(x)


class MobileNetV2(nn.Module):
    def __init__(self, plan, last):
        super().__init__()
        layers, before = [normed_conv(3, 8, 3, 2)], 8
        for expansion, filters, count, stride in plan:
            for number in range(count):
                step = 1 if number else stride
                layers.append(Inverted(before, filters, step, expansion))
                before = filters
        layers.append(normed_conv(before, last))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, 5))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


# --- vision transformer --------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        x = F.scaled_dot_product_attention(query, key, value)
        return self.proj(x.transpose(1, 2).flatten(2))


class Perceptron(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Perceptron(width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, width, patch):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class ViT(nn.Module):
    def __init__(self, width, heads, depth, patch, patches):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, width))
        self.patch_embed = PatchEmbed(width, patch)
        self.blocks = nn.Sequential(*[Layer(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = self.norm(self.blocks(x + self.pos_embed))
        return self.head(x[:, 0])


# --- writing -------------------------------------------------------------------------


def randomize(net, rng):
    for name, value in net.state_dict().items():
        if name.endswith("num_batches_tracked"):
            value.fill_(7)
            continue
        drawn = rng.normal(size=tuple(value.shape))
        if name.endswith("running_var"):
            drawn = 0.5 + rng.random(tuple(value.shape))
        elif value.ndim > 1 and name.endswith("weight"):
            drawn *= np.sqrt(2 / np.prod(value.shape[1:]))
        elif name.endswith("weight"):
            drawn = 1 + 0.2 * drawn
        else:
            drawn *= 0.2
        value.copy_(torch.tensor(drawn.astype(np.float16)))


def write(name, net, stages, size):
    rng = np.random.default_rng(sum(map(ord, name)))
    randomize(net, rng)
    net.eval()
    found = {}
    for stage in stages:
        net.get_submodule(stage).register_forward_hook(
            lambda _, __, output, stage=stage: found.update({stage: output})
        )
    inputs = rng.normal(size=(1, 3, *size)).astype(np.float16)
    with torch.no_grad():
        net(torch.tensor(inputs, dtype=torch.float32))
    weights = {
        f"weights/{name}": value.numpy()
        if value.dtype == torch.int64
        else value.numpy().astype(np.float16)
        for name, value in net.state_dict().items()
    }
    outputs = {f"stages/{stage}": found[stage].numpy() for stage in stages}
    path = HERE / f"pretrained_{name}.npz"
    np.savez_compressed(path, inputs=inputs, **weights, **outputs)


def resampled():
    rng = np.random.default_rng(0)
    arrays = {"embeddings": rng.normal(size=(1, 1 + 6 * 6, 4)).astype(np.float32)}
    grid = torch.tensor(arrays["embeddings"][:, 1:]).reshape(1, 6, 6, 4)
    for size in ((9, 9), (4, 4), (3, 8)):
        other = F.interpolate(
            grid.permute(0, 3, 1, 2),
            size,
            mode="bicubic",
            antialias=True,
            align_corners=False,
        )
        other = other.permute(0, 2, 3, 1).reshape(1, -1, 4).numpy()
        other = np.concatenate([arrays["embeddings"][:, :1], other], axis=1)
        arrays[f"{size[0]}x{size[1]}"] = other
    np.savez_compressed(HERE / "pretrained_resampled.npz", **arrays)


def main():
    stages = [f"layer{stage}" for stage in range(1, 5)]
    stages = ["conv1", "bn1", *stages, "fc"]
    write("resnet18", ResNet(3, (2, 1, 2, 1), False), stages, (32, 32))
    write("resnet50", ResNet(2, (1, 2, 1, 1), True), stages, (32, 32))
    stages = ["features.0", "features.6", "features.18", "classifier.0", "classifier.6"]
    write("vgg11", VGG(2, 8, normed=False), stages, (32, 32))
    stages = ["features.0", "features.9", "features.25", "classifier.0", "classifier.6"]
    write("vgg11_bn", VGG(2, 8, normed=True), stages, (64, 64))
    plan = ((1, 8, 1, 1), (6, 8, 2, 2), (6, 16, 1, 2))
    stages = [f"features.{number}" for number in range(1, 5)]
    stages = ["features.0.0", *stages, "features.5.0", "classifier.1"]
    write("mobilenet_v2", MobileNetV2(plan, 16), stages, (32, 32))
    stages = ["patch_embed", "blocks.0.attn", "blocks.0", "blocks.1", "norm", "head"]
    write("vit", ViT(12, 3, 2, 8, 4 * 6), stages, (32, 48))
    resampled()


if __name__ == "__main__":
    torch.set_default_dtype(torch.float32)
    main()
