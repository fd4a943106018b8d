"""Settings over time: weight decay, momentum, the weight of a loss, a dropout probability."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from camshaft.engine import BatchReady, Callback, ConfigurationError, Engine, FitStart, can_take, did_you_mean

from .stopwatch import Stopwatch


class Ramp(Callback):
    """Sets something, before each training step, to a function of how far the run is.

    For learning rates there is `Schedule`. The value depends on the count alone, so a resumed run has the values of
    the run left alone. After the run, the last value stays.

    With ``per="second"`` it depends on the time that the run has taken, for a budget of time: a resumed run counts on,
    and no two runs have the same values.

    Args:
        target: a part and what to set in it: ``"optimizer.weight_decay"`` sets that entry of each parameter group of
            an optimizer, and ``"model.drop.p"`` or ``"loss_fn.kl_weight"`` an attribute.
        value: ``value(done, total)``, called with how many steps or epochs of the run are done, and how many it is to
            make; or ``value(done)`` for a run whose length is unknown, and for seconds.
        per: "step", "epoch" or "second".

    Raises:
        ConfigurationError: for settings that cannot work; before the first step, if there is no such part, entry or
            attribute, or the length of the run is unknown and the function needs it; for seconds on several ranks,
            whose clocks differ.

    >>> Ramp("loss_fn.kl_weight", lambda done, total: min(1.0, 2 * done / total))
    Ramp('loss_fn.kl_weight', per='step')

    A learning rate that falls to 0 within two hours, with which the run ends, ``StopAfter(hours=2)``:

    >>> Ramp("optimizer.lr", lambda seconds: 0.1 * max(0.0, 1 - seconds / 7200), per="second")
    Ramp('optimizer.lr', per='second')
    """

    def __init__(
        self, target: str, value: Callable[..., float], *, per: Literal["step", "epoch", "second"] = "step"
    ) -> None:
        if not isinstance(target, str) or "." not in target:
            raise ConfigurationError(
                f'Ramp has the target {target!r}. Write a part and what to set in it: "optimizer.weight_decay".'
            )
        if per not in ("step", "epoch", "second"):
            raise ConfigurationError(f'Ramp has per={per!r}. Write "step", "epoch" or "second".')
        if not callable(value) or not (can_take(value, 1) or can_take(value, 2)):
            raise ConfigurationError(f"Ramp has the value {value!r}. Write lambda done, total: ...")
        if per == "second" and not can_take(value, 1):
            raise ConfigurationError(
                'Ramp has per="second" and a function of a total, and nobody knows how long the run takes. '
                "Write lambda seconds: ..."
            )
        self.target = target
        self.per = per
        self._value = value
        self._takes_total = can_take(value, 2) and per != "second"
        self._watch = Stopwatch()
        self._set: Callable[[float], None] = _unset

    def on_fit_start(self, event: FitStart) -> None:
        """Find what is to be set, and start the clock."""
        ranks = event.engine.ranks
        if self.per == "second" and ranks.several:
            raise ConfigurationError(
                f'Ramp has per="second" on {ranks.world} ranks, whose clocks would give them differing values. '
                'Write per="step".'
            )
        self._watch.start()
        name, _, rest = self.target.partition(".")
        parts = event.engine.parts
        if name not in parts:
            raise ConfigurationError(
                f'Ramp sets "{self.target}", but the parts are: {", ".join(parts)}. '
                f"{did_you_mean(name, parts) or 'Write one of those.'}".rstrip()
            )
        part = parts[name]
        self._set = _entry(part, rest) if isinstance(part, torch.optim.Optimizer) else _attribute(part, rest)

    def on_batch_ready(self, event: BatchReady) -> None:
        """Set the value for the step that begins."""
        engine = event.engine
        if engine.training:
            done = self._done(engine)
            self._set(self._value(done, self._known_total(engine)) if self._takes_total else self._value(done))

    def _done(self, engine: Engine) -> float:
        if self.per == "second":
            return self._watch.look()
        if self.per == "epoch":
            return engine.epoch - 1 - engine.run.first_epoch
        return engine.step - 1 - engine.run.first_step

    def _known_total(self, engine: Engine) -> int:
        total = engine.run.num_planned("epoch" if self.per == "epoch" else "step")
        if total is None:
            raise ConfigurationError(
                f"Ramp does not know how many {self.per}s the run makes. "
                "Pass max_steps=... or epoch_length=..., or a function of what is done alone: lambda done: ..."
            )
        return total

    def state_dict(self) -> dict[str, Any]:
        """Return the time that was spent."""
        return {"spent": self._watch.spent} if self.per == "second" else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Count the time that an earlier run has spent."""
        self._watch.start(state.get("spent", 0.0))

    def __repr__(self) -> str:
        return f"Ramp({self.target!r}, per={self.per!r})"


def _unset(value: float) -> None:
    """Set nothing: there is no run yet."""


def _entry(optimizer: torch.optim.Optimizer, name: str) -> Callable[[float], None]:
    known = {key for group in optimizer.param_groups for key in group if key != "params"}
    if name not in known:
        raise ConfigurationError(
            f'Ramp sets "{name}" of {type(optimizer).__name__}, which has: {", ".join(sorted(known))}. '
            f"{did_you_mean(name, known) or 'Write one of those.'}".rstrip()
        )

    def set_all(value: float) -> None:
        for group in optimizer.param_groups:
            if name in group:
                group[name] = value

    return set_all


def _attribute(part: Any, path: str) -> Callable[[float], None]:
    *outer, last = path.split(".")
    for name in outer:
        part = _required(part, name)
    _required(part, last)
    return lambda value: setattr(part, last, value)


def _required(owner: Any, name: str) -> Any:
    if not hasattr(owner, name):
        known = [one for one in dir(owner) if not one.startswith("_")]
        raise ConfigurationError(
            f'Ramp sets "{name}" of {type(owner).__name__}, which has no such attribute. '
            f"{did_you_mean(name, known) or 'Write one that it has.'}".rstrip()
        )
    return getattr(owner, name)
