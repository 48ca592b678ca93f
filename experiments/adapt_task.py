"""A task of your own: a few labelled images a class adapt a meta-trained network.

--checkpoint is a folder networks/METHOD of a run of experiments.few_shot_omniglot.
--support holds CLASS/IMAGE, a few images of each class; the classes may differ in
number of images. --query holds the images to be told apart, or again CLASS/IMAGE: then
the accuracy is printed.

Images become what the network was trained on: grey, square, small, inverted if those
were (adapt_task.png shows them so, inverted ones again dark on light). Confidence is
the softmax of the outputs; it is not calibrated.
"""

import csv
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from experiments.common import StudyConfig, command_line, start_run
from experiments.few_shot_recipes import RECIPES
from experiments.few_shot_saved import ANY_WAYS, Saved, load
from experiments.figures import BASELINE, STYLE
from jaxtransfer import data
from jaxtransfer.methods import meta


@dataclasses.dataclass(frozen=True)
class Config(StudyConfig):
    """Options of the command."""

    checkpoint: Path = tyro.MISSING
    """Folder of a meta-trained network."""
    support: Path = tyro.MISSING
    """Folder of the labelled images, CLASS/IMAGE."""
    query: Path = tyro.MISSING
    """Folder of the images to predict, IMAGE or CLASS/IMAGE."""
    steps: int | None = None
    """Gradient steps; as saved with the network if None. Refused by methods that take
    none."""
    rate: float | None = None
    """Rate of the inner SGD, as it is taken; as in training if None. Refused by methods
    that learn their rates (Meta-SGD, MAML++) or take no gradient steps."""
    invert: bool | None = None
    """Invert the images; as in training if None. Networks of Omniglot want dark ink on
    light paper and invert it."""
    data_dir: tyro.conf.Suppress[str | None] = None
    seeds: tyro.conf.Suppress[int] = 1


PRESETS = {"cpu": Config()}


class Task(NamedTuple):
    """What a network has become on a task.

    Attributes:
        predict: ``inputs [rows, size, size, 1] -> probabilities [rows, classes]``.
        losses: on the support, before any step and after each, ``[steps + 1]``.
    """

    predict: Callable[[Any], np.ndarray]
    losses: np.ndarray


def adapt(
    saved: Saved,
    support: Mapping[str, Any],
    *,
    steps: int | None = None,
    rate: float | None = None,
    seed: int = 0,
) -> Task:
    """Adapt a meta-trained network to a task.

    Args:
        saved: from :func:`experiments.few_shot_saved.load`.
        support: ``inputs``, ``labels`` and ``names`` of ``data.image_folder``.
        steps: inner steps; as saved with the network if None. Not for methods that take
            none.
        rate: of the inner SGD, if another than in training; not for methods that learn
            their rates or take no gradient steps.
        seed: of the networks that draw while they adapt.

    Raises:
        ValueError: images of another size than the network's, fewer than two classes,
            more than it can tell apart, a rate that is not positive, or steps or a rate
            that are not for its method.
        FloatingPointError: a step diverged.
    """
    ways = len(support["names"])
    if ways < 2:
        raise ValueError(f"support: {ways} class; a task needs at least two")
    shape = (saved.image_size, saved.image_size, 1)
    if support["inputs"].shape[1:] != shape:
        raise ValueError(
            f"support: images are {support['inputs'].shape[1:]}, the network's are "
            f"{shape}; read them with data.image_folder(..., **saved.reading())"
        )
    data.check_labels(support["labels"], ways)
    learner, variables = saved.learner(ways, steps=steps, rate=rate)
    rows = {name: jnp.asarray(support[name]) for name in ("inputs", "labels")}
    if saved.method not in ANY_WAYS:  # the task may lack the head's last classes
        rows["classes"] = jnp.arange(saved.ways) < ways

    @jax.jit
    def run(variables: Any, rows: Any, key: jax.Array) -> meta.Adapted:
        params, state = variables

        def loss(params: Any, state: Any) -> jax.Array:
            return learner.query(params, {}, state, rows, key)[0]

        return learner.adapt(params, {}, state, rows, key, visit=loss)

    adapted = run(variables, rows, jax.random.key(seed))
    losses = np.asarray(adapted.visited)
    try:
        meta.check_finite({"loss": losses[None]})
    except FloatingPointError as error:
        cause = (
            "the steps diverged"
            if RECIPES[saved.method].no_rate
            else f"rate: {saved.rate if rate is None else rate:g} was too large"
        )
        raise FloatingPointError(
            f"{cause}, or the weights are not finite: {error}"
        ) from error

    @jax.jit
    def outputs(adapted: meta.Adapted, inputs: Any) -> jax.Array:
        assert learner.predict is not None
        found = learner.predict(adapted.params, {}, adapted.model_state, inputs)
        return jax.nn.softmax(found[:, :ways])

    return Task(lambda inputs: np.asarray(outputs(adapted, inputs)), losses)


