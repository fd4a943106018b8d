"""What can be ordered of a run that goes on, and what each order does."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

from camshaft.engine import Callback, ConfigurationError, Engine, did_you_mean, is_number, named_callbacks

from .ramp import Ramp
from .rates import scale_rates

Order = dict[str, Any]  # as it is in a file: {"what": "lr", "factor": 0.5}
Effect = tuple[str, Callable[[], object]]  # in words, and the function that makes it

STOPPED = "Steering: it was ordered to stop"  # the reason of the run's end
# What an order has beside "what".
_KEYS = {
    "validate": (),
    "checkpoint": (),
    "stop": ("after",),
    "lr": ("factor",),
    "set": ("handler", "setting", "value"),
}


def in_words(order: Order) -> str:
    """Return an order as it is written after ``camshaft steer RUN``.

    >>> in_words({"what": "stop", "after": "epoch"}), in_words({"what": "lr", "factor": 0.5})
    ('stop --after epoch', 'lr x0.5')
    >>> in_words({"what": "set", "handler": "EarlyStopping", "setting": "patience", "value": 10})
    'set EarlyStopping.patience=10'
    """
    if order["what"] == "stop" and order["after"] == "epoch":
        return "stop --after epoch"
    if order["what"] == "lr":
        return f"lr x{order['factor']!r}"
    if order["what"] == "set":
        return f"set {order['handler']}.{order['setting']}={json.dumps(order['value'])}"
    return str(order["what"])


def effect_of(engine: Engine, order: Any) -> Effect:
    """Return what an order does; nothing is done yet.

    Raises:
        ConfigurationError: if it is no order, or the run cannot take it.
    """
    what = order.get("what") if isinstance(order, dict) else None
    if not isinstance(what, str) or what not in _KEYS or order.keys() != {"what", *_KEYS[what]}:
        raise ConfigurationError(f"{order!r:.100} is not an order. Send one of: {', '.join(_KEYS)}.")
    try:
        return _EFFECTS[what](engine, order)
    except ConfigurationError:
        raise
    except Exception as error:  # a value that a check did not expect, such as a whole number of a thousand digits
        raise ConfigurationError(f"{order!r:.100} raised {error!r:.200}. Send another value.") from error


def _validate(engine: Engine, order: Order) -> Effect:
    if not engine.run.has_validation:
        raise ConfigurationError(
            "The run has no validation data that the engine knows. Pass them to it: fit(train, val, ...)."
        )
    return "a validation comes after the next step, or with the epoch's end", engine.run.validate


def _checkpoint(engine: Engine, order: Order) -> Effect:
    if not any(one.checkpoints is not None for one in engine.listeners.callbacks):
        raise ConfigurationError("The run has nobody who saves it. Attach a RunCheckpoint.")
    return "a checkpoint is saved after the next step, or at the epoch's end", engine.run.save


def _stop(engine: Engine, order: Order) -> Effect:
    at_end = order["after"] == "epoch"
    if order["after"] not in ("step", "epoch"):
        raise ConfigurationError(f'{order["after"]!r:.100} is not a place to stop after. Write "step" or "epoch".')
    if not engine.run.may_stop(engine.epoch + (at_end and not engine.run.data_exhausted)):
        raise ConfigurationError(
            f"The run makes at least min_epochs={engine.run.plan.min_epochs} epochs. Send the order after them."
        )
    if at_end:
        return f"the run ends with epoch {engine.epoch}", lambda: None  # by `Steering.on_epoch_end`
    return "the run ends here", lambda: engine.stop(STOPPED)


def _lr(engine: Engine, order: Order) -> Effect:
    factor, optimizers = order["factor"], engine.parts.optimizers()
    if not (is_number(factor) and factor > 0):
        raise ConfigurationError(f"lr has the factor {factor!r:.100}. Write a number above 0: lr x0.5.")
    if not optimizers:
        raise ConfigurationError("The run has no part that is an optimizer. Write Engine(step, optimizer=...).")
    for one in engine.listeners.callbacks:
        if isinstance(one, Ramp) and one.target in [f"{name}.lr" for name in optimizers]:
            raise ConfigurationError(
                f"{one!r} sets the learning rate anew before each step. Use a Schedule, whose rates can be multiplied."
            )
    return f"the learning rates are multiplied by {factor!r}", partial(scale_rates, engine, factor)


def _set(engine: Engine, order: Order) -> Effect:
    callback, setting = steered(engine, order), order["setting"]
    check, before = callback.steerable[setting], getattr(callback, setting)
    if before is None and not _accepts_none(check):
        raise ConfigurationError(f"{order['handler']} does not use {setting} in this run. Set what it uses.")
    value = check(order["value"])
    said = f"{order['handler']}.{setting} is {value!r} now, and was {before!r}"
    return said, lambda: setattr(callback, setting, value)


def _accepts_none(check: Callable[[Any], Any]) -> bool:
    try:
        check(None)
    except Exception:  # a check of the user's own may raise anything
        return False
    return True


def steered(engine: Engine, order: Order) -> Callback:
    """Return the handler whose setting an order changes.

    Raises:
        ConfigurationError: if there is no such handler, or its setting cannot be changed.
    """
    known = {name: one for name, one in named_callbacks(engine.listeners.callbacks).items() if one.steerable}
    handler, setting = str(order["handler"]), str(order["setting"])
    if handler not in known:
        raise ConfigurationError(
            f"No handler named {handler!r:.100} has settings that can be changed in a run. "
            f"{did_you_mean(handler, known)}Select one of: {', '.join(known) or 'none'}."
        )
    settings = known[handler].steerable
    if setting not in settings:
        raise ConfigurationError(
            f"{handler} has no setting {setting!r:.100} that can be changed in a run. "
            f"{did_you_mean(setting, settings)}Select one of: {', '.join(settings)}."
        )
    return known[handler]


_EFFECTS: dict[str, Callable[[Engine, Order], Effect]] = {
    "validate": _validate,
    "checkpoint": _checkpoint,
    "stop": _stop,
    "lr": _lr,
    "set": _set,
}
