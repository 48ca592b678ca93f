"""One pure step, compiled for one device, a mesh, or several hosts.

``jit`` over a mesh is the main path: a batch that is sharded over devices is still
one global batch, so batch statistics and set losses (MMD) are those of one device.
Under ``pmap`` and ``shard_map`` each device sees its own part; build the step with
``axis_name`` and give it to losses and layers that must see the whole batch.
"""

import ctypes
import functools
import hashlib
import os
import zlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtransfer.processes import exchange, is_own, wait
from jaxtransfer.typing import Batch, Step

_PATIENCE = 600.0  # seconds that a batch waits for those of other processes
AnyStep = TypeVar("AnyStep", bound=Callable[[Any, Batch], Any])


def make_mesh(
    *,
    axis_name: str = "data",
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
) -> Mesh:
    """Make a one-dimensional mesh over all devices.

    Args:
        axis_name: name of the axis that batches are split over.
        devices: which devices; all by default, those of other hosts included.

    Returns:
        The mesh.
    """
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh(
        (len(devices),), (axis_name,), axis_types=(AxisType.Auto,), devices=devices
    )


def _check_divisible(batch: Batch, parts: int) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if np.ndim(leaf) == 0 or np.shape(leaf)[0] % parts:
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)}: shape {np.shape(leaf)} can't be "
                f"split over {parts} devices; make its first axis a multiple of {parts}"
            )


_agreed: set[Any] = set()


