"""The three kinds of scheduler that a `Schedule` takes.

Each kind has the same three methods, which `Schedule` calls at the moments that they are named after:

* ``at_attachment`` returns the name of its optimizer, and its scheduler, or None if there is none before a run;
* ``for_run`` returns a scheduler for this run and the total it was made for, or None to keep the one that there is;
* ``on_resume`` fits the scheduler to the total of a run that resumes one with another total.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from camshaft.engine import ConfigurationError, Engine, can_take, did_you_mean

Unit = Literal["update", "step", "epoch"]

OTHER_OPTIMIZER = (
    "Schedule's scheduler belongs to an optimizer that is not the run's. Build it over the run's optimizer."
)


@dataclass(frozen=True, slots=True)
class Ready:
    """An existing scheduler, which all runs share."""

    scheduler: LRScheduler

    def at_attachment(self, name: str, optimizers: Mapping[str, Optimizer]) -> tuple[str, LRScheduler]:
        """Find the optimizer that it is over, whichever ``name`` was given."""
        for found, optimizer in optimizers.items():
            if optimizer is self.scheduler.optimizer:
                return found, self.scheduler
        raise ConfigurationError(OTHER_OPTIMIZER)

    def for_run(self, engine: Engine, name: str, per: Unit, earlier: LRScheduler | None) -> None:
        """Keep the scheduler: a second run continues where the first ended."""

    def on_resume(self, scheduler: LRScheduler | None, before: int, now: int, per: Unit) -> None:
        """Keep the learning rates: no total decided them."""


@dataclass(frozen=True, slots=True)
class MadeOnce:
    """A function ``optimizer -> scheduler``; all runs share its scheduler."""

    make: Callable[..., object]

    def at_attachment(self, name: str, optimizers: Mapping[str, Optimizer]) -> tuple[str, LRScheduler]:
        """Make the scheduler."""
        optimizer = _named(name, optimizers)
        return name, _checked(self.make(optimizer), optimizer)

    def for_run(self, engine: Engine, name: str, per: Unit, earlier: LRScheduler | None) -> None:
        """Keep the scheduler: a second run continues where the first ended."""

    def on_resume(self, scheduler: LRScheduler | None, before: int, now: int, per: Unit) -> None:
        """Keep the learning rates: no total decided them."""


@dataclass(frozen=True, slots=True)
class MadeForEachRun:
    """A function ``(optimizer, total) -> scheduler``; each run gets a new scheduler."""

    make: Callable[..., object]

    def at_attachment(self, name: str, optimizers: Mapping[str, Optimizer]) -> tuple[str, None]:
        """Wait for the run, whose length is not known yet."""
        _named(name, optimizers)
        return name, None

    def for_run(self, engine: Engine, name: str, per: Unit, earlier: LRScheduler | None) -> tuple[LRScheduler, int]:
        """Make the scheduler for as many updates, steps or epochs as the run will have."""
        total, optimizer = _planned(engine, per), engine.parts[name]
        if earlier is not None:
            _undo(earlier)
        scheduler = _checked(self.make(optimizer, total), optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            raise ConfigurationError(
                "ReduceLROnPlateau does not need a total. Pass a function of the optimizer alone, and a monitor."
            )
        return scheduler, total

    def on_resume(self, scheduler: LRScheduler | None, before: int, now: int, per: Unit) -> None:
        """Set the learning rates that a run of the new total has at this point; only a `LambdaLR` can tell them."""
        if before == now:
            return
        if not isinstance(scheduler, LambdaLR):
            raise ConfigurationError(
                f"{type(scheduler).__name__} was made for a total of {before} {per}s, and this run will make {now}. "
                "Ask for as many as before, or use a LambdaLR, such as warmup_cosine."
            )
        groups = zip(scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        for group, base, factor in groups:
            group["lr"] = base * factor(scheduler.last_epoch)


Kind = Ready | MadeOnce | MadeForEachRun


def kind_of(given: object) -> Kind:
    """Return what a `Schedule` was given as one of the three kinds.

    Raises:
        ConfigurationError: for anything else.
    """
    if isinstance(given, LRScheduler):
        return Ready(given)
    if isinstance(given, type) or not callable(given):
        raise ConfigurationError(
            f"Schedule got {given!r}, which is not a scheduler. "
            "Pass StepLR(optimizer, 10), or a function: lambda optimizer: StepLR(optimizer, 10)."
        )
    if can_take(given, 1):
        return MadeOnce(given)
    if can_take(given, 2):
        return MadeForEachRun(given)
    raise ConfigurationError(
        f"Schedule's function {getattr(given, '__name__', given)!r} takes neither (optimizer) nor (optimizer, total). "
        "Write lambda optimizer: StepLR(optimizer, 10)."
    )


def _named(name: str, optimizers: Mapping[str, Optimizer]) -> Optimizer:
    """Return the optimizer of this name."""
    if name not in optimizers:
        raise ConfigurationError(
            f'Schedule is for "{name}", but the optimizers are: {", ".join(optimizers)}. '
            f'{did_you_mean(name, optimizers)}Write Schedule(..., optimizer="{next(iter(optimizers))}").'
        )
    return optimizers[name]


def _checked(made: object, optimizer: Optimizer) -> LRScheduler:
    """Return what a function has made, if that is a scheduler over this optimizer."""
    if not isinstance(made, LRScheduler):
        raise ConfigurationError(
            f"Schedule's function returned {made!r}, which is not a scheduler. "
            "Return one: lambda optimizer: StepLR(optimizer, 10)."
        )
    if made.optimizer is not optimizer:
        raise ConfigurationError(OTHER_OPTIMIZER)
    return made


def _planned(engine: Engine, per: Unit) -> int:
    """Return how many updates, steps or epochs the present run is to make; at least 1."""
    run = engine.run
    total = engine.update.num_planned(run) if per == "update" else run.num_planned(per)
    if total is None:
        why = "its data, or the windows of Accumulate, have no set length"
        if run.has_validation is None:
            why = "in a loop of your own the data are not known yet"
        raise ConfigurationError(
            f"Schedule cannot know how many {per}s this run will make: {why}. "
            "State it: lambda optimizer: warmup_cosine(optimizer, total=10_000)."
        )
    return max(total, 1)


def _undo(earlier: LRScheduler) -> None:
    """Let the next schedule begin with the learning rates that this one began with, or those set by hand since."""
    for group, last in zip(earlier.optimizer.param_groups, earlier.get_last_lr(), strict=True):
        begin = "initial_lr" if group["lr"] == last else "lr"
        group["lr"] = group["initial_lr"] = group[begin]
