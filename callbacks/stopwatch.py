"""The time that a run has taken, without what lies between a stop and a resume."""

from __future__ import annotations

import time


class Stopwatch:
    """Counts seconds from its start, or on from those of an earlier run.

    Attributes:
        spent: seconds up to the last look.

    >>> watch = Stopwatch()
    >>> watch.start(3600.0)
    >>> watch.look() >= watch.spent >= 3600.0
    True
    """

    def __init__(self) -> None:
        self.start()

    def start(self, spent: float = 0.0) -> None:
        """Count from now, ``spent`` seconds being over already."""
        self.spent = spent
        self._began = time.monotonic() - spent

    def look(self) -> float:
        """Return how many seconds are over."""
        self.spent = time.monotonic() - self._began
        return self.spent
