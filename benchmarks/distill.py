"""What does a step of distillation cost with its teacher run, and looked up?

``python -m benchmarks.distill [--only WORDS] [--rounds N] [--fresh] [--precision NAME]
[--json FILE]``: an update of a student ResNet-8 (SGD with momentum, KD of logits,
images of 32 x 32, batch 64) with a teacher that is run within the compiled step, run in
a call of its own, or looked up in a cache on the device or on the disk; beside PyTorch,
with its images contiguous or channels last. Ours run on one device, and with the batch
shared by one for each core, for XLA runs some convolutions on one core only. All forms
get the same weights and must return the same loss and gradient. Needs PyTorch. All run
with `jaxtransfer.parallel.keep_host_memory`, unless ``--fresh`` is given.

``--accuracy`` adds a real task, if ``JAXTRANSFER_DATA_DIR`` (or ``--data-dir``) has
cifar10 and ``weights/cifar10_resnet56.safetensors``: the time until the student reaches
an accuracy on images of the training split that it is not trained on. The students with
the teacher run and looked up are the same bit for bit, so only their times differ; that
of writing the cache counts. Of the two and a student with labels alone, epochs are
trained in turn.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from benchmarks import pytorch
from benchmarks.common import interleave, parser_of, report, shards
from benchmarks.peers import distill as peers
from jaxtransfer import data, nets, parallel, pretrained, train, tree
from jaxtransfer.methods import distill
from jaxtransfer.model import from_linen
from jaxtransfer.typing import Model, Variables

BATCH, IMAGES, SIZE, CLASSES = 64, 512, 32, 10
LOSS = peers.Settings()
TOLERANCE = {"float32": 1e-3, "tf32": 0.1}
"""Of the gradient, relative to its norm; TF32 keeps 10 bits of a factor."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the inputs that the real teacher was trained with."""


class Pair(NamedTuple):
    """A teacher of some depth and width; the student is a ResNet-8."""

    depth: int
    filters: int = 16


PAIRS = {
    "ResNet-56": Pair(56),
    "ResNet-110": Pair(110),
    "ResNet-20, four times as wide": Pair(20, 64),
}
STUDENT = Pair(8)


def network(pair: Pair) -> Model:
    """The network of a pair."""
    return from_linen(nets.ResNet(CLASSES, depth=pair.depth, filters=pair.filters))


def start(pair: Pair, seed: int) -> Variables:
    """Random weights of a network."""
    image = jnp.zeros((1, SIZE, SIZE, 3))
    return jax.jit(network(pair).init)(jax.random.key(seed), image)


def to_torch(params: Any, state: Any = None) -> dict[str, np.ndarray]:
    """Weights (or their gradient) in PyTorch's names and layout."""
    found = {}
    for path, leaf in {**tree.flatten(params), **tree.flatten(state or {})}.items():
        name = path.removeprefix("batch_stats/").replace("/", ".")
        for ours, theirs in (
            ("kernel", "weight"),
            ("scale", "weight"),
            (".mean", ".running_mean"),
            (".var", ".running_var"),
        ):
            name = name.replace(ours, theirs)
        array = np.asarray(leaf)
        if array.ndim == 4:
            array = array.transpose(3, 2, 0, 1)
        elif array.ndim == 2:
            array = array.T
        found[name] = np.ascontiguousarray(array)
    return found


# --- forms of a step ------------------------------------------------------------------


def optimizer() -> optax.GradientTransformation:
    """SGD with momentum."""
    return optax.sgd(LOSS.rate, momentum=LOSS.momentum)


def objective(teacher: Model, alpha: float = LOSS.alpha) -> Any:
    """KD of logits."""
    return distill.objective(
        network(STUDENT), teacher, temperature=LOSS.temperature, alpha=alpha
    )


