"""One watched value, and what "better" means for it: shared by early stopping and best checkpoints."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from camshaft.engine import ConfigurationError, Engine, EpochEnd, FitStart, ValidationEnd, did_you_mean

logger = logging.getLogger("camshaft")

Mode = Literal["min", "max"]


class Monitor:
    """Watches ``monitor`` for ``owner``; reads ``val_*`` when a validation ends and ``train_*`` when an epoch ends.

    Which direction is better is given as ``mode``, or by the metric itself, or known because the value is a trainer's
    loss. It is never guessed from a name.
    """

    def __init__(self, owner: str, monitor: str, mode: Mode | None) -> None:
        if not isinstance(monitor, str) or not monitor.startswith(("train_", "val_")):
            raise ConfigurationError(
                f"{owner} watches {monitor!r}, which does not name a stage. "
                f'Write "val_{monitor}" or "train_{monitor}".'
            )
        if mode not in (None, "min", "max"):
            raise ConfigurationError(
                f'{owner} has mode={mode!r}. {did_you_mean(str(mode), ["min", "max"])}Write "min" or "max".'
            )
        self.owner = owner
        self.name = monitor
        self.mode = mode

    def attach(self, engine: Engine, check: Callable[[Engine, float], None]) -> None:
        """Call ``check(engine, value)`` at each new value, and check before the run that the value will exist."""
        engine.subscribe(FitStart, self._before_run)

        def read(event: ValidationEnd | EpochEnd) -> None:
            check(event.engine, self.read(event.metrics))

        read.__qualname__ = f"{self.owner} on {self.name}"
        if self.name.startswith("val_"):
            engine.subscribe(ValidationEnd, read)
        else:
            engine.subscribe(EpochEnd, read)

    def better(self, value: float, than: float) -> bool:
        """Return whether ``value`` beats ``than``; NaN beats nothing, and anything else beats NaN."""
        if math.isnan(value):
            return False
        if math.isnan(than):
            return True
        return value < than if self.mode == "min" else value > than

    def read(self, metrics: Mapping[str, Any]) -> float:
        """Return the watched value.

        Raises:
            ConfigurationError: if no value has that name, or it is not a single number.
        """
        if self.name not in metrics:
            raise self._missing(list(metrics))
        value = metrics[self.name]
        if not isinstance(value, float):
            raise ConfigurationError(
                f'{self.owner} watches "{self.name}", which has shape {list(value.shape)}. Watch a single number.'
            )
        return value

    def _before_run(self, event: FitStart) -> None:
        engine = event.engine
        if self.name.startswith("val_") and engine.run.has_validation is False:
            raise ConfigurationError(
                f'{self.owner} watches "{self.name}", but fit was given no validation data. '
                f'Pass fit(train, val, ...), or watch "train_{self.name[4:]}".'
            )
        sets = engine.run.validation_sets
        if not engine.stages.may_have(self.name, sets):
            raise self._missing(engine.stages.expected(sets))
        self._warn_of_one_epoch(engine)
        if self.mode is None:
            higher = engine.stages.higher_is_better(self.name, sets)
            if higher is None:
                raise ConfigurationError(
                    f'{self.owner} cannot know whether a higher or a lower "{self.name}" is better. '
                    'Write mode="max" or mode="min".'
                )
            self.mode = "max" if higher else "min"

    def _warn_of_one_epoch(self, engine: Engine) -> None:
        """Say that a training value has come too late for anything if a run by steps is a single epoch."""
        run = engine.run
        if self.name.startswith("train_") and run.feed.data is not None and run.plan.max_steps is not None:
            num_epochs = run.num_planned("epoch")
            if num_epochs is None or num_epochs == 1:
                logger.warning(
                    '%s watches "%s", which is there when an epoch ends, and a run of max_steps=%d over these data '
                    'may be a single epoch. Pass epoch_length=..., or watch a "val_" value.',
                    self.owner, self.name, run.plan.max_steps,
                )  # fmt: skip

    def _missing(self, known: list[str]) -> ConfigurationError:
        stage, _, short = self.name.partition("_")
        names = [name for name in known if name.startswith(f"{stage}_")]
        guess = did_you_mean(short, [name.partition("_")[2] for name in names]).replace('"', f'"{stage}_', 1)
        guess = guess or did_you_mean(self.name, () if names else known)  # the stage itself is misspelt
        return ConfigurationError(
            f'{self.owner} watches "{self.name}", but the values are: {", ".join(names or known) or "none"}. '
            f"{guess.rstrip() or f'Watch one of those, or declare it: engine.stages.declare({short!r}).'}"
        )
