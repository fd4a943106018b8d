"""An optimizer is tried with a state before it is trusted: what it saved itself always passes."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

from camshaft.engine.trial_step import trial_step

NEEDS_ANOTHER_MODEL = {"SparseAdam", "Muon"}  # sparse gradients; matrices alone
KINDS = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
)


def stepped(name: str, model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    """An optimizer of this kind that has stepped twice."""
    optimizer: torch.optim.Optimizer = getattr(torch.optim, name)(model.parameters(), **settings)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = torch.stack([parameter.square().sum() for parameter in model.parameters()]).sum()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    return optimizer


def model_of(name: str) -> nn.Module:
    if name in NEEDS_ANOTHER_MODEL:
        return nn.Linear(5, 7, bias=False)
    return nn.Sequential(nn.Conv1d(3, 4, 2), nn.Linear(5, 1), nn.PReLU(), nn.LayerNorm(6))


def reloaded(name: str, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> Exception | None:
    fresh = getattr(torch.optim, name)(optimizer.param_groups[0]["params"])
    earlier = fresh.state_dict()["param_groups"]
    fresh.load_state_dict(state)
    return trial_step(fresh, earlier)


@pytest.mark.parametrize("name", [name for name in KINDS if name != "SparseAdam"])
def test_what_an_optimizer_saved_passes_and_the_trial_changes_nothing(name: str) -> None:
    model = model_of(name)
    optimizer = stepped(name, model)
    before = str(optimizer.state_dict())
    assert reloaded(name, optimizer, optimizer.state_dict()) is None
    assert trial_step(optimizer, optimizer.state_dict()["param_groups"]) is None
    assert str(optimizer.state_dict()) == before


@pytest.mark.parametrize("settings", [{"amsgrad": True}, {"foreach": True}, {"fused": True}, {"maximize": True}])
def test_other_settings_pass_too(settings: dict[str, Any]) -> None:
    optimizer = stepped("AdamW", nn.Linear(5, 7), **settings)
    assert reloaded("AdamW", optimizer, optimizer.state_dict()) is None


@pytest.mark.parametrize("name", sorted({*KINDS} - {"SparseAdam", "LBFGS"}))
def test_a_state_of_another_shape_does_not_pass(name: str) -> None:
    """LBFGS asks for a closure, and is not tried."""
    optimizer = stepped(name, nn.Linear(5, 7, bias=False), **({"momentum": 0.9} if name == "SGD" else {}))
    state = optimizer.state_dict()
    for key, value in state["state"][0].items():
        if isinstance(value, torch.Tensor) and value.numel() > 1:
            forged = {**state, "state": {0: {**state["state"][0], key: torch.zeros(3, 2)}}}
            assert reloaded(name, optimizer, forged) is not None, key


def test_an_optimizer_of_somebody_else_is_never_tried() -> None:
    class Mine(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise AssertionError

    optimizer = Mine(nn.Linear(2, 1).parameters(), 0.1)
    assert trial_step(optimizer, optimizer.state_dict()["param_groups"]) is None
