"""The learning rates of a run."""

from __future__ import annotations

from typing import Any

import torch

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
