"""Ranks find the same checkpoint, however they come along. Here each rank is a thread."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any, TypeVar, cast

import pytest
from torch._C._distributed_c10d import HashStore, PrefixStore, Store

from camshaft.engine import agreement as module
from camshaft.engine.agreement import Agreement
from camshaft.engine.errors import EngineStateError
from camshaft.engine.ranks import Ranks

T = TypeVar("T")


class Group:
    """What the threads share: a store, and a place for what each of them gathers."""

    def __init__(self, world: int) -> None:
        self.store: Store = HashStore()
        self.values: list[Any] = [None] * world
        self.barrier = threading.Barrier(world, timeout=20)


class ThreadRanks(Ranks):
    """One of the ranks, each of which is a thread of this process."""

    def __init__(self, rank: int, world: int, group: Group) -> None:
        super().__init__()
        self.rank, self.world, self.group = rank, world, group

    def store(self) -> Store:
        return PrefixStore("agreement", self.group.store)

    def gather_all(self, value: T) -> list[T]:
        self.group.values[self.rank] = value
        self.group.barrier.wait()
        values = list(self.group.values)
        self.group.barrier.wait()
        return cast("list[T]", values)


def on_threads(world: int, function: Callable[[int, Agreement[str]], T]) -> list[T]:
    """Return what ``function(rank, agreement)`` returns on each rank."""
    group = Group(world)

    def one(rank: int) -> T:
        with closing(Agreement[str](ThreadRanks(rank, world, group))) as agreement:
            result = function(rank, agreement)
            group.barrier.wait()
            return result

    with ThreadPoolExecutor(world) as threads:
        return list(threads.map(one, range(world)))


@pytest.fixture(autouse=True)
def _fast_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look into the store more often, so that many rounds fit into a test."""
    monkeypatch.setattr(module, "POLL", 0.002)


@pytest.mark.parametrize("seed", range(30))
def test_all_ranks_meet_at_the_same_checkpoints_whatever_the_interleaving(seed: int) -> None:
    """No decision is lost or comes twice or too early, and all ranks hear of each at the same checkpoint."""
    draw = random.Random(seed)
    world, num_decisions = draw.choice([2, 3, 4]), 6
    plans = [sorted(draw.choices(range(40), k=num_decisions)) for _ in range(world)]
    paces = [draw.choice([0.0, 0.0005, 0.002]) for _ in range(world)]

    def pass_checkpoints(rank: int, agreement: Agreement[str]) -> dict[str, int]:
        pause, met, number = random.Random(seed * 10 + rank), dict[str, int](), 0
        while len(met) < world * num_decisions:
            for nth, planned in enumerate(plans[rank]):
                if planned == number:
                    agreement.ask_for(f"{rank}.{nth}")
            time.sleep(paces[rank] * pause.random() * 2)
            for decision in agreement.decisions_here():
                assert decision not in met
                met[decision] = number
            number += 1
        return met

    results = on_threads(world, pass_checkpoints)
    assert all(result == results[0] for result in results)
    for rank, plan in enumerate(plans):
        assert all(results[0][f"{rank}.{nth}"] >= planned for nth, planned in enumerate(plan))


@pytest.mark.parametrize("world", [2, 3, 4])
def test_what_all_ranks_decide_before_the_same_checkpoint_takes_effect_there(world: int) -> None:
    def decide_at_every_third(rank: int, agreement: Agreement[str]) -> list[int]:
        met = []
        for number in range(60):
            time.sleep(random.Random(number + 100 * rank).random() * 0.002)
            if number % 3 == 0:
                agreement.ask_for(f"{rank}")
            if decisions := agreement.decisions_here():
                assert decisions == [str(one) for one in range(world)]
                met.append(number)
        return met

    for met in on_threads(world, decide_at_every_third):
        assert met == list(range(0, 60, 3))


def test_what_is_decided_while_a_rank_is_held_takes_effect_at_the_meeting() -> None:
    """Rank 0 is far ahead when rank 1 decides, so that rank 1 has a long way to the meeting."""
    ahead = threading.Event()

    def decide(rank: int, agreement: Agreement[str]) -> dict[str, int]:
        met: dict[str, int] = {}
        for number in range(100):
            if rank == 1 and number == 0:
                ahead.wait(10)
                agreement.ask_for("first")
            if rank == 1 and number == 5:
                agreement.ask_for("second")
            if rank == 0 and number == 40:
                ahead.set()
                time.sleep(0.2)
                agreement.ask_for("third")
            met |= dict.fromkeys(agreement.decisions_here(), number)
        return met

    assert on_threads(2, decide) == [{"first": 40, "second": 40, "third": 40}] * 2


def test_a_checkpoint_where_nobody_has_decided_anything_waits_for_nobody() -> None:
    """One rank passes all of its checkpoints before the other passes its first."""
    passed = threading.Event()

    def run(rank: int, agreement: Agreement[str]) -> None:
        if rank == 1:
            assert passed.wait(10)
        assert not any(agreement.decisions_here() for _ in range(1000))
        passed.set()

    on_threads(2, run)


def test_a_decision_after_the_last_checkpoint_of_another_rank_takes_no_effect_on_either() -> None:
    passed = threading.Event()

    def run(rank: int, agreement: Agreement[str]) -> list[str]:
        if rank == 1:
            assert passed.wait(10)
            agreement.ask_for("too late")
        decisions = [decision for _ in range(10) for decision in agreement.decisions_here()]
        passed.set()
        return decisions

    assert on_threads(2, run) == [[], []]


def pass_checkpoints_slowly(agreement: Agreement[str]) -> None:
    for _ in range(1000):
        agreement.decisions_here()
        time.sleep(0.01)


def test_an_announced_failure_is_raised_at_the_next_checkpoint_of_the_others() -> None:
    def run(rank: int, agreement: Agreement[str]) -> str | None:
        if rank == 1:
            assert agreement.failure(looks_for_life=False) is None
            agreement.announce("ValueError: no")
            agreement.announce("only the first counts")
            return None
        with pytest.raises(EngineStateError, match="Rank 1 failed: ValueError: no"):
            pass_checkpoints_slowly(agreement)
        return agreement.failure()

    assert on_threads(2, run) == ["Rank 1 failed: ValueError: no", None]


def test_a_rank_that_gives_no_sign_of_life_is_named() -> None:
    """Its watcher has ended without a word, as that of a process on another host that was killed."""

    def run(rank: int, agreement: Agreement[str]) -> str | None:
        if rank == 1:
            agreement._closed.set()
            agreement._watcher.join()
            time.sleep(4)
            return None
        time.sleep(0.5)
        return agreement.failure()

    assert on_threads(2, run) == ["Rank 1 gives no sign of life.", None]
