"""How several ranks find the same place in a run, without a collective operation on the way."""

from __future__ import annotations

import threading
import time
from typing import Generic, TypeVar

from .errors import EngineStateError
from .ranks import Ranks

T = TypeVar("T")

POLL = 0.05  # seconds between two looks into the store
BEAT = 1.0  # seconds between two signs of life
PATIENCE = 8.0  # seconds of waiting for the others before one looks whether they are alive


class Agreement(Generic[T]):
    """Lets what one rank decides take effect on all of them, at the same place of a run.

    All ranks pass the same checkpoints in the same order, but not at the same time. A rank that has decided something
    says so in the store. A thread on every rank sees it, holds its rank, and publishes the number of the checkpoint
    that its rank is on the way to. No rank passes the highest of these: there they meet, and tell each other what was
    decided. Until then, a checkpoint costs a lock.

    The threads also show that their ranks are alive, so that a rank that is gone can be named.

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
        if not self._meets():
            return []
        own, self._decisions = self._decisions, []
        return [decision for decisions in self._ranks.gather(own) for decision in decisions]

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
        """Tell the other ranks why this one fails; only the first is kept."""
        self._store.compare_set("failure", "", f"Rank {self._ranks.rank} failed: {failure}")

    def failure(self, *, looks_for_life: bool = True) -> str | None:
        """Return what happened to another rank: what it announced, or that it is gone; None if all are well.

        Args:
            looks_for_life: whether to wait for signs of life, which takes a few seconds.
        """
        if self._store.check(["failure"]):
            said = str(self._store.get("failure").decode())
            return None if said.startswith(f"Rank {self._ranks.rank} ") else said
        gone = self._gone() if looks_for_life else []
        return f"Rank {gone[0]} gives no sign of life." if gone else None

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._watcher.join()

    def _hold(self, round_: int) -> None:
        with self._lock:
            if round_ == self._round and not self._is_held:
                self._is_held = True
                self._store.set(f"{round_}/next/{self._ranks.rank}", str(self._next))

    def _highest(self) -> int:
        keys = [f"{self._round}/next/{rank}" for rank in range(self._ranks.world)]
        look = time.monotonic() + PATIENCE
        while not self._store.check(keys):  # not wait(), because a signal is handled only between two looks
            time.sleep(POLL / 10)
            if time.monotonic() > look and (failure := self.failure()):
                raise EngineStateError(f"The ranks could not agree. {failure} Look for the cause there.")
        return max(int(self._store.get(key)) for key in keys)

    def _gone(self) -> list[int]:
        """Return the ranks that give no sign of life; takes as long as two of those signs are apart, and more."""
        earlier = self._beats()
        time.sleep(2.5 * BEAT)
        return [rank for rank, beats in enumerate(self._beats()) if beats == earlier[rank]]

    def _beats(self) -> list[int]:
        return [self._store.add(f"alive/{rank}", 0) for rank in range(self._ranks.world)]

    def _watch(self) -> None:
        next_beat = 0.0
        try:
            while not self._closed.wait(POLL):
                round_ = self._round
                if not self._is_held and self._store.check([f"{round_}/asked"]):
                    self._hold(round_)
                if (now := time.monotonic()) > next_beat:
                    self._store.add(f"alive/{self._ranks.rank}", 1)
                    next_beat = now + BEAT
        except Exception:  # the store ends with the process that holds it, and this one is about to notice
            return
