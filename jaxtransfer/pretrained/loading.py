"""From a file of weights to a network's variables, with a strict report, and back."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer import tree
from jaxtransfer.pretrained import files
from jaxtransfer.pretrained.adapt import Adapter
from jaxtransfer.pretrained.names import Leaf, Naming, flax, torch
from jaxtransfer.pretrained.report import Report
from jaxtransfer.typing import Inputs, Model, Variables

# Counts batches in PyTorch's batch normalisation; of no use, and kept by `save(like=)`.
_COUNTERS = "num_batches_tracked"


def load(
    path: str | os.PathLike[str],
    model: Model,
    inputs: Inputs,
    *,
    names: Naming | None = None,
    key: jax.Array | None = None,
    fresh: tree.Rules = (),
    unused: tree.Rules = (),
    adapt: Mapping[str, Adapter] | None = None,
) -> tuple[Variables, Report]:
    """Read a network's weights from a file.

    Every leaf of the network must be in the file in its shape, and every entry of the
    file in the network; what is to be otherwise is said by a rule. Parameters and
    running statistics are read alike; a rule on ``"layer1_0"`` means both. Values are
    converted to the types of the network's leaves.

    Args:
        path: ``.safetensors``, ``.npz`` or ``.msgpack``.
        model: the network.
        inputs: example of its inputs, arrays or ``jax.ShapeDtypeStruct``; only shapes
            and types are used.
        names: how the file names and lays out the leaves; by default :func:`torch` for
            safetensors, :func:`flax` for the others.
        key: of the initial values of what is ``fresh``.
        fresh: rules on the network's paths: what keeps initial values whatever the
            file holds, e.g. ``"head"`` for another number of classes; see
            :func:`jaxtransfer.tree.match`.
        unused: rules on the file's names, ``/`` for ``.``: entries to pass over.
            PyTorch's ``num_batches_tracked`` and what is no array of numbers are
            passed over anyway.
        adapt: functions by rules on the network's paths that make values of another
            shape, e.g. ``{"conv1/kernel": input_channels}``.

    Returns:
        The variables and the report.

    Raises:
        FileNotFoundError, ImportError: see :func:`read`.
        TypeError: the model is a bare module.
        ValueError: the file doesn't fit (the message is the report and what to do), an
            entry is of integers or complex numbers and its leaf is not, a number is
            too large for its leaf, a rule matches nothing, two leaves would be read
            from one entry, a leaf is both ``fresh`` and in ``adapt``, or ``fresh``
            without ``key``.

    Example:
        >>> import pathlib, tempfile
        >>> from jaxtransfer.model import from_linen
        >>> from jaxtransfer.nets import MLP
        >>> example, model = jnp.ones((1, 3)), from_linen(MLP(10, (4,)))
        >>> source = model.init(jax.random.key(0), example)
        >>> other = from_linen(MLP(2, (4,)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "mlp.safetensors")
        ...     save(file, source)
        ...     variables, report = load(
        ...         file, other, example, fresh="head", key=jax.random.key(1))
        >>> print(report)
        matched 2, adapted 0, fresh 2, unused 2, missing 0, unexpected 0, wrong shape 0
        fresh:
          'head/bias'
          'head/kernel'
        unused:
          'head.bias'
          'head.weight'
    """
    if not isinstance(model, Model):
        raise TypeError(
            f"model: got a {type(model).__name__}, no Model; wrap the module, "
            "model.from_linen(module) or model.from_nnx(build)"
        )
    content = files.read_content(path)
    entries = {name: x for name, x in content.entries.items() if files.is_weight(x)}
    shapes = jax.eval_shape(model.init, jax.random.key(0), inputs)
    leaves = leaves_of(shapes)
    naming = names or _naming_of(path)
    places = {place: naming(leaf) for place, (leaf, _) in leaves.items()}
    kept = tree.match(fresh, leaves)
    adapters = _adapters(adapt or {}, leaves, kept)
    claimed = {name: place for place in kept for name in places[place].names}
    claimed |= _claimed({p: e.names for p, e in places.items() if p not in kept})
    values, missing, mismatched = {}, {}, {}
    for place, (leaf, wanted) in leaves.items():
        if place in kept:
            continue
        looked_for = places[place].names
        if any(name not in entries for name in looked_for):
            missing[place] = looked_for
            continue
        value = places[place].read(*(entries[name] for name in looked_for))
        if place in adapters:
            value = np.asarray(adapters[place](value, leaf.shape))
        if value.shape == leaf.shape:
            _check_kind(place, looked_for, value.dtype, wanted.dtype)
            values[place] = jnp.asarray(_cast(place, value, wanted.dtype))
        else:
            mismatched[place] = (value.shape, leaf.shape)
    over = [
        name
        for name in entries
        if name not in claimed and name.rpartition(".")[2] != _COUNTERS
    ]
    passed = _passed_over(unused, over, [name for name in claimed if name in entries])
    report = Report(
        os.fspath(path),
        {place: places[place].names for place in values},
        adapted=tuple(sorted(set(adapters) & set(values))),
        fresh=tuple(sorted(kept)),
        unused=tuple(
            name for name in entries if name in passed or claimed.get(name) in kept
        ),
        missing=missing,
        unexpected=tuple(name for name in over if name not in passed),
        mismatched=mismatched,
    )
    report.require_fit()
    values |= _initial(model, inputs, key, kept)
    return filled(shapes, values), report


_KINDS = {
    jnp.floating: "fractions",
    jnp.complexfloating: "complex numbers",
    jnp.integer: "integers",
}


def _kind(dtype: Any) -> str:
    found = [name for of, name in _KINDS.items() if jnp.issubdtype(dtype, of)]
    return found[0] if found else str(dtype)


def _check_kind(place: str, names: Iterable[str], held: Any, wanted: Any) -> None:
    """A cast between kinds of numbers is no matter of precision.

    Raises:
        ValueError: the file holds another kind than the leaf.
    """
    if _kind(held) != _kind(wanted):
        raise ValueError(
            f"{place!r} is of {_kind(wanted)} ({wanted}), but {list(names)} of the "
            f"file are {_kind(held)} ({held}): quantized, or of another network? What "
            f"turns them into {wanted} goes into "
            f"adapt={{{place!r}: lambda value, shape: …}}"
        )


def _cast(place: str, value: np.ndarray, wanted: Any) -> np.ndarray:
    """The values in another precision.

    Raises:
        ValueError: some of them are finite, and too large for it.
    """
    if value.dtype == wanted:
        return value
    with np.errstate(over="ignore"):  # said below
        cast = value.astype(wanted)
    if np.any(np.isfinite(value) & ~np.isfinite(cast)):
        raise ValueError(
            f"{place!r} has numbers up to {np.nanmax(np.abs(value)):.3g}, too large "
            f"for {np.dtype(wanted)}; keep it in {value.dtype}"
        )
    return cast


def save(
    path: str | os.PathLike[str],
    variables: Variables,
    *,
    names: Naming | None = None,
    like: str | os.PathLike[str] | None = None,
) -> None:
    """Write a network's weights to a file; undoes :func:`load` exactly.

    With several processes one is enough; all may call it.

    Args:
        path: ``.safetensors``, ``.npz`` or ``.msgpack``; replaced if it is there.
        variables: of the network.
        names: as in :func:`load`.
        like: the file that the weights were loaded from: the new one gets its names,
            their order (sorted in msgpack), their types, its metadata, and the entries
            that are none of the network's leaves. Weights that did not change are
            bit-identical in it, of a network of fewer digits than the file's too;
            those that ``adapt`` made are written as they are.

    Raises:
        FileNotFoundError: there is no such folder, or no file ``like``.
        ImportError: a safetensors file, without the package.
        TypeError: the variables are no :class:`~jaxtransfer.typing.Variables`, or hold
            a random key.
        ValueError: another ending, two leaves of one name, leaves that are not in the
            file ``like``, of another kind of numbers there (integers, if it was
            quantized) or too large for its types, or numbers that ``.npz`` can't hold,
            such as bfloat16.

    Example:
        >>> import pathlib, tempfile
        >>> variables = Variables({"fc": {"kernel": jnp.ones((4, 2))}})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "weights.safetensors")
        ...     save(file, variables)
        ...     {name: x.shape for name, x in files.read(file).items()}
        {'fc.weight': (2, 4)}
    """
    if not isinstance(variables, Variables):
        raise TypeError(
            f"variables: got a {type(variables).__name__}, no Variables; give "
            "Variables(params, model_state)"
        )
    naming = names or _naming_of(path)
    leaves = leaves_of(variables)
    places = {place: naming(leaf) for place, (leaf, _) in leaves.items()}
    _claimed({place: entry.names for place, entry in places.items()})
    arrays: dict[str, np.ndarray] = {}
    for place, entry in places.items():
        value = leaves[place][1]
        if isinstance(value, jax.Array) and jax.dtypes.issubdtype(
            value.dtype, jax.dtypes.prng_key
        ):
            raise TypeError(
                f"variables: {place!r} is a random key, which files of weights don't "
                "hold; leave it out"
            )
        written = entry.write(np.asarray(value))
        arrays.update(zip(entry.names, written, strict=True))
    if like is None:
        metadata = {"format": "pt"}  # readers of safetensors ask for it
        files.write_content(path, files._Content(dict(arrays), metadata))
        return
    content = files.read_content(like)
    strange = [name for name in arrays if name not in content.entries]
    if strange:
        raise ValueError(
            f"like: {os.fspath(like)!r} has no {strange[0]!r} (and {len(strange) - 1} "
            f"more); nearest: {tree.nearest(strange[0], content.entries)}. Give the "
            "names= that it was loaded with, or leave like= out"
        )
    entries = dict(content.entries)
    for name, value in arrays.items():
        held = entries[name]
        if _kind(held.dtype) != _kind(value.dtype):
            raise ValueError(
                f"like: {name!r} is of {_kind(held.dtype)} ({held.dtype}) in "
                f"{os.fspath(like)!r}, and of {_kind(value.dtype)} ({value.dtype}) "
                "here; leave like= out, which writes the weights as they are"
            )
        if not _unchanged(held, value):
            entries[name] = _cast(name, value, held.dtype)
    files.write_content(path, content._replace(entries=entries))


def _unchanged(held: np.ndarray, value: np.ndarray) -> bool:
    """Whether the network has what the file holds, as far as its digits go."""
    with np.errstate(over="ignore"):
        rounded = held.astype(value.dtype)
    return rounded.shape == value.shape and rounded.tobytes() == value.tobytes()


def _naming_of(path: str | os.PathLike[str]) -> Naming:
    return torch() if files.kind_of(path) == ".safetensors" else flax()


def leaves_of(variables: Variables) -> dict[str, tuple[Leaf, Any]]:
    """Leaves of all collections by path, with their values.

    State that is held by parts of the network, ``{"backbone": {"batch_stats": …}}`` as
    of :func:`~jaxtransfer.model.with_head`, has the paths of their parameters:
    ``backbone/bn1/mean`` beside ``backbone/bn1/scale``.
    """
    leaves: dict[str, tuple[Leaf, Any]] = {}

    def add(collection: str, part: str, values: Any) -> None:
        if not isinstance(values, Mapping):  # a counter of the whole network
            values = {collection: values}
        for path, value in tree.flatten({part: values} if part else values).items():
            if path in leaves:
                raise ValueError(
                    f"{path!r} is a leaf of {leaves[path][0].collection!r} and of "
                    f"{collection!r}; rename one of the two"
                )
            leaves[path] = Leaf(collection, path, tuple(np.shape(value))), value

    def visit(params: Mapping[str, Any], state: Mapping[str, Any], part: str) -> None:
        for name, below in state.items():
            above = params.get(name)
            if isinstance(above, Mapping) and isinstance(below, Mapping):  # a part
                visit(above, below, f"{part}/{name}".removeprefix("/"))
            else:
                add(name, part, below)

    add("params", "", variables.params)
    visit(variables.params, variables.model_state, "")
    return leaves


def filled(like: Variables, values: Mapping[str, Any]) -> Variables:
    """The variables with other values, given by path; what is empty stays there."""
    structure = jax.tree.structure(like)
    numbered = jax.tree.unflatten(structure, range(structure.num_leaves))
    places = {number: place for place, (_, number) in leaves_of(numbered).items()}
    ordered = [values[places[number]] for number in range(structure.num_leaves)]
    return jax.tree.unflatten(structure, ordered)


def _claimed(names: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Leaves by the names of their entries."""
    claimed: dict[str, str] = {}
    for place, own in names.items():
        for name in own:
            if name in claimed:
                raise ValueError(
                    f"names: {name!r} is the name of {place!r} and of "
                    f"{claimed[name]!r}; give each leaf a name of its own"
                )
            claimed[name] = place
    return claimed


