"""Options of the study of ratings, and its presets."""

import dataclasses
from typing import Literal

from experiments import ratings as lib
from experiments.common import StudyConfig


@dataclasses.dataclass(frozen=True)
class Config(StudyConfig):
    """Options of the study."""

    dataset: Literal["movielens_100k", "synthetic"] = "movielens_100k"
    """Ratings; the made-up ones are for trying out."""
    protocol: lib.Protocol = lib.Protocol()
    """What is new, and who counts."""
    identities: tuple[bool, ...] = (False, True)
    """Networks to run: without and with an embedding of the item itself."""
    hidden: float = 0.2
    """Part of the identities that is hidden in training."""
    embedding: int = 16
    """Width of an embedding."""
    widths: tuple[int, ...] = (64, 64)
    """Hidden decision layers."""
    weight_decay: float = 1.0
    """Of AdamW, times its learning rate, in all networks."""
    block: int = 100
    """Updates between two looks at the validation users; divides the numbers below."""
    tasks: int = 16
    """Users of a meta-step."""
    support: int = 40
    """Most support ratings of a user in meta-training."""
    updates: int = 300
    """Meta-steps."""
    learning_rates: tuple[float, ...] = (3e-3,)
    """Of AdamW on the meta-parameters, to choose from."""
    inner_rates: tuple[float, ...] = (0.05, 0.1)
    """Of the inner SGD, in meta-training and at test, to choose from."""
    inner_steps: int = 3
    """Gradient steps of a user in meta-training."""
    first_order: bool = False
    """Take the inner gradients as constants."""
    joint_updates: int = 400
    """Updates of the network without meta-learning."""
    joint_batch: int = 256
    """Ratings of its updates."""
    joint_learning_rates: tuple[float, ...] = (3e-3,)
    """Of its AdamW, to choose from."""
    tuning_rates: tuple[float, ...] = (0.03, 0.1)
    """Of its fine-tuning by SGD on a user's support, to choose from."""
    steps: int = 10
    """Most gradient steps at test; how many is chosen, for all networks."""
    bias_penalties: tuple[float, ...] = (1.0, 3.0, 10.0)
    """Of the biases, to choose from for users and for items."""
    factor_penalties: tuple[float, ...] = (2.0, 5.0, 10.0, 20.0)
    """Of the factors, to choose from."""
    ranks: tuple[int, ...] = (2, 8)
    """Factors, to choose from."""
    sweeps: int = 15
    """Turns of the alternating ridge regressions."""


PRESETS = {
    "smoke": Config(
        dataset="synthetic",
        protocol=lib.Protocol(most=60, queries=5),
        identities=(True,),
        embedding=4,
        widths=(8, 8),
        block=2,
        tasks=4,
        support=10,
        updates=4,
        inner_rates=(0.05,),
        inner_steps=1,
        joint_updates=4,
        joint_batch=16,
        joint_learning_rates=(3e-3,),
        tuning_rates=(0.01, 0.03),
        steps=2,
        bias_penalties=(3.0,),
        factor_penalties=(5.0,),
        ranks=(2,),
        sweeps=3,
        seeds=2,
    ),
    "cpu": Config(),
    "paper": Config(
        embedding=32,
        tasks=32,
        support=90,
        updates=2000,
        learning_rates=(3e-4, 1e-3, 3e-3),
        inner_rates=(0.01, 0.02, 0.05, 0.1),
        inner_steps=5,
        joint_updates=3000,
        joint_learning_rates=(3e-4, 1e-3, 3e-3),
        ranks=(2, 4, 8, 16),
        seeds=10,
    ),
}