COLUMNS = 12
"""Images in a row of the picture; the support's names take the place of two."""
SHOWN = 240
"""Query images in the picture; all are in predictions.csv."""
TALL = 1.6
"""Height of a query image with what is written below it, in image heights."""


def draw(
    path: Path,
    title: str,
    support: Mapping[str, Any],
    query: Mapping[str, Any],
    probabilities: np.ndarray,
    *,
    invert: bool,
) -> None:
    """The support by class, and each query image with prediction and confidence."""
    names, labels = support["names"], support["labels"]
    shown, fits = min(len(probabilities), SHOWN), COLUMNS - 2
    heights = len(names), TALL * -(-shown // COLUMNS)
    with matplotlib.rc_context(STYLE):
        canvas = Figure(figsize=(10, 0.83 * sum(heights) + 1), layout="constrained")
        above, below = canvas.subplots(2, 1, height_ratios=heights)
        for axes, height in ((above, heights[0]), (below, heights[1])):
            axes.set(xlim=(0, COLUMNS), ylim=(height, 0), aspect="equal")
            axes.set_axis_off()
        above.set_title(f"support by class ({title})")
        for c, name in enumerate(names):
            rows = np.flatnonzero(labels == c)
            count = f"{len(rows)}, shown: {fits}" if len(rows) > fits else len(rows)
            _write(above, 1.9, c + 0.3, _short(name, 22), _colour(c), ha="right")
            _write(above, 1.9, c + 0.5, f"images: {count}", BASELINE, ha="right")
            for column, row in enumerate(rows[:fits]):
                _image(above, column + 2, c, support["inputs"][row], invert)
        which = "query" if shown == len(probabilities) else f"first {shown} queries"
        wrong = ", ✗ true class where it is another" if "labels" in query else ""
        below.set_title(f"{which}: prediction, confidence{wrong}")
        for number, row in enumerate(probabilities[:shown]):
            line, column = divmod(number, COLUMNS)
            best, y = int(row.argmax()), TALL * line
            _image(below, column, y, query["inputs"][number], invert)
            place = (column + 0.04, y + 1), 0.92, 0.05
            below.add_patch(Rectangle(*place, color=_FRAME, lw=0))
            place = place[0], 0.92 * row[best], 0.05
            below.add_patch(Rectangle(*place, color=_colour(best), lw=0))
            middle = column + 0.5
            _write(below, middle, y + 1.07, _short(names[best], 14), _colour(best))
            text, colour = f"{100 * row[best]:.0f} %", BASELINE
            if "labels" in query and query["labels"][number] != best:
                true = names[query["labels"][number]]
                text, colour = f"{text} ✗ {_short(true, 8)}", "black"
            _write(below, middle, y + 1.25, text, colour)
        canvas.savefig(path, dpi=120)


_FRAME = STYLE["grid.color"]


def _colour(number: int) -> Any:
    return matplotlib.colormaps["tab10"](number % 10)


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"


def _image(axes: Axes, x: float, y: float, image: np.ndarray, invert: bool) -> None:
    place = (x + 0.04, x + 0.96, y + 0.96, y + 0.04)
    colours = "gray_r" if invert else "gray"
    axes.imshow(image[..., 0], colours, vmin=0, vmax=1, extent=place)
    corner = x + 0.04, y + 0.04
    axes.add_patch(Rectangle(corner, 0.92, 0.92, fill=False, color=_FRAME, lw=0.8))


def _write(
    axes: Axes, x: float, y: float, text: str, colour: Any, ha: str = "center"
) -> None:
    shape: dict[str, Any] = {"size": 7, "ha": ha, "va": "top", "parse_math": False}
    axes.text(x, y, text, color=colour, **shape)


def read(config: Config, saved: Saved) -> tuple[dict[str, Any], dict[str, Any], bool]:
    """Support, query, and whether they were inverted."""
    reading = saved.reading()
    if config.invert is not None:
        reading["invert"] = config.invert
    support = data.image_folder(config.support, **reading)
    query = data.image_folder(config.query, **reading, names=support["names"])
    if reading["invert"] and np.median(support["inputs"]) > 0.5:
        print("The support is dark with light ink, it seems: try --invert False.")
    return support, query, reading["invert"]


def main(config: Config) -> list[dict[str, Any]]:
    """Adapt, predict, draw.

    Returns:
        By query image: ``image``, ``prediction``, ``confidence``, ``class`` where it is
        known, ``probabilities`` by class.

    Raises:
        OSError: a folder is missing or can't be written to.
        ValueError: images, networks or options that don't fit, as the message says.
        FloatingPointError: a step diverged.
    """
    saved = load(config.checkpoint)
    support, query, invert = read(config, saved)
    options = {"steps": config.steps, "rate": config.rate, "seed": config.seed}
    task = adapt(saved, support, **options)
    folder = start_run("adapt_task", config)
    probabilities = task.predict(query["inputs"])
    names = support["names"]
    found = []
    for number, row in enumerate(probabilities):
        best = int(row.argmax())
        found.append(
            {
                "image": str(query["paths"][number]),
                "prediction": names[best],
                "confidence": float(row[best]),
                **_known(query, number),
                "probabilities": dict(zip(names, map(float, row), strict=True)),
            }
        )
    title = f"{saved.method}, {len(names)} classes"
    if len(task.losses) > 1:
        title += f", gradient steps: {len(task.losses) - 1}"
    draw(
        folder / "adapt_task.png",
        title,
        support,
        query,
        probabilities,
        invert=invert,
    )
    _record(folder, title, task, found)
    first, last = task.losses[[0, -1]]
    if last > first:
        rate = saved.rate if config.rate is None else config.rate
        remedy = f"a smaller --rate than {rate:g}"
        if RECIPES[saved.method].no_rate:
            remedy = "fewer --steps"
        print(
            f"Warning: the steps raised the loss on the support from {first:.4g} to "
            f"{last:.4g}; try {remedy}."
        )
    return found


def _known(query: Mapping[str, Any], number: int) -> dict[str, str]:
    if "labels" not in query:
        return {}
    return {"class": query["names"][query["labels"][number]]}


def _record(folder: Path, title: str, task: Task, found: list[dict[str, Any]]) -> None:
    """Write predictions.csv and predictions.json, and print what is in them."""
    with (folder / "predictions.csv").open("w", newline="", encoding="utf-8") as file:
        heads = [name for name in found[0] if name != "probabilities"]
        classes = list(found[0]["probabilities"])
        writer = csv.writer(file)
        writer.writerow([*heads, *(f"p({name})" for name in classes)])
        for row in found:
            values = [row[name] for name in heads]
            writer.writerow([*values, *row["probabilities"].values()])
    right = [row["prediction"] == row["class"] for row in found if "class" in row]
    accuracy = sum(right) / len(right) if right else None
    about = {"accuracy": accuracy, "support loss by step": task.losses.tolist()}
    text = json.dumps({"title": title, **about, "predictions": found}, indent=2)
    (folder / "predictions.json").write_text(text + "\n")
    for row in found:
        of = f" ({row['class']})" if "class" in row else ""
        print(f"{row['image']}: {row['prediction']} {row['confidence']:.0%}{of}")
    losses = " → ".join(f"{loss:.3f}" for loss in dict.fromkeys(task.losses[[0, -1]]))
    print(f"{title}; loss on the support: {losses}")
    if accuracy is not None:
        chance = f"chance is {100 / len(classes):.1f} %"
        print(f"accuracy: {sum(right)} of {len(right)}, {accuracy:.1%} ({chance})")
    print(f"picture and predictions in {folder}")


if __name__ == "__main__":
    command_line(main, PRESETS)
