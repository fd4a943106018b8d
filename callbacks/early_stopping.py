"""Stop when a value no longer gets better."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, ClassVar, Literal

from camshaft.engine import Callback, ConfigurationError, Engine, FitEnd, FitStart, is_number, whole_number

from .monitor import Mode, Monitor

_patience = partial(whole_number, "EarlyStopping's patience", least=1)


def _gain(min_delta: Any) -> float:
    if not (is_number(min_delta) and min_delta >= 0):
        raise ConfigurationError(f"EarlyStopping has min_delta={min_delta!r}. Pass a number of at least 0.")
    return min_delta


def _bound(name: str, bound: Any) -> float | None:
    if bound is not None and not is_number(bound):
        raise ConfigurationError(f"EarlyStopping has {name}={bound!r}. Pass a finite number, or leave it out.")
    return bound


class EarlyStopping(Callback):
    """Stops the run after ``patience`` checks in a row without improvement.

    A check is a validation for ``val_*`` values and an epoch for ``train_*`` values.

    Args:
        monitor: the value to watch, such as ``"val_acc"``.
        mode: "max" or "min"; may be left out if the metric itself says which is better.
        patience: checks without improvement before the run stops; at least 1.
        min_delta: how much a value must gain to count as an improvement, in the value's own unit.
        relative: take ``min_delta`` as a share of the best value so far: 0.01 is 1 % of it.
        on_nan: "count" takes NaN as no improvement, "stop" ends the run at the first.
        threshold: stop as soon as a value is as good as this, whatever the patience.
        divergence: stop as soon as a value is worse than this.
        start: the number of first epochs in which nothing is checked, such as those of a warm-up.

    Raises:
        ConfigurationError: for settings that cannot work; before the first step if the value will not exist.

    On resume the count and the best value are kept, and the settings are those of the new run.

    >>> import torch
    >>> losses = iter([3.0, 2.0, 2.5, 2.2, 1.0])
    >>> engine = Engine(lambda engine, batch: {"loss": next(losses)},
    ...                 callbacks=[EarlyStopping("train_loss", mode="min", patience=2)])
    >>> engine.fit([torch.zeros(8)], epochs=5).reason
    'EarlyStopping: train_loss has not improved for 2 checks (best 2 at epoch 2)'
    """

    steerable: ClassVar = {
        "patience": _patience,
        "min_delta": _gain,
        "threshold": partial(_bound, "threshold"),
        "divergence": partial(_bound, "divergence"),
    }

    def __init__(
        self,
        monitor: str,
        mode: Mode | None = None,
        patience: int = 5,
        *,
        min_delta: float = 0.0,
        relative: bool = False,
        on_nan: Literal["count", "stop"] = "count",
        threshold: float | None = None,
        divergence: float | None = None,
        start: int = 0,
    ) -> None:
        self.monitor = Monitor("EarlyStopping", monitor, mode)
        self.patience = _patience(patience)
        if on_nan not in ("count", "stop"):
            raise ConfigurationError(f'EarlyStopping has on_nan={on_nan!r}. Write "count" or "stop".')
        self.min_delta = _gain(min_delta)
        self.relative = relative
        self.threshold = _bound("threshold", threshold)
        self.divergence = _bound("divergence", divergence)
        self.start = whole_number("EarlyStopping's start", start, least=0)
        self.on_nan = on_nan
        self.best = math.nan
        self.best_epoch = 0
        self.num_checks_without_gain = 0
        self._run_is_over = False

    def attach(self, engine: Engine) -> None:
        """Watch the value."""
        super().attach(engine)
        self.monitor.attach(engine, self._check)

    def on_fit_end(self, event: FitEnd) -> None:
        """Remember that this run is over."""
        self._run_is_over = True

    def on_fit_start(self, event: FitStart) -> None:
        """Reset the patience at the start of another run."""
        if self._run_is_over:
            self.num_checks_without_gain = 0
            self._run_is_over = False

    def _check(self, engine: Engine, value: float) -> None:
        name, better = self.monitor.name, self.monitor.better
        if math.isnan(value) and self.on_nan == "stop":
            engine.stop(f"EarlyStopping: {name} is NaN")
            return
        if engine.epoch - engine.run.first_epoch <= self.start:
            return
        exists = not math.isnan(value)
        if exists and self.threshold is not None and not better(self.threshold, than=value):
            engine.stop(f"EarlyStopping: {name} is {value:.6g}, as good as the threshold of {self.threshold:.6g}")
            return
        if exists and self.divergence is not None and better(self.divergence, than=value):
            engine.stop(f"EarlyStopping: {name} is {value:.6g}, worse than {self.divergence:.6g}")
            return
        if better(value, than=self._bar()):
            self.best, self.best_epoch, self.num_checks_without_gain = value, engine.epoch, 0
            return
        self.num_checks_without_gain += 1
        if self.num_checks_without_gain >= self.patience:
            best = "NaN so far" if math.isnan(self.best) else f"best {self.best:.6g} at epoch {self.best_epoch}"
            engine.stop(f"EarlyStopping: {name} has not improved for {self.num_checks_without_gain} checks ({best})")

    def _bar(self) -> float:
        """Return what a value must be better than to be an improvement."""
        gain = self.min_delta * abs(self.best) if self.relative else self.min_delta
        return self.best - gain if self.monitor.mode == "min" else self.best + gain

    def state_dict(self) -> dict[str, Any]:
        """Return the best value and the count."""
        return {
            "best": self.best,
            "best_epoch": self.best_epoch,
            "num_checks_without_gain": self.num_checks_without_gain,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back the best value and the count."""
        self.best = state["best"]
        self.best_epoch = state["best_epoch"]
        self.num_checks_without_gain = state["num_checks_without_gain"]
        self._run_is_over = False

    def __repr__(self) -> str:
        return f"EarlyStopping({self.monitor.name!r}, mode={self.monitor.mode!r}, patience={self.patience})"
