"""The two runs of a rehearsal that show handlers what they will see: from the first epoch to the last, and no gain."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from .continued import ENOUGH
from .data import DataSets
from .events import EpochEnd, EpochStart, FitEnd, FitStart, Settled, StepEnd, ValidationEnd
from .rehearsed import Measure, Rehearsal, listing
from .route import NUM_STEPS, Route
from .run import Phase
from .state import named_callbacks

if TYPE_CHECKING:
    from .engine import Engine

Life = Callable[..., AbstractContextManager[Path]]
Change = Callable[[str, float], float]

_MOST_CHECKS = 50  # of values that do not get better
_LONGEST_SECONDS = 15.0


def from_first_to_last(
    engine: Engine, fit: Callable[[], object], life: Life, val: DataSets | None, rehearsal: Rehearsal
) -> None:
    """Make a few steps wherever something is new, with values that get better and worse in turn."""
    with life("from the first epoch to the last") as files:
        engine.subscribe(FitStart, lambda event: event.engine.run.change_values(_in_turn()))
        tour = _Tour(engine, val)
        fit()
        names = named_callbacks(engine.listeners.callbacks)
        rehearsal.bytes_on_disk = {name: sum(size for size, _ in listing([files / name]).values()) for name in names}
        checkpoints = [one.checkpoints for one in engine.listeners.callbacks if one.checkpoints is not None]
        sizes = [file.path.stat().st_size for directory in checkpoints for file in directory.files()]
        rehearsal.bytes_per_checkpoint = max(sizes, default=0)
        rehearsal.peak_memory = tour.measure.peak_memory()
        free = shutil.disk_usage(files).free
    route, whole = tour.route, tour.route.num_epochs or 1
    number = route.num_validations
    rehearsal.seconds = tour.measure.seconds(route.num_steps, whole, number)
    each = None if number is None else number / whole
    rehearsal.seconds_per_epoch = tour.measure.seconds(route.epoch_length, 1, each)
    epochs = ", ".join(map(str, dict.fromkeys(tour.epochs)))
    of = "an unknown number" if route.num_epochs is None else str(route.last_epoch)
    rehearsal.tried["epochs"] = f"{epochs} of {of}, a few steps of each; {tour.num_validations} validations"
    rehearsal.tried["handlers"] = "; ".join([", ".join(names) or "none", *route.tried])
    if val is not None and number == 0:
        rehearsal.warnings.append("No validation is due in this run. Look at validate_every.")
    rehearsal.warnings += route.warnings
    if (needed := sum(rehearsal.bytes_on_disk.values())) > free:
        rehearsal.warnings.append(f"The run keeps {needed:,} bytes on the disk, of which {free:,} are free.")


class _Tour:
    """A run that makes a few steps at each place of a `Route`, and jumps from there to the next.

    A handler that ends the run is heard, and the run goes on all the same, or the last epoch would not be tried.

    Args:
        engine: whose run.
        val: its validation data.

    Attributes:
        route: the places.
        measure: how long what takes.
        epochs: the epochs of which a part was made.
        num_validations: how many were made.
    """

    def __init__(self, engine: Engine, val: DataSets | None) -> None:
        self._engine, self._val = engine, val
        self.epochs: list[int] = []
        self.num_validations = 0
        engine.subscribe(FitStart, self._begin)

    def _begin(self, event: FitStart) -> None:
        engine = self._engine
        if self.epochs:  # the run goes on from an earlier state of it
            return
        self.route, self.measure = Route(engine), Measure(engine, self._val)
        engine.subscribe(EpochStart, self._enter)
        engine.subscribe(StepEnd, self._leave)
        engine.subscribe(ValidationEnd, self._count)
        engine.subscribe(Settled, self._go_on)

    def _enter(self, event: EpochStart) -> None:
        """Go to the steps of the epoch that are wanted."""
        engine, place = self._engine, self.route.places[0]
        self.epochs.append(engine.epoch)
        print(f"  epoch {engine.epoch}, from step {place.step + 1}", flush=True)
        if place.step > place.before:
            engine.step = place.step
            engine.run.jump(place.step, epoch=place.epoch, skips=place.step - place.before)
            engine.listeners.rewind()

    def _leave(self, event: StepEnd) -> None:
        engine, places = self._engine, self.route.places
        ends_by_itself = len(places) == 1 and engine.run.epoch_length is not None
        if engine.step >= places[0].last and not ends_by_itself:
            engine.run.end_epoch()

    def _count(self, event: ValidationEnd) -> None:
        self.num_validations += 1

    def _go_on(self, event: Settled) -> None:
        """Go to the epoch of the next place, when everybody has heard of the end of the present one."""
        engine, run, route = self._engine, self._engine.run, self.route
        if run.phase is not Phase.BETWEEN or run.breaks_off or len(route.places) == 1:
            return
        del route.places[0]
        place = route.places[0]
        engine.epoch, engine.step = place.epoch - 1, place.before
        engine.num_validations = route.num_validations_before(place)
        engine.num_updates = route.num_updates_before(place)
        run.jump(place.before)
        engine.listeners.rewind()


def _in_turn() -> Change:
    """Return a change that lets each value be better and worse in turn, whichever of up and down is better."""
    firsts: dict[str, float] = {}
    numbers: Counter[str] = Counter()

    def change(name: str, value: float) -> float:
        first, number = firsts.setdefault(name, value), numbers[name]
        numbers[name] += 1
        return first + 0.01 * max(abs(first), 0.1) * ((number + 1) // 2) * (1 if number % 2 else -1)

    return change


def without_gain(engine: Engine, fit: Callable[[], object], life: Life, rehearsal: Rehearsal) -> None:
    """Let no value get better, until a handler ends the run."""
    firsts: dict[str, float] = {}
    reasons: list[str | None] = []
    num_checks: Counter[type] = Counter()
    began = time.monotonic()

    def leave(event: StepEnd) -> None:
        run = engine.run
        in_steps = run.plan.validation_interval()[1] == "steps"
        if in_steps and run.has_validation:
            run.validate()
        if engine.epoch_step >= NUM_STEPS and not (in_steps and engine.epoch >= run.last_epoch):
            run.end_epoch()

    def count(event: ValidationEnd | EpochEnd) -> None:
        num_checks[type(event)] += 1
        if num_checks[type(event)] >= _MOST_CHECKS or time.monotonic() - began > _LONGEST_SECONDS:
            engine.run.interrupt(ENOUGH)

    with life("values that do not get better"):
        engine.subscribe(
            FitStart, lambda event: event.engine.run.change_values(lambda *pair: firsts.setdefault(*pair))
        )
        engine.subscribe(StepEnd, leave)
        engine.subscribe(ValidationEnd, count)
        engine.subscribe(EpochEnd, count)
        engine.subscribe(FitEnd, lambda event: reasons.append(engine.run.stop_reason))
        fit()
    number = max(num_checks.values(), default=0)
    rehearsal.tried["stopped"] = reasons[0] or f"by nobody, though no value got better {number} times in a row"
