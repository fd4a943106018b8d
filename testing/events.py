"""Which events fired."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from camshaft.engine import Engine, Event
from camshaft.engine.events import known_events


@dataclass(frozen=True, slots=True)
class Recorded:
    """An event that fired, and where the run was then."""

    name: str
    epoch: int
    step: int
    event: Event


@contextmanager
def record_events(engine: Engine) -> Iterator[list[Recorded]]:
    """Collect every event that fires in the body, yours included, in order.

    They are recorded by a handler that comes after all those that are attached already.

    >>> from camshaft.testing import toy_data, toy_engine
    >>> engine = toy_engine()
    >>> with record_events(engine) as events:
    ...     history = engine.fit(toy_data()[0][:1], epochs=1)
    >>> [one.name for one in events][:4]
    ['FitStart', 'EpochStart', 'BatchReady', 'LossReady']
    """
    recorded: list[Recorded] = []

    def note(event: Event) -> None:
        recorded.append(Recorded(type(event).__name__, engine.epoch, engine.step, event))

    subscriptions = [engine.subscribe(kind, note) for kind in known_events().values()]
    try:
        yield recorded
    finally:
        for subscription in subscriptions:
            subscription.cancel()
