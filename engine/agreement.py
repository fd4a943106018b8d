"""How several ranks find the same place in a run, without a collective operation on the way."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import Generic, TypeVar

from .errors import EngineStateError
from .failures import BEAT, Failures, end_process
from .ranks import Ranks

T = TypeVar("T")

POLL = 0.2  # seconds between two looks into the store: each takes time from the training of all ranks
PAUSE = 0.005  # seconds between two looks while a rank waits for the others
GRACE = 2.5  # seconds that a rank is given to end by itself when another one has failed
PATIENCE = 8.0  # seconds of waiting for the others before one looks for their signs of life


class Agreement(Generic[T]):
    """Lets what one rank decides take effect on all of them, at the same place of a run.

    All ranks pass the same checkpoints in the same order, but not at the same time. A rank that has decided something
    says so in the store. A thread on every rank sees it, holds its rank, and publishes the number of the checkpoint
    that its rank is on the way to. No rank passes the highest of these: there they meet, and tell each other what was
    decided. Until then, a checkpoint costs a lock.

    The threads also look whether other ranks have failed or are gone. Then the next checkpoint raises, and the thread
    of a rank that comes to none, because it waits for those in vain, ends the process.

    Args:
        ranks: all of them; each makes its agreement at the same place of the run.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._store = ranks.store()
        self._decisions: list[T] = []  # of this rank, which the others do not know yet
        self._lock = threading.Lock()
        self._round = 0
        self._next = 0  # the number of the checkpoint that this rank is on the way to
        self._is_held = False
        self._meeting: int | None = None  # the number of the checkpoint to meet at
        self._failures = Failures(self._store, ranks.rank, ranks.world)
        self._failure: str | None = None  # of another rank, as the thread has seen it
        self._is_leaving = False  # whether this rank is about to end by itself
        self._closed = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="camshaft-agreement", daemon=True)
        self._watcher.start()

    def ask_for(self, decision: T) -> None:
        """Let a decision of this rank take effect on all of them; a signal handler may call this."""
        self._decisions.append(decision)

    def decisions_here(self) -> list[T]:
        """Pass a checkpoint; return what all ranks have decided, in their order, if they meet here.

        Raises:
            EngineStateError: naming it, if another rank failed or is gone.
        """
        self._refuse_alone(self._failure)
        if not self._meets():
            return []
        own, self._decisions = self._decisions, []
        return [decision for decisions in self._ranks.gather_all(own) for decision in decisions]

    def _meets(self) -> bool:
        if self._decisions and not self._is_held:
            self._hold(self._round)
            self._store.set(f"{self._round}/asked", "")
        with self._lock:
            if not self._is_held:
                self._next += 1
                return False
        if self._meeting is None:
            self._meeting = self._highest()
        if self._next < self._meeting:
            self._next += 1
            return False
        with self._lock:
            self._round += 1
            self._next += 1
            self._is_held, self._meeting = False, None
        return True

    def announce(self, failure: str) -> None:
        """Tell the other ranks why this one fails; only the first failure of all is kept."""
        self._failures.announce(failure)

    def failure(self, *, looks_for_life: bool = True) -> str | None:
        """Return what happened to another rank: what it announced, or that it is gone; None if all are well.

        From now on, this rank is about to leave by itself.

        Args:
            looks_for_life: whether to wait for signs of life, which takes a few seconds.
        """
        self._is_leaving = True
        return self._failures.found() if looks_for_life else self._failures.known()

    def close(self) -> None:
        """End the thread, and tell the others that this rank does not fail any more."""
        self._closed.set()
        self._watcher.join()
        with suppress(RuntimeError):  # the store may be gone
            self._failures.leave()

    def _hold(self, round_: int) -> None:
        with self._lock:
            if round_ == self._round and not self._is_held:
                self._is_held = True
                self._store.set(f"{round_}/next/{self._ranks.rank}", str(self._next))

    def _highest(self) -> int:
        keys = [f"{self._round}/next/{rank}" for rank in range(self._ranks.world)]
        look = time.monotonic() + PATIENCE
        while not self._store.check(keys):  # not wait(), because a signal is handled only between two looks
            time.sleep(PAUSE)
            self._refuse_alone(self._failures.found() if time.monotonic() > look else self._failure)
        return max(int(self._store.get(key)) for key in keys)

    def _refuse_alone(self, failure: str | None) -> None:
        if failure is not None:
            raise EngineStateError(
                f"This is rank {self._ranks.rank}, which cannot continue alone. Look at the cause: {failure}"
            )

    def _watch(self) -> None:
        try:
            self._failure = self._watch_the_store()
        except Exception:  # the store ends with the process that holds it
            self._failure = "The process that holds the store of all ranks is gone."
        end = time.monotonic() + GRACE
        while self._failure is not None and not self._is_leaving and not self._closed.wait(POLL):
            if time.monotonic() > end:
                end_process(self._failure, self._ranks.rank)

    def _watch_the_store(self) -> str | None:
        """Hold this rank whenever one asks, until another one has failed; return what happened to it."""
        next_beat = 0.0
        while not self._closed.wait(POLL):
            round_ = self._round
            if not self._is_held and self._store.check([f"{round_}/asked"]):
                self._hold(round_)
            if (now := time.monotonic()) > next_beat:
                self._failures.beat()
                next_beat = now + BEAT
                if not self._is_leaving and (failure := self._failures.known()) is not None:
                    return failure
        return None
