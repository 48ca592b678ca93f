"""SIGTERM and Ctrl-C: asked to stop, a run ends between two updates."""

import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax

_asked = itertools.count(1)  # of JAX's service, alike in all processes


@contextlib.contextmanager
def stop_signals() -> Iterator[list[str]]:
    """Collect SIGTERM and SIGINT; the second one does what it did before.

    With several processes a signal that reaches one of them would leave the others
    waiting: there JAX's own preemption service is asked, see :func:`stopping`. It
    knows SIGTERM, so the first SIGINT becomes one.
    """
    received: list[str] = []
    main = threading.current_thread() is threading.main_thread()
    several = jax.process_count() > 1
    if not main or several and not _has_service():
        yield received
        return
    signals = (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in signals}

    def restore() -> None:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)

    def note(number: int, frame: Any) -> None:
        restore()
        if several:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            received.append(signal.Signals(number).name)

    for number in signals:
        signal.signal(number, note)
    try:
        yield received
    finally:
        restore()


def _has_service() -> bool:
    from jax._src import distributed  # else SIGTERM would end the process

    return distributed.global_state.preemption_sync_manager is not None


def stopping(received: list[str]) -> str:
    """Name the signal that asks this run to stop here, or ``""``.

    JAX's service says yes at one number alone: the largest that a process has asked for
    when the signal comes, and one. So all ask by the same count, which goes on from one
    run to the next: a step would be passed by when a run begins at another one, and
    come again in the next run.
    """
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        try:
            stop = multihost_utils.reached_preemption_sync_point(next(_asked))
        except RuntimeError:  # the preemption service is switched off
            return ""
        return "SIGTERM" if stop else ""
    return received[0] if received else ""


__all__ = ["stop_signals", "stopping"]
