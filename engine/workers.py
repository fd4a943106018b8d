"""Loader workers that ignore the first signal, and that never outlive the process that started them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import active_children, get_start_method
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from types import FrameType
from typing import Any
from weakref import WeakSet

from torch.utils.data import DataLoader

# The signals that ask a run to end; SIGUSR1 is how cluster schedulers warn of what is to come.
HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

_patient: dict[int, WeakSet[BaseProcess]] = {}  # by the process that started them: a forked child inherits this


@contextmanager
def patient_workers(loader: DataLoader[Any]) -> Iterator[None]:
    """Let the workers that ``loader`` starts within the block ignore the first signal; they end with this process."""
    given, others = loader.worker_init_fn, set(active_children())
    before = _hold_signals_back() if _are_forked(loader) else None
    loader.worker_init_fn = partial(_be_patient, given, before)
    try:
        yield
    finally:
        loader.worker_init_fn = given
        if before is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        _end_with_this_process(set(active_children()) - others)


def kill_workers() -> None:
    """Kill the patient workers of this process, which is about to end.

    With SIGKILL, because a worker that is stuck in native code runs no signal handler of Python's.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises an error when a worker was killed
    kill_workers_now()


def kill_workers_now() -> None:
    """Kill the patient workers of this process, from a thread of it that ends it next."""
    workers = _patient.get(os.getpid(), ())
    for child in active_children():
        if child in workers:
            child.kill()


def _are_forked(loader: DataLoader[Any]) -> bool:
    context = loader.multiprocessing_context
    return (get_start_method() if context is None else context.get_start_method()) == "fork"


def _hold_signals_back() -> set[int]:
    """Let signals wait, also in forked workers until they can ignore them; return what was held back before."""
    return set(signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED))


def _be_patient(init: Callable[[int], None] | None, held_back: set[int] | None, worker: int) -> None:
    """Start a worker that ignores the first signal to its process group, so that the step can be finished.

    The second one has its usual effect, because otherwise nothing could end a worker that hangs.
    """
    seen: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        if len(seen) > 1:
            # A KeyboardInterrupt ends torch's worker silently; if it is killed, torch raises in the main process.
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            os.kill(os.getpid(), number)

    for name in HANDLED:
        signal.signal(name, handle)
    if held_back is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, held_back)
    if init is not None:
        init(worker)


def _end_with_this_process(workers: set[BaseProcess]) -> None:
    """Kill these workers wherever they would be sent a single SIGTERM, which they ignore.

    Python's multiprocessing sends it when the process exits, and then waits for their end without a limit. A finalizer
    with a priority of 0 or more runs before that.
    """
    for worker in workers:  # torch calls `terminate` for a worker that hangs at the end of its pass
        worker.terminate = partial(os.kill, worker.pid, signal.SIGKILL)  # type: ignore[method-assign, arg-type]
    if os.getpid() not in _patient:
        _patient[os.getpid()] = WeakSet()
        Finalize(None, kill_workers, exitpriority=0)
    _patient[os.getpid()].update(workers)
