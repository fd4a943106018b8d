"""Learning rates over time, by torch's own schedulers."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from camshaft.engine import (
    Callback,
    ConfigurationError,
    Engine,
    EpochEnd,
    FitStart,
    StepEnd,
    Subscription,
    UpdateEnd,
    can_take,
    did_you_mean,
    is_number,
    whole_number,
)

from .monitor import Monitor

logger = logging.getLogger("camshaft")


class Schedule(Callback):
    """Steps a torch scheduler after each update, step or epoch.

    An update that the loss scaler skipped does not count. ``ReduceLROnPlateau`` steps whenever ``monitor`` has a
    new value. The scheduler becomes the part ``scheduler`` of the run (``<name>_scheduler`` for an optimizer that is
    the part ``<name>``).

    Args:
        scheduler: a scheduler over one of the run's optimizers; or a function ``optimizer -> scheduler``; or a
            function ``(optimizer, total) -> scheduler``, such as `warmup_cosine`, which is called when a run begins,
            and makes a new schedule for each fit. The total is how many epochs, training steps, or updates the run is
            to make; of updates, one is expected for each step, or window of `Accumulate`.
        per: "update", "step" or "epoch".
        monitor: the value that ``ReduceLROnPlateau`` watches, such as ``"val_loss"``.
        optimizer: the name of the part that a function's scheduler is over.

    Raises:
        ConfigurationError: when made or attached, for what is no scheduler, is over another optimizer, or lacks
            its monitor; before the first step if that value will not exist, or the total cannot be known; after the
            first epoch, if its optimizer was never due.

    On resume the schedule is where it was. If the run now goes further, a `LambdaLR`, such as `warmup_cosine`'s, has
    the new length; others that were made for a total cannot be stretched, and are refused.

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
        per: Literal["update", "step", "epoch"] = "epoch",
        monitor: str | None = None,
        optimizer: str = "optimizer",
    ) -> None:
        if isinstance(scheduler, type) or not (isinstance(scheduler, LRScheduler) or callable(scheduler)):
            raise ConfigurationError(
                f"Schedule got {scheduler!r}, which is no scheduler. "
                "Pass StepLR(optimizer, 10), or a function: lambda optimizer: StepLR(optimizer, 10)."
            )
        if per not in ("update", "step", "epoch"):
            raise ConfigurationError(f'Schedule has per={per!r}. Write "update", "step" or "epoch".')
        self._given: Any = scheduler
        self.per = per
        self.monitor = monitor
        self.needs_update = per == "update" and monitor is None
        self.optimizer = optimizer
        self.scheduler = scheduler if isinstance(scheduler, LRScheduler) else None
        self._takes_total = not isinstance(scheduler, LRScheduler) and _takes_total(scheduler)
        self._total = 0
        self._has_stepped = False
        self._updates = [0, 0]  # made and skipped, at the end of the last epoch
        self._first_epoch: Subscription[EpochEnd] | None = None

    def attach(self, engine: Engine) -> None:
        """Hear updates, steps, epochs or the monitored value."""
        self._find_optimizer(engine)
        if self.scheduler is None and not self._takes_total:
            self.scheduler = self._made(engine)
        if self.scheduler is not None:
            self._check_monitor(self.scheduler)
        if self._part in engine.parts and (self._takes_total or engine.parts[self._part] is not self.scheduler):
            raise ConfigurationError(
                f"Schedule is to become the part {self._part}, which the engine has already. "
                "Attach one for each optimizer; torch's ChainedScheduler joins several."
            )
        super().attach(engine)
        engine.parts[self._part] = self.scheduler
        if self._takes_total:
            engine.subscribe(FitStart, self._make_for_run)
        if self.monitor is not None and isinstance(self.scheduler, ReduceLROnPlateau):
            watched = Monitor("Schedule", self.monitor, self.scheduler.mode)
            watched.attach(engine, lambda engine, value: self.scheduler.step(value))  # type: ignore[union-attr, arg-type]  # plateau
        elif self.per == "epoch":
            engine.subscribe(EpochEnd, self._step_after_epoch)
        elif self.per == "step":
            engine.subscribe(StepEnd, self._step)
        else:
            engine.subscribe(UpdateEnd, self._step_after_update)
            self._first_epoch = engine.subscribe(EpochEnd, self._check_first_epoch)

    @property
    def _part(self) -> str:
        return "scheduler" if self.optimizer == "optimizer" else f"{self.optimizer}_scheduler"

    def _find_optimizer(self, engine: Engine) -> None:
        optimizers = engine.parts.optimizers()
        if not optimizers:
            raise ConfigurationError("Schedule needs the optimizer. Write Engine(step, optimizer=optimizer, ...).")
        if self.scheduler is not None:
            self.optimizer = next((n for n, part in optimizers.items() if part is self.scheduler.optimizer), "")
            if not self.optimizer:
                raise ConfigurationError(OTHER_OPTIMIZER)
        elif self.optimizer not in optimizers:
            raise ConfigurationError(
                f'Schedule is for "{self.optimizer}", but the optimizers are: {", ".join(optimizers)}. '
                f'{did_you_mean(self.optimizer, optimizers)}Write Schedule(..., optimizer="{next(iter(optimizers))}").'
            )

    def _made(self, engine: Engine, *total: int) -> LRScheduler:
        """Return what the function makes of the optimizer."""
        made = self._given(engine.parts[self.optimizer], *total)
        if not isinstance(made, LRScheduler):
            raise ConfigurationError(
                f"Schedule's function returned {made!r}, which is no scheduler. "
                "Return one: lambda optimizer: StepLR(optimizer, 10)."
            )
        if made.optimizer is not engine.parts[self.optimizer]:
            raise ConfigurationError(OTHER_OPTIMIZER)
        return made

    def _check_monitor(self, scheduler: LRScheduler) -> None:
        if isinstance(scheduler, ReduceLROnPlateau) and self._takes_total:
            raise ConfigurationError(
                "ReduceLROnPlateau has no use for a total. Pass a function of the optimizer alone, and a monitor."
            )
        if isinstance(scheduler, ReduceLROnPlateau) != (self.monitor is not None):
            raise ConfigurationError(
                f"Schedule has {type(scheduler).__name__} and monitor={self.monitor!r}. "
                'ReduceLROnPlateau needs one, such as monitor="val_loss"; no other scheduler takes one.'
            )

    def _make_for_run(self, event: FitStart) -> None:
        engine = event.engine
        total = engine.update.num_planned(engine.run) if self.per == "update" else engine.run.num_planned(self.per)
        if total is None:
            why = "its data, or the windows of Accumulate, have no set length"
            if engine.run.has_validation is None:
                why = "a loop of your own shows its data only later"
            raise ConfigurationError(
                f"Schedule cannot know how many {self.per}s this run is to make: {why}. "
                "State it: lambda optimizer: warmup_cosine(optimizer, total=10_000)."
            )
        if self.scheduler is not None:  # of an earlier fit, which has left the rates where it ended
            for group, last in zip(self.scheduler.optimizer.param_groups, self.scheduler.get_last_lr(), strict=True):
                begin = "initial_lr" if group["lr"] == last else "lr"  # or one was set by hand since
                group["lr"] = group["initial_lr"] = group[begin]
        self._total, self._has_stepped = max(total, 1), False
        self.scheduler = engine.parts[self._part] = self._made(engine, self._total)
        self._check_monitor(self.scheduler)

    def _step_after_update(self, event: UpdateEnd) -> None:
        if self.scheduler is not None and event.optimizer is self.scheduler.optimizer:
            self.scheduler.step()

    def _step_after_epoch(self, event: EpochEnd) -> None:
        engine = event.engine
        before, self._updates = self._updates, [engine.num_updates, engine.num_skipped_updates]
        if self._updates[0] == before[0] and self._updates[1] > before[1]:
            return  # an epoch in which the loss scaler skipped every update
        if self.scheduler is not None:
            self.scheduler.step()

    def _step(self, event: StepEnd) -> None:
        if self.scheduler is None:
            return
        if self._has_stepped:
            self.scheduler.step()
            return
        with warnings.catch_warnings():  # torch looks once whether its optimizer was first, which may not be due yet
            warnings.filterwarnings("ignore", message=".*lr_scheduler.step.* before .*optimizer.step")
            self.scheduler.step()
        self._has_stepped = True

    def _check_first_epoch(self, event: EpochEnd) -> None:
        """Compare, once, what the optimizer did in an epoch with what the schedule counts on."""
        self._stop_checking()
        engine = event.engine
        made = engine.update.num_made(self.optimizer)
        if engine.num_updates and not made:
            raise ConfigurationError(
                f'Schedule had no effect in this epoch, for no update was for "{self.optimizer}". '
                f'Write engine.update(loss, optimizer="{self.optimizer}").'
            )
        expected = -(-engine.epoch_step // engine.update.window_size.batches)
        if self._takes_total and made != expected:
            logger.warning(
                'Schedule counts on %d updates of "%s" in an epoch of %d steps, and there were %d, so it will not end '
                'with the run. Write per="step", which counts steps.',
                expected, self.optimizer, engine.epoch_step, made,
            )  # fmt: skip

    def _stop_checking(self) -> None:
        if self._first_epoch is not None:
            self._first_epoch.cancel()

    def state_dict(self) -> dict[str, Any]:
        """Return the total, and the updates up to the last epoch; the scheduler is a part of the run."""
        return {"total": self._total, "updates": self._updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned; a run that now goes further needs other learning rates.

        Raises:
            ConfigurationError: if the scheduler cannot be stretched to the new total.
        """
        self._stop_checking()  # of this epoch, only a part will be seen
        self._updates = list(state["updates"])
        if not self._takes_total or self._total == state["total"]:
            return
        scheduler = self.scheduler
        if not isinstance(scheduler, LambdaLR):
            raise ConfigurationError(
                f"{type(scheduler).__name__} was made for a total of {state['total']} {self.per}s, and this run is to "
                f"make {self._total}. Ask for as many as before, or use a LambdaLR, such as warmup_cosine."
            )
        for group, base, factor in zip(
            scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(scheduler.last_epoch)

    def __repr__(self) -> str:
        name = "function" if self.scheduler is None else type(self.scheduler).__name__
        return f"Schedule({name}, per={self.per!r})"


OTHER_OPTIMIZER = "Schedule's scheduler is over another optimizer than the run's. Build it over the same one."


def _takes_total(make: Callable[..., LRScheduler]) -> bool:
    if can_take(make, 1):
        return False
    if can_take(make, 2):
        return True
    raise ConfigurationError(
        f"Schedule's function {getattr(make, '__name__', make)!r} takes neither (optimizer) nor (optimizer, total). "
        "Write lambda optimizer: StepLR(optimizer, 10)."
    )


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
