"""Every built-in event, in the order in which a run fires them.

An event's class is its identity and its fields are its payload. Indentation is nesting, and ``*`` marks
what repeats::

    FitStart
      EpochStart *
        BatchReady *              may be replaced: the batch
          LossReady               may be replaced: the loss that is differentiated
          GradientsReady          the true gradients, once per optimizer update
          UpdateEnd               the optimizer has stepped (not fired if the scaler skipped it)
        StepEnd
        Logged                    only if a `Log` is attached, and then every few steps
        ValidationStart           here when validate_every counts steps
          BatchReady *
          ValidationStepEnd
        ValidationEnd
        Settled                   everything for this step is done
        ValidationStart ...       here when it counts epochs
      EpochEnd
      Settled                     everything for this epoch is done
    RunFailed                     only if the run raised
    FitEnd                        once, however the run ended

A handler of an event that ends in ``Ready`` may return a value, which takes the place of the one the event
carries; ``None`` keeps it. What a handler of any other event returns is ignored: those events are facts.

An event of your own is a frozen dataclass that derives from `Event`; there is nothing to register:

>>> @dataclass(frozen=True, slots=True)
... class LossSpike(Event):
...     loss: float
>>> hook_name(LossSpike)
'on_loss_spike'
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from .engine import Engine


@dataclass(frozen=True, slots=True)
class Event:
    """What every event has: the engine it happened in.

    ``counter`` names the engine's counter that a ``when`` filter looks at. All counters are 1-based: during
    the first step ``engine.step`` is 1, and after it, too.
    """

    engine: Engine
    counter: ClassVar[str] = "step"


@dataclass(frozen=True, slots=True)
class FitStart(Event):
    """A run begins; nothing has been read from the data."""

    counter: ClassVar[str] = "num_fits"


@dataclass(frozen=True, slots=True)
class EpochStart(Event):
    """An epoch begins; ``engine.epoch`` is its number."""

    counter: ClassVar[str] = "epoch"


@dataclass(frozen=True, slots=True)
class BatchReady(Event):
    """A batch was read, for training, validation, evaluation or prediction; a handler may replace it."""

    batch: Any


@dataclass(frozen=True, slots=True)
class LossReady(Event):
    """A training loss is known; what a handler returns is differentiated in its place, for ``optimizer``."""

    loss: Tensor
    optimizer: Optimizer


@dataclass(frozen=True, slots=True)
class GradientsReady(Event):
    """``optimizer`` is about to step; its parameters' ``.grad`` hold the true, unscaled gradients.

    ``together`` holds all optimizers that this update is of, each of which has an event of its own.
    """

    optimizer: Optimizer
    together: tuple[Optimizer, ...] = ()
    counter: ClassVar[str] = "num_updates"


@dataclass(frozen=True, slots=True)
class UpdateEnd(Event):
    """``optimizer`` has stepped; not fired for a step that the loss scaler skipped.

    ``together`` holds all optimizers that have stepped in this update, each of which has an event of its own.
    """

    optimizer: Optimizer
    together: tuple[Optimizer, ...] = ()
    counter: ClassVar[str] = "num_updates"


@dataclass(frozen=True, slots=True)
class StepEnd(Event):
    """A training step is done.

    ``output`` is what a trainer's model returned, or what a step gave to ``engine.measure``, or else returned.
    """

    batch: Any
    output: Any


@dataclass(frozen=True, slots=True)
class Logged(Event):
    """The values of some training step are on the host; a `Log` announces it, for whoever writes or draws them.

    ``at`` is the step that the values belong to, in epoch ``epoch``. On an accelerator that is an earlier one than the
    present step.
    """

    epoch: int
    at: int
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class ValidationStart(Event):
    """A validation begins; the model is in eval mode and gradients are off."""

    counter: ClassVar[str] = "num_validations"


@dataclass(frozen=True, slots=True)
class ValidationStepEnd(Event):
    """A validation batch is done; ``engine.validation_step`` is its number within this validation.

    ``dataset`` is the name of its validation set; "" if there is one without a name.
    """

    batch: Any
    output: Any
    dataset: str = ""
    counter: ClassVar[str] = "validation_step"


@dataclass(frozen=True, slots=True)
class ValidationEnd(Event):
    """A validation is done; ``metrics`` holds its values, ``{"val_loss": 0.25, ...}``."""

    metrics: Mapping[str, Any]
    counter: ClassVar[str] = "num_validations"


@dataclass(frozen=True, slots=True)
class EpochEnd(Event):
    """An epoch is done; ``metrics`` holds its ``train_*`` values and those of its last validation."""

    metrics: Mapping[str, Any]
    counter: ClassVar[str] = "epoch"


@dataclass(frozen=True, slots=True)
class Settled(Event):
    """Every handler of this step or epoch has run: the moment to save the run."""


@dataclass(frozen=True, slots=True)
class RunFailed(Event):
    """The run raised ``error``; it reaches the caller whatever the handlers do."""

    error: BaseException
    counter: ClassVar[str] = "num_fits"


@dataclass(frozen=True, slots=True)
class FitEnd(Event):
    """A run is over, for the ``reason`` given; fired exactly once per run, also after an error."""

    reason: str
    counter: ClassVar[str] = "num_fits"


def hook_name(event: type[Event]) -> str:
    """Return the name of the `Callback` method that hears this event.

    >>> hook_name(ValidationStepEnd)
    'on_validation_step_end'
    """
    return "on_" + re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", event.__name__).lower()


def known_events() -> dict[str, type[Event]]:
    """Return every event class there is, yours included, by hook name and in order of definition."""
    known: dict[str, type[Event]] = {}
    for event in Event.__subclasses__():
        # A class with slots is made twice, and a notebook cell runs twice: the newest definition counts.
        known.pop(hook_name(event), None)
        known[hook_name(event)] = event
    return known
