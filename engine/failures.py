"""How a rank learns that another one has failed or is gone, so that it does not wait for it."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

from .workers import kill_workers_now

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

BEAT = 1.0  # seconds between two signs of life


class Failures:
    """What the ranks of a run tell each other of failures, by a store that all of them see.

    Each rank says which process it is: one that was started by the same process as this one, and has ended, is seen at
    once. All show that they are alive by a number that grows, which takes longer to see.

    Args:
        store: of this run alone.
        rank: the number of this process.
        world: the number of processes.
    """

    def __init__(self, store: Store, rank: int, world: int) -> None:
        self._store = store
        self._rank = rank
        self._world = world
        self._siblings: dict[int, int] = {}  # the processes of ranks that have the same parent
        self._unknown = set(range(world)) - {rank}  # the ranks that have not said yet which process they are
        store.set(f"process/{rank}", f"{os.getpid()} {_family()}")

    def announce(self, failure: str) -> None:
        """Tell the other ranks why this one fails; only the first failure of all is kept."""
        self._store.compare_set("failure", "", f"Rank {self._rank} failed: {failure}")

    def known(self) -> str | None:
        """Return what is known of a failure of another rank, without waiting; None if there was none."""
        if not self._store.check(["failure"]):
            if not (ended := self._ended()):
                return None
            self._store.compare_set("failure", "", f"Rank {ended[0]} is gone: its process has ended.")
        said = str(self._store.get("failure").decode())
        return None if said.startswith(f"Rank {self._rank} ") else said

    def found(self) -> str | None:
        """Return what is known of a failure of another rank, or which gives no sign of life; takes some seconds."""
        earlier, until = self._beats(), time.monotonic() + 2.2 * BEAT
        while (failure := self.known()) is None and time.monotonic() < until:
            time.sleep(BEAT / 20)
        if failure is not None:
            return failure
        silent = [rank for rank, beats in enumerate(self._beats()) if beats == earlier[rank] and rank != self._rank]
        silent = self._without_those_that_left(silent)
        return f"Rank {silent[0]} gives no sign of life." if silent else None

    def beat(self) -> None:
        """Give a sign of life."""
        self._store.add(f"alive/{self._rank}", 1)

    def leave(self) -> None:
        """Say that this rank has ended its run, so that the end of its process is no failure."""
        self._store.set(f"left/{self._rank}", "")

    def _beats(self) -> list[int]:
        return [self._store.add(f"alive/{rank}", 0) for rank in range(self._world)]

    def _ended(self) -> list[int]:
        """Return the ranks whose processes are known to have ended before their runs."""
        for rank in sorted(self._unknown):
            if self._store.check([f"process/{rank}"]):
                process, _, family = self._store.get(f"process/{rank}").decode().partition(" ")
                self._unknown.discard(rank)
                if family == _family():
                    self._siblings[rank] = int(process)
        return self._without_those_that_left([r for r, process in list(self._siblings.items()) if _has_ended(process)])

    def _without_those_that_left(self, ranks: list[int]) -> list[int]:
        return [rank for rank in ranks if not self._store.check([f"left/{rank}"])]


def end_process(failure: str, rank: int) -> None:
    """End this process at once, because its main thread waits for a rank that has failed."""
    os.write(2, f"\nThis is rank {rank}, which ends now, because it would wait in vain. {failure}\n".encode())
    kill_workers_now()
    os._exit(1)


def _family() -> str:
    """Return what only the processes share that one process has started."""
    return f"{os.getppid()} {socket.gethostname()}"


def _has_ended(process: int) -> bool:
    """Return whether a process has ended, also if the one that started it has not asked for its exit code yet."""
    try:
        os.kill(process, 0)
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except ProcessLookupError:
        return True
    except OSError:  # it is another user's, or this system does not say
        return False
