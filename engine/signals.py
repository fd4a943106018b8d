"""Signals that ask a run to end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, FunctionType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from .workers import HANDLED, kill_workers

# The handlers of runs that have begun and not ended, and those of ended runs that a later run still has as its
# earlier one, with what was there before them.
_active: WeakSet[Any] = WeakSet()
_ended: WeakKeyDictionary[Any, dict[signal.Signals, Any]] = WeakKeyDictionary()


@contextmanager
def handled_signals(interrupt: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Call ``interrupt`` at the first signal while the block runs; the second one has its usual effect.

    The handler only sets a flag; the loop acts on it at the end of a step. A run within another one passes the signal
    on to it. Nothing is installed outside the main thread. The handlers from before are restored at the end.
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
        earlier = _not_ended(before[name], name)
        if len(seen) > 1:
            if not callable(earlier):
                kill_workers()  # this process is about to end without its exit handlers
            signal.signal(name, earlier if callable(earlier) else signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif os.getpid() == owner:
            interrupt(name)
            if _is_ours(earlier) and earlier in _active:
                earlier(number, frame)
            else:
                os.write(2, f"\n{name.name}: finishing the step; send it again to stop now.\n".encode())

    for name in HANDLED:
        if signal.getsignal(name) is not signal.SIG_IGN:  # as under nohup: what is ignored stays ignored
            before[name] = signal.signal(name, handle)
    _active.add(handle)
    try:
        yield
    finally:
        _active.discard(handle)
        _ended[handle] = before
        for name in before:
            if signal.getsignal(name) is handle:  # otherwise a run that began later is still to restore it
                earlier = _not_ended(before[name], name)
                signal.signal(name, signal.SIG_DFL if earlier is None else earlier)


def _not_ended(handler: Any, name: signal.Signals) -> Any:
    """Return the handler, or, if it is the one of a run that has ended, the one from before that run."""
    while _is_ours(handler) and handler in _ended:
        handler = _ended[handler].get(name)
    return handler


def _is_ours(handler: Any) -> bool:
    return isinstance(handler, FunctionType) and handler.__module__ == __name__