class Form:
    """An update in JAX: ``run``, and what its programs need.

    The state is donated to every update, as in training; :meth:`once` starts anew.
    """

    def __init__(self, step, variables, batch, *, frozen=None, before=None, devices=1):
        self._variables, self._frozen, self._before = variables, frozen or {}, before
        self._mesh = None
        if devices > 1:
            self._mesh = parallel.make_mesh(devices=jax.devices()[:devices])
            batch = parallel.shard_batch(batch, self._mesh)
        self._step, self._batch = parallel.jit_step(step, self._mesh), batch
        self._state, programs = self._begin(), []
        if before is not None:
            programs += before.programs(batch)
            batch = before(batch)
        lower = self._step.lower  # pyright: ignore[reportFunctionMemberAccess]
        programs.append(lower(self._state, batch).compile())
        self.flops = devices * sum(
            program.cost_analysis()["flops"] for program in programs
        )
        self.megabytes = devices * max(
            program.memory_analysis().temp_size_in_bytes / 1e6 for program in programs
        )

    def _begin(self) -> Any:
        state = train.init_state(
            jax.random.key(0),
            distill.init(self._variables),
            optimizer(),
            frozen=self._frozen,
        )
        return state if self._mesh is None else parallel.replicate(state, self._mesh)

    def run(self) -> Any:
        """One update; the loss."""
        batch = self._batch if self._before is None else self._before(self._batch)
        self._state, measured = self._step(self._state, batch)
        return measured["loss"].total

    def once(self) -> tuple[float, dict[str, np.ndarray]]:
        """Loss and gradient of the first update."""
        self._state = self._begin()
        loss = float(self.run())
        # Momentum after one update is the gradient.
        gradient = optax.tree.get(self._state.opt_state, "trace")["student"]
        return loss, to_torch(jax.device_get(gradient))


class TeacherCall:
    """The teacher, compiled by itself and called before the step."""

    def __init__(self, model: Model, variables: Variables, devices: int = 1):
        mesh = parallel.make_mesh(devices=jax.devices()[:devices])
        self._look = parallel.jit(
            lambda variables, x: model.apply(variables, x)[0], mesh
        )
        if devices > 1:
            variables = parallel.replicate(variables, mesh)
        self._variables = variables

    def programs(self, batch: Any) -> list[Any]:
        """Compiled for such a batch."""
        return [self._look.lower(self._variables, batch["inputs"]).compile()]

    def __call__(self, batch: Any) -> Any:
        return {**batch, "teacher": {"": self._look(self._variables, batch["inputs"])}}


class DiskCall:
    """What the teacher says, read from the mapped files before the step."""

    def __init__(self, cache: distill.TeacherCache):
        self._cache = cache

    def programs(self, batch: Any) -> list[Any]:
        """None is needed."""
        del batch
        return []

    def __call__(self, batch: Any) -> Any:
        return {**batch, "teacher": self._cache.lookup(np.asarray(batch["index"]))}


def forms(pair: Pair, folder: str) -> tuple[dict[str, Form], dict[str, peers.Step]]:
    """Ours and PyTorch's, of the same weights and images."""
    model, given, own = network(pair), start(pair, 1), start(STUDENT, 2)
    images = np.asarray(jax.random.normal(jax.random.key(0), (IMAGES, SIZE, SIZE, 3)))
    places = np.arange(BATCH) * 7 % IMAGES
    labels = np.arange(BATCH, dtype=np.int32) % CLASSES
    cache = distill.cache_teacher(folder, model, given, images, batch_size=BATCH)
    batch = {"inputs": images[places], "labels": labels, "index": places}
    batch = jax.tree.map(jnp.asarray, batch)
    step = train.train_step(objective(model), optimizer())

    def looked_up(state: Any, batch: Any) -> Any:
        taught = state.frozen["cache"].lookup(batch["index"])
        return step(state, {**batch, "teacher": taught})

    alone = train.train_step(objective(model, alpha=0.0), optimizer())
    ours = {
        "online, one step": Form(step, own, batch, frozen={"teacher": given}),
        "online, two calls": Form(step, own, batch, before=TeacherCall(model, given)),
        "cached, on the device": Form(
            looked_up, own, batch, frozen={"cache": cache.on_device()}
        ),
        "cached, on the disk": Form(step, own, batch, before=DiskCall(cache)),
        "labels alone": Form(alone, own, batch),
    }
    # As many as `main` has asked for on a CPU; of accelerators those that are there.
    if (cores := min(shards(BATCH), jax.device_count())) > 1:
        on_all = f", {cores} devices"
        ours |= {
            f"online, one step{on_all}": Form(
                step, own, batch, frozen={"teacher": given}, devices=cores
            ),
            f"online, two calls{on_all}": Form(
                step, own, batch, before=TeacherCall(model, given, cores), devices=cores
            ),
            f"cached, on the device{on_all}": Form(
                looked_up,
                own,
                batch,
                frozen={"cache": cache.on_device()},
                devices=cores,
            ),
        }
    weights = [to_torch(*variables) for variables in (given, own)]
    theirs = {
        layout: peers.make_step(
            peers.network(*pair, weights[0]),
            peers.network(*STUDENT, weights[1]),
            images[places],
            labels,
            layout,
            LOSS,
        )
        for layout in peers.FORMATS
    }
    return ours, theirs


