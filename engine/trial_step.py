"""Whether an optimizer could step with the state that it was given, found out on parameters of one or two elements."""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from .sharded import is_sharded

# How the parameters of an accelerator are stepped does not matter here, and some ways do not exist on the CPU.
_PLAIN = {"foreach": False, "fused": False, "capturable": False}


def trial_step(optimizer: torch.optim.Optimizer, earlier: list[dict[str, Any]]) -> Exception | None:
    """Return the error that the optimizer's next step would raise because of its state; None where none is known.

    Only torch's own optimizers are tried: those of others may do more than change their parameters.

    Args:
        optimizer: it has just been given a state.
        earlier: its groups before that. If it could not step with them either, the state is not the cause.
    """
    if not type(optimizer).__module__.startswith("torch.optim"):
        return None
    if _error_of(optimizer, earlier, with_state=False) is not None:
        return None
    return _error_of(optimizer, optimizer.param_groups, with_state=True)


def _error_of(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]], *, with_state: bool) -> Exception | None:
    trial = copy.copy(optimizer)
    trial.state, trial.param_groups = defaultdict(dict), []
    try:
        for real, group in zip(optimizer.param_groups, groups, strict=True):
            small = [_small(parameter) for parameter in real["params"]]
            elsewhere = any(parameter.device.type != "cpu" for parameter in real["params"])
            plain = {key: _PLAIN[key] for key in _PLAIN.keys() & group.keys()} if elsewhere else {}
            trial.param_groups.append({**group, **plain, "params": small})
            if with_state:
                for parameter, one in zip(real["params"], small, strict=True):
                    trial.state[one] = _small_state(optimizer.state.get(parameter, {}), parameter)
        step: Any = type(trial).step
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            getattr(step, "__wrapped__", step)(trial)  # without the hooks of profilers and users
    except Exception as error:
        return error
    return None


def _small(parameter: Tensor) -> nn.Parameter:
    small = nn.Parameter(torch.zeros([min(size, 2) for size in parameter.shape], dtype=parameter.dtype))
    small.grad = torch.zeros_like(small)
    return small


def _small_state(state: Any, parameter: Tensor) -> Any:
    return {key: _like(value, parameter) if isinstance(value, Tensor) else value for key, value in state.items()}


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return a small tensor that has the shape of a small parameter where the value has that of the real one."""
    if value.numel() == 1 and not is_sharded(value):
        return value.detach().cpu().clone()
    sizes = [min(size, 2) for size in value.shape]
    if value.ndim != parameter.ndim or any(a not in (1, b) for a, b in zip(value.shape, parameter.shape, strict=True)):
        sizes = [3] * (value.ndim + 1)
    return torch.zeros(sizes, dtype=value.dtype)
