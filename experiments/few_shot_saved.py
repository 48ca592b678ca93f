"""Meta-trained networks as they are kept: weights, and what they are weights of.

A folder holds ``network.json`` and the checkpoint ``weights``.
"""

import dataclasses
import difflib
import json
import math
import os
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import optax

from experiments.few_shot_recipes import (
    RECIPES,
    Build,
    Setting,
    make_setting,
    network,
)
from jaxtransfer.methods import meta
from jaxtransfer.train import Checkpointer, DamagedCheckpointError, init_state
from jaxtransfer.typing import Params, Variables

ABOUT = "network.json"
WEIGHTS = "weights"
VERSION = 2
"""Of ``network.json``; in the first, which does not say it, ``rate`` is the study's."""
ANY_WAYS = (
    "ProtoMAML",
    "ProtoNet",
    "ProtoNet in turns",
    "Matching",
    "Relation",
    "R2D2",
)
"""Methods whose classifier is made of the support, so that a task may have any number
of classes; the others have a head of as many outputs as in training."""


@dataclasses.dataclass(frozen=True)
class Saved:
    """A meta-trained network.

    Attributes:
        method: name of its recipe.
        filters: of each convolution.
        image_size: height and width of its images, which have one channel.
        ways: classes of a task in training.
        shots: support examples of a class in training.
        rate: of the inner SGD in training, where the method has one; where it learns
            rates, their start.
        steps: inner steps in training.
        test_steps: inner steps when it adapts, unless told otherwise.
        statistics: whose batch statistics normalise when it adapts.
        invert: whether its images were inverted, so that ink is 1.
        variables: meta-parameters and state.
    """

    method: str
    filters: int
    image_size: int
    ways: int
    shots: int
    rate: float
    steps: int
    test_steps: int
    statistics: meta.Statistics
    invert: bool
    variables: Variables

    def reading(self) -> dict[str, Any]:
        """How images are read for it: arguments of ``data.image_folder``."""
        return {"size": self.image_size, "channels": 1, "invert": self.invert}

    def learner(
        self, ways: int, *, steps: int | None = None, rate: float | None = None
    ) -> tuple[meta.Learner, Variables]:
        """The learner for a task, and the meta-parameters it begins with.

        Args:
            ways: classes of the task.
            steps: inner steps; ``test_steps`` if None. Not for methods that take none.
            rate: of the inner SGD, if another than in training.

        Raises:
            ValueError: more classes than the head has outputs, a rate that is not
                positive, or steps or a rate for a method that has none to choose.
        """
        free = self.method in ANY_WAYS
        if ways > self.ways and not free:
            raise ValueError(
                f"support: {ways} classes, but this {self.method} network has a head "
                f"of {self.ways}; take classes out, train one with --ways {ways}, or "
                f"use one of {', '.join(ANY_WAYS)}, which take any number"
            )
        if steps is not None and not RECIPES[self.method].descends:
            raise ValueError(
                f"steps: got {steps}, but {self.method} takes no gradient steps; leave "
                "it out"
            )
        if rate is not None:
            if why := RECIPES[self.method].no_rate:
                raise ValueError(
                    f"rate: got {rate:g}, but {self.method} has none to choose: {why}; "
                    "leave it out"
                )
            if not 0 < rate < math.inf:
                raise ValueError(f"rate: got {rate:g}; it must be positive and finite")
        build, setting = _setting(_about(self))
        setting = dataclasses.replace(
            setting,
            ways=ways if free else self.ways,
            steps=self.test_steps if steps is None else steps,
            rate=self.rate if rate is None else rate,
        )
        variables = self.variables
        if self.method == "ProtoMAML":
            setting = dataclasses.replace(setting, model=network(ways, self.filters))
            variables = variables._replace(params=_with_room(variables.params, ways))
        return build(setting), variables


def _with_room(params: Params, ways: int) -> Params:
    """Another number of outputs for a head whose values are not read."""
    width = len(params["head"]["kernel"])
    head = {"kernel": jnp.zeros((width, ways)), "bias": jnp.zeros(ways)}
    return {**params, "head": head}


def _about(saved: Saved) -> dict[str, Any]:
    return {
        field.name: getattr(saved, field.name)
        for field in dataclasses.fields(saved)
        if field.name != "variables"
    }


def _setting(about: dict[str, Any]) -> tuple[Build, Setting]:
    """Recipe and setting of the training."""
    recipe = RECIPES[about["method"]]
    assert recipe.build is not None
    return recipe.build, make_setting(
        recipe,
        ways=about["ways"],
        filters=about["filters"],
        image_size=about["image_size"],
        steps=about["steps"],
        rate=about["rate"],
        statistics=about["statistics"],
    )


def _image(about: dict[str, Any]) -> jax.Array:
    return jnp.zeros((1, about["image_size"], about["image_size"], 1))


