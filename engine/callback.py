"""A class whose ``on_*`` methods are subscriptions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .errors import ConfigurationError, HandlerError, did_you_mean
from .events import known_events

if TYPE_CHECKING:
    from torch import Tensor

    from . import events
    from .checkpoint import CheckpointDirectory
    from .engine import Engine


class Callback:
    """A handler with a name, settings and state.

    Each method ``on_<event in snake case>`` hears that event, and takes it as its one argument. This is the loop in
    which they are called; what is in brackets is not always done::

        on_fit_start
        for each epoch:
            on_epoch_start
            for each training batch:
                on_batch_ready              may return another batch
                step: output and loss
                    engine.update(loss):
                        on_loss_ready       may return another loss
                        loss.backward()
                        [on_gradients_ready, optimizer.step(), on_update_end, optimizer.zero_grad()]
                on_step_end
                [on_logged]                 a Log has the values of a step
                [validation, if it is due in the middle of the epoch]
                on_settled                  the run can be saved now
            [validation:
                on_validation_start
                for each validation batch: on_batch_ready, step, on_validation_step_end
                on_validation_end]
            on_epoch_end
            on_settled
        [on_run_failed]
        on_fit_end

    Override `attach` to subscribe with a filter or to look at the engine before the run, and `state_dict` if
    something of yours must survive a restart. A callback belongs to one engine.

    Attributes:
        needs_update: whether it can do nothing in a step that does not call ``engine.update``.
        unique: whether an engine takes only one of its class.
        main_only: whether it is attached on rank 0 alone, if there are several: for what writes or prints. It must not
            ask the other ranks for anything.
        run_directory: the directory that it offers to other handlers, as ``engine.directory``; None for most.
        checkpoints: the directory in which ``fit(..., resume="auto")`` looks for checkpoints; None for most.
        steerable: the settings that `camshaft.callbacks.Steering` may change while a run goes on: attributes that are
            read each time they are needed, each with the check that ``__init__`` makes, which returns the value.

    >>> from camshaft.engine import Callback, EpochEnd
    >>> class Shout(Callback):
    ...     def on_epoch_end(self, event: EpochEnd) -> None:
    ...         print(f"EPOCH {event.engine.epoch}!")
    """

    needs_update: bool = False
    unique: bool = False
    main_only: bool = False
    run_directory: Path | None = None
    checkpoints: CheckpointDirectory | None = None
    steerable: ClassVar[Mapping[str, Callable[[Any], Any]]] = {}
    _is_attached: bool = False

    def attach(self, engine: Engine) -> None:
        """Subscribe every ``on_*`` method of this object to its event.

        Called once, in the order of ``callbacks=``.

        Raises:
            ConfigurationError: if it was attached to another engine, because it still holds values from that engine.
            HandlerError: if a method matches no event, or cannot take one event.
        """
        if self._is_attached:
            raise ConfigurationError(
                f"{self!r} was attached to another engine before, and keeps values from that engine. "
                "Make a new callback for each engine."
            )
        self._is_attached = True
        events = known_events()
        for name in dir(self):
            if not name.startswith("on_") or not callable(getattr(self, name)):
                continue
            if name not in events:
                raise HandlerError(
                    f"{type(self).__name__}.{name} matches no event. "
                    f"{did_you_mean(name, events)}Hooks: {', '.join(events)}."
                )
            handler = getattr(self, name)
            engine.subscribe(events[name], handler)

    def state_dict(self) -> dict[str, Any]:
        """Return what must survive a restart: state, never settings.

        It may hold tensors, numbers, strings, lists and dicts.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned. Called after ``on_fit_start``."""

    def before_resume(self, state: dict[str, Any]) -> None:
        """Prepare what other callbacks need in FitStart; called with the saved state before a resumed run begins."""

    def write_into(self, directory: Path) -> None:
        """Write files into ``directory`` from now on, and nowhere else: this run is only tried.

        Called before a replay, and before a rehearsal, which puts everything back afterwards. What a handler writes in
        ``engine.directory`` is led elsewhere anyway; this is for one that was told a path, or sends to a service.
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    if TYPE_CHECKING:  # for editors and type checkers; a hook that is not defined costs nothing

        def on_fit_start(self, event: events.FitStart) -> None:
            """Hear that a run begins."""

        def on_epoch_start(self, event: events.EpochStart) -> None:
            """Hear that an epoch begins."""

        def on_batch_ready(self, event: events.BatchReady) -> Any:
            """Hear of a batch that was read; return another to replace it."""

        def on_loss_ready(self, event: events.LossReady) -> Tensor | None:
            """Hear of a loss before it is differentiated; return another to replace it."""

        def on_gradients_ready(self, event: events.GradientsReady) -> None:
            """Hear that an optimizer is about to step; change the gradients in place."""

        def on_update_end(self, event: events.UpdateEnd) -> None:
            """Hear that an optimizer has stepped."""

        def on_step_end(self, event: events.StepEnd) -> None:
            """Hear that a training step is done."""

        def on_logged(self, event: events.Logged) -> None:
            """Hear the values of a training step."""

        def on_validation_start(self, event: events.ValidationStart) -> None:
            """Hear that a validation begins."""

        def on_validation_step_end(self, event: events.ValidationStepEnd) -> None:
            """Hear that a validation batch is done."""

        def on_validation_end(self, event: events.ValidationEnd) -> None:
            """Hear the values of a validation."""

        def on_epoch_end(self, event: events.EpochEnd) -> None:
            """Hear the values of an epoch."""

        def on_settled(self, event: events.Settled) -> None:
            """Hear that a step or an epoch is done, and that the run can be saved."""

        def on_run_failed(self, event: events.RunFailed) -> None:
            """Hear of the error that ends the run."""

        def on_fit_end(self, event: events.FitEnd) -> None:
            """Hear that the run is over, and why."""


def check_callbacks(callbacks: object) -> list[Callback]:
    """Return ``callbacks`` as a list of callbacks.

    Raises:
        ConfigurationError: for a single callback, or for anything else.
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
        f"callbacks holds {callback!r}, which is not a Callback. "
        "Derive a class from Callback, or pass a plain function to engine.subscribe(Event, function)."
    )
