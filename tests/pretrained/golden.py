"""The golden networks: what PyTorch computed, and the networks that shall here."""

import pathlib

import numpy as np

from jaxtransfer import nets, pretrained

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "golden"
_MOBILE = {
    "width": 0.25,
    "stages": ((1, 16, 1, 1), (6, 24, 2, 2), (6, 64, 1, 2)),
    "last": 16,
}
_MOBILE_BLOCKS = (1, 2, 1)

# name: the network, how its file names things
NETWORKS = {
    "resnet18": (
        nets.ImageNetResNet(5, depth=18, filters=3, stages=(2, 1, 2, 1)),
        pretrained.torch(),
    ),
    "resnet50": (
        nets.ImageNetResNet(5, depth=50, filters=2, stages=(1, 2, 1, 1)),
        pretrained.torch(),
    ),
    "vgg11": (nets.VGG(5, depth=11, filters=2, width=8), pretrained.torch()),
    "vgg11_bn": (
        nets.VGG(5, depth=11, batch_norm=True, filters=2, width=8),
        pretrained.torch(),
    ),
    "mobilenet_v2": (
        nets.MobileNetV2(5, **_MOBILE),
        pretrained.torchvision_mobilenet_v2(blocks=_MOBILE_BLOCKS),
    ),
    "vit": (nets.ViT(5, width=12, depth=2, heads=3, patch=8), pretrained.torch()),
}

# PyTorch's stages whose modules have other names here
TAPS = {
    "layer1": "layer1_1",
    "layer2": "layer2_0",
    "layer3": "layer3_1",
    "layer4": "layer4_0",
}
TAPS_OF = {
    "resnet50": TAPS
    | {"layer1": "layer1_0", "layer2": "layer2_1"}
    | {"layer3": "layer3_0"},
    "mobilenet_v2": {
        "features.0.0": "conv_stem",
        "features.1": "blocks_0_0",
        "features.2": "blocks_1_0",
        "features.3": "blocks_1_1",
        "features.4": "blocks_2_0",
        "features.5.0": "conv_head",
        "classifier.1": "classifier",
    },
    "vit": {"blocks.0.attn": "blocks_0/attn", "blocks.0": "blocks_0"},
}


def tap(name: str, stage: str) -> str:
    """Path of the module here that computes a stage there."""
    taps = TAPS_OF.get(name, TAPS)
    return taps.get(stage, stage.replace(".", "_"))


class Golden:
    """Weights, input and outputs of a network, images with channels last."""

    def __init__(self, name: str):
        self.name = name
        with np.load(FOLDER / f"pretrained_{name}.npz") as stored:
            arrays = {key: stored[key] for key in stored.files}
        self.inputs = np.moveaxis(arrays["inputs"].astype(np.float32), 1, -1)
        self.weights = {
            key.removeprefix("weights/"): value
            if value.dtype == np.int64
            else value.astype(np.float32)
            for key, value in arrays.items()
            if key.startswith("weights/")
        }
        self.stages = {
            tap(name, key.removeprefix("stages/")): np.moveaxis(value, 1, -1)
            if value.ndim == 4
            else value
            for key, value in arrays.items()
            if key.startswith("stages/")
        }

    def write(self, folder: pathlib.Path, *, dtype: str | None = None) -> pathlib.Path:
        """Write the weights as PyTorch users have them."""
        from safetensors.numpy import save_file

        file = folder / f"{self.name}.safetensors"
        weights = {
            key: value.astype(dtype) if dtype and value.ndim else value
            for key, value in self.weights.items()
        }
        save_file(weights, file, metadata={"format": "pt"})
        return file


def error(here, there) -> float:
    """Largest difference, relative to the largest value."""
    return float(np.max(np.abs(np.asarray(here) - there)) / np.max(np.abs(there)))
