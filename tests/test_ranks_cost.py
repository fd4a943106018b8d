"""What several ranks send: in a step no more than a hand-written loop over DistributedDataParallel."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from camshaft.callbacks import Accumulate, ClipGradients, Distributed, StopOnNonFinite, WeightAverage
from camshaft.engine import Callback, Trainer

WORLD = 2
FEW, MANY = 3, 8


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def batches(num: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 4, generator=generator), torch.arange(6) % 3) for _ in range(num)]


def operations(function: Callable[[], Any]) -> Counter[str]:
    """Return how often each operation of torch.distributed was begun on this rank."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        function()
    return Counter(event.name for event in seen.events() if event.name.startswith("c10d::"))


def calls(function: Callable[[], Any]) -> Counter[str]:
    """Return how many functions of Python's own were called, on the main thread."""
    counts: Counter[str] = Counter()

    def count(frame: Any, what: str, argument: Any) -> None:
        counts["calls"] += what == "call"

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return counts


Counts = Callable[[Callable[[], Any]], Counter[str]]


def by_hand(num: int, *, device: str = "cpu", counted: Counts = operations) -> Counter[str]:
    net = model().to(device)
    replica, optimizer = DistributedDataParallel(net), torch.optim.SGD(net.parameters(), 0.1)

    def run() -> None:
        for inputs, target in batches(num):
            output = replica(inputs[:3].to(device))
            nn.functional.cross_entropy(output, target[:3].to(device)).backward()
            optimizer.step()
            optimizer.zero_grad()

    return counted(run)


def ours(
    num: int,
    *,
    callbacks: Callable[[], list[Callback]] = list,
    metrics: Callable[[], dict[str, Any]] = dict,
    epochs: int = 1,
    validates: bool = False,
    counted: Counts = operations,
) -> Counter[str]:
    net = model()
    trainer = Trainer(
        net,
        torch.optim.SGD(net.parameters(), 0.1),
        nn.CrossEntropyLoss(),
        metrics=metrics(),
        callbacks=[Distributed(), *callbacks()],
        seed=0,
    )
    return counted(lambda: trainer.fit(batches(num), batches(2) if validates else None, epochs=epochs))


def watched() -> list[Callback]:
    return [ClipGradients(1.0), WeightAverage(), StopOnNonFinite("raise")]


def two_metrics() -> dict[str, Any]:
    return {"acc": MulticlassAccuracy(3), "confusion": MulticlassConfusionMatrix(3)}


def of_steps(run: Callable[..., Counter[str]], **settings: Any) -> dict[str, int]:
    """Return what the steps beyond the first few send."""
    few, many = run(FEW, **settings), run(MANY, **settings)
    many.subtract(few)
    return {name: count for name, count in many.items() if count}


def of_an_epoch(**settings: Any) -> dict[str, int]:
    """Return what an epoch sends beside what its steps do."""
    one, two = ours(FEW, epochs=1, **settings), ours(FEW, epochs=2, **settings)
    two.subtract(one)
    two.subtract({"c10d::allreduce_": FEW})
    return {name: count for name, count in two.items() if count}


@pytest.mark.parametrize("callbacks", [list, watched])
def test_a_step_sends_what_a_step_of_a_hand_written_loop_sends(callbacks: Callable[[], list[Callback]]) -> None:
    for hand in on_ranks(WORLD, of_steps, by_hand):
        assert hand == {"c10d::allreduce_": MANY - FEW}
    for rank in on_ranks(WORLD, lambda: of_steps(ours, callbacks=callbacks, metrics=two_metrics)):
        assert rank == hand


def calls_of_a_step(run: Callable[..., Counter[str]]) -> float:
    run(FEW)  # what is only done once, such as imports
    return of_steps(run, counted=calls)["calls"] / (MANY - FEW)


def test_a_step_calls_few_functions_beside_those_of_a_hand_written_loop() -> None:
    """None of Python's own runs while the gradients of a batch that divides evenly are added up."""
    hand, own = (on_ranks(WORLD, calls_of_a_step, run)[0] for run in (by_hand, ours))
    assert hand / 2 < own <= hand + 30


def test_an_accumulated_batch_sends_no_more_than_a_step() -> None:
    for rank in on_ranks(WORLD, lambda: of_steps(ours, callbacks=lambda: [Accumulate(2)])):
        assert rank == {"c10d::allreduce_": MANY - FEW}


def test_a_stage_sends_its_averages_at_once() -> None:
    for rank in on_ranks(WORLD, of_an_epoch):
        assert rank == {"c10d::allreduce_": 1}
    for rank in on_ranks(WORLD, lambda: of_an_epoch(validates=True)):
        assert rank == {"c10d::allreduce_": 2}


def test_a_stage_sends_the_states_of_all_metrics_at_once() -> None:
    """Gathering objects is two operations of torch: their sizes, and what they hold."""
    for rank in on_ranks(WORLD, lambda: of_an_epoch(metrics=two_metrics)):
        assert rank == {"c10d::allreduce_": 1, "c10d::allgather_": 2}
