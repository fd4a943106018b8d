"""Ranks with a GPU each, which communicate by NCCL: the basic promises, on one GPU or on two.

The functions are those of the tests on CPUs. With one GPU they run in one process.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import test_fsdp
import test_ranks
import torch
from ranks import on_ranks
from test_fsdp import KINDS, Kind, make, outcome
from test_ranks import assert_alike, data, everything_on
from test_ranks_cost import FEW, MANY, by_hand, of_steps, ours

from camshaft.callbacks import Accumulate, Placement, RunCheckpoint
from camshaft.engine import Callback, CheckpointDirectory, StepEnd, at

pytestmark = pytest.mark.gpu
SAVED, STOPPED = 9, 12  # in the second epoch of 7 steps


def placed() -> list[Callback]:
    return [Placement()]


def placed_with_everything_on() -> list[Callback]:
    return [Placement(), *everything_on()]


@pytest.mark.parametrize(
    "train",
    [
        partial(test_ranks.fit, placed_with_everything_on),
        partial(test_fsdp.fit, KINDS["sharded"], placed_with_everything_on),
        partial(test_fsdp.by_hand, KINDS["sharded"], placed),
    ],
)
def test_ranks_with_gpus_train_as_one_process_does(train: Callable[[], dict[str, Any]]) -> None:
    results = on_ranks(2, train, backend="nccl")
    assert all(torch.equal(result["weights"], results[0]["weights"]) for result in results)
    assert_alike(results[0], train())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one process sends nothing")
def test_a_step_on_gpus_sends_what_a_step_of_a_hand_written_loop_sends() -> None:
    hand = on_ranks(2, partial(of_steps, by_hand, device="cuda"), backend="nccl")
    assert hand == [{"c10d::allreduce_": MANY - FEW}] * 2
    assert on_ranks(2, partial(of_steps, ours, callbacks=placed), backend="nccl") == hand


def run_in(directory: Path, kind: Kind, *, is_cut: bool) -> dict[str, Any]:
    """Train, or go on; the last rank alone asks for a checkpoint, and for the end of the run."""
    trainer = make(kind, lambda: [Placement(), Accumulate(3), RunCheckpoint(directory, keep=9)])
    if is_cut and trainer.ranks.rank == trainer.ranks.world - 1:
        trainer.subscribe(StepEnd, lambda event: event.engine.run.save(), when=at(SAVED))
        trainer.subscribe(StepEnd, lambda event: event.engine.run.interrupt(signal.SIGTERM), when=at(STOPPED))
    trainer.fit(data(), data(37, shuffle=False, seed=1), epochs=3, resume="auto")
    return outcome(trainer)


@pytest.mark.parametrize("kind", ["replicated", "sharded"])
def test_what_one_rank_asks_for_is_done_by_all_and_the_run_goes_on(kind: str, tmp_path: Path) -> None:
    run = partial(run_in, tmp_path / "run", KINDS[kind])
    (end,) = {result["counters"][1] for result in on_ranks(2, partial(run, is_cut=True), backend="nccl")}
    saved = sorted(file.step for file in CheckpointDirectory(tmp_path / "run").files())
    assert saved == [7, saved[1], end]
    assert SAVED <= saved[1] < STOPPED <= end
    results = on_ranks(2, partial(run, is_cut=False), backend="nccl")
    assert_alike(results[0], run_in(tmp_path / "alone", KINDS[kind], is_cut=False))
