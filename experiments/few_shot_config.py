"""Options of the few-shot study, and its presets."""

import dataclasses
from typing import Literal, get_args

from experiments.common import StudyConfig
from jaxtransfer.methods import meta

MEASURES: dict[str, meta.Statistics] = {
    "transductive": "transductive",
    "support statistics": "support",
}
Method = Literal[
    "MAML",
    "FOMAML",
    "Reptile",
    "ANIL",
    "BOIL",
    "Meta-SGD",
    "MAML++",
    "MAML++ annealed",
    "meta-curvature",
    "CAVIA",
    "iMAML",
    "ProtoMAML",
    "ProtoNet",
    "ProtoNet in turns",
    "Matching",
    "Relation",
    "R2D2",
]
Baseline = Literal[
    "pretrained, head tuned",
    "pretrained, fine-tuned",
    "Baseline++",
    "SimpleShot",
    "nearest neighbour",
    "transductive fine-tuning",
]
ALL: tuple[Method, ...] = get_args(Method)
BASELINES: tuple[Baseline, ...] = get_args(Baseline)


@dataclasses.dataclass(frozen=True)
class Config(StudyConfig):
    """Options of the study."""

    dataset: Literal["omniglot", "digits"] = "omniglot"
    """Where the classes come from; digits (embedded, ten classes) is for trying out."""
    image_size: int = 28
    """Height and width of the images."""
    characters: tuple[int, int, int] = (1100, 100, 423)
    """Classes for meta-training, validation and test, drawn from the seed."""
    ways: int = 5
    """Classes of a task."""
    train_ways: int = 0
    """Classes of a task in meta-training; 0: as many as at test. Only for methods
    without an output of their own for each class, such as ProtoNet."""
    shots: int = 1
    """Support examples of a class."""
    also: tuple[tuple[int, int], ...] = ()
    """Further tests, (ways, shots) each, of the methods that any task suits."""
    distort: bool = False
    """Turn, shear, stretch and shift the images of meta-training a little."""
    queries: int = 3
    """Query examples of a class in meta-training."""
    test_queries: int = 5
    """Query examples of a class in validation and test."""
    filters: int = 32
    """Filters of each of the four convolutions."""
    tasks: int = 16
    """Tasks of a meta-step."""
    methods: tuple[Method, ...] = ALL
    """What is meta-trained."""
    baselines: tuple[Baseline, ...] = BASELINES
    """What is made of a pretrained network."""
    meta_steps: int = 1000
    """Updates of the meta-parameters, the same for every method."""
    learning_rate: float = 3e-3
    """Of Adam on the meta-parameters; falls to 0 along a cosine."""
    inner_steps: int = 1
    """Gradient steps of a task in meta-training; MAML++ takes at least 3, Reptile and
    iMAML 5."""
    inner_learning_rate: float = 0.4
    """Of the inner SGD on the mean cross-entropy (the published 0.4 is on a sum over
    classes: 2.0 here in 5-way tasks). Reptile and iMAML take half of it, ProtoMAML a
    twentieth, CAVIA 1.0 whatever it is."""
    steps: int = 10
    """Most gradient steps at test; how many are taken is chosen on validation tasks."""
    baseline_steps: int = 50
    """Most gradient steps of the baselines that tune."""
    pretrain_steps: int = 1500
    """Updates of the pretrained network."""
    pretrain_batch: int = 128
    """Batch size of the pretrained network."""
    validation_tasks: int = 100
    """Validation tasks, drawn from a fixed key; divides test_tasks."""
    test_tasks: int = 600
    """Test tasks, drawn from a fixed key, the same for all methods and seeds."""
    workers: int = 3
    """Seeds that run side by side, in threads. The table does not depend on it."""
    block: int = 100
    """Updates between two signs of progress; divides meta_steps and pretrain_steps."""


PRESETS = {
    "smoke": Config(
        dataset="digits",
        image_size=8,
        characters=(4, 3, 3),
        ways=3,
        filters=4,
        tasks=2,
        methods=("MAML", "ProtoNet"),
        baselines=("SimpleShot",),
        meta_steps=4,
        pretrain_steps=4,
        pretrain_batch=8,
        steps=2,
        baseline_steps=2,
        validation_tasks=4,
        test_tasks=8,
        block=2,
        seeds=2,
    ),
    "cpu": Config(),
    "paper": Config(
        queries=15,
        test_queries=15,
        filters=64,
        tasks=32,
        workers=1,
        meta_steps=60_000,
        learning_rate=1e-3,
        inner_learning_rate=2.0,
        pretrain_steps=20_000,
        validation_tasks=200,
        block=500,
    ),
}
