"""Stop when a run has used up its time."""

from __future__ import annotations

from typing import Any, ClassVar

from camshaft.engine import Callback, ConfigurationError, Engine, EpochEnd, FitStart, StepEnd, is_number

from .stopwatch import Stopwatch


def _limit(seconds: Any) -> float:
    if not is_number(seconds) or seconds <= 0:
        raise ConfigurationError(
            f"StopAfter was given a time of {seconds!r} s. Write StopAfter(hours=2), or minutes, or seconds."
        )
    return seconds


class StopAfter(Callback):
    """Ends the run after the step with which its time is over.

    The time of a run counts from its start, also what the run that it resumes has spent; what lies between does not
    count. A validation or a save that has begun is finished. Stopped in the middle of an epoch, a run ends as with
    `Engine.stop`: the epoch is ended, and validated.

    Args:
        hours, minutes, seconds: how long; they are added up.

    Raises:
        ConfigurationError: unless that is a finite time above 0.

    >>> StopAfter(hours=1, minutes=30)
    StopAfter(seconds=5400)
    """

    main_only = True
    steerable: ClassVar = {"limit": _limit}  # in seconds

    def __init__(self, *, hours: float = 0.0, minutes: float = 0.0, seconds: float = 0.0) -> None:
        for name, value in (("hours", hours), ("minutes", minutes), ("seconds", seconds)):
            if not is_number(value) or value < 0:
                raise ConfigurationError(f"StopAfter has {name}={value!r}. Pass a number of at least 0.")
        self.limit = _limit(3600 * hours + 60 * minutes + seconds)
        self._watch = Stopwatch()
        self._may_stop = True

    def on_fit_start(self, event: FitStart) -> None:
        """Start the clock."""
        self._watch.start()
        self._may_stop = True

    def on_step_end(self, event: StepEnd) -> None:
        """Look at the clock."""
        if self._watch.look() >= self.limit and self._may_stop:
            self._stop(event.engine)

    def on_epoch_end(self, event: EpochEnd) -> None:
        """Stop here at the latest, if ``min_epochs`` did not allow it before."""
        if self._watch.spent >= self.limit:
            self._stop(event.engine)

    def _stop(self, engine: Engine) -> None:
        # Asked once in an epoch, because each refusal, for min_epochs, is a line in the log.
        self._may_stop = engine.stop(f"StopAfter: {self.limit:g} s are over")

    def state_dict(self) -> dict[str, Any]:
        """Return the time that was spent."""
        return {"spent": self._watch.spent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Count the time that an earlier run has spent."""
        self._watch.start(state["spent"])

    def __repr__(self) -> str:
        return f"StopAfter(seconds={self.limit:g})"
