"""Who hears what, and in which order.

Handlers run in the order in which they were attached. One that is added while an event is announced waits for the next
event, and a cancelled one never runs again. The exception of a handler reaches the caller, with a note that names the
handler.
"""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from .errors import HandlerError
from .events import Event, known_events
from .when import NEVER, Always, When

E = TypeVar("E", bound=Event)
Handler = Callable[[E], object]
Report = Callable[[Handler[Any], type[Event], float, float], None]


class Subscription(Generic[E]):
    """One handler of one event; ``cancel()`` ends it.

    ``due`` is a lower bound: the filter need not be asked before the counter reaches it. What is called is
    ``call``: the handler, or, once it is cancelled, a function that does nothing.
    """

    __slots__ = ("_channel", "always", "call", "due", "handler", "when")

    def __init__(self, channel: Channel[E], handler: Handler[E], when: When) -> None:
        self._channel = channel
        self.handler = self.call = handler
        self.when = when
        self.always = isinstance(when, Always)
        self.due = 0

    def cancel(self) -> None:
        """Stop hearing, from this moment on; a second call does nothing."""
        self.call = _nothing
        self._channel.remove(self)

    def is_due(self, count: int) -> bool:
        """Return whether the handler runs at this count, and look up when to ask the filter again."""
        if self.always:
            return True
        if count < self.due:
            return False
        if self.when(count):
            self.due = count  # a second event at this count is heard, too
            return True
        self.due = self.when.next_due(count)
        return False

    def __repr__(self) -> str:
        return f"{self._channel.event.__name__} -> {describe(self.handler)}{when_text(self.when)}"


class Timed(Generic[E]):
    """A handler with the time of its calls, also of those that it fails in.

    Args:
        handler: the handler.
        report: told of each call: the handler, the class of the event, and the clock (``time.perf_counter``) before
            and after.
    """

    __slots__ = ("_report", "handler", "num_calls", "seconds")

    def __init__(self, handler: Handler[E], report: Report) -> None:
        self.handler = handler
        self.num_calls = 0
        self.seconds = 0.0
        self._report = report

    def __call__(self, event: E) -> object:
        """Call the handler."""
        began = time.perf_counter()
        try:
            return self.handler(event)
        finally:
            ended = time.perf_counter()
            self.num_calls += 1
            self.seconds += ended - began
            self._report(self.handler, type(event), began, ended)


def _nothing(event: object) -> None:
    """Stand in for a cancelled handler."""


class Channel(Generic[E]):
    """The subscriptions of one event.

    For an event that nobody is due to hear, all that the loop does is ``if count >= channel.due``.
    """

    __slots__ = ("_called", "due", "event", "filtered", "subscriptions")

    def __init__(self, event: type[E]) -> None:
        self.event = event
        self.subscriptions: dict[Subscription[E], None] = {}  # in the order in which they were added
        self._called: tuple[Subscription[E], ...] | None = ()  # the same, for a dispatch; None if they have changed
        self.due = NEVER
        self.filtered = False  # whether any subscription had a filter at the last dispatch

    def add(self, handler: Handler[E], when: When) -> Subscription[E]:
        """Append a handler; it takes part from the next dispatch on."""
        subscription = Subscription(self, handler, when)
        self.subscriptions[subscription] = None
        self._called, self.due = None, 0
        return subscription

    def remove(self, subscription: Subscription[E]) -> None:
        """Take a handler out."""
        self.subscriptions.pop(subscription, None)
        self._called, self.due = None, 0 if self.subscriptions else NEVER

    def rewind(self) -> None:
        """Ask every filter again, because the counter was set to another value."""
        for subscription in self.subscriptions:
            subscription.due = 0
        self._settle_due()

    def emit(self, event: E, count: int) -> None:
        """Call each handler that is due with ``event``."""
        subscription = None
        try:
            for subscription in self._called or self._renewed():
                if subscription.always or (count >= subscription.due and subscription.is_due(count)):
                    subscription.call(event)
        except Exception as error:
            self._add_note(error, subscription, count)
            raise
        if self.filtered:
            self._settle_due()

    def emit_to_all(self, event: E, count: int) -> None:
        """Call each handler that is due, also after one has raised; then raise the first error."""
        errors: list[Exception] = []
        for subscription in self._called or self._renewed():
            try:
                if subscription.is_due(count):
                    subscription.call(event)
            except Exception as error:
                self._add_note(error, subscription, count)
                errors.append(error)
        self._settle_due()
        if errors:
            for other in errors[1:]:
                errors[0].add_note(f"Another handler of {self.event.__name__} failed, too: {other!r}")
            raise errors[0]

    def transform(self, build: Callable[[Any], E], value: Any, count: int) -> Any:
        """Offer ``value`` to each handler that is due and return what they made of it."""
        subscription = None
        try:
            for subscription in self._called or self._renewed():
                if subscription.always or (count >= subscription.due and subscription.is_due(count)):
                    replacement = subscription.call(build(value))
                    if replacement is not None:
                        value = replacement
        except Exception as error:
            self._add_note(error, subscription, count)
            raise
        if self.filtered:
            self._settle_due()
        return value

    def _renewed(self) -> tuple[Subscription[E], ...]:
        """Return the subscriptions as they are now: those that are added during a dispatch wait for the next."""
        self._called = tuple(self.subscriptions)
        self.filtered = any(not subscription.always for subscription in self._called)
        return self._called

    def _settle_due(self) -> None:
        due = NEVER
        for subscription in self.subscriptions:  # rather than min() of a generator, which is a call for each
            if subscription.due < due:
                due = subscription.due
        self.due = due

    def _add_note(self, error: Exception, subscription: Subscription[E] | None, count: int) -> None:
        if subscription is not None:
            error.add_note(
                f"Raised by {describe(subscription.handler)}, a handler of {self.event.__name__}, "
                f"at {self.event.counter} {count}."
            )


