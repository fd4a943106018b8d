"""When a handler runs: small frozen filters over an event's counter.

A filter is called with the count (the step of a step event, the epoch of an epoch event) and says whether
the handler runs. ``next_due`` says which later count to look at again, so a handler on ``every(100)`` costs
nothing on the other 99. Any function ``count -> bool`` serves as a filter, too; it is asked each time.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from .errors import ConfigurationError, can_take

# A due count that means "not in sight". It is small enough for CPython's fast comparison of ints, which the loop
# makes several times a step; a run that does get there only looks more often than it needs to.
NEVER = 2**30 - 1


@runtime_checkable
class When(Protocol):
    """A filter that also knows the next count worth asking for."""

    def __call__(self, count: int, /) -> bool:
        """Return whether the handler runs at this count."""

    def next_due(self, count: int, /) -> int:
        """Return the first count after ``count`` at which the handler may run, or `NEVER`."""


def _require(filter_name: str, argument: object, *, least: int) -> None:
    if isinstance(argument, bool) or not isinstance(argument, int) or argument < least:
        raise ConfigurationError(
            f"{filter_name}(n) needs a whole number n >= {least}, got {filter_name}({argument!r}). "
            f"Write {filter_name}({least}) or more."
        )


@dataclass(frozen=True, slots=True)
class Always:
    """Run each time: what a subscription without ``when`` has."""

    def __call__(self, count: int) -> bool:
        """Return True."""
        return True

    def next_due(self, count: int) -> int:
        """Return the next count."""
        return count + 1


@dataclass(frozen=True, slots=True)
class every:  # noqa: N801 - reads as a word: when=every(100)
    """Run when the absolute count is a multiple of ``n``, so that a resumed run fires on the same steps.

    >>> [count for count in range(1, 8) if every(3)(count)]
    [3, 6]
    """

    n: int

    def __post_init__(self) -> None:
        _require("every", self.n, least=1)

    def __call__(self, count: int) -> bool:
        """Return whether ``count`` is a multiple of ``n``."""
        return count % self.n == 0

    def next_due(self, count: int) -> int:
        """Return the next multiple of ``n``."""
        return (count // self.n + 1) * self.n


@dataclass(frozen=True, slots=True)
class at:  # noqa: N801
    """Run once, at count ``n``."""

    n: int

    def __post_init__(self) -> None:
        _require("at", self.n, least=1)

    def __call__(self, count: int) -> bool:
        """Return whether ``count`` is ``n``."""
        return count == self.n

    def next_due(self, count: int) -> int:
        """Return ``n`` if it is still to come."""
        return self.n if count < self.n else NEVER


@dataclass(frozen=True, slots=True)
class after:  # noqa: N801
    """Run at every count after ``n``.

    >>> [count for count in range(1, 6) if after(3)(count)]
    [4, 5]
    """

    n: int

    def __post_init__(self) -> None:
        _require("after", self.n, least=0)

    def __call__(self, count: int) -> bool:
        """Return whether ``count`` is past ``n``."""
        return count > self.n

    def next_due(self, count: int) -> int:
        """Return the next count past ``n``."""
        return max(count, self.n) + 1


@dataclass(frozen=True, slots=True)
class until:  # noqa: N801
    """Run at every count up to and including ``n``.

    >>> [count for count in range(1, 6) if until(3)(count)]
    [1, 2, 3]
    """

    n: int

    def __post_init__(self) -> None:
        _require("until", self.n, least=1)

    def __call__(self, count: int) -> bool:
        """Return whether ``count`` is at most ``n``."""
        return count <= self.n

    def next_due(self, count: int) -> int:
        """Return the next count if it is at most ``n``."""
        return count + 1 if count < self.n else NEVER


@dataclass(frozen=True, slots=True)
class every_seconds:  # noqa: N801
    """Run when ``seconds`` of wall-clock time have passed since the last time (or since the subscription).

    Each subscription has a clock of its own.
    """

    seconds: float

    def __post_init__(self) -> None:
        if not (isinstance(self.seconds, int | float) and 0 < self.seconds < math.inf):
            raise ConfigurationError(
                f"every_seconds(s) needs s > 0, got every_seconds({self.seconds!r}). "
                "Write the seconds between two runs, such as every_seconds(0.1)."
            )


class Clock:
    """The clock of one subscription with `every_seconds`.

    It is not read at every count, but about half-way to the time, judged by the pace so far; at most 64 counts later.
    """

    def __init__(self, setting: every_seconds) -> None:
        self._setting = setting
        self._last_run = self._last_look = time.monotonic()
        self._last_count = 0

    def __call__(self, count: int) -> bool:
        """Return whether the time has come, and if so begin to count again."""
        now = time.monotonic()
        if now - self._last_run < self._setting.seconds:
            return False
        self._last_run = now
        return True

    def next_due(self, count: int) -> int:
        """Return a count about half-way to the time, judged by the pace since the last look."""
        now = time.monotonic()
        pace = (count - self._last_count) / max(now - self._last_look, 1e-9)
        self._last_look, self._last_count = now, count
        half_way = int(pace * (self._setting.seconds - (now - self._last_run)) / 2)
        return count + min(max(half_way, 1), 64)

    def run_out(self) -> None:
        """Let the time have come: for a run that is only tried."""
        self._last_run -= self._setting.seconds

    def __repr__(self) -> str:
        return repr(self._setting)


@dataclass(frozen=True, slots=True)
class Predicate:
    """A user's own function as a filter: asked at every count."""

    function: object

    def __call__(self, count: int) -> bool:
        """Return what the function says."""
        return bool(self.function(count))  # type: ignore[operator]  # checked callable by as_when

    def next_due(self, count: int) -> int:
        """Return the next count."""
        return count + 1

    def __repr__(self) -> str:
        return getattr(self.function, "__qualname__", repr(self.function))


def as_when(when: object) -> When:
    """Return ``when`` as a filter, or refuse it.

    Raises:
        ConfigurationError: for a number, a string, or a filter class instead of a filter.
    """
    if when is None:
        return Always()
    if isinstance(when, every_seconds):
        return Clock(when)
    if isinstance(when, type):
        raise ConfigurationError(
            f"when={when.__name__} is a class, not a filter. Write {when.__name__}(...) with its number."
        )
    if isinstance(when, When):
        return when
    if callable(when) and can_take(when, 1):
        return Predicate(when)
    raise ConfigurationError(
        f"when={when!r} is not a filter. Write every({when!r}), at({when!r}) or a function of the count."
        if isinstance(when, int)
        else f"when={when!r} is not a filter. Write every(n), at(n), after(n), until(n) or a function of the count."
    )
