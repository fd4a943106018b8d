"""What an engine offers to those who listen: events, scopes and callbacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, get_args

from .callback import Callback, check_callback
from .dispatch import Dispatch, Subscription
from .errors import ConfigurationError, did_you_mean
from .events import Event

if TYPE_CHECKING:
    from .engine import Engine

E = TypeVar("E", bound=Event)
Scope = Literal["fit", "forward", "evaluation"]
Manager = Callable[[], AbstractContextManager[Any]]


class Announcer:
    """The listening side of an `Engine`.

    Attributes:
        callbacks: the attached callbacks, in order.
    """

    def __init__(self) -> None:
        self.dispatch = Dispatch()
        self.callbacks: list[Callback] = []
        self._managers: dict[Scope, list[Manager]] = {}

    def attach(self, callback: Callback) -> None:
        """Attach one more callback, after those that are there.

        Raises:
            ConfigurationError: if it is no callback, or is attached already.
        """
        callback = check_callback(callback)
        if any(callback is other for other in self.callbacks):
            raise ConfigurationError(f"{callback!r} is attached twice. Attach it once, or make a second one.")
        callback.attach(cast("Engine", self))
        self.callbacks.append(callback)

    def subscribe(self, event: type[E], handler: Callable[[E], object], when: object = None) -> Subscription[E]:
        """Call ``handler(event)`` whenever ``event`` happens and ``when`` allows; ``.cancel()`` the result to stop.

        Raises:
            HandlerError: if ``event`` is no event class, or the handler cannot take one event.
            ConfigurationError: if ``when`` is no filter.
        """
        return self.dispatch.subscribe(event, handler, when)

    def on(self, event: type[E], when: object = None) -> Callable[[Callable[[E], object]], Callable[[E], object]]:
        """Subscribe the decorated function: ``@engine.on(StepEnd, when=every(100))``."""
        self.dispatch.channel(event)  # refuses what is no event, as in @engine.on without its parentheses

        def decorate(handler: Callable[[E], object]) -> Callable[[E], object]:
            self.subscribe(event, handler, when)
            return handler

        return decorate

    def emit(self, event: Event) -> None:
        """Announce an event, your own or a built-in one, to its handlers."""
        channel = self.dispatch.channel(type(event))
        count = getattr(self, event.counter)
        if count >= channel.due:
            channel.emit(event, count)

    def hears(self, event: type[Event]) -> bool:
        """Return whether the event has a handler: ask before building a costly one of your own."""
        return bool(self.dispatch.channel(event).subscriptions)

    def around(self, scope: Scope, manager: Manager) -> None:
        """Enter ``manager()`` around every "fit", "forward" (model and loss) or "evaluation".

        Managers are entered in the order of this call and left in reverse, also on failure. FitStart and FitEnd
        happen inside "fit".
        """
        if scope not in get_args(Scope):
            raise ConfigurationError(
                f'"{scope}" is not a scope. {did_you_mean(scope, get_args(Scope))}'
                f"Write one of: {', '.join(get_args(Scope))}."
            )
        if not callable(manager) or isinstance(manager, AbstractContextManager):
            raise ConfigurationError(
                f'{manager!r} is no function, and the scope "{scope}" is entered again and again. '
                "Pass a function that makes one: lambda: torch.autocast(...)."
            )
        self._managers.setdefault(scope, []).append(manager)

    def scope(self, scope: Scope) -> AbstractContextManager[Any]:
        """Return the context that handlers put around ``scope``; write ``with engine.scope("forward"):``."""
        managers = self._managers.get(scope)
        if not managers:
            return _NOTHING
        return managers[0]() if len(managers) == 1 else _entered(managers)

    def explain(self) -> str:
        """Return which handlers run, when and in which order, one event a paragraph, in firing order."""
        around = [f"around {scope}: {len(managers)} context managers" for scope, managers in self._managers.items()]
        return "\n".join([self.dispatch.explain(), *around])


_NOTHING: AbstractContextManager[None] = nullcontext()


@contextmanager
def _entered(managers: list[Manager]) -> Iterator[None]:
    with ExitStack() as stack:
        for manager in managers:
            stack.enter_context(manager())
        yield
