"""A teacher run once over a data set: its outputs and features on the disk.

Keyed by the teacher's variables, the example's place and its variant.
"""

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer.methods._inputs import check_scaled
from jaxtransfer.methods.distill.augmentation import Augmentation
from jaxtransfer.methods.distill.cache_files import (
    VERSION,
    DamagedCacheError,
    Writer,
    bytes_of,
    file_checksum,
    file_names,
    make_arrays,
    read_manifest,
    write_manifest,
)
from jaxtransfer.methods.distill.cache_open import (
    check_same,
    count_batches,
    count_examples,
    identity,
    opened,
)
from jaxtransfer.methods.distill.taught import TOP_K, TeacherCache
from jaxtransfer.parallel import jit
from jaxtransfer.processes import together
from jaxtransfer.train.folders import check_folder
from jaxtransfer.typing import Inputs, Model, Variables

_EVERY = 50  # batches between two times that everything is flushed
_FILLED_IN = 7 * 24 * 3600.0  # seconds that other processes wait for that


def cache_teacher(
    folder: str | os.PathLike[str],
    teacher: Model,
    variables: Variables,
    examples: Inputs,
    *,
    batch_size: int,
    augmentation: Augmentation | None = None,
    taps: tuple[str, ...] = (),
    top_k: int | None = None,
    temperature: float = 4.0,
    dtype: Any = np.float32,
) -> TeacherCache:
    """Run a teacher over every variant of every example, and keep what it says.

    In evaluation mode: its batch statistics are used and left alone. A call that is
    stopped, however hard, goes on from the last fifty batches when it is made again,
    and ends with the same bytes; a complete cache is returned without running the
    teacher.

    With several processes all must call it, with a folder that they share: process 0
    runs the teacher and the others wait for it.

    **Equality with a teacher that is run in training.** On CPU a row of a network's
    output does not depend on the rows beside it nor on its place among them, but on
    their number, which chooses the matrix product's kernel: other batch sizes differ in
    the last bits. So with the ``batch_size`` of the training and float32, distillation
    from the cache equals distillation from the teacher bit for bit (an incomplete last
    batch is filled up), in a step that `jaxtransfer.parallel.jit_step` compiles for one
    device. This was seen with dense and convolutional networks; on other devices
    nothing is promised. The same is true of the augmentation if it only moves values,
    as shifts and mirrors do; sums of products may be rounded otherwise in another
    compiled program.

    Args:
        folder: for this cache alone; made if it doesn't exist.
        teacher: the network.
        variables: of the teacher. Their fingerprint is kept; a change of the network's
            code that leaves them as they are is not seen.
        examples: inputs of the whole data set, pytree of ``[examples, ...]``; may be
            mapped from the disk.
        batch_size: examples that the teacher sees at once; see above.
        augmentation: of the inputs, with a number of variants; None: none.
        taps: paths of layers whose outputs are kept too.
        top_k: keep the likeliest classes only, all others being one bucket; None: all
            logits.
        temperature: T > 0 with which the likeliest classes are softened, that of the
            loss; not used without ``top_k``.
        dtype: of what is kept, ``np.float32`` or ``np.float16``.

    Returns:
        The cache. With ``top_k`` it has, in place of the output ``""``, the two paths
        ``distill.TOP_K``: ``log softmax(z / T)`` of k classes, and which they are; the
        rest of the probability is that of the bucket.

    Raises:
        ValueError: an argument is out of range; the teacher's output is no array;
            ``examples`` are images of integers; the folder has a cache of something
            else.
        FloatingPointError: the teacher says what is no number, or too large for
            ``dtype``.
        DamagedCacheError: the cache that is there can't be gone on with.
        OSError: the folder can't be written to, or its disk is full.

    Example:
        >>> import tempfile
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from jaxtransfer.methods import distill
        >>> from jaxtransfer.model import from_linen
        >>> net, images = from_linen(nn.Dense(5)), jnp.ones((7, 2))
        >>> given = net.init(jax.random.key(0), images)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache = distill.cache_teacher(
        ...         folder, net, given, images, batch_size=4, top_k=2, temperature=2.0)
        ...     taught = cache.lookup(jnp.array([6, 0, 3]))
        >>> [taught[path].shape for path in distill.TOP_K]
        [(3, 2), (3, 2)]
        >>> term = cache.term(weight=0.9)  # what is made of them
    """
    augmentation = augmentation or Augmentation()
    number = count_examples(examples)
    check_scaled("examples", examples)
    kind = np.dtype(dtype)
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}; it must be at least 1")
    if temperature <= 0:
        raise ValueError(f"temperature: got {temperature}; it must be positive")
    if kind not in (np.float16, np.float32):
        raise ValueError(f"dtype: got {kind}; choose np.float32 or np.float16")
    look = _look(teacher, augmentation, taps, top_k, temperature)
    shapes = _shapes(look, variables, examples, batch_size)
    classes = None
    if top_k is not None:
        every = _look(teacher, augmentation, (), None, temperature)
        classes = _shapes(every, variables, examples, batch_size)[""][0][-1]
    names = file_names(shapes)
    wanted = identity(variables, examples, augmentation) | {
        "content": {
            "taps": list(taps),
            "top_k": top_k,
            "temperature": None if top_k is None else float(temperature),
            "classes": classes,
            "dtype": str(kind),
            "batch_size": batch_size,
        }
    }
    arrays = {
        path: {
            "file": names[path],
            "shape": [augmentation.variants, number, *shape[1:]],
            "dtype": str(kind if jnp.issubdtype(own, jnp.floating) else own),
        }
        for path, (shape, own) in shapes.items()
    }
    path = pathlib.Path(folder).expanduser().absolute()
    cache, kinds = None, (ValueError, FloatingPointError, DamagedCacheError, OSError)
    with together(*kinds, seconds=_FILLED_IN):
        if jax.process_index() == 0:
            manifest = _begun(path, wanted, arrays)
            verify = "checksums" in manifest
            if not verify:
                manifest = _fill(path, manifest, look, _here(variables), examples)
            cache = opened(path, manifest, augmentation, verify)
    if cache is None:
        manifest = read_manifest(path)
        check_same(path, manifest, wanted)
        cache = opened(path, manifest, augmentation, verify=False)
    return cache