def _blank(about: dict[str, Any]) -> Variables:
    """Zeros of the structure that the meta-parameters have."""
    build, setting = _setting(about)
    learner = build(setting)
    shapes = jax.eval_shape(
        lambda key: learner.init(setting.model.init(key, _image(about))),
        jax.random.key(0),
    )
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def save(
    folder: str | os.PathLike[str],
    *,
    method: str,
    filters: int,
    image_size: int,
    ways: int,
    shots: int,
    rate: float,
    steps: int,
    statistics: meta.Statistics,
    variables: Variables,
    invert: bool,
    test_steps: int | None = None,
) -> None:
    """Write a meta-trained network to a folder of its own.

    Args:
        folder: is made; must not hold a network.
        method: as the other arguments, an attribute of :class:`Saved`.
        filters: see above.
        image_size: see above.
        ways: see above.
        shots: see above.
        rate: see above.
        steps: see above.
        statistics: see above.
        variables: of the learner: without the count of updates.
        invert: see above.
        test_steps: see above, such as the number that was best on validation tasks;
            ``steps`` if None.

    Raises:
        ValueError: no recipe of ``method``, or one that is not meta-trained.
        FileExistsError: there is a network in the folder.
        OSError: the folder can't be written to.
    """
    _check_method(method)
    about = {
        "version": VERSION,
        "method": method,
        "filters": filters,
        "image_size": image_size,
        "ways": ways,
        "shots": shots,
        "rate": rate,
        "steps": steps,
        "test_steps": steps if test_steps is None else test_steps,
        "statistics": statistics,
        "invert": invert,
    }
    folder = Path(folder).expanduser()
    state = init_state(jax.random.key(0), variables, optax.identity())
    with Checkpointer(folder / WEIGHTS) as checkpointer:
        checkpointer.save(0, state)
        checkpointer.wait()
    (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n")


def load(folder: str | os.PathLike[str]) -> Saved:
    """Read a network that :func:`save` wrote.

    Args:
        folder: ``networks/METHOD`` in the run folder of the study that trained it.

    Raises:
        FileNotFoundError: there is no such folder, or no network in it.
        DamagedCheckpointError: its files are truncated or changed.
        ValueError: ``network.json`` describes another network than the weights are of,
            or one that this version does not know.
    """
    folder = Path(folder).expanduser()
    about = _read_about(folder)
    again = f"train it again: {_command(about['method'])}"
    state = init_state(jax.random.key(0), _blank(about), optax.identity())
    try:
        if not (folder / WEIGHTS).is_dir():
            raise FileNotFoundError(f"there is no folder {WEIGHTS!r} in it")
        with Checkpointer(folder / WEIGHTS) as checkpointer:
            state = checkpointer.restore(state)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"checkpoint {str(folder)!r} is not complete ({error}); copy the whole "
            f"folder, or {again}"
        ) from error
    except DamagedCheckpointError as error:
        raise DamagedCheckpointError(
            f"checkpoint {str(folder)!r} is damaged ({error.__cause__ or error}); copy "
            f"the whole folder again, or {again}"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"checkpoint {str(folder)!r}: its weights are not those of the network in "
            f"its {ABOUT}, {about['method']} with {about['filters']} filters "
            f"({error}); copy the whole folder of one network, or {again}"
        ) from error
    return Saved(**about, variables=Variables(state.params, state.model_state))


def _command(method: str) -> str:
    return f'python -m experiments.few_shot_omniglot --methods "{method}"'


def _read_about(folder: Path) -> dict[str, Any]:
    file = folder / ABOUT
    if not file.is_file():
        pattern = (f"*/{ABOUT}", f"networks/*/{ABOUT}")
        near = sorted(str(found.parent) for p in pattern for found in folder.glob(p))
        hint = (
            f"did you mean one of {near}?"
            if near
            else f"give networks/METHOD of a run of {_command('ProtoNet')}"
        )
        what = f"has no {ABOUT}" if folder.is_dir() else "is no folder"
        raise FileNotFoundError(f"checkpoint {str(folder)!r} {what}; {hint}")
    names = {field.name for field in dataclasses.fields(Saved)} - {"variables"}
    try:
        about = json.loads(file.read_text())
    except ValueError as error:
        raise DamagedCheckpointError(
            f"checkpoint {str(folder)!r} is damaged: {ABOUT} can't be read ({error}); "
            "copy the whole folder again, or train the network again"
        ) from error
    if not isinstance(about, dict) or set(about) - {"version"} != names:
        raise ValueError(
            f"checkpoint {str(folder)!r}: {ABOUT} is not of a few-shot network: it has "
            f"{sorted(about)} where {sorted(names)} are needed; "
            f"give networks/METHOD of a run of {_command('ProtoNet')}"
        )
    version = about.pop("version", 1)
    if version not in (1, VERSION):
        raise ValueError(
            f"checkpoint {str(folder)!r}: {ABOUT} has version {version!r}, not 1 or "
            f"{VERSION}; load it with the version of this library that trained it"
        )
    try:
        _check_method(about["method"])
    except ValueError as error:
        raise ValueError(
            f"checkpoint {str(folder)!r}: {error}; load it with the version that "
            "trained it, or train one of these"
        ) from error
    try:
        _check_values(about)
    except ValueError as error:
        raise ValueError(
            f"checkpoint {str(folder)!r}: {ABOUT}: {error}; copy the whole folder again"
        ) from error
    if version == 1:
        about["rate"] = RECIPES[about["method"]].rate(about["rate"])
    return about


def _check_values(about: dict[str, Any]) -> None:
    least = {"filters": 1, "image_size": 1, "ways": 1, "shots": 1}
    for name, low in {**least, "steps": 0, "test_steps": 0}.items():
        value = about[name]
        if type(value) is not int or value < low:
            raise ValueError(f"{name} is {value!r}, not a whole number from {low} on")
    rate, known = about["rate"], get_args(meta.Statistics)
    if type(rate) not in (int, float) or not 0 <= rate < math.inf:
        raise ValueError(f"rate is {rate!r}, not a finite number from 0 on")
    if about["statistics"] not in known:
        raise ValueError(f"statistics is {about['statistics']!r}, none of {known}")
    if type(about["invert"]) is not bool:
        raise ValueError(f"invert is {about['invert']!r}, not true or false")


def _check_method(method: str) -> None:
    known = [name for name, recipe in RECIPES.items() if recipe.build]
    if method not in known:
        near = difflib.get_close_matches(str(method), known, n=1)
        hint = f" (nearest: {near[0]!r})" if near else ""
        raise ValueError(f"method {method!r} is none of {known}{hint}")
