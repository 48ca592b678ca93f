"""Photographs by domain and class, and what a pretrained network makes of them."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import StudyConfig, find
from jaxtransfer import data, nets, parallel, pretrained
from jaxtransfer.methods import features
from jaxtransfer.model import from_linen
from jaxtransfer.typing import Variables


@dataclasses.dataclass(frozen=True)
class PhotosConfig(StudyConfig):
    """Options of a study of photographs."""

    photos: str = "office_caltech10"
    """Folder DOMAIN/CLASS/IMAGE, or its name below --data-dir; "random" (patterns, and
    an untrained network) is for trying out."""
    domains: tuple[str, ...] = ()
    """Its subfolders that take part; all if there are none."""
    weights: str = "imagenet_mobilenet_v2_1.0_224.npz"
    """File of the pretrained network, under weights/ of a folder of --data-dir, or a
    path."""
    layout: Literal["keras", "timm", "torchvision"] = "keras"
    """Whose names it has; "keras" with the normalisation folded into the
    convolutions."""
    image_size: int = 224
    """Height and width in pixels that photographs are brought to."""


class Backbone(NamedTuple):
    """A MobileNetV2 as others have trained it."""

    net: nets.MobileNetV2
    names: Callable[[], pretrained.Naming]
    mean: float | tuple[float, ...]
    """Of pixels in 0 … 1, taken off them."""
    deviation: float | tuple[float, ...]
    """By which they are divided then."""
    tap: str
    """What the last ReLU6 is given."""


_FOLDED = nets.MobileNetV2(1001, padding="same", batch_norm=False)
_BY_CHANNEL = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bn2")
BACKBONES = {
    "keras": Backbone(
        _FOLDED, pretrained.keras_mobilenet_v2, 128 / 255, 128 / 255, "conv_head"
    ),
    "timm": Backbone(nets.MobileNetV2(1000), pretrained.torch, *_BY_CHANNEL),
    "torchvision": Backbone(
        nets.MobileNetV2(1000), pretrained.torchvision_mobilenet_v2, *_BY_CHANNEL
    ),
}


def read(config: PhotosConfig) -> dict[str, dict[str, Any]]:
    """``{"inputs", "labels", "names"}`` of each domain.

    Raises:
        ValueError: fewer than two domains, one that is not there, or other classes in
            one of them.
    """
    if config.photos == "random":
        return _patterns(config)
    folder = find("photos", config.photos, config, folder=True)
    there = sorted(
        place.name
        for place in folder.iterdir()
        if place.is_dir() and not place.name.startswith(".")
    )
    chosen = config.domains or tuple(there)
    if missing := [name for name in chosen if name not in there]:
        raise ValueError(f"domains: {folder} has no {missing}, but {there}")
    if len(chosen) < 2:
        raise ValueError(
            f"photos: {folder} has the domains {there}; at least two take part"
        )
    domains = {
        name: data.image_folder(folder / name, size=config.image_size, channels=3)
        for name in chosen
    }
    (first, one), *others = domains.items()
    for name, other in others:
        if other["names"] != one["names"]:
            raise ValueError(
                f"photos: the classes of {name}, {other['names']}, are not those of "
                f"{first}, {one['names']}; name the folders alike"
            )
    return domains


def _patterns(config: PhotosConfig) -> dict[str, dict[str, Any]]:
    """Three domains of three noisy patterns, each in a colour of its own."""
    random, size = np.random.default_rng(0), config.image_size
    classes = random.uniform(size=(3, size, size, 1))
    domains = {}
    for name in config.domains or ("red", "green", "blue"):
        labels = np.repeat(np.arange(3, dtype=np.int32), 8)
        noise = random.uniform(size=(len(labels), size, size, 1))
        pixels = (classes[labels] + noise) / 2 * random.uniform(size=3)
        inputs = pixels.astype(np.float32)
        domains[name] = {"inputs": inputs, "labels": labels, "names": ["a", "b", "c"]}
    return domains


def read_features(
    config: PhotosConfig, domains: dict[str, dict[str, Any]]
) -> dict[str, np.ndarray]:
    """Features ``[rows, features]`` of each domain, as the classifier sees them."""
    backbone = BACKBONES[config.layout]
    net = from_linen(backbone.net)
    example = jax.ShapeDtypeStruct((1, *(2 * [config.image_size]), 3), jnp.float32)
    if config.photos == "random":
        variables = jax.jit(net.init)(jax.random.key(0), jnp.zeros(example.shape))
    else:
        file = find("weights", config.weights, config, under="weights")
        variables, _ = pretrained.load(file, net, example, names=backbone.names())
    last = features.extract(net, tap=backbone.tap)
    mean, deviation = jnp.asarray(backbone.mean), jnp.asarray(backbone.deviation)

    @parallel.jit  # pooled at once: all maps of a domain are gigabytes
    def run(variables: Variables, pixels: jax.Array) -> jax.Array:
        found = last(variables, (pixels - mean) / deviation)
        return jnp.mean(nn.relu6(found), axis=(1, 2))

    def all_of(images: np.ndarray) -> np.ndarray:
        size = 32
        full = np.pad(images, [(0, -len(images) % size), *[(0, 0)] * 3])
        parts = [run(variables, part) for part in np.split(full, len(full) // size)]
        return np.concatenate(parts)[: len(images)]

    return {name: all_of(domain["inputs"]) for name, domain in domains.items()}
