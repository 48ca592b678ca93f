"""A trained network as files that need JAX, but neither this library nor its code."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax import export

from jaxtransfer import pretrained
from jaxtransfer.pretrained import loading
from jaxtransfer.typing import Inputs, Model, Output, Variables


class Exported(NamedTuple):
    """The files of an exported network.

    Attributes:
        student: the program with its weights inside, ``inputs -> outputs``.
        network: the program without them, ``(weights, inputs) -> outputs``.
        weights: a safetensors file of them, by name.
        readme: how the three are loaded.
    """

    student: pathlib.Path
    network: pathlib.Path
    weights: pathlib.Path
    readme: pathlib.Path


def export_student(
    folder: str | os.PathLike[str],
    model: Model,
    variables: Variables,
    inputs: Inputs,
    *,
    batch: int | None = None,
    platforms: tuple[str, ...] = ("cpu", "cuda", "tpu"),
) -> Exported:
    """Write a network as StableHLO programs and a file of weights.

    It runs in evaluation mode. Given the variables of
    :func:`~jaxtransfer.methods.distill.of_student` it has no bridges; given
    :attr:`~jaxtransfer.compress.Quantized.integer` its weights are 8-bit integers.

    Args:
        folder: where the files go; made if it is not there.
        model: the network.
        variables: its variables.
        inputs: example of its inputs, arrays or ``jax.ShapeDtypeStruct``; only shapes
            and types are used.
        batch: examples of a call; None: any number of them.
        platforms: what the programs can run on.

    Returns:
        The files.

    Raises:
        ImportError: flatbuffers or safetensors are not there.
        TypeError: ``platforms`` is a string.
        ValueError: the network can't be traced without knowing how many examples
            there are, there are none, or two of its leaves have the same name.

    Example:
        >>> import pathlib, tempfile
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from jax import export
        >>> from jaxtransfer.model import from_linen
        >>> net, x = from_linen(nn.Dense(2)), jnp.ones((1, 3))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     made = export_student(
        ...         folder, net, net.init(jax.random.key(0), x), x, platforms=("cpu",))
        ...     run = export.deserialize(bytearray(made.student.read_bytes()))
        >>> run.call(jnp.ones((7, 3))).shape
        (7, 2)
    """
    try:
        import flatbuffers  # noqa: F401 - jax.export writes with it
    except ImportError as error:
        raise ImportError(
            "compress.export_student needs the package flatbuffers; run: python -m pip "
            "install 'jaxtransfer[compress]'"
        ) from error
    if isinstance(platforms, str):
        raise TypeError(
            f"platforms: got the string {platforms!r}; give a tuple, ({platforms!r},)"
        )
    if batch is not None and batch < 1:
        raise ValueError(
            f"batch: got {batch}; give the examples of a call, at least 1, or None for "
            "any number"
        )
    place = pathlib.Path(folder).expanduser()
    files = Exported(
        place / "student.jax",
        place / "network.jax",
        place / "weights.safetensors",
        place / "README.md",
    )
    naming = pretrained.flax()
    leaves = loading.leaves_of(variables)
    names = {path: naming(leaf).names[0] for path, (leaf, _) in leaves.items()}
    weights = {names[path]: value for path, (_, value) in leaves.items()}

    def network(weights: Mapping[str, Any], inputs: Inputs) -> Output:
        values = {path: weights[name] for path, name in names.items()}
        return model.apply(loading.filled(variables, values), inputs)[0]

    def student(inputs: Inputs) -> Output:
        return network(weights, inputs)

    examples = export.symbolic_shape("batch")[0] if batch is None else batch
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((examples, *x.shape[1:]), x.dtype), inputs
    )
    held = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), weights)
    programs = [
        export.export(jax.jit(function), platforms=platforms)
        for function in (student, network)
    ]
    try:
        programs = [programs[0](shapes), programs[1](held, shapes)]
    except (TypeError, jax.errors.InconclusiveDimensionOperation) as error:
        if batch is not None:
            raise
        raise ValueError(
            "batch: the network can't be traced for any number of examples; give a "
            "number with batch=, or write x.shape[0] in it where it has len(x). "
            f"{error}"
        ) from error
    place.mkdir(parents=True, exist_ok=True)
    for file, program in zip(files[:2], programs, strict=True):
        file.write_bytes(program.serialize())
    pretrained.save(files.weights, variables, names=naming)
    files.readme.write_text(_readme(programs[0], platforms), encoding="utf-8")
    return files


def _readme(student: export.Exported, platforms: tuple[str, ...]) -> str:
    (inputs,), _ = jax.tree.unflatten(student.in_tree, student.in_avals)
    outputs = jax.tree.unflatten(student.out_tree, student.out_avals)
    return f"""# An exported network

Needs `pip install jax flatbuffers safetensors`. Runs on {", ".join(platforms)}.

- inputs: `{_words(inputs)}`
- outputs: `{_words(outputs)}`

The network with its weights:

```python
from jax import export

student = export.deserialize(bytearray(open("student.jax", "rb").read()))
outputs = student.call(inputs)
```

The network and its weights apart:

```python
from jax import export
from safetensors.numpy import load_file

network = export.deserialize(bytearray(open("network.jax", "rb").read()))
outputs = network.call(load_file("weights.safetensors"), inputs)
```

A weight's name is its collection and path in the network, `params/conv1/kernel`.
Kernels are `[*window, in, out]`; one that is held in 8-bit integers is
`kernel/array/qvalue` times `kernel/array/scale`.
"""


def _words(avals: Any) -> str:
    return str(
        jax.tree.map(lambda x: f"{x.dtype}[{', '.join(map(str, x.shape))}]", avals)
    ).replace("'", "")


__all__ = ["Exported", "export_student"]
