"""Orders to a run that goes on, each of them recorded with the step at which it was taken."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any, Literal

from camshaft.engine import (
    Callback,
    ConfigurationError,
    Engine,
    EpochEnd,
    FitEnd,
    FitStart,
    Phase,
    Settled,
    asked_trial,
    describe,
    directory_for,
    every_seconds,
    is_number,
    named_callbacks,
    write_durably,
)

from .appending import append, cut
from .at_steps import AtSteps
from .order_files import OrderFiles
from .orders import STOPPED, effect_of, in_words, steered

logger = logging.getLogger("camshaft")

Record = dict[str, Any]  # an order that was taken: its name, the time, the epoch and step, at which moment, and itself
Moment = Literal["step", "epoch"]  # when a step has settled, or at an epoch's end

RECORD = "steering.jsonl"
_TYPES = {"name": str, "time": float, "epoch": int, "step": int, "at": str, "order": dict}


class Steering(Callback):
    """Takes orders from ``camshaft steer`` while the run goes on, and records each with its step.

    An order is taken when a step has settled, or at the end of an epoch. Before it takes effect, it is written into
    ``steering.jsonl`` in the run directory, and on the disk; it becomes a remark of the history, too. A run that is
    killed and resumed repeats the orders that came after its checkpoint, each at its step.

    Orders are files in ``steering`` in the run directory. Only the user whose process the run is can send them. An
    order that was sent before the run began, or was resumed, is refused.

    Attach it before whatever saves the run, such as `RunCheckpoint`, so that a checkpoint holds the orders of its own
    step.

    Args:
        every_seconds: how long at least between two looks for orders.
        repeat: the run directory of an earlier run, whose orders are repeated, each at its step. With the same seed
            and settings, this run is then that run again, to the bit. May be set until the run begins.

    Raises:
        ConfigurationError: if ``every_seconds`` is not a number above 0, or ``repeat`` has no ``steering.jsonl``; when
            attached on several ranks; before the first step, without a `RunDirectory`, after a handler that may save
            the run, where others could write in ``steering``, or if ``steering.jsonl`` cannot be read.
    """

    unique = True

    def __init__(self, every_seconds: float = 1.0, *, repeat: str | Path | None = None) -> None:
        if not (is_number(every_seconds) and every_seconds > 0):
            raise ConfigurationError(f"Steering has every_seconds={every_seconds!r}. Pass a number above 0.")
        if repeat is not None and not Path(repeat, RECORD).is_file():
            raise ConfigurationError(
                f"Steering cannot repeat {repeat}, which has no {RECORD}. Pass the directory of a run with Steering()."
            )
        self.every_seconds = every_seconds
        self.repeat = None if repeat is None else Path(repeat)
        self._files: OrderFiles | None = None
        self._path = Path()
        self._recorded: list[Record] = []  # when the run began: those of this run and those to repeat
        self._taken: list[Record] = []
        self._originals: dict[tuple[str, str], Any] = {}  # settings as they were before the first order

    def attach(self, engine: Engine) -> None:
        """Look at the steps at which an order is to be repeated, and at the clock."""
        if engine.ranks.several:
            raise ConfigurationError(
                "Steering does not work on several ranks yet, which would take an order at different steps. "
                "Train on one process, or leave it out."
            )
        super().attach(engine)
        self._engine = engine
        engine.subscribe(Settled, self._repeat, when=AtSteps(self._recorded_steps, "recorded steps"))
        engine.subscribe(Settled, self._look, when=every_seconds(self.every_seconds))

    def on_fit_start(self, event: FitStart) -> None:
        """Make the directory for orders, and read what is to be repeated."""
        engine = event.engine
        first = next(iter(engine.listeners.channel(Settled).subscriptions)).handler
        if first != self._repeat:
            raise ConfigurationError(
                f"Steering comes after {describe(first)}, which may save the run without the orders of its step. "
                "Attach Steering before it."
            )
        if engine.directory is None:
            raise ConfigurationError("Steering keeps its orders in a run directory. Attach RunDirectory(), too.")
        directory = directory_for("Steering", None, engine.directory)
        self._path = directory / RECORD
        self._recorded[:] = _begin_record(self._path, self.repeat or _replayed())
        self._files = OrderFiles(directory / "steering")
        if not engine.run.goes_on:  # or orders of before still wait for this run
            self._files.sweep()
        logger.info("To steer this run: camshaft steer %s ...", directory)

    def on_epoch_end(self, event: EpochEnd) -> None:
        """Repeat and take the orders of this moment; stop, if that was ordered for it."""
        engine = event.engine
        self._take_recorded(engine, "epoch")
        if engine.epoch < engine.run.last_epoch and engine.step < engine.run.last_step:
            self._take_sent(engine, "epoch")
        if any(one["epoch"] == engine.epoch and in_words(one["order"]) == "stop --after epoch" for one in self._taken):
            engine.stop(STOPPED)

    def on_fit_end(self, event: FitEnd) -> None:
        """Refuse the orders that still wait."""
        if self._files is not None and event.engine.run.goes_back_to is None:
            self._files.refuse_all("The run has just ended. Send it again if it goes on.")

    def _recorded_steps(self) -> list[int]:
        return [int(record["step"]) for record in self._recorded]

    def _repeat(self, event: Settled) -> None:
        """Take the recorded orders of this step."""
        if event.engine.run.phase is not Phase.BETWEEN:
            self._take_recorded(event.engine, "step")

    def _look(self, event: Settled) -> None:
        """Take the orders that were sent."""
        if event.engine.run.phase is not Phase.BETWEEN:
            self._take_sent(event.engine, "step")

    def _take_recorded(self, engine: Engine, at: Moment) -> None:
        here = engine.epoch, engine.step, at
        for record in self._recorded:
            if (record["epoch"], record["step"], record["at"]) != here or record in self._taken:
                continue
            try:
                self._carry_out(record)
            except ConfigurationError as error:
                logger.warning("Steering cannot repeat an order of step %d: %s", engine.step, error)

    def _take_sent(self, engine: Engine, at: Moment) -> None:
        if self._files is None or engine.run.is_over or engine.run.breaks_off or engine.run.stop_reason is not None:
            return
        for name, order in self._files.take():
            record = {
                "name": name, "time": round(time.time(), 3), "epoch": engine.epoch, "step": engine.step, "at": at,
                "order": order,
            }  # fmt: skip
            try:
                said = self._carry_out(record, is_new=True)
            except ConfigurationError as error:
                logger.warning("Steering refuses an order: %s", error)
                self._files.answer(name, str(error), is_taken=False)
            except OSError as error:
                why = f"Nothing was done: {self._path} could not be written: {error.strerror}. Look for the cause."
                logger.warning("Steering refuses an order. %s", why)
                self._files.answer(name, why, is_taken=False)
            else:
                self._files.answer(name, said, is_taken=True)

    def _carry_out(self, record: Record, *, is_new: bool = False) -> str:
        """Do what was ordered, and return it in words; a new order is on the disk before.

        Raises:
            ConfigurationError: if the run cannot take it; then nothing is done.
            OSError: if it cannot be written; then nothing is done.
        """
        engine, order = self._engine, record["order"]
        said, act = effect_of(engine, order)
        if is_new:
            _append_durably(self._path, record)
        self._keep_original(order)
        act()
        self._taken.append(record)
        end = " (the epoch's end)" if record["at"] == "epoch" else ""
        said = f"{in_words(order)}: {said}; taken at step {engine.step}, epoch {engine.epoch}{end}"
        engine.history.remark(engine.epoch, engine.step, f"Steering: {in_words(order)}")
        logger.info("Steering: %s", said)
        return said

    def _keep_original(self, order: Record) -> None:
        if order["what"] == "set":
            value = getattr(steered(self._engine, order), order["setting"])
            self._originals.setdefault((order["handler"], order["setting"]), value)

    def state_dict(self) -> dict[str, Any]:
        """Return the orders that were taken, as text: a state that is resumed may have any number of them."""
        return {"orders": json.dumps(self._taken)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back the orders that were taken, and with them the settings; what else they did is in other states."""
        callbacks = named_callbacks(self._engine.listeners.callbacks)
        for (handler, setting), value in self._originals.items():
            setattr(callbacks[handler], setting, value)
        self._taken = json.loads(state["orders"])
        for order in [record["order"] for record in self._taken if record["order"]["what"] == "set"]:
            try:
                _, act = effect_of(self._engine, order)
            except ConfigurationError as error:
                logger.warning("Steering cannot %s again: %s", in_words(order), error)
            else:
                self._keep_original(order)
                act()

    def __repr__(self) -> str:
        return f"Steering({self.every_seconds:g})"