def _begun(
    path: pathlib.Path, wanted: Mapping[str, Any], arrays: Mapping[str, Any]
) -> dict[str, Any]:
    """The manifest that is there, or one of a cache that nothing is in yet."""
    try:
        manifest = read_manifest(path)
    except FileNotFoundError:
        path = check_folder(path, needed=bytes_of(arrays))
        make_arrays(path, arrays)
        manifest = {"version": VERSION, **wanted, "arrays": arrays, "done": 0}
        write_manifest(path, manifest)
    check_same(path, manifest, wanted)
    return manifest


def _here(variables: Variables) -> Variables:
    """Variables of one process, which works alone, though they lie on all."""

    def local(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return leaf.addressable_data(0)
        return leaf

    return variables if jax.process_count() == 1 else jax.tree.map(local, variables)


Look = Callable[[Variables, Inputs, Any, Any], dict[str, Any]]


def _look(
    teacher: Model,
    augmentation: Augmentation,
    taps: tuple[str, ...],
    top_k: int | None,
    temperature: float,
) -> Look:
    """The teacher on a batch: what is kept, by path."""

    def look(
        variables: Variables, inputs: Inputs, indices: Any, variant: Any
    ) -> dict[str, Any]:
        seen = augmentation(inputs, indices, variant)
        outputs, features, _ = teacher.apply(variables, seen, taps=taps)
        if top_k is None:
            return {"": outputs, **features}
        classes = outputs.shape[-1]
        if not 1 <= top_k <= classes:
            raise ValueError(
                f"top_k: got {top_k}, the teacher has {classes} classes; choose 1 … "
                f"{classes}, or None to keep all logits"
            )
        predicted = jax.nn.log_softmax(outputs.astype(jnp.float32) / temperature)
        likeliest, which = jax.lax.top_k(predicted, top_k)
        which = which.astype(np.min_scalar_type(classes - 1))
        return {**dict(zip(TOP_K, (likeliest, which), strict=True)), **features}

    return jit(look)


def _shapes(
    look: Look, variables: Variables, examples: Inputs, batch_size: int
) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and type of what is kept of a batch, by path; nothing is run.

    Raises:
        ValueError: it is no array of a row an example.
    """
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype), examples
    )
    indices = jax.ShapeDtypeStruct((batch_size,), np.int32)
    found = jax.eval_shape(look, variables, batch, indices, np.int32(0))
    for path, array in found.items():
        what = repr(path) if path else "its output"
        if not isinstance(array, jax.ShapeDtypeStruct):
            raise ValueError(
                f"teacher: {what} is a {type(array).__name__}, a cache keeps arrays; "
                "wrap the network so that it returns one"
            )
        if array.shape[:1] != (batch_size,):
            raise ValueError(
                f"teacher: {what} is {array.shape} of {batch_size} examples; a cache "
                "keeps a row an example"
            )
    return {path: (array.shape, array.dtype) for path, array in found.items()}


def _fill(
    path: pathlib.Path,
    manifest: dict[str, Any],
    look: Look,
    variables: Variables,
    examples: Inputs,
) -> dict[str, Any]:
    """Compute what is missing; the complete manifest."""
    number, blocks = manifest["examples"]["number"], count_batches(manifest)
    size, arrays = manifest["content"]["batch_size"], manifest["arrays"]
    total = manifest["augmentation"]["variants"] * blocks
    with Writer(path, arrays) as writer:
        for done in range(manifest["done"], total):
            variant, start = done // blocks, done % blocks * size
            # The last batch goes on with the first examples.
            places = np.arange(start, start + size) % number
            inputs = jax.tree.map(lambda x, p=places: x[p], examples)
            rows = look(variables, inputs, places.astype(np.int32), np.int32(variant))
            kept = min(size, number - start)
            writer.write(
                variant,
                start,
                {
                    name: _stored(name, np.asarray(values)[:kept], arrays[name])
                    for name, values in rows.items()
                },
            )
            if (done + 1) % _EVERY == 0 or done + 1 == total:
                writer.flush()
                manifest = {**manifest, "done": done + 1}
                write_manifest(path, manifest)
    checksums = {name: file_checksum(path / x["file"]) for name, x in arrays.items()}
    manifest = {**manifest, "checksums": checksums}
    write_manifest(path, manifest)
    return manifest


def _stored(path: str, rows: np.ndarray, array: Mapping[str, Any]) -> np.ndarray:
    """Rows in the type they are kept in.

    Raises:
        FloatingPointError: a value is not a number, or too large for the type.
    """
    with np.errstate(over="ignore"):
        kept = rows.astype(array["dtype"])
    if not np.issubdtype(kept.dtype, np.floating):
        return kept
    # Minus infinity is the logit of a class that can't be.
    if np.any(np.isnan(kept)) or np.any(np.isinf(kept) & (rows != -np.inf)):
        raise FloatingPointError(
            f"what the teacher says at {path!r} is not finite in {array['dtype']}; "
            "look for NaN in its weights and inputs, or give dtype=np.float32"
        )
    return kept


__all__ = ["cache_teacher"]
