"""Signals that ask a run to end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

from .workers import kill_workers

# SIGUSR1 is how cluster schedulers warn of what is to come.
HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

# Our handlers of runs that are over, with those from before: only runs that overlap leave one here.
_left: WeakKeyDictionary[Any, dict[signal.Signals, Any]] = WeakKeyDictionary()


@contextmanager
def handled_signals(interrupt: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Call ``interrupt`` at the first signal while the block runs; the second one has its usual effect.

    The handler only sets a flag; the loop acts on it at the end of a step. Nothing is installed outside the main
    thread. The handlers from before are restored at the end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()
    before: dict[signal.Signals, Any] = {}
    seen: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number)
        seen.append(number)  # first, because the next signal may come within this function
        if len(seen) > 1:
            usual = _alive(before[name], name)
            if not callable(usual):
                kill_workers()  # this process is about to end without its exit handlers
            signal.signal(name, usual if callable(usual) else signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif os.getpid() == owner:
            interrupt(name)
            os.write(2, f"\n{name.name}: finishing the step; send it again to stop now.\n".encode())

    for name in HANDLED:
        if signal.getsignal(name) is not signal.SIG_IGN:  # as under nohup: what is ignored stays ignored
            before[name] = signal.signal(name, handle)
    try:
        yield
    finally:
        if all(signal.getsignal(name) is handle for name in before):
            for name, handler in before.items():
                usual = _alive(handler, name)
                signal.signal(name, signal.SIG_DFL if usual is None else usual)
        else:  # another run, which began later, is still going on
            seen.append(0)
            _left[handle] = before


def _alive(handler: Any, name: signal.Signals) -> Any:
    """Return the handler, or, if it is ours and its run is over, the one from before it."""
    while handler in _left:
        handler = _left[handler].get(name)
    return handler
