"""How far a run goes, and when it validates."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from .errors import ConfigurationError, whole_number
from .when import NEVER


@dataclass(frozen=True, slots=True)
class Plan:
    """What ``fit`` and ``epochs`` were asked for, checked.

    Args:
        epochs: how many more epochs to run; None means until ``max_steps``.
        max_steps: how many more training steps to run at most.
        min_epochs: how many epochs to run before a handler's ``stop`` counts.
        epoch_length: steps in an epoch; by default an epoch is one pass over the data.
        validate_every: a number in the run's own unit (epochs, or steps in a run by ``max_steps`` alone), or
            with the unit said: ``"500 steps"``, ``"2 epochs"``. Default: after each epoch.
        limit: read only so many batches in each epoch and of each validation set, for a trial of everything
            else. Each epoch begins the data anew; so without shuffling, all epochs have the same batches.

    Raises:
        ConfigurationError: naming the setting that cannot work.
    """

    epochs: int | None = None
    max_steps: int | None = None
    min_epochs: int = 0
    epoch_length: int | None = None
    validate_every: int | str | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.epochs is None and self.max_steps is None:
            raise ConfigurationError("Neither epochs nor max_steps was given. Say how far to go: epochs=10.")
        if self.epochs is not None:
            whole_number("epochs", self.epochs, least=0)
        if self.max_steps is not None:
            whole_number("max_steps", self.max_steps, least=0)
        if self.epoch_length is not None:
            whole_number("epoch_length", self.epoch_length, least=1)
        if self.limit is not None:
            whole_number("limit", self.limit, least=1)
            if self.epoch_length is not None:
                raise ConfigurationError(
                    f"limit={self.limit} and epoch_length={self.epoch_length} both say how long an epoch is. "
                    "Pass one of them."
                )
        whole_number("min_epochs", self.min_epochs, least=0)
        if self.epochs is not None and self.min_epochs > self.epochs:
            raise ConfigurationError(
                f"min_epochs={self.min_epochs} is more than epochs={self.epochs}. Lower one or raise the other."
            )
        self.validation_interval()

    def goal(self, *, by_steps: bool) -> str:
        """Return, in words, what was reached."""
        if by_steps:
            return f"max_steps={self.max_steps} reached"
        return f"{self.epochs} epoch{'' if self.epochs == 1 else 's'} done"

    def length_of_epoch(self, num_batches: int | None) -> int | None:
        """Return the steps of an epoch, given the batches of one pass over the data; None where that is unknown.

        >>> Plan(epochs=1, limit=3).length_of_epoch(100), Plan(epochs=1).length_of_epoch(100)
        (3, 100)
        """
        if self.epoch_length is not None:
            return self.epoch_length
        return num_batches if num_batches is None or self.limit is None else min(num_batches, self.limit)

    def num_steps(self, epoch_length: int | None) -> int | None:
        """Return how many steps that makes, given the steps of an epoch where they are known; None if unknown.

        >>> Plan(epochs=3, max_steps=50).num_steps(epoch_length=20)
        50
        """
        if self.epochs is None:
            return self.max_steps
        if epoch_length is None:
            return None
        steps = self.epochs * epoch_length
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def num_epochs(self, epoch_length: int | None) -> int | None:
        """Return how many epochs that makes, a last one that is cut short included; None if unknown.

        >>> Plan(max_steps=50).num_epochs(epoch_length=20)
        3
        """
        if self.max_steps is None:
            return self.epochs
        steps = self.num_steps(epoch_length)
        return None if steps is None or epoch_length is None else -(-steps // epoch_length)

    def reaches_further(self, epochs: int | None = None, max_steps: int | None = None) -> bool:
        """Return whether this plan goes beyond one of so many epochs and steps."""
        return _limit(self.epochs) > _limit(epochs) or _limit(self.max_steps) > _limit(max_steps)

    def validation_interval(self) -> tuple[int, str]:
        """Return how often to validate, as ``(n, "steps" or "epochs")``.

        >>> Plan(epochs=3, validate_every="500 steps").validation_interval()
        (500, 'steps')
        """
        wanted = self.validate_every
        if wanted is None:
            return 1, "epochs"
        own_unit = "steps" if self.epochs is None else "epochs"
        if isinstance(wanted, str):
            match = re.fullmatch(r"(\d+) *(steps?|epochs?)", wanted.strip())
            if match is None:
                raise ConfigurationError(
                    f"validate_every={wanted!r} is not an interval. "
                    'Write "500 steps", "2 epochs", or a number of ' + own_unit + "."
                )
            return whole_number("validate_every", int(match[1]), least=1), match[2].rstrip("s") + "s"
        return whole_number("validate_every", wanted, least=1), own_unit

    def validates_after_step(self, step: int) -> bool:
        """Return whether a validation is due in the middle of an epoch, after this step."""
        n, unit = self.validation_interval()
        return unit == "steps" and step % n == 0

    def validates_after_epoch(self, epoch: int) -> bool:
        """Return whether a validation is due at the end of this epoch."""
        n, unit = self.validation_interval()
        return unit == "epochs" and epoch % n == 0

    def next_validation(self, step: int) -> int:
        """Return the next step after ``step`` with a validation in mid-epoch, or `NEVER`."""
        n, unit = self.validation_interval()
        return (step // n + 1) * n if unit == "steps" else NEVER


def _limit(number: int | None) -> float:
    """Return a limit as a number; infinite where there is none."""
    return math.inf if number is None else number