def _replayed() -> Path | None:
    """Return the run of which this process makes a step again, if that run was steered."""
    trial = asked_trial()
    run = Path(trial.settings["run"]) if trial is not None and trial.kind == "replay" else None
    return run if run is not None and (run / RECORD).is_file() else None


def _begin_record(path: Path, repeat: Path | None) -> list[Record]:
    """Make the record of a run, if it has none yet, as a copy of that of another run; return its entries."""
    try:
        if not path.exists():
            content = b"" if repeat is None else (repeat / RECORD).read_bytes()
            write_durably(path, lambda file: file.write(content))
        with open(path, "r+b") as file:
            cut(file, lambda line: True)
            file.seek(0)
            return [_checked(line, number, path) for number, line in enumerate(file, start=1)]
    except OSError as error:
        raise ConfigurationError(
            f"Steering cannot read or write {path}: {error.strerror}. Look for the cause, and start again."
        ) from error


def _checked(line: bytes, number: int, path: Path) -> Record:
    """Return a line of a record."""
    try:
        record = json.loads(line)
        if {key: type(value) for key, value in record.items()} == _TYPES:
            in_words(record["order"])
            return dict(record)
    except (ValueError, KeyError, AttributeError):
        pass
    raise ConfigurationError(
        f"Line {number} of {path} is no order of a run. Look at it: a line that is removed is not repeated."
    )


def _append_durably(path: Path, record: Record) -> None:
    end = path.stat().st_size
    try:
        append(path, f"{json.dumps(record)}\n".encode())
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    except OSError:
        os.truncate(path, end)  # what was not done is not to be repeated
        raise
