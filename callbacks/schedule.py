"""Learning rates over time, by torch's own schedulers."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any, Literal

from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from camshaft.engine import (
    Callback,
    ConfigurationError,
    Engine,
    EpochEnd,
    FitStart,
    StepEnd,
    Subscription,
    UpdateEnd,
)

from .monitor import Monitor
from .schedule_kinds import kind_of

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

    >>> import torch
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
        self._kind = kind_of(scheduler)
        if per not in ("update", "step", "epoch"):
            raise ConfigurationError(f'Schedule has per={per!r}. Write "update", "step" or "epoch".')
        self.per = per
        self.monitor = monitor
        self.needs_update = per == "update" and monitor is None
        self.optimizer = optimizer
        self.scheduler = scheduler if isinstance(scheduler, LRScheduler) else None
        self._total = 0  # what the scheduler of this run was made for, if it was made for a total
        self._has_stepped = False
        self._updates = [0, 0]  # made and skipped, at the end of the last epoch
        self._first_epoch: Subscription[EpochEnd] | None = None
        self._lengths: Subscription[EpochEnd] | None = None

    def attach(self, engine: Engine) -> None:
        """Hear updates, steps, epochs or the monitored value."""
        optimizers = engine.parts.optimizers()
        if not optimizers:
            raise ConfigurationError("Schedule needs the optimizer. Write Engine(step, optimizer=optimizer, ...).")
        name, scheduler = self._kind.at_attachment(self.optimizer, optimizers)
        self._check_monitor(scheduler)
        _check_part(engine, _part_for(name), scheduler)
        super().attach(engine)
        self.optimizer, self.scheduler = name, scheduler
        engine.parts[_part_for(name)] = scheduler
        engine.subscribe(FitStart, self._begin_run)
        if self.per != "epoch":
            self._lengths = engine.subscribe(EpochEnd, self._check_length)
        self._hear_when_to_step(engine)

    def _check_monitor(self, scheduler: LRScheduler | None) -> None:
        if scheduler is not None and isinstance(scheduler, ReduceLROnPlateau) != (self.monitor is not None):
            raise ConfigurationError(
                f"Schedule has {type(scheduler).__name__} and monitor={self.monitor!r}. "
                'ReduceLROnPlateau needs one, such as monitor="val_loss"; no other scheduler takes one.'
            )

    def _hear_when_to_step(self, engine: Engine) -> None:
        plateau = self.scheduler
        if self.monitor is not None and isinstance(plateau, ReduceLROnPlateau):
            watched = Monitor("Schedule", self.monitor, plateau.mode)
            watched.attach(engine, lambda engine, value: plateau.step(value))
        elif self.per == "epoch":
            engine.subscribe(EpochEnd, self._step_after_epoch)
        elif self.per == "step":
            engine.subscribe(StepEnd, self._step)
        else:
            engine.subscribe(UpdateEnd, self._step_after_update)
            self._first_epoch = engine.subscribe(EpochEnd, self._check_first_epoch)

    def _begin_run(self, event: FitStart) -> None:
        made = self._kind.for_run(event.engine, self.optimizer, self.per, self.scheduler)
        if made is not None:
            self.scheduler, self._total = made
            self._has_stepped = False
            self._check_monitor(self.scheduler)
            event.engine.parts[_part_for(self.optimizer)] = self.scheduler

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
                f'Schedule had no effect in this epoch because no update was for "{self.optimizer}". '
                f'Write engine.update(loss, optimizer="{self.optimizer}").'
            )
        expected = -(-engine.epoch_step // engine.update.window_size.batches)
        if self._total and made != expected:
            logger.warning(
                'Schedule counts on %d updates of "%s" in an epoch of %d steps, and there were %d, so it will not end '
                'with the run. Write per="step", which counts steps.',
                expected, self.optimizer, engine.epoch_step, made,
            )  # fmt: skip

    def _check_length(self, event: EpochEnd) -> None:
        """Warn, once, if an epoch was not as long as those that the total was computed from."""
        engine, run = event.engine, event.engine.run
        if not self._total or run.ends_epoch or run.epoch_length in (None, engine.epoch_step):
            return
        logger.warning(
            "Schedule counts on %d steps in an epoch, and epoch %d had %d, so it will not end with the run. "
            "Pass epoch_length=%d and repeat(train), or state the total.",
            run.epoch_length, engine.epoch, engine.epoch_step, run.epoch_length,
        )  # fmt: skip
        if self._lengths is not None:
            self._lengths.cancel()

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
        self._kind.on_resume(self.scheduler, state["total"], self._total, self.per)

    def __repr__(self) -> str:
        name = "function" if self.scheduler is None else type(self.scheduler).__name__
        return f"Schedule({name}, per={self.per!r})"


def _part_for(optimizer: str) -> str:
    """Return the name of the part that the scheduler of this optimizer becomes."""
    return "scheduler" if optimizer == "optimizer" else f"{optimizer}_scheduler"


def _check_part(engine: Engine, part: str, scheduler: LRScheduler | None) -> None:
    """Refuse a second schedule of one optimizer; the scheduler itself may be a part already."""
    if part in engine.parts and (scheduler is None or engine.parts[part] is not scheduler):
        raise ConfigurationError(
            f"Schedule would become the part {part}, which the engine has already. "
            "Attach one for each optimizer; torch's ChainedScheduler joins several."
        )
