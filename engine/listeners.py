"""Who listens to an engine: event handlers, context managers around parts of a run, and callbacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from .callback import Callback, check_callback
from .dispatch import Channel, Report, Subscription, Timed, check_event, check_handler, describe, location, when_text
from .errors import ConfigurationError, did_you_mean
from .events import Event, known_events
from .when import as_when

if TYPE_CHECKING:
    from .engine import Engine

E = TypeVar("E", bound=Event)
Scope = Literal["lock", "fit", "epoch", "forward", "evaluation"]
Manager = Callable[[], AbstractContextManager[Any]]


class Listeners:
    """All that listens to one engine.

    Attributes:
        engine: the engine that its events carry.
        callbacks: the attached callbacks, in order.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.callbacks: list[Callback] = []
        self._channels: dict[type[Event], Channel[Any]] = {}
        self._managers: dict[Scope, list[Manager]] = {}
        self._report: Report | None = None

    def attach(self, callback: Callback) -> None:
        """Attach one more callback, after the others.

        Raises:
            ConfigurationError: if it is not a callback, is attached already, or is one of a class of which an engine
                takes only one.
        """
        callback = check_callback(callback)
        if any(callback is other for other in self.callbacks):
            raise ConfigurationError(f"{callback!r} is attached twice. Attach it once, or make a second one.")
        if callback.unique and any(type(other) is type(callback) for other in self.callbacks):
            raise ConfigurationError(f"The engine has a {type(callback).__name__} already. Attach only one.")
        if callback.main_only and self.engine.ranks.several:
            self._attach_on_main(callback)
        else:
            callback.attach(self.engine)
        self.callbacks.append(callback)

    def _attach_on_main(self, callback: Callback) -> None:
        if self.engine.ranks.is_main:
            with self.engine.ranks.not_asking():
                callback.attach(self.engine)

    def channel(self, event: type[E]) -> Channel[E]:
        """Return the event's channel, made on first request.

        Raises:
            HandlerError: if ``event`` is not an event class.
        """
        channel = self._channels.get(event)
        if channel is None:
            check_event(event)
            channel = self._channels[event] = Channel(event)
        return channel

    def subscribe(self, event: type[E], handler: Callable[[E], object], when: object = None) -> Subscription[E]:
        """Check the handler, then add it to the event's channel.

        Raises:
            HandlerError: if ``event`` is not an event class, or the handler cannot be called with one event.
            ConfigurationError: if ``when`` is not a filter.
        """
        channel = self.channel(event)
        check_handler(event, handler)
        handler = self.engine.ranks.guarded(handler)
        subscription = channel.add(handler, as_when(when))
        if self._report is not None:
            subscription.call = Timed(handler, self._report)
        return subscription

    def time_handlers(self, report: Report) -> None:
        """Take the time of each handler's calls from now on, also of those that are still to come.

        Args:
            report: called after each of them with the handler, the class of the event, and the clock
                (``time.perf_counter``) before and after.

        Raises:
            ConfigurationError: if somebody takes it already.
        """
        if self._report is not None:
            raise ConfigurationError("The handlers are timed already. Attach one Profile.")
        self._report = report
        for channel in self._channels.values():
            for subscription in channel.subscriptions:
                subscription.call = Timed(subscription.handler, report)

    def hears(self, event: type[Event]) -> bool:
        """Return whether the event has a handler: ask before building a costly event of your own."""
        return bool(self.channel(event).subscriptions)

    def filtered(self) -> list[tuple[type[Event], Subscription[Any]]]:
        """Return the subscriptions that do not run each time, with their events."""
        pairs = [(event, one) for event, channel in self._channels.items() for one in channel.subscriptions]
        return [(event, one) for event, one in pairs if not one.always]

    def rewind(self) -> None:
        """Ask every filter again, because the counters were set to other values."""
        for channel in self._channels.values():
            channel.rewind()

    def around(self, scope: Scope, manager: Manager) -> None:
        """Enter ``manager()`` around every "lock", "fit", "epoch", "forward" (model and loss) or "evaluation".

        Managers are entered in the order of these calls and left in reverse order, also after an error. FitStart and
        FitEnd happen inside "fit". "lock" is around that, and around the search for a checkpoint to resume from: it
        keeps other runs out of the files of this one. "epoch" is around the training and the validations of an epoch,
        also of one that is resumed in its middle; EpochStart is before it, and EpochEnd after it.
        """
        if scope not in get_args(Scope):
            raise ConfigurationError(
                f'"{scope}" is not a scope. {did_you_mean(scope, get_args(Scope))}'
                f"Write one of: {', '.join(get_args(Scope))}."
            )
        if not callable(manager) or isinstance(manager, AbstractContextManager):
            raise ConfigurationError(
                f'{manager!r} is not a function, and the scope "{scope}" is entered again and again. '
                "Pass a function that makes one: lambda: torch.autocast(...)."
            )
        self._managers.setdefault(scope, []).append(manager)

    def scope(self, scope: Scope) -> AbstractContextManager[Any]:
        """Return the context managers that callbacks put around ``scope``, as one."""
        managers = self._managers.get(scope)
        if not managers:
            return _NOTHING
        return managers[0]() if len(managers) == 1 else _entered(managers)

    @property
    def is_timed(self) -> bool:
        """Whether the time of each handler is taken, as `Profile` asks for."""
        return self._report is not None

    def explain(self, *, times: bool = False) -> str:
        """Return which handlers run, when and in which order, one event a paragraph, in firing order.

        Args:
            times: with how often each was called, and how long that took.

        Raises:
            ConfigurationError: if nobody takes the time.
        """
        if times and not self.is_timed:
            raise ConfigurationError("The handlers are not timed. Attach Profile() before the run.")
        order = list(known_events().values())
        heard = [channel for channel in self._channels.values() if channel.subscriptions]
        heard.sort(key=lambda channel: order.index(channel.event) if channel.event in order else len(order))
        lines = [line for channel in heard for line in _explained(channel, times=times)] or ["No event has a handler."]
        lines += [f"around {scope}: {len(managers)} context managers" for scope, managers in self._managers.items()]
        return "\n".join(lines)


def _explained(channel: Channel[Any], *, times: bool) -> list[str]:
    handlers = [
        f"  {position}. {describe(s.handler)}{when_text(s.when)}  {location(s.handler)}".rstrip()
        + (f"  {_times(s.call)}" if times and isinstance(s.call, Timed) else "")
        for position, s in enumerate(channel.subscriptions, start=1)
    ]
    return [channel.event.__name__, *handlers]


def _times(timed: Timed[Any]) -> str:
    each = 1e3 * timed.seconds / timed.num_calls if timed.num_calls else 0.0
    return f"{timed.num_calls} calls, {each:.3g} ms each, {timed.seconds:.3g} s"


_NOTHING: AbstractContextManager[None] = nullcontext()


@contextmanager
def _entered(managers: list[Manager]) -> Iterator[None]:
    with ExitStack() as stack:
        for manager in managers:
            stack.enter_context(manager())
        yield
