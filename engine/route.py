"""The places of a whole run at which something happens for the first time, and the way from one to the next."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .dispatch import describe
from .when import NEVER, Clock, Predicate, When, after, at, every, until

if TYPE_CHECKING:
    from .engine import Engine

NUM_STEPS = 2  # at each place, and batches of each validation set
_NUM_FIRST_STEPS = 4  # at the first place, where the times of steps are taken
_MOST_LOOKS = 10_000  # at the counts of a filter
_OF_COUNTS = (every, at, after, until, Predicate)  # another filter may look at something else than the count


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """An epoch of the run, of which a few steps are made.

    Args:
        epoch: its number.
        step: the steps done before the first of the few.
        before: the steps done before the epoch.
        last: the number of the last of the few.
    """

    epoch: int
    step: int
    before: int
    last: int


class Route:
    """The places of one run, in order; made when the handlers have heard `FitStart`.

    Args:
        engine: whose run.

    Attributes:
        places: what is still to come.
        num_epochs, num_steps: of the whole run; None where unknown.
        epoch_length: the steps of an epoch; None where unknown.
        tried: each handler with a filter, in words, with the count at which it is due first.
        warnings: what the run itself would not notice before its end.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._run = run = engine.run
        self.epoch_length = run.epoch_length
        self._first: dict[str, int] = {
            name: getattr(engine, name) for name in ("epoch", "step", "num_updates", "num_validations")
        }
        self.num_epochs, self.num_steps = run.num_planned("epoch"), run.num_planned("step")
        updates = engine.update.num_planned(run)
        self._updates_per_step = updates / self.num_steps if updates and self.num_steps else 1.0
        self.tried: list[str] = []
        self.warnings: list[str] = []
        if run.plan.epoch_length is not None and (run.feed.length or NEVER) < (self.num_steps or 0):
            self.warnings.append(
                f"The data have {run.feed.length} batches, and the run needs {self.num_steps}. Pass repeat(train)."
            )
        first = Place(engine.epoch + 1, engine.step, engine.step, engine.step + _NUM_FIRST_STEPS)
        later = {*self._validations(), *self._handlers(), self._place(epoch=self.last_epoch, step=self.last_step)}
        beyond = [one for one in later if one is not None and (one.epoch > first.epoch or one.last > first.last)]
        self.places = [first, *sorted(beyond)]

    @property
    def last_epoch(self) -> int:
        """The number of the last epoch; of the first one where there may be no other."""
        return self._first["epoch"] + (self.num_epochs or 1)

    @property
    def last_step(self) -> int | None:
        """The number of the last step; None where that is unknown."""
        return None if self.num_steps is None else self._first["step"] + self.num_steps

    @property
    def num_validations(self) -> int | None:
        """The validations of the whole run; None where their number is unknown."""
        if not self._run.has_validation:
            return 0
        last = self._last("num_validations")
        return None if last == NEVER else last - self._first["num_validations"]

    def num_validations_before(self, place: Place) -> int:
        """Return the engine's counter as it is before the validations of a place."""
        n, unit = self._run.plan.validation_interval()
        done, first = (place.epoch - 1, "epoch") if unit == "epochs" else (place.step, "step")
        return self._first["num_validations"] + done // n - self._first[first] // n

    def num_updates_before(self, place: Place) -> int:
        """Return about what the engine's counter is before a place."""
        return self._first["num_updates"] + int((place.step - self._first["step"]) * self._updates_per_step)

    def _place(self, *, epoch: int | None = None, step: int | None = None) -> Place | None:
        """Return the place of an epoch, or at which a step is done; None if the run does not get there."""
        first_epoch, first_step, length = self._first["epoch"], self._first["step"], self.epoch_length
        if step is not None and epoch is None:
            epoch = first_epoch + (1 if length is None else math.ceil((step - first_step) / length))
        assert epoch is not None
        if epoch == self.last_epoch and step is None:
            step = self.last_step
        if epoch > self.last_epoch or (step is not None and step > (self.last_step or NEVER)):
            return None
        before = first_step if length is None else first_step + (epoch - first_epoch - 1) * length
        last = before + min(NUM_STEPS, length or NUM_STEPS) if step is None else step
        return Place(epoch, max(before, last - NUM_STEPS), before, last)

    def _validations(self) -> list[Place | None]:
        """Return the places of the first few validations: of values that get better, worse, and better again."""
        n, unit = self._run.plan.validation_interval()
        counts = [(self._first[unit.rstrip("s")] // n + number) * n for number in (1, 2, 3)]
        if not self._run.has_validation:
            return []
        return [self._place(epoch=count) if unit == "epochs" else self._place(step=count) for count in counts]

    def _handlers(self) -> list[Place | None]:
        """Return where each handler with a filter is due first."""
        places: list[Place | None] = []
        for event, subscription in self._engine.listeners.filtered():
            name, counter = f"{describe(subscription.handler)} ({subscription.when!r})", event.counter
            if isinstance(subscription.when, Clock):
                subscription.when.run_out()  # it is due at its next event
                self.tried.append(name)
            elif counter == "validation_step" and not any(map(subscription.when, range(1, NUM_STEPS + 1))):
                self.warnings.append(f"{name} is not tried: only {NUM_STEPS} batches of each validation set are read.")
            elif counter in self._first and isinstance(subscription.when, _OF_COUNTS):
                count = _first_due(subscription.when, self._first[counter], self._last(counter))
                place = None if count is None else self._at(counter, count)
                places.append(place)
                if place is None:
                    self.warnings.append(f"{name} hears {event.__name__} and is never due in this run.")
                else:
                    self.tried.append(f"{name} at {counter} {count}")
        return places

    def _last(self, counter: str) -> int:
        """Return the last count of a counter in this run; `NEVER` where that is unknown."""
        if counter == "epoch":
            return self.last_epoch
        in_steps = self._run.plan.validation_interval()[1] == "steps"
        if self.last_step is None and (counter != "num_validations" or in_steps or self.num_epochs is None):
            return NEVER
        step = self.last_step or 0
        end = Place(self.last_epoch + 1, step, step, step)
        last = {"num_updates": self.num_updates_before(end), "num_validations": self.num_validations_before(end)}
        return last.get(counter, step)

    def _at(self, counter: str, count: int) -> Place | None:
        """Return the place at which a counter has this count."""
        if counter == "epoch":
            return self._place(epoch=count)
        if counter == "num_updates":
            steps = math.ceil((count - self._first["num_updates"]) / self._updates_per_step)
            return self._place(step=self._first["step"] + max(steps, 1))
        if counter == "num_validations":
            n, unit = self._run.plan.validation_interval()
            counted = (self._first[unit.rstrip("s")] // n + count - self._first["num_validations"]) * n
            return self._place(epoch=counted) if unit == "epochs" else self._place(step=counted)
        return self._place(step=count)


def _first_due(when: When, count: int, last: int) -> int | None:
    """Return the first count after ``count`` at which a filter lets its handler run; None if there is none."""
    for _ in range(_MOST_LOOKS):
        count = when.next_due(count)
        if count > last:
            return None
        if when(count):
            return count
    return None
