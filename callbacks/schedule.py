"""Learning rates over time, by torch's own schedulers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, ReduceLROnPlateau, SequentialLR

from camshaft.engine import Callback, ConfigurationError, Engine, EpochEnd, UpdateEnd
from camshaft.engine.errors import is_number, whole_number

from .monitor import Monitor


class Schedule(Callback):
    """Steps a torch scheduler after each update or each epoch.

    An update that the loss scaler skipped does not count. ``ReduceLROnPlateau`` steps whenever ``monitor`` has a
    new value. The scheduler becomes the part ``scheduler`` of the run.

    Args:
        scheduler: a scheduler over the run's optimizer, or a function ``optimizer -> scheduler``.
        per: "update" or "epoch".
        monitor: the value that ``ReduceLROnPlateau`` watches, such as ``"val_loss"``.

    Raises:
        ConfigurationError: when made or attached, for what is no scheduler, is over another optimizer, or lacks
            its monitor; before the first step if that value will not exist.

    >>> model = torch.nn.Linear(1, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    >>> Schedule(torch.optim.lr_scheduler.StepLR(optimizer, 10), per="update")
    Schedule(StepLR, per='update')
    """

    def __init__(
        self,
        scheduler: LRScheduler | Callable[[torch.optim.Optimizer], LRScheduler],
        *,
        per: Literal["update", "epoch"] = "epoch",
        monitor: str | None = None,
    ) -> None:
        if isinstance(scheduler, type) or not (isinstance(scheduler, LRScheduler) or callable(scheduler)):
            raise ConfigurationError(
                f"Schedule got {scheduler!r}, which is no scheduler. "
                "Pass StepLR(optimizer, 10), or a function: lambda optimizer: StepLR(optimizer, 10)."
            )
        if per not in ("update", "epoch"):
            raise ConfigurationError(f'Schedule has per={per!r}. Write "update" or "epoch".')
        self._given = scheduler
        self.per = per
        self.monitor = monitor
        self.needs_update = per == "update" and monitor is None
        self._updates = (0, 0)
        self.scheduler: LRScheduler | None = scheduler if isinstance(scheduler, LRScheduler) else None

    def attach(self, engine: Engine) -> None:
        """Hear updates, epochs or the monitored value."""
        optimizer = engine.parts.get("optimizer")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ConfigurationError("Schedule needs the optimizer. Write Engine(step, optimizer=optimizer, ...).")
        if self.scheduler is None:
            made = self._given(optimizer)  # type: ignore[operator]  # not a scheduler: checked callable
            if not isinstance(made, LRScheduler):
                raise ConfigurationError(
                    f"Schedule's function returned {made!r}, which is no scheduler. "
                    "Return one: lambda optimizer: StepLR(optimizer, 10)."
                )
            self.scheduler = made
        if engine.parts.get("scheduler") not in (None, self.scheduler):
            raise ConfigurationError(
                "The engine has a Schedule already. Attach one; torch's ChainedScheduler joins several."
            )
        if self.scheduler.optimizer is not optimizer:
            raise ConfigurationError(
                "Schedule's scheduler is over another optimizer than the run's. Build it over the same one."
            )
        if isinstance(self.scheduler, ReduceLROnPlateau) != (self.monitor is not None):
            raise ConfigurationError(
                f"Schedule has {type(self.scheduler).__name__} and monitor={self.monitor!r}. "
                'ReduceLROnPlateau needs one, such as monitor="val_loss"; no other scheduler takes one.'
            )
        super().attach(engine)
        engine.parts["scheduler"] = self.scheduler
        if isinstance(self.scheduler, ReduceLROnPlateau) and self.monitor is not None:
            watched = Monitor("Schedule", self.monitor, self.scheduler.mode)
            watched.attach(engine, lambda engine, value: self.scheduler.step(value))  # type: ignore[union-attr, arg-type]  # plateau
        elif self.per == "update":
            engine.subscribe(UpdateEnd, self._step)
        else:
            engine.subscribe(EpochEnd, self._step)

    def _step(self, event: UpdateEnd | EpochEnd) -> None:
        engine = event.engine
        before, self._updates = self._updates, (engine.num_updates, engine.num_skipped_updates)
        if self._updates[0] == before[0] and self._updates[1] > before[1]:
            return  # an epoch in which the loss scaler skipped every update
        if self.scheduler is not None:
            self.scheduler.step()

    def __repr__(self) -> str:
        name = "function" if self.scheduler is None else type(self.scheduler).__name__
        return f"Schedule({name}, per={self.per!r})"


def warmup_cosine(
    optimizer: torch.optim.Optimizer, *, warmup: int, total: int, start_factor: float = 0.01, min_lr: float = 0.0
) -> SequentialLR:
    """Return a linear warm-up followed by a cosine down to ``min_lr``, composed of torch's own schedulers.

    Args:
        optimizer: whose learning rates are reached at the end of the warm-up.
        warmup: how many updates (or epochs) it takes; at least 1.
        total: how many updates (or epochs) in all; more than ``warmup``.
        start_factor: share of the learning rate to begin with, above 0.
        min_lr: learning rate at the end.

    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    >>> schedule = Schedule(warmup_cosine(optimizer, warmup=10, total=100), per="update")
    """
    whole_number("warmup", warmup, least=1)
    if whole_number("total", total, least=1) <= warmup:
        raise ConfigurationError(
            f"warmup={warmup} leaves nothing of total={total}. Pass a larger total, or a smaller warmup."
        )
    if not (is_number(min_lr) and min_lr >= 0):
        raise ConfigurationError(f"min_lr is {min_lr!r}. Pass a number of at least 0.")
    if not (is_number(start_factor) and 0 < start_factor <= 1):
        raise ConfigurationError(f"start_factor is {start_factor!r}. Pass a share above 0 and up to 1.")
    rise = LinearLR(optimizer, start_factor=start_factor, total_iters=warmup)
    fall = CosineAnnealingLR(optimizer, T_max=total - warmup, eta_min=min_lr)
    return SequentialLR(optimizer, [rise, fall], milestones=[warmup])
