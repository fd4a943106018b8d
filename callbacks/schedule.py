"""Learning rates over time, by torch's own schedulers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from camshaft.engine import Callback, ConfigurationError, Engine, EpochEnd, FitStart, UpdateEnd
from camshaft.engine.errors import can_take, did_you_mean, is_number, whole_number

from .monitor import Monitor


class Schedule(Callback):
    """Steps a torch scheduler after each update or each epoch.

    An update that the loss scaler skipped does not count. ``ReduceLROnPlateau`` steps whenever ``monitor`` has a
    new value. The scheduler becomes the part ``scheduler`` of the run (``<name>_scheduler`` for an optimizer that is
    the part ``<name>``).

    Args:
        scheduler: a scheduler over one of the run's optimizers; or a function ``optimizer -> scheduler``; or a
            function ``(optimizer, total) -> scheduler``, such as `warmup_cosine`, which is called when a run begins
            with the number of updates (or epochs) that it is to make, and makes a new schedule for each fit.
        per: "update" or "epoch".
        monitor: the value that ``ReduceLROnPlateau`` watches, such as ``"val_loss"``.
        optimizer: the name of the part that a function's scheduler is over.

    Raises:
        ConfigurationError: when made or attached, for what is no scheduler, is over another optimizer, or lacks
            its monitor; before the first step if that value will not exist, or the total cannot be known.

    On resume the schedule is where it was; that of a `LambdaLR`, such as `warmup_cosine`'s, has the new run's length.

    >>> model = torch.nn.Linear(1, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    >>> Schedule(torch.optim.lr_scheduler.StepLR(optimizer, 10), per="update")
    Schedule(StepLR, per='update')
    >>> Schedule(lambda optimizer, total: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total), per="update")
    Schedule(function, per='update')
    """

    def __init__(
        self,
        scheduler: LRScheduler | Callable[..., LRScheduler],
        *,
        per: Literal["update", "epoch"] = "epoch",
        monitor: str | None = None,
        optimizer: str = "optimizer",
    ) -> None:
        if isinstance(scheduler, type) or not (isinstance(scheduler, LRScheduler) or callable(scheduler)):
            raise ConfigurationError(
                f"Schedule got {scheduler!r}, which is no scheduler. "
                "Pass StepLR(optimizer, 10), or a function: lambda optimizer: StepLR(optimizer, 10)."
            )
        if per not in ("update", "epoch"):
            raise ConfigurationError(f'Schedule has per={per!r}. Write "update" or "epoch".')
        self._given: Any = scheduler
        self.per = per
        self.monitor = monitor
        self.needs_update = per == "update" and monitor is None
        self.optimizer = optimizer
        self._updates = (0, 0)
        self.scheduler = scheduler if isinstance(scheduler, LRScheduler) else None
        made = None if isinstance(scheduler, LRScheduler) else scheduler
        self._needs_total = made is not None and can_take(made, 2) and not can_take(made, 1)

    def attach(self, engine: Engine) -> None:
        """Hear updates, epochs or the monitored value."""
        optimizers = {name: part for name, part in engine.parts.items() if isinstance(part, torch.optim.Optimizer)}
        if not optimizers:
            raise ConfigurationError("Schedule needs the optimizer. Write Engine(step, optimizer=optimizer, ...).")
        if self.scheduler is not None:
            owners = [name for name, part in optimizers.items() if part is self.scheduler.optimizer]
            if not owners:
                raise ConfigurationError(
                    "Schedule's scheduler is over another optimizer than the run's. Build it over the same one."
                )
            self.optimizer = owners[0]
        elif self.optimizer not in optimizers:
            raise ConfigurationError(
                f'Schedule is for "{self.optimizer}", but the optimizers are: {", ".join(optimizers)}. '
                f'{did_you_mean(self.optimizer, optimizers)}Write Schedule(..., optimizer="{next(iter(optimizers))}").'
            )
        if self._part in engine.parts:
            raise ConfigurationError(
                "The engine has a Schedule already. Attach one; torch's ChainedScheduler joins several."
            )
        if self._needs_total:
            engine.subscribe(FitStart, self._make_for_run)
        elif self.scheduler is None:
            self.scheduler = self._made(engine)
        plateau = isinstance(self.scheduler, ReduceLROnPlateau)
        if plateau != (self.monitor is not None):
            name = "a function of the total" if self.scheduler is None else type(self.scheduler).__name__
            raise ConfigurationError(
                f"Schedule has {name} and monitor={self.monitor!r}. "
                'ReduceLROnPlateau needs one, such as monitor="val_loss"; no other scheduler takes one.'
            )
        super().attach(engine)
        engine.parts[self._part] = self.scheduler
        if isinstance(self.scheduler, ReduceLROnPlateau) and self.monitor is not None:
            watched = Monitor("Schedule", self.monitor, self.scheduler.mode)
            watched.attach(engine, lambda engine, value: self.scheduler.step(value))  # type: ignore[union-attr, arg-type]  # plateau
        elif self.per == "update":
            engine.subscribe(UpdateEnd, self._step_after_update)
        else:
            engine.subscribe(EpochEnd, self._step_after_epoch)

    @property
    def _part(self) -> str:
        return "scheduler" if self.optimizer == "optimizer" else f"{self.optimizer}_scheduler"

    def _made(self, engine: Engine, *total: int) -> LRScheduler:
        """Return what the function makes of the optimizer."""
        made = self._given(engine.parts[self.optimizer], *total)
        if not isinstance(made, LRScheduler):
            raise ConfigurationError(
                f"Schedule's function returned {made!r}, which is no scheduler. "
                "Return one: lambda optimizer: StepLR(optimizer, 10)."
            )
        if made.optimizer is not engine.parts[self.optimizer]:
            raise ConfigurationError(
                "Schedule's scheduler is over another optimizer than the run's. Build it over the same one."
            )
        return made

    def _make_for_run(self, event: FitStart) -> None:
        total = event.engine.planned(self.per)
        if total is None:
            raise ConfigurationError(
                f"Schedule cannot know how many {self.per}s this run is to make: "
                "its data, or the windows of Accumulate, have no set length. "
                "State it: lambda optimizer: warmup_cosine(optimizer, total=10_000)."
            )
        self.scheduler = event.engine.parts[self._part] = self._made(event.engine, max(total, 1))

    def _step_after_update(self, event: UpdateEnd) -> None:
        if self.scheduler is not None and event.optimizer is self.scheduler.optimizer:
            self.scheduler.step()

    def _step_after_epoch(self, event: EpochEnd) -> None:
        engine = event.engine
        before, self._updates = self._updates, (engine.num_updates, engine.num_skipped_updates)
        if self._updates[0] == before[0] and self._updates[1] > before[1]:
            return  # an epoch in which the loss scaler skipped every update
        if self.scheduler is not None:
            self.scheduler.step()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Look the learning rates up again where they are a function of the count: the run may be longer now."""
        if self._needs_total and isinstance(self.scheduler, LambdaLR):
            scheduler = self.scheduler
            for group, base, factor in zip(
                scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
            ):
                group["lr"] = base * factor(scheduler.last_epoch)

    def __repr__(self) -> str:
        name = "function" if self.scheduler is None else type(self.scheduler).__name__
        return f"Schedule({name}, per={self.per!r})"


