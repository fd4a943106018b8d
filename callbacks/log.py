"""The values of every few training steps."""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from camshaft.engine import (
    Arriving,
    Callback,
    ConfigurationError,
    Engine,
    EpochEnd,
    EpochStart,
    FitEnd,
    FitStart,
    Logged,
    Selection,
    StepEnd,
    ValidationEnd,
    ValidationStart,
    every,
    whole_number,
)

from .log_updates import UpdateMeter
from .rates import learning_rates

Sums = dict[str, tuple[float, float]]  # a sum and a count, by name


class Log(Callback):
    """Announces the values of every few training steps, for those who write them, as the event `Logged`.

    A `RunDirectory` writes them as rows of ``steps.csv``, `TensorBoard` as curves under ``step/``, and a handler of
    yours hears them in ``on_logged``. The values are

    * what the step records (``loss``, terms of the loss, metrics that are functions): averages over the steps since
      the last row, or since the epoch's start. After a NaN, until the epoch's end, the newest value instead.
    * ``lr``, as it is after the step and its schedule; ``lr_0``, ``lr_1`` ... of several parameter groups, and
      ``lr_<part>`` of several optimizers.
    * ``steps_per_second`` and ``samples_per_second`` over the same steps, without the time of validations.
    * With ``gradients``, of the newest update: ``grad_norm``, the norm of all gradients as they are at this handler's
      place in the order; and ``update_ratio``, the norm of the weights' change divided by that of the weights.

    No step waits for the device: on an accelerator, the values of a step are announced with a later row, or at the end
    of the epoch. Steps without a row cost nothing. On several ranks the averages are those of all ranks.

    Args:
        every: steps from row to row.
        gradients: measure gradients and updates. Names or patterns of parameters of the part ``model``, or a
            function ``(name, parameter) -> bool``, give the norm of each of those, too: ``grad_norm/<name>``. While
            an update is measured, its weights are in memory twice.

    Raises:
        ConfigurationError: for settings that cannot work; before the first step, if nobody hears `Logged`.

    >>> import torch
    >>> engine = Engine(lambda engine, batch: {"loss": batch.mean()}, callbacks=[Log(every=2)])
    >>> heard = engine.subscribe(Logged, lambda event: print(event.at, event.values["loss"]))
    >>> history = engine.fit(torch.tensor([[1.0], [2.0], [4.0], [8.0]]), epochs=1)
    2 1.5
    4 6.0
    """

    unique = True

    def __init__(self, every: int = 50, *, gradients: bool | Selection = False) -> None:
        self.every = whole_number("Log's every", every, least=1)
        self.gradients = gradients
        self._meter: UpdateMeter | None = None
        self._sent: deque[_Row] = deque()  # rows that have not arrived on the host
        self._arrived: deque[tuple[int, int, dict[str, float]]] = deque()  # epoch, step, values; not announced
        self._epoch, self._sums = 0, Sums()  # of the newest row that has arrived
        self._clock = _Clock(0)

    def attach(self, engine: Engine) -> None:
        """Look every few steps; and at the updates just before, if they are measured."""
        super().attach(engine)
        self._engine = engine
        if self.gradients is not False:
            self._meter = UpdateMeter(engine, self.every, () if self.gradients is True else self.gradients)
        engine.subscribe(StepEnd, self._send, when=every(self.every))

    def on_fit_start(self, event: FitStart) -> None:
        """Begin with nothing; a run that is resumed then takes back what it had."""
        engine = event.engine
        if engine.ranks.is_main and not engine.listeners.channel(Logged).subscriptions:
            raise ConfigurationError(
                f"{self!r} has nobody to tell its values. "
                "Attach RunDirectory() or TensorBoard(), too, or subscribe to the event Logged."
            )
        self._sent.clear()
        self._arrived.clear()
        self._epoch, self._sums = 0, {}
        self._clock = _Clock(engine.step)

    def on_epoch_start(self, event: EpochStart) -> None:
        """Let the time between epochs count for no row."""
        self._clock = _Clock(event.engine.step)

    def on_validation_start(self, event: ValidationStart) -> None:
        """Stop the clock."""
        self._clock.stop()

    def on_validation_end(self, event: ValidationEnd) -> None:
        """Let the clock go on."""
        self._clock.go_on()

    def on_epoch_end(self, event: EpochEnd) -> None:
        """Announce the rows that are left."""
        self._announce(waits=True)

    def on_fit_end(self, event: FitEnd) -> None:
        """Announce the rows that are left, also after an interruption or an error."""
        self._announce(waits=True)

    def _send(self, event: StepEnd) -> None:
        """Begin to bring the values of this step to the host, and announce those that have arrived."""
        engine, record = event.engine, event.engine.current.record
        assert record is not None  # a training step has one
        measured = learning_rates(engine) | ({} if self._meter is None else self._meter.take())
        num_steps, seconds = self._clock.restart(engine.step)
        self._sent.append(_Row(engine.epoch, engine.step, record.send(), Arriving(measured), num_steps, seconds))
        self._announce(waits=False)

    def _announce(self, *, waits: bool) -> None:
        self._receive(waits=waits)
        while self._arrived:
            self._engine.emit(Logged(self._engine, *self._arrived.popleft()))

    def _receive(self, *, waits: bool) -> None:
        while self._sent and (waits or self._sent[0].has_arrived()):
            row = self._sent.popleft()
            before = self._sums if self._epoch == row.epoch else {}
            self._epoch, self._sums = row.epoch, row.sums()
            self._arrived.append((row.epoch, row.step, row.values(before)))

    def state_dict(self) -> dict[str, Any]:
        """Return the rows that nobody was told of, what the newest one ended with, and its step."""
        self._receive(waits=True)
        return {
            "rows": [list(row) for row in self._arrived],
            "epoch": self._epoch,
            "sums": {name: list(pair) for name, pair in self._sums.items()},
            "step": max(self._engine.step, self._clock.step),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._arrived = deque((epoch, step, dict(values)) for epoch, step, values in state["rows"])
        self._epoch, self._sums = state["epoch"], {name: (pair[0], pair[1]) for name, pair in state["sums"].items()}
        self._clock = _Clock(state["step"])

    def __repr__(self) -> str:
        return f"Log(every={self.every})"


@dataclass(frozen=True, slots=True)
class _Row:
    """The values of a step, on their way to the host."""

    epoch: int
    step: int
    recorded: Arriving[tuple[str, str]]  # sums, counts and newest values since the epoch's start
    measured: Arriving[str]
    num_steps: int
    seconds: float

    def has_arrived(self) -> bool:
        return self.recorded.is_done() and self.measured.is_done()

    def sums(self) -> Sums:
        values = self.recorded.values()
        return {name: (values[name, "sum"], values[name, "count"]) for name, what in values if what == "sum"}

    def values(self, before: Sums) -> dict[str, float]:
        """Return all values by name; those that were recorded are averages of what came after ``before``."""
        recorded, num_samples = self.recorded.values(), 0.0
        averages = {}
        for name, (total, count) in self.sums().items():
            earlier, earlier_count = before.get(name, (0.0, 0.0))
            if count == earlier_count:
                continue
            is_known = math.isfinite(total) and math.isfinite(earlier)
            averages[name] = (total - earlier) / (count - earlier_count) if is_known else recorded[name, "newest"]
            num_samples = max(num_samples, count - earlier_count)
        values = self.measured.values()
        if self.seconds > 0:
            values["steps_per_second"] = self.num_steps / self.seconds
            if num_samples:
                values["samples_per_second"] = num_samples / self.seconds
        return values | averages


class _Clock:
    """The time that training steps have taken since some step."""

    def __init__(self, step: int) -> None:
        self.step = step
        self._seconds = 0.0  # up to where it was stopped
        self._began = time.monotonic()

    def stop(self) -> None:
        self._seconds += time.monotonic() - self._began

    def go_on(self) -> None:
        self._began = time.monotonic()

    def restart(self, step: int) -> tuple[int, float]:
        """Return the steps and the seconds since it began, and begin again."""
        num_steps, seconds = step - self.step, self._seconds + time.monotonic() - self._began
        self.step, self._seconds, self._began = step, 0.0, time.monotonic()
        return num_steps, seconds
