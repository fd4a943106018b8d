"""Signals that ask a run to end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# SIGUSR1 is how cluster schedulers warn of what is to come.
HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@contextmanager
def handled_signals(interrupt: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Call ``interrupt`` at the first signal, and let the second one through, for the length of the block.

    The handler only sets a flag; the loop acts on it at a step boundary. Outside the main thread nothing is
    installed. The handlers from before are put back in the end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()
    before: dict[signal.Signals, Any] = {}
    seen: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number)
        if seen:
            signal.signal(name, before[name] if callable(before[name]) else signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif os.getpid() == owner:
            interrupt(name)
            os.write(2, f"\n{name.name}: finishing the step; send it again to stop now.\n".encode())
        seen.append(number)

    for name in HANDLED:
        if signal.getsignal(name) is not signal.SIG_IGN:  # as under nohup: what is ignored stays so
            before[name] = signal.signal(name, handle)
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, signal.SIG_DFL if handler is None else handler)


def patient_worker(init: Callable[[int], None] | None, worker: int) -> None:
    """Start a loader's worker that ignores the first signal to its process group, so that the step can be finished.

    The second one is let through, or a worker that hangs could never be ended.
    """
    seen: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if seen:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        seen.append(number)

    for name in HANDLED:
        signal.signal(name, handle)
    if init is not None:
        init(worker)