def check(
    results: dict[str, tuple[float, dict[str, np.ndarray]]], tolerance: float
) -> dict[str, float]:
    """Relative difference of each form's gradient to the first's.

    Raises:
        AssertionError: a loss or a gradient is another.
    """
    loss, gradient = next(iter(results.values()))
    size = np.sqrt(sum(np.sum(leaf**2) for leaf in gradient.values()))
    differences = {}
    for form, (other, leaves) in results.items():
        assert leaves.keys() == gradient.keys(), form
        total = sum(np.sum((leaves[k] - gradient[k]) ** 2) for k in gradient)
        differences[form] = float(np.sqrt(total) / size)
        np.testing.assert_allclose(other, loss, rtol=tolerance / 10, err_msg=form)
        assert differences[form] < tolerance, f"{form}: {differences[form]}"
    return differences


def measure(pair: Pair, rounds: int, tolerance: float) -> dict[str, dict[str, float]]:
    """All forms with one teacher: quantity by form."""
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = forms(pair, folder)
        results = {n: form.once() for n, form in ours.items() if n != "labels alone"}
        for layout, step in theirs.items():
            loss = float(step.online())
            results[f"PyTorch, online, {layout}"] = loss, step.gradient()
        differences = check(results, tolerance)
        runs = {name: form.run for name, form in ours.items()}
        for layout, step in theirs.items():
            runs[f"PyTorch, online, {layout}"] = step.online
            runs[f"PyTorch, cached, {layout}"] = step.cached
        seconds = interleave(runs, rounds=rounds)

    def quickest(kind: str) -> float:
        return min(x for n, x in seconds.items() if n.startswith(kind))

    online, cached = seconds["online, one step"], seconds["cached, on the device"]
    flops = {name: form.flops / 1e9 for name, form in ours.items()}
    return {
        "seconds": seconds,
        "ratios": {
            "cached over online": online / cached,
            "the same by FLOPs": flops["online, one step"]
            / flops["cached, on the device"],
            "one step over two calls": seconds["online, two calls"] / online,
            "quickest cached over quickest online": quickest("online")
            / quickest("cached"),
            "online over PyTorch's": quickest("PyTorch, online") / quickest("online"),
            "cached over PyTorch's": quickest("PyTorch, cached") / quickest("cached"),
            "the same on one device, online": quickest("PyTorch, online") / online,
            "the same on one device, cached": quickest("PyTorch, cached") / cached,
        },
        "GFLOP": flops,
        "temporary megabytes": {name: form.megabytes for name, form in ours.items()},
        "difference of the gradient": differences,
    }


# --- a real task ----------------------------------------------------------------------


def shifted(key: jax.Array, image: jax.Array) -> jax.Array:
    """Shifted by up to four pixels, mirrored half of the time."""
    place, turn = jax.random.split(key)
    padded = jnp.pad(image, ((4, 4), (4, 4), (0, 0)))
    corner = (*jax.random.randint(place, (2,), 0, 9), 0)
    window = jax.lax.dynamic_slice(padded, corner, image.shape)
    return jnp.where(jax.random.bernoulli(turn), window[:, ::-1], window)


