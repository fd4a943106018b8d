"""The learning rates of a run."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from camshaft.engine import Engine


def learning_rates(engine: Engine) -> dict[str, Any]:
    """Return the learning rates by name, of which each is a number or a tensor.

    >>> model = torch.nn.Linear(1, 1)
    >>> learning_rates(Engine(optimizer=torch.optim.SGD(model.parameters(), lr=0.1)))
    {'lr': 0.1}
    """
    rates: dict[str, Any] = {}
    for optimizer in engine.parts.optimizers().values():
        name, groups = name_after("lr", engine, optimizer), optimizer.param_groups
        rates |= {name if len(groups) == 1 else f"{name}_{at}": group["lr"] for at, group in enumerate(groups)}
    return rates


def scale_rates(engine: Engine, factor: float) -> None:
    """Multiply all learning rates by ``factor``, and what schedulers compute the next ones from.

    A scheduler that keeps other numbers, such as ``eta_min``, still ends at those.

    >>> model = torch.nn.Linear(1, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    >>> scale_rates(Engine(optimizer=optimizer, scheduler=scheduler), 0.5)
    >>> optimizer.param_groups[0]["lr"], scheduler.base_lrs
    (0.05, [0.05])
    """
    for optimizer in engine.parts.optimizers().values():
        for group in optimizer.param_groups:
            for name in ("lr", "initial_lr", "max_lr", "min_lr"):
                if name in group:
                    group[name] = group[name] * factor
    schedulers = [part for part in engine.parts.values() if isinstance(part, LRScheduler)]
    while schedulers:
        scheduler: Any = schedulers.pop()
        for name in ("base_lrs", "max_lrs", "_last_lr"):
            if hasattr(scheduler, name):
                setattr(scheduler, name, [rate * factor for rate in getattr(scheduler, name)])
        schedulers += getattr(scheduler, "_schedulers", [])


def name_after(name: str, engine: Engine, optimizer: torch.optim.Optimizer) -> str:
    """Return the name of an optimizer's value, which has the name of its part where there are several.

    >>> model = torch.nn.Linear(1, 1)
    >>> engine = Engine(optimizer=torch.optim.SGD(model.parameters()))
    >>> name_after("lr", engine, engine.parts["optimizer"])
    'lr'
    """
    optimizers = engine.parts.optimizers()
    if len(optimizers) == 1:
        return name
    return next((f"{name}_{part}" for part, one in optimizers.items() if one is optimizer), name)
