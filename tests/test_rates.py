"""Learning rates that are multiplied in the middle of a run, also under a scheduler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    PolynomialLR,
    SequentialLR,
    StepLR,
)

from camshaft.callbacks.rates import scale_rates
from camshaft.engine import Engine

MAKE: dict[str, Callable[[Any], LRScheduler]] = {
    "lambda": lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "step": lambda optimizer: StepLR(optimizer, 3),
    "exponential": lambda optimizer: ExponentialLR(optimizer, 0.9),
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, 20),
    "linear": lambda optimizer: LinearLR(optimizer, 0.1, total_iters=12),
    "polynomial": lambda optimizer: PolynomialLR(optimizer, 20, 2.0),
    "one cycle": lambda optimizer: OneCycleLR(optimizer, 0.5, 20),
    "in sequence": lambda optimizer: SequentialLR(
        optimizer, [LinearLR(optimizer, 0.1, total_iters=4), CosineAnnealingLR(optimizer, 20)], [4]
    ),
    "chained": lambda optimizer: ChainedScheduler([ExponentialLR(optimizer, 0.9), StepLR(optimizer, 4)]),
}


def rates(make: Callable[[Any], LRScheduler], scaled_at: int | None) -> list[list[float]]:
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [parameters[0]], "lr": 0.1}, {"params": [parameters[1]], "lr": 0.01}])
    scheduler = make(optimizer)
    engine = Engine(optimizer=optimizer, scheduler=scheduler)
    seen = []
    for step in range(15):
        if step == scaled_at:
            scale_rates(engine, 0.25)
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return seen


@pytest.mark.filterwarnings("ignore:The epoch parameter")  # torch's own, in SequentialLR
@pytest.mark.parametrize("name", MAKE)
def test_from_then_on_each_rate_is_the_one_without_it_times_the_factor(name: str) -> None:
    before, after = rates(MAKE[name], None), rates(MAKE[name], 6)
    for step, (one, other) in enumerate(zip(before, after, strict=True)):
        factor = 1.0 if step < 6 else 0.25
        assert other == pytest.approx([rate * factor for rate in one], rel=1e-6, abs=1e-12), step


def test_a_rate_that_is_a_tensor_stays_one() -> None:
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=torch.tensor(0.1), foreach=False)
    scale_rates(Engine(optimizer=optimizer), 0.5)
    assert torch.equal(optimizer.param_groups[0]["lr"], torch.tensor(0.05))
