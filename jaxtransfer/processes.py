"""What the processes of one run tell each other, on the host.

By the service that JAX connects them with, not by its devices: a process that fails
can say so where the others would wait for it in a collective for ever.
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax


def wait(name: str, seconds: float, processes: Sequence[int] | None = None) -> bool:
    """Wait for the other processes; whether they came in time.

    Args:
        name: of the meeting, the same in all and of no other.
        seconds: how long.
        processes: which; all by default.
    """
    from jax._src import distributed  # of what is public, nothing waits on the host

    client = distributed.global_state.client
    if client is None:
        return True
    try:
        client.wait_at_barrier(name, int(1000 * seconds), processes)
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        return False
    return True


_exchanges = itertools.count()


def exchange(said: str, *, seconds: float = 3600.0) -> list[str]:
    """What every process says, in their order; all must ask, and equally often.

    Args:
        said: by this one.
        seconds: how long it waits for the others.

    Raises:
        RuntimeError: not all have asked in time.
    """
    if jax.process_count() == 1:
        return [said]
    from jax._src import distributed

    client, place = distributed.global_state.client, f"jaxtransfer/{next(_exchanges)}/"
    if client is None:  # nothing to ask by: a TPU pod that was not initialised
        return [said] * jax.process_count()
    client.key_value_set(f"{place}{jax.process_index()}", said)
    if not wait(place, seconds):
        raise RuntimeError(
            f"process {jax.process_index()} waited {seconds:.0f} seconds for the "
            "others; look for the error of one, and call what writes, reads or trains "
            "in every process, in the same order"
        )
    found = dict(client.key_value_dir_get(place))
    return [found[f"{place}{process}"] for process in range(jax.process_count())]


@contextlib.contextmanager
def together(*kinds: type[Exception], seconds: float = 3600.0) -> Iterator[None]:
    """What one process can't do, none does: an error of one is raised in all.

    The others raise the first of ``kinds`` that it is of (or ``RuntimeError``), with
    the number of the process.

    Args:
        *kinds: errors that are raised as what they are.
        seconds: how long each waits for the others.
    """
    error = None
    try:
        yield
    except BaseException as raised:  # of Ctrl-C, too: the others wait for a word
        error = raised
    said = ""
    if error is not None:
        kind = [isinstance(error, kind) for kind in (*kinds, BaseException)].index(True)
        said = f"{kind} {type(error).__name__}: {error}"
    everyone = exchange(said, seconds=seconds)
    if error is not None:
        raise error
    for process, other in enumerate(everyone):
        if other:
            kind, message = other.split(" ", 1)
            raise (*kinds, RuntimeError)[int(kind)](f"in process {process}: {message}")


def is_own(leaf: Any) -> bool:
    """Whether an array is of this process alone, or no array of JAX."""
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable


__all__ = ["exchange", "is_own", "together", "wait"]
