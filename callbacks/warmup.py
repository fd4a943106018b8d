"""A learning rate that rises in a line and falls along a cosine."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from camshaft.engine import ConfigurationError, is_number, whole_number


def warmup_cosine(
    optimizer: torch.optim.Optimizer,
    total: int,
    *,
    warmup: float = 0.1,
    start_factor: float = 0.01,
    min_lr: float = 0.0,
) -> LambdaLR:
    """Return a scheduler: a linear warm-up, then a cosine decay to ``min_lr``, which is kept afterwards.

    ``Schedule(warmup_cosine, per="update")`` spans the whole run; `functools.partial` sets more.

    Args:
        optimizer: whose learning rates are reached at the end of the warm-up.
        total: how many updates (or epochs) in all; more than the warm-up.
        warmup: how many of them the warm-up takes, or, below 1, which share of them.
        start_factor: share of the learning rate to begin with, above 0.
        min_lr: learning rate at the end.

    Source: Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, 2017, equation 5.

    >>> from camshaft.callbacks import Schedule
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    >>> schedule = Schedule(warmup_cosine(optimizer, total=100, warmup=10), per="update")
    """
    rise = _length_of_warmup(warmup, total)
    _check_rates(start_factor, min_lr)

    def of_group(group: dict[str, Any]) -> Callable[[int], float]:
        base = float(group.get("initial_lr", group["lr"]))
        least = min_lr / base if base else 0.0  # LambdaLR takes shares of each group's own rate
        # Not an object that can be called: LambdaLR would save its attributes, and a resumed run could not be longer.
        return lambda count: _factor(count, rise, total, start_factor, least)

    return LambdaLR(optimizer, [of_group(group) for group in optimizer.param_groups])


def _factor(count: int, rise: int, total: int, start: float, least: float) -> float:
    """Return the share of the learning rate after ``count`` of ``total`` updates, of which ``rise`` are warm-up."""
    if count < rise:
        return start + (1 - start) * count / rise
    done = min((count - rise) / (total - rise), 1.0)
    return least + (1 - least) * (1 + math.cos(math.pi * done)) / 2


def _length_of_warmup(warmup: float, total: int) -> int:
    """Return how many of ``total`` updates are warm-up; at least one is not."""
    if not (is_number(warmup) and warmup >= 0 and (warmup < 1 or warmup == int(warmup))):
        raise ConfigurationError(
            f"warmup is {warmup!r}. Pass a whole number, or a fraction of at least 0 and below 1."
        )
    whole_number("total", total, least=1)
    rise = min(round(warmup * total), total - 1) if warmup < 1 else int(warmup)
    if rise >= total:
        raise ConfigurationError(
            f"warmup={warmup} leaves nothing of total={total}. Pass a larger total, or a smaller warmup."
        )
    return rise


def _check_rates(start_factor: float, min_lr: float) -> None:
    if not (is_number(min_lr) and min_lr >= 0):
        raise ConfigurationError(f"min_lr is {min_lr!r}. Pass a number of at least 0.")
    if not (is_number(start_factor) and 0 < start_factor <= 1):
        raise ConfigurationError(f"start_factor is {start_factor!r}. Pass a fraction above 0 and up to 1.")
