"""Signals at random moments to random ranks: all ranks end after the same step, and the resumed run shows none of it.

Each case cuts a small training by real signals and resumes it with fresh engines until it ends by itself. Its weights,
history and counters must then be those of the run that was left alone on as many ranks, to the bit.
"""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from camshaft.callbacks import Accumulate, Distributed, RunCheckpoint
from camshaft.engine import (
    BatchReady,
    Engine,
    EpochEnd,
    EpochStart,
    Event,
    FitEnd,
    FitStart,
    GradientsReady,
    Settled,
    StepEnd,
    Trainer,
    ValidationEnd,
    ValidationStart,
    ValidationStepEnd,
)

EVENTS: dict[type[Event], int] = {  # and how often a run announces each
    FitStart: 1, EpochStart: 3, BatchReady: 27, GradientsReady: 9, StepEnd: 15, ValidationStart: 3,
    ValidationStepEnd: 12, ValidationEnd: 3, EpochEnd: 3, Settled: 18,
}  # fmt: skip
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
Style = Callable[[Engine], None]


def loader(num: int, *, shuffle: bool = False) -> DataLoader[Any]:
    inputs = torch.randn(num, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(num))
    return DataLoader(TensorDataset(inputs, (inputs.sum(1) > 0).long()), 8, shuffle=shuffle)


def build(directory: Path) -> tuple[Engine, nn.Module]:
    """An engine in which the order of the batches, the random numbers and open windows show."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 2)).double()
    engine = Trainer(
        net,
        torch.optim.SGD(net.parameters(), 0.1, momentum=0.9),
        nn.CrossEntropyLoss(),
        callbacks=[Distributed(), Accumulate(batches=2), RunCheckpoint(directory, every_steps=4)],
        seed=5,
    )
    return engine, net


def with_fit(engine: Engine) -> None:
    engine.fit(loader(37, shuffle=True), loader(27), epochs=3, resume="auto")


def with_validations_in_mid_epoch(engine: Engine) -> None:
    engine.fit(loader(37, shuffle=True), loader(27), epochs=3, validate_every="2 steps", resume="auto")


def as_a_script(engine: Engine) -> None:
    train, val = loader(37, shuffle=True), loader(27)
    net = engine.parts["model"]
    for _ in engine.epochs(3, resume="auto"):
        for inputs, target in engine.train(train):
            loss = nn.functional.cross_entropy(net(inputs), target)
            engine.update(loss)
            engine.record(loss=loss)
        for inputs, target in engine.validate(val):
            engine.record(loss=nn.functional.cross_entropy(net(inputs), target))


@dataclass(frozen=True)
class Shot:
    """A signal to one rank at one occurrence of an event in one of a case's runs, and some seconds later."""

    run: int
    rank: int
    event: type[Event]
    count: int
    name: signal.Signals
    delay: float

    def load(self, engine: Engine) -> None:
        """Let it be sent in this process, before the run has ended."""
        heard, timers = 0, []

        def hear(event: Event) -> None:
            nonlocal heard
            heard += 1
            if heard == self.count:
                timers.append(threading.Timer(self.delay, os.kill, (os.getpid(), self.name)))
                timers[0].start()
                if not self.delay:
                    timers[0].join()

        def stop(event: FitEnd) -> None:
            for timer in timers:
                timer.cancel()
                timer.join()

        engine.subscribe(self.event, hear)
        engine.subscribe(FitEnd, stop)


def shots(case: int, world: int) -> list[Shot]:
    """One in the first run of a case; in some cases another one in the second run, or at the same time elsewhere."""
    draw = random.Random(case)

    def shot(run: int) -> Shot:
        event = draw.choice(list(EVENTS))
        count = draw.randint(1, EVENTS[event])
        return Shot(run, draw.randrange(world), event, count, draw.choice(SIGNALS), draw.choice([0, 0.002, 0.01]))

    drawn = [shot(0)]
    if case % 3 == 1:
        drawn.append(shot(1))
    if case % 5 == 2:
        other = (drawn[0].rank + 1) % world
        drawn.append(Shot(0, other, drawn[0].event, drawn[0].count, draw.choice(SIGNALS), 0))
    return drawn


def outcome(engine: Engine, net: nn.Module) -> dict[str, Any]:
    return {
        "weights": torch.cat([parameter.detach().reshape(-1) for parameter in net.parameters()]),
        "rows": engine.history.rows,
        "validations": engine.history.validations,
        "counters": [engine.epoch, engine.step, engine.num_updates, engine.num_validations],
    }


def everywhere(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def run_case(style: Style, directory: Path, planned: list[Shot]) -> tuple[dict[str, Any], int]:
    """Return what the runs of a case have reached, and how many were cut."""
    for number in range(6):
        engine, net = build(directory)
        for shot in planned:
            if shot.run == number and shot.rank == dist.get_rank():
                shot.load(engine)
        style(engine)
        reached = (outcome(engine, net)["counters"], engine.history.exit_code, engine.history.reason)
        assert everywhere(reached) == [reached] * dist.get_world_size(), planned
        if not engine.history.exit_code:
            return outcome(engine, net), number
        newest = RunCheckpoint(directory).checkpoints.load_newest()
        assert newest is not None
        assert newest[0]["counters"]["step"] == engine.step
        dist.barrier()
    raise AssertionError(f"not at the end after 6 runs: {planned}")


def run_cases(style: Style, directory: Path, cases: list[list[Shot]]) -> int:
    """Compare each case with the run that was left alone; return how many runs were cut."""
    whole, cut = run_case(style, directory / "whole", [])
    assert not cut
    for number, planned in enumerate(cases):
        ended, num_cut = run_case(style, directory / str(number), planned)
        cut += num_cut
        assert torch.equal(ended.pop("weights"), whole["weights"]), planned
        assert ended == {name: value for name, value in whole.items() if name != "weights"}, planned
    return cut


@pytest.mark.parametrize("style", [with_fit, as_a_script])
def test_signals_to_ranks_leave_no_trace_in_the_resumed_run(style: Style, tmp_path: Path) -> None:
    """The first cuts the last step of an epoch, which leaves an open window, and by another signal to each rank."""
    cut = [Shot(0, rank, StepEnd, 5, name, 0) for rank, name in enumerate([signal.SIGTERM, signal.SIGINT])]
    results = on_ranks(2, run_cases, style, tmp_path, [cut, *(shots(case, 2) for case in range(1, 4))])
    assert results[0] == results[1] > 2


def test_three_ranks_add_up_the_first_gradients_after_a_resume_as_the_others(tmp_path: Path) -> None:
    """Which of three numbers are added first shows in the last bit."""
    cut = [Shot(0, rank, StepEnd, 4, signal.SIGTERM, 0) for rank in range(3)]
    assert on_ranks(3, run_cases, with_fit, tmp_path, [cut]) == [1, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("style", [with_fit, with_validations_in_mid_epoch, as_a_script])
def test_many_signals_to_ranks_leave_no_trace_in_the_resumed_run(style: Style, world: int, tmp_path: Path) -> None:
    num_cut = 0
    for first in range(4, 54, 10):
        cases = [shots(case, world) for case in range(first, first + 10)]
        results = on_ranks(world, run_cases, style, tmp_path / str(first), cases)
        assert results == [results[0]] * world
        num_cut += results[0]
    assert num_cut > 40