def _passed_over(
    unused: tree.Rules, over: Sequence[str], claimed: Sequence[str]
) -> set[str]:
    """The names that rules pass over, of those that no leaf is looked for under."""
    known = {name.replace(".", "/"): name for name in (*claimed, *over)}
    passed: set[str] = set()
    for rule in [unused] if isinstance(unused, str) else unused:
        found = {known[path] for path in tree.match(rule, known)}
        if found.isdisjoint(over):
            raise ValueError(
                f"unused: rule {rule!r} matches names of the network's own leaves "
                f"alone, such as {min(found)!r}; it is for the file's other names, "
                f"here {tree.nearest(rule, over)}"
            )
        passed |= found.intersection(over)
    return passed


def _adapters(
    adapt: Mapping[str, Adapter], leaves: Mapping[str, Any], kept: set[str]
) -> dict[str, Adapter]:
    adapters: dict[str, Adapter] = {}
    for rule, function in adapt.items():
        for path in tree.match(rule, leaves):
            if path in adapters:
                raise ValueError(f"adapt: {path!r} is matched by two rules; keep one")
            if path in kept:
                raise ValueError(
                    f"adapt: {path!r} is matched by a rule of fresh= too, and so is "
                    "not read; keep one"
                )
            adapters[path] = function
    return adapters


def _initial(
    model: Model, inputs: Inputs, key: jax.Array | None, paths: set[str]
) -> dict[str, Any]:
    """Initial values of some leaves; the others are not computed."""
    if not paths:
        return {}
    if key is None:
        raise ValueError("key: fresh leaves need one for their initial values")

    @jax.jit
    def chosen(key: jax.Array) -> dict[str, Any]:
        example = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), inputs)
        leaves = leaves_of(model.init(key, example))
        return {path: leaves[path][1] for path in paths}

    return chosen(key)


__all__ = ["filled", "leaves_of", "load", "save"]