def real_teacher(folders: list[str]) -> tuple[Model, Variables]:
    """The trained ResNet-56.

    Raises:
        FileNotFoundError: its file is in none of the folders.
    """
    model = network(PAIRS["ResNet-56"])
    places = [Path(f, "weights", "cifar10_resnet56.safetensors") for f in folders]
    for place in places:
        if place.is_file():
            image = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
            return model, pretrained.load(place, model, image)[0]
    raise FileNotFoundError(f"no {[str(place) for place in places]}; give --data-dir")


def real_images(options: argparse.Namespace) -> tuple[Any, Any]:
    """Images to train on, and others of the same split to score with."""
    arrays = data.as_arrays(data.load("cifar10", "train", data_dir=options.data_dir))
    inputs = (arrays["inputs"] - np.asarray(MEAN, np.float32)) / np.asarray(
        STD, np.float32
    )
    if options.images + options.held_out > len(inputs):
        raise SystemExit(
            f"--images {options.images} and --held-out {options.held_out}: "
            f"there are {len(inputs)} images in all"
        )
    order = np.random.default_rng(0).permutation(len(inputs))
    some, rest = np.split(order[: options.images + options.held_out], [options.images])
    train_part, held_out = (
        {"inputs": inputs[part], "labels": arrays["labels"][part]}
        for part in (some, rest)
    )
    return train_part, held_out


def accuracy(held_out: Any) -> Any:
    """``state -> %`` of the student's right answers."""
    model = network(STUDENT)

    @jax.jit
    def right(params: Any, model_state: Any, inputs: Any, labels: Any) -> jax.Array:
        logits = model.apply(distill.of_student(params, model_state), inputs)[0]
        return jnp.sum(jnp.argmax(logits, axis=-1) == labels)

    def score(state: Any) -> float:
        total = 0
        for n in range(0, len(held_out["labels"]), 500):
            part = [held_out[name][n : n + 500] for name in ("inputs", "labels")]
            total += int(right(state.params, state.model_state, *part))
        return 100 * total / len(held_out["labels"])

    return score


