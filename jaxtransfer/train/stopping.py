"""SIGTERM and Ctrl-C: asked to stop, a run ends between two updates."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax


@contextlib.contextmanager
def stop_signals() -> Iterator[list[str]]:
    """Collect SIGTERM and SIGINT; the second one does what it did before.

    With several processes a signal that reaches one of them would leave the others
    waiting: there JAX's own preemption service is asked, see :func:`stopping`.
    """
    received: list[str] = []
    main = threading.current_thread() is threading.main_thread()
    if not main or jax.process_count() > 1:
        yield received
        return
    signals = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in signals}

    def restore() -> None:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)

    def note(number: int, frame: Any) -> None:
        received.append(signal.Signals(number).name)
        restore()

    for number in signals:
        signal.signal(number, note)
    try:
        yield received
    finally:
        restore()


def stopping(received: list[str], step: int) -> str:
    """Name the signal that asks this run to stop after ``step``, or ``""``."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        try:
            stop = multihost_utils.reached_preemption_sync_point(step)
        except RuntimeError:  # the preemption service is switched off
            return ""
        return "SIGTERM" if stop else ""
    return received[0] if received else ""


__all__ = ["stop_signals", "stopping"]