def warmup_cosine(
    optimizer: torch.optim.Optimizer,
    total: int,
    *,
    warmup: float = 0.1,
    start_factor: float = 0.01,
    min_lr: float = 0.0,
) -> LambdaLR:
    """Return a scheduler: a linear warm-up, then a cosine down to ``min_lr``, which stays.

    ``Schedule(warmup_cosine, per="update")`` spans the whole run; `functools.partial` sets more.

    Args:
        optimizer: whose learning rates are reached at the end of the warm-up.
        total: how many updates (or epochs) in all; more than the warm-up.
        warmup: how many of them the warm-up takes, or, below 1, which share of them.
        start_factor: share of the learning rate to begin with, above 0.
        min_lr: learning rate at the end.

    Source: Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, 2017, equation 5.

    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    >>> schedule = Schedule(warmup_cosine(optimizer, total=100, warmup=10), per="update")
    """
    if not (is_number(warmup) and warmup >= 0 and (warmup < 1 or warmup == int(warmup))):
        raise ConfigurationError(f"warmup is {warmup!r}. Pass a whole number, or a share of at least 0 and below 1.")
    whole_number("total", total, least=1)
    rise = min(round(warmup * total), total - 1) if warmup < 1 else int(warmup)
    if rise >= total:
        raise ConfigurationError(
            f"warmup={warmup} leaves nothing of total={total}. Pass a larger total, or a smaller warmup."
        )
    if not (is_number(min_lr) and min_lr >= 0):
        raise ConfigurationError(f"min_lr is {min_lr!r}. Pass a number of at least 0.")
    if not (is_number(start_factor) and 0 < start_factor <= 1):
        raise ConfigurationError(f"start_factor is {start_factor!r}. Pass a share above 0 and up to 1.")

    def factor(count: int, least: float) -> float:
        if count < rise:
            return start_factor + (1 - start_factor) * count / rise
        done = min((count - rise) / (total - rise), 1.0)
        return least + (1 - least) * (1 + math.cos(math.pi * done)) / 2

    def of_group(base: float) -> Callable[[int], float]:
        least = min_lr / base if base else 0.0  # LambdaLR takes shares of each group's own rate
        return lambda count: factor(count, least)

    return LambdaLR(
        optimizer, [of_group(float(group.get("initial_lr", group["lr"]))) for group in optimizer.param_groups]
    )