def _check_agreed(batch: Batch, mesh: Mesh | None) -> None:
    """Wait until every process has given a batch of these shapes, at the first.

    Each works out the shape of the global batch from the rows that it has itself. With
    unequal numbers the processes would run different programs and add up what does
    not belong together, and none would notice.
    """
    if jax.process_count() == 1:
        return
    shapes = tuple(
        (jax.tree_util.keystr(path), np.shape(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch)
        if is_own(leaf)
    )
    if not shapes or (shapes, mesh) in _agreed:
        return
    devices = jax.devices() if mesh is None else mesh.devices.flat
    processes = sorted({device.process_index for device in devices})
    here = len(jax.local_devices() if mesh is None else mesh.local_devices)
    if len(processes) > 1:
        each = [(path, shape[0] // here, shape[1:]) for path, shape in shapes]
        digest = hashlib.sha256(repr((each, processes)).encode()).hexdigest()
        if not wait(f"jaxtransfer/batch/{digest[:32]}", _PATIENCE, processes):
            given = ", ".join(f"batch{path}: {shape}" for path, shape in shapes)
            raise ValueError(
                f"batch: process {jax.process_index()} gives {given}, and within "
                f"{_PATIENCE:.0f} seconds not every other process gave the same: one "
                "is late, or gives another number; give as many rows in every process "
                "(data: batches of one size, as many in each shard) and start again"
            )
    _agreed.add((shapes, mesh))


def shard_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Lay this host's part of a batch over the mesh.

    With several hosts every process must give as many rows (a device). At the first
    batch of a shape they wait until all have given it; a shape that comes back is not
    looked at again.

    Args:
        batch: pytree of host arrays ``[batch, ...]``; with several hosts, each
            passes its own part of the global batch.
        mesh: one-dimensional mesh.

    Returns:
        Global arrays, split along their first axis.

    Raises:
        ValueError: the first axis is not a multiple of the local devices; or another
            process has not given as many rows within ten minutes.
    """
    _check_divisible(batch, len(mesh.local_devices))
    _check_agreed(batch, mesh)
    sharding = NamedSharding(mesh, P(*mesh.axis_names))

    def place(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array):
            if leaf.sharding == sharding:
                return leaf
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                data = place(jax.random.key_data(leaf))
                return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))

    return jax.tree.map(place, batch)


def _check_same(tree: Any, mesh: Mesh) -> None:
    """Refuse values that each process has of its own and that differ."""
    if jax.process_count() == 1:
        return
    own = [
        (jax.tree_util.keystr(path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if is_own(leaf)
    ]
    processes = {device.process_index for device in mesh.devices.flat} if own else set()
    if len(processes) < jax.process_count():  # none of its own after the first update
        return
    crc = 0
    for path, leaf in own:
        if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(
            leaf.dtype, jax.dtypes.prng_key
        ):
            leaf = jax.random.key_data(leaf)
        values = np.asarray(leaf)
        crc = zlib.crc32(f"{path} {values.shape} {values.dtype}".encode(), crc)
        crc = zlib.crc32(values.tobytes(), crc)
    if len(found := set(exchange(f"{crc}"))) > 1:
        raise ValueError(
            f"state: what the processes have differs ({len(found)} kinds among "
            f"{jax.process_count()}); make it from the same key and the same files in "
            "each, or give all that of the first "
            "(jax.experimental.multihost_utils.broadcast_one_to_all)"
        )


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Copy a tree (such as the training state) to every device of the mesh.

    With several hosts it must be the same in every process: made from the same key, or
    read from the same file.

    Raises:
        ValueError: it is not.
    """
    sharding = NamedSharding(mesh, P())
    _check_same(tree, mesh)

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            leaf = np.asarray(leaf)
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        if jax.process_count() == 1:
            return jax.device_put(leaf, sharding)
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = place(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))

    return jax.tree.map(place, tree)


_LIBRARY = "xla_cpu_experimental_ynn_fusion_type"
_NOT_CONVOLUTIONS = "LIBRARY_FUSION_TYPE_REDUCE,LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"


def jit(function: Callable, mesh: Mesh | None = None, **options: Any) -> Any:
    """``jax.jit`` with those options of XLA that make the fastest program.

    On a CPU, XLA hands convolutions to a library that runs those of many channels on
    one core only. A program for one device has all cores, and takes 0.7 to 1.0 of the
    time without that library; those for a device a core are better off with it. Nothing
    is changed on an accelerator, for several devices, for a version of XLA without the
    option, if ``XLA_FLAGS`` says what is wished, and within another compiled function,
    whose options hold. :func:`jit_step` and :func:`shard_map_step` compile by it.
    Depthwise convolutions are slow with the library and slower without; see
    :func:`jaxtransfer.ops.depthwise_conv`.

    Args:
        function: what is compiled.
        mesh: what the program is for; one device if ``None``.
        options: of ``jax.jit``.

    Returns:
        The compiled function; its attribute ``lower`` is that of ``jax.jit``.

    Example:
        >>> predict = jit(lambda x: 2.0 * x)
        >>> float(predict(1.0))
        2.0
    """

    @functools.cache
    def compiled() -> Any:
        # At the first call: the devices may not be settled before.
        return jax.jit(function, compiler_options=_compiler_options(mesh), **options)

    within = jax.jit(function, **options)

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        try:
            return compiled()(*arguments, **named)
        except ValueError as error:
            if "compiler_options" not in str(error):
                raise
        # JAX takes options for the outermost function only.
        return within(*arguments, **named)

    def lower(*arguments: Any, **named: Any) -> Any:
        return compiled().lower(*arguments, **named)

    call.lower = lower  # pyright: ignore[reportAttributeAccessIssue]
    return call


def _compiler_options(mesh: Mesh | None) -> dict[str, str]:
    several = mesh is not None and mesh.devices.size > 1
    asked = _LIBRARY in os.environ.get("XLA_FLAGS", "")
    if several or asked or jax.default_backend() != "cpu":
        return {}
    return if_known(_LIBRARY, _NOT_CONVOLUTIONS)


@functools.cache
def if_known(option: str, value: str | int) -> dict[str, Any]:
    """Compiler options of one entry; none where this version of XLA lacks it."""
    options = {option: value}
    nothing = jax.jit(lambda: 0, compiler_options=options)
    try:
        nothing.lower().compile()
    except jax.errors.JaxRuntimeError:  # another version of XLA
        return {}
    return options


def _without_frozen(step: Step) -> Any:
    """``(rest, frozen, batch) -> (rest, metrics)``: so that ``rest`` can be donated."""

    def run(rest: Any, frozen: Any, batch: Batch) -> Any:
        state, metrics = step(rest.replace(frozen=frozen), batch)
        return state.replace(frozen=None), metrics

    return run


def jit_step(
    step: AnyStep, mesh: Mesh | None = None, *, donate: bool = True
) -> AnyStep:
    """Compile a step with ``jit``; over a mesh, with the batch split along it.

    With several hosts each process gives its part of the global batch, as many rows
    as every other (see :func:`shard_batch`), and the same state.

    Args:
        step: pure step, from :func:`~jaxtransfer.train.train_step` or
            :func:`~jaxtransfer.train.eval_step` without ``axis_name``.
        mesh: one-dimensional mesh; one device if ``None``.
        donate: give the state's buffers to its successor. The state passed in can't
            be used again; what is frozen is never donated, nor is what a step of
            ``eval_step`` measures.

    Returns:
        The compiled step; a batch of host arrays is laid over the mesh by the call.
        Its attribute ``lower(state, batch)`` is that of the compiled function.

    Raises:
        ValueError: (at a call) the batch can't be split over the mesh; or processes
            give unequal numbers of rows.
    """
    measures = getattr(step, "measures", False)
    shardings = {}
    if mesh is not None:
        whole, split = (
            NamedSharding(mesh, P()),
            NamedSharding(mesh, P(*mesh.axis_names)),
        )
        shardings = {
            "in_shardings": (whole, split) if measures else (whole, whole, split),
            "out_shardings": whole,
        }
    if measures:
        compiled = jit(step, mesh, **shardings)
    else:
        shardings["donate_argnums"] = (0,) if donate else ()
        compiled = jit(_without_frozen(step), mesh, **shardings)

    def call(state: Any, batch: Batch) -> Any:
        if mesh is not None:
            batch, state = shard_batch(batch, mesh), replicate(state, mesh)
        if measures:
            return compiled(state, batch)
        rest, metrics = compiled(state.replace(frozen=None), state.frozen, batch)
        return rest.replace(frozen=state.frozen), metrics

    def lower(state: Any, batch: Batch) -> Any:
        if measures:
            return compiled.lower(state, batch)
        return compiled.lower(state.replace(frozen=None), state.frozen, batch)

    call.lower = lower  # pyright: ignore[reportFunctionMemberAccess]
    return call  # pyright: ignore[reportReturnType]


def _check_axis(step: Callable, axis_name: str) -> None:
    """Refuse a step of the library's that reduces over no or another axis."""
    made = getattr(step, "axis_name", axis_name)
    if made != axis_name:
        raise ValueError(
            f"step: was made with axis_name={made!r}, so devices of the axis "
            f"{axis_name!r} would each see their own rows alone; build the step with "
            f"train_step(..., axis_name={axis_name!r}), or eval_step likewise"
        )


def shard_map_step(step: AnyStep, mesh: Mesh, axis_name: str = "data") -> AnyStep:
    """Compile a per-device step with ``shard_map``.

    Args:
        step: pure step, from :func:`~jaxtransfer.train.train_step` or
            :func:`~jaxtransfer.train.eval_step` with ``axis_name``, or one of your own
            that reduces over it.
        mesh: one-dimensional mesh that has the axis.
        axis_name: the axis.

    Returns:
        The compiled step; takes state and batch as :func:`jit_step` does.

    Raises:
        ValueError: the mesh lacks the axis; the step was made without it; (at a call)
            the batch can't be split, or processes give unequal numbers of rows.
    """
    if axis_name not in mesh.axis_names:
        raise ValueError(
            f"axis_name {axis_name!r} is not an axis of the mesh, {mesh.axis_names}"
        )
    _check_axis(step, axis_name)
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(axis_name)), out_specs=P())
    compiled = jit(mapped, mesh)

    def call(state: Any, batch: Batch) -> Any:
        return compiled(replicate(state, mesh), shard_batch(batch, mesh))

    return call  # pyright: ignore[reportReturnType]