def describe(handler: object) -> str:
    """Return a handler's name as a person would say it.

    >>> describe(print)
    'print'
    """
    name = getattr(handler, "__qualname__", None)
    if name is None:
        return repr(handler)
    owner = getattr(handler, "__self__", None)
    if owner is not None and not inspect.ismodule(owner) and not isinstance(owner, type):
        return f"{type(owner).__name__}.{handler.__name__}"  # type: ignore[attr-defined]  # a bound method
    return str(name).replace("<locals>.", "")


def location(handler: object) -> str:
    """Return ``file:line`` of a handler, relative to the working directory if it is in it."""
    code = getattr(inspect.unwrap(getattr(handler, "__func__", handler)), "__code__", None)  # type: ignore[arg-type]
    if code is None:
        return ""
    path = os.path.relpath(code.co_filename)
    return f"{code.co_filename if path.startswith('..') else path}:{code.co_firstlineno}"


def when_text(when: When) -> str:
    """Return a filter as `explain` shows it; nothing for a handler that always runs."""
    return "" if isinstance(when, Always) else f"  {when!r}"


def check_event(event: object) -> None:
    """Refuse what is not an event class.

    Raises:
        HandlerError: with the names of the events.
    """
    if isinstance(event, type) and issubclass(event, Event) and event is not Event:
        return
    names = ", ".join(known.__name__ for known in known_events().values())
    if isinstance(event, Event):
        raise HandlerError(f"{event!r} is one event, not a class of them. Write {type(event).__name__}.")
    raise HandlerError(f"{event!r} is not an event class. Subscribe to one of: {names}.")


def check_handler(event: type[Event], handler: object) -> None:
    """Refuse a handler that could not be called with one event.

    Raises:
        HandlerError: with how to write it.
    """
    name = describe(handler)
    should = f'Write "def {getattr(handler, "__name__", "handler")}(event: {event.__name__})".'
    if isinstance(handler, type) or not callable(handler):
        raise HandlerError(f"{name} is not a function, so it cannot handle {event.__name__}. {should}")
    called = handler if inspect.isroutine(handler) else type(handler).__call__
    if any(
        kind(called) for kind in (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
    ):
        raise HandlerError(f"{name}() is async or a generator, so a call would not run it. {should}")
    try:
        signature = inspect.signature(handler)
    except ValueError:  # some built-in functions have none
        return
    try:
        signature.bind(event)
    except TypeError:
        takes = ", ".join(signature.parameters) or "no arguments"
        raise HandlerError(
            f"{name}() takes {takes}, but a {event.__name__} handler receives the event. {should}"
        ) from None
