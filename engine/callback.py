"""A class whose ``on_*`` methods are subscriptions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .errors import ConfigurationError, HandlerError, did_you_mean
from .events import known_events

if TYPE_CHECKING:
    from .engine import Engine


class Callback:
    """A handler with a name, settings and state.

    Each method ``on_<event in snake case>`` hears that event, and takes it as its one argument. Override
    `attach` to subscribe with a filter or to look at the engine before the run, and `state_dict` if
    something of yours must survive a restart.

    >>> from camshaft.engine import Callback, EpochEnd
    >>> class Shout(Callback):
    ...     def on_epoch_end(self, event: EpochEnd) -> None:
    ...         print(f"EPOCH {event.engine.epoch}!")
    """

    needs_update: bool = False  # whether it hears nothing from a step that goes past ``engine.update``

    def attach(self, engine: Engine) -> None:
        """Subscribe every ``on_*`` method of this object to its event.

        Called once per engine, in the order of ``callbacks=``.

        Raises:
            HandlerError: if a method matches no event, or cannot take one event.
        """
        events = known_events()
        for name in dir(self):
            if not name.startswith("on_") or not callable(getattr(self, name)):
                continue
            if name not in events:
                raise HandlerError(
                    f"{type(self).__name__}.{name} matches no event. "
                    f"{did_you_mean(name, events)}Hooks: {', '.join(events)}."
                )
            engine.subscribe(events[name], getattr(self, name))

    def state_dict(self) -> dict[str, Any]:
        """Return what must survive a restart: state, never settings; tensors and JSON-able values only."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def check_callbacks(callbacks: object) -> list[Callback]:
    """Return ``callbacks`` as a list if it is one of callbacks.

    Raises:
        ConfigurationError: for a single callback, or for what is none.
    """
    if isinstance(callbacks, str | Callback) or not isinstance(callbacks, Iterable):
        raise ConfigurationError(f"callbacks is {callbacks!r}, which is not a list. Write callbacks=[{callbacks!r}].")
    return [check_callback(callback) for callback in callbacks]


def check_callback(callback: object) -> Callback:
    """Return ``callback`` if it is one.

    Raises:
        ConfigurationError: for a class, a string or anything else.
    """
    if isinstance(callback, Callback):
        return callback
    if isinstance(callback, type):
        raise ConfigurationError(f"callbacks holds the class {callback.__name__}, not an instance. Did you forget ()?")
    raise ConfigurationError(
        f"callbacks holds {callback!r}, which is no Callback. "
        "Derive a class from Callback, or pass a plain function to engine.subscribe(Event, function)."
    )