def pmap_step(step: AnyStep, axis_name: str = "data") -> AnyStep:
    """Compile a per-device step with ``jax.pmap`` over all devices.

    Args:
        step: pure step, from :func:`~jaxtransfer.train.train_step` or
            :func:`~jaxtransfer.train.eval_step` with ``axis_name``, or one of your own
            that reduces over it.
        axis_name: the axis.

    Returns:
        The compiled step. State and batch are as for :func:`jit_step`: the state is
        not stacked, the batch is split along its first axis over this host's devices.

    Raises:
        ValueError: the step was made without the axis; (at a call) the batch can't be
            split over the devices, or processes give unequal numbers of rows.
    """
    _check_axis(step, axis_name)
    compiled = jax.pmap(step, axis_name=axis_name, in_axes=(None, 0), out_axes=None)

    def call(state: Any, batch: Batch) -> Any:
        devices = jax.local_device_count()
        _check_divisible(batch, devices)
        _check_agreed(batch, None)
        batch = jax.tree.map(
            lambda x: x.reshape(devices, x.shape[0] // devices, *x.shape[1:]), batch
        )
        if jax.process_count() == 1:
            # Else a first state is compiled for apart, and each batch moved unasked.
            places = np.array(jax.local_devices())
            mesh = Mesh(places, (axis_name,), axis_types=(AxisType.Auto,))
            state = replicate(state, mesh)
            batch = jax.device_put(batch, NamedSharding(mesh, P(axis_name)))
        return compiled(state, batch)

    call.axis_name = axis_name  # pyright: ignore[reportFunctionMemberAccess]
    return call  # pyright: ignore[reportReturnType]


def initialize_distributed(
    coordinator: str | None = None,
    *,
    processes: int | None = None,
    process: int | None = None,
) -> None:
    """Join this process to a run over several hosts; call it before any JAX work.

    Args:
        coordinator: ``"host:port"`` of process 0; found out on TPU, Slurm and
            Open MPI if ``None``.
        processes: how many processes there are.
        process: number of this one, ``0 … processes - 1``.

    Raises:
        ValueError: only some of the three are given.
        RuntimeError: JAX has already started its devices.

    Example:
        On each of two hosts, with ``N`` 0 on the first and 1 on the second::

            initialize_distributed("10.0.0.1:1234", processes=2, process=N)
    """
    given = [argument is not None for argument in (coordinator, processes, process)]
    if any(given) and not all(given):
        raise ValueError(
            "initialize_distributed: give coordinator, processes and process, or none "
            f"of them (got {coordinator!r}, {processes!r}, {process!r})"
        )
    jax.distributed.initialize(coordinator, processes, process)


# Switches of ``mallopt``, from <malloc.h> of the GNU C library, and their values.
_KEEP = {
    "M_ARENA_MAX": (-8, 1),
    "M_MMAP_MAX": (-4, 0),
    "M_TRIM_THRESHOLD": (-1, 2**31 - 1),
    "M_TOP_PAD": (-2, 2**26),
}


def keep_host_memory() -> bool:
    """Let this process keep the memory that it frees, until it ends.

    On a CPU every call of a compiled step asks for its temporary arrays anew and gives
    them back. Those of many megabytes come from the kernel, page by page, with zeros
    written at the first touch, which can be half of the time of a step.
    Kept, they lie ready for the next call. The process then stays at the largest size
    that it had; steps on an accelerator gain nothing. Call it before the first array.

    Returns:
        Whether it worked: the GNU C library has the switches (``mallopt``), others
        do not, and nothing is changed there.

    Example:
        >>> kept = keep_host_memory()

    Reference:
        The GNU C Library Reference Manual, "Malloc Tunable Parameters".
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all([mallopt(*switch) == 1 for switch in _KEEP.values()])


__all__ = [
    "initialize_distributed",
    "jit",
    "jit_step",
    "keep_host_memory",
    "make_mesh",
    "pmap_step",
    "replicate",
    "shard_batch",
    "shard_map_step",
]