def time_to_accuracy(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of training until each student is as good as asked for.

    Raises:
        AssertionError: the students with the teacher run and looked up differ.
    """
    folders = (options.data_dir or "").split(os.pathsep)
    model, given = real_teacher(folders)
    images, held_out = real_images(options)
    augmentation = distill.Augmentation(
        shifted, key=jax.random.key(1), variants=options.variants
    )
    per_epoch = options.images // BATCH
    schedule = optax.cosine_decay_schedule(0.1, options.epochs * per_epoch)
    sgd = optax.chain(
        optax.add_decayed_weights(5e-4), optax.sgd(schedule, momentum=LOSS.momentum)
    )
    score = accuracy(held_out)
    on_device = jax.tree.map(jnp.asarray, images)

    def make(alpha: float) -> Any:
        step = train.train_step(objective(model, alpha), sgd)

        def update(state: Any, given: Any) -> Any:
            images, places, variant = given
            batch = jax.tree.map(lambda leaf: leaf[places], images)
            batch["inputs"] = augmentation(batch["inputs"], places, variant)
            if "cache" in state.frozen:
                batch["teacher"] = state.frozen["cache"].lookup(places, variant)
            return step(state, batch)

        return parallel.jit_step(update)

    def epoch(update: Any, state: Any, number: int) -> Any:
        order = np.random.default_rng(number).permutation(options.images)
        variant = np.int32(augmentation.variant(number))
        for places in order[: per_epoch * BATCH].reshape(per_epoch, BATCH):
            state, _ = update(state, (on_device, places.astype(np.int32), variant))
        return jax.block_until_ready(state)

    def begin(**frozen: Any) -> Any:
        begun = distill.init(start(STUDENT, 2))
        return train.init_state(jax.random.key(0), begun, sgd, frozen=frozen)

    with tempfile.TemporaryDirectory() as folder:
        cached = {"augmentation": augmentation, "batch_size": BATCH}
        few = images["inputs"][:BATCH]  # compiles what is no part of the time below
        distill.cache_teacher(Path(folder, "few"), model, given, few, **cached)
        begun = time.perf_counter()
        cache = distill.cache_teacher(
            Path(folder, "all"), model, given, images["inputs"], **cached
        )
        writing = time.perf_counter() - begun
        frozen = {
            "online": {"teacher": given},
            "cached": {"cache": cache.on_device()},
            "labels alone": {},
        }
        updates = {"online": make(LOSS.alpha), "labels alone": make(0.0)}
        updates["cached"] = updates["online"]
        states, spent = {}, {"online": 0.0, "cached": writing, "labels alone": 0.0}
        for name, more in frozen.items():
            epoch(updates[name], begin(**more), 0)  # compiles
            states[name] = begin(**more)
        curves: dict[str, list[tuple[float, float]]] = {name: [] for name in frozen}
        for number in range(options.epochs):
            for name in frozen:
                begun = time.perf_counter()
                states[name] = epoch(updates[name], states[name], number)
                spent[name] += time.perf_counter() - begun
                curves[name].append((spent[name], score(states[name])))
            online, same = (states[name].params for name in ("online", "cached"))
            pairs = zip(jax.tree.leaves(online), jax.tree.leaves(same), strict=True)
            assert all(np.array_equal(a, b) for a, b in pairs), f"epoch {number}"
            print(
                f"  epoch {number + 1}: "
                + ", ".join(
                    f"{name} {curve[-1][0]:.1f} s {curve[-1][1]:.1f} %"
                    for name, curve in curves.items()
                ),
                flush=True,
            )
    reached = {
        name: next((at for at, value in curve if value >= options.target), None)
        for name, curve in curves.items()
    }
    return {
        "images": options.images,
        "held out": options.held_out,
        "variants": options.variants,
        "target %": options.target,
        "seconds to the target": reached,
        "seconds of writing the cache": writing,
        "last accuracy": {name: curve[-1][1] for name, curve in curves.items()},
        "curves": curves,
    }


def main() -> None:
    """Measure and report."""
    parser = parser_of(__doc__)
    parser.add_argument("--only", nargs="*", help="teachers whose names hold one")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--accuracy", action="store_true", help="the real task too")
    parser.add_argument("--data-dir", default=os.environ.get("JAXTRANSFER_DATA_DIR"))
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--held-out", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--variants", type=int, default=4)
    parser.add_argument("--target", type=float, default=65.0, help="in %%")
    parser.add_argument("--fresh", action="store_true", help="memory is not kept")
    pytorch.add_precision(parser, "tf32")
    options = parser.parse_args()
    words = [""] if options.only is None else options.only
    pairs = {n: p for n, p in PAIRS.items() if any(word in n for word in words)}
    if not pairs and not options.accuracy:
        parser.error(f"--only: no teacher of that name; there are {sorted(PAIRS)}")
    kept = not options.fresh and parallel.keep_host_memory()
    jax.config.update("jax_num_cpu_devices", shards(BATCH))
    precision = pytorch.set_precision(options.precision)
    tolerance = TOLERANCE[precision]
    seconds, facts = {}, {}
    for name, pair in pairs.items():
        found = measure(pair, options.rounds, tolerance)
        print(f"teacher {name}, student ResNet-8, batch {BATCH}")
        for form, spent in found["seconds"].items():
            print(
                f"  {form:<32} {spent:8.4f} s"
                f" {found['GFLOP'].get(form, float('nan')):8.2f} GFLOP"
                f" {found['temporary megabytes'].get(form, float('nan')):8.1f} MB",
                flush=True,
            )
        for ratio, value in found["ratios"].items():
            print(f"  {ratio}: {value:.2f}", flush=True)
        seconds |= {f"{name}: {form}": x for form, x in found.pop("seconds").items()}
        facts[name] = found
    task = None
    if options.accuracy:
        print("time to an accuracy on held-out images")
        task = time_to_accuracy(options)
        print(f"  seconds to {options.target} %: {task['seconds to the target']}")
        for name, curve in task["curves"].items():
            seconds[f"real task, all epochs: {name}"] = curve[-1][0]
    report(
        "a step of distillation with its teacher run, and looked up",
        seconds,
        teachers=facts,
        accuracy=task,
        rounds=options.rounds,
        memory_kept=kept,
        precision=precision,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        json_file=options.json,
    )


if __name__ == "__main__":
    main()
