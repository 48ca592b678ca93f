"""Where the characters of the one-shot challenge come from, and which are judged."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer import data, prng

Set = Literal["background", "small1", "small2"]
SPLITS: dict[Set, str] = {"background": "train", "small1": "small1", "small2": "small2"}
WAYS = 20


@dataclasses.dataclass(frozen=True)
class Pool:
    """Drawings of one training set, on the device."""

    inputs: jax.Array
    index: data.ClassIndex
    groups: data.GroupIndex


def pool_of(arrays: Mapping[str, np.ndarray]) -> Pool:
    return Pool(
        jnp.asarray(arrays["inputs"]),
        data.class_index(arrays["labels"]),
        data.group_index(arrays["labels"], arrays["alphabet"]),
    )


def synthetic(
    key: jax.Array, alphabets: int, drawings: int, size: int
) -> dict[str, np.ndarray]:
    """Blots in the place of characters: 20 to an alphabet, each drawn several times."""
    blot_key, draw_key = prng.streams(key, "blots", "drawings")
    count = alphabets * WAYS
    coarse = jax.random.normal(blot_key, (count, 4, 4, 1))
    blots = jax.image.resize(coarse, (count, size, size, 1), "cubic") > 0.4
    labels = np.repeat(np.arange(count), drawings)
    inputs = data.random_affine(draw_key, blots.astype(jnp.float32)[labels])
    return {
        "inputs": np.asarray(inputs),
        "labels": labels,
        "alphabet": labels // WAYS,
    }


@dataclasses.dataclass(frozen=True)
class Characters:
    """Omniglot, or blots that need no data, as images of one size."""

    synthetic: bool
    size: int
    seed: int = 0
    data_dir: str | None = None

    def read(self, name: Set) -> dict[str, np.ndarray]:
        """The drawings of a set with their characters and alphabets."""
        if self.synthetic:
            key = prng.stream(jax.random.key(self.seed), name)
            return synthetic(key, 6 if name == "background" else 2, 8, self.size)
        return data.as_arrays(
            data.load("omniglot", SPLITS[name], data_dir=self.data_dir),
            size=self.size,
            channels=1,
            invert=True,
        )

    def challenge(self) -> tuple[data.ChallengeRuns, data.ChallengeRuns]:
        """The runs that are judged, at this size and at their own."""
        if self.synthetic:
            key = prng.stream(jax.random.key(self.seed), "challenge")
            images = synthetic(key, 2, 2, self.size)["inputs"]
            runs = as_runs(images.reshape(2, WAYS, 2, *images.shape[1:]))
            return runs, runs
        small = data.challenge_runs(size=self.size, data_dir=self.data_dir)
        return small, data.challenge_runs(data_dir=self.data_dir)

    def hold_out(
        self, background: Mapping[str, np.ndarray], number: int, tasks: int = 300
    ) -> tuple[dict[str, np.ndarray], data.ChallengeRuns]:
        """The background without some alphabets, and runs of those.

        Alphabets of the minimal sets stay in. Which are held out, and the runs, depend
        on ``number`` alone.

        Raises:
            ValueError: there are not so many that are large enough.
        """
        key = prng.stream(jax.random.key(0), "held out")
        labels, alphabets = background["labels"], background["alphabet"]
        taken = set()
        if not self.synthetic:
            for name in ("small1", "small2"):
                source = data.load("omniglot", name, data_dir=self.data_dir)
                taken |= set(data.as_arrays(source, size=1)["alphabet"].tolist())
        large = [
            alphabet
            for alphabet in np.unique(alphabets).tolist()
            if len(np.unique(labels[alphabets == alphabet])) >= WAYS
            and alphabet not in taken
        ]
        if number >= len(large):
            raise ValueError(
                f"held_out: {number} must be less than {len(large)}, the number of "
                f"background alphabets of {WAYS} characters or more in no minimal set"
            )
        order = np.asarray(jax.random.permutation(key, len(large)))[:number]
        held = np.isin(alphabets, [large[place] for place in order])
        pool = pool_of({name: values[held] for name, values in background.items()})
        episodes = data.sample(
            key,
            pool.inputs,
            pool.index,
            tasks=tasks,
            ways=WAYS,
            shots=1,
            queries=1,
            groups=pool.groups,
        )
        both = [episodes[part]["inputs"] for part in ("support", "query")]
        rest = {name: values[~held] for name, values in background.items()}
        return rest, as_runs(jnp.stack(both, axis=2))


def as_runs(images: Any) -> data.ChallengeRuns:
    """Runs of two drawings of each class, ``[runs, ways, 2, ...]``."""
    images = np.asarray(images)
    answers = np.broadcast_to(np.arange(WAYS, dtype=np.int32), images.shape[:2])
    return data.ChallengeRuns(images[:, :, 0], images[:, :, 1], answers)
