"""Event files for TensorBoard."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from camshaft.engine import (
    Callback,
    ConfigurationError,
    Engine,
    EngineStateError,
    EpochEnd,
    FitStart,
    Logged,
    Selection,
    ValidationEnd,
    directory_for,
    has_shards,
    preserve_rng,
    scalars,
    select_parameters,
    unwrap,
    values_of,
)

from .event_writer import EventWriter

logger = logging.getLogger("camshaft")


class TensorBoard(Callback):
    """Writes each epoch's ``train_*`` values and each validation's ``val_*`` values, over steps, as tensorboardX does.

    If validations are made in mid-epoch, the training values are those of the steps between them, beginning anew with
    each epoch; those of the steps after the last validation of an epoch are only in the history.

    The values that a `Log` announces are curves under ``step/``, such as ``step/loss``.

    A resumed run lets TensorBoard drop what the directory has from the resumed step on, also curves that others wrote,
    and writes its own values of that step again, so that each step is there once.

    In a handler of yours, ``writer`` writes images, figures, histograms, texts and other numbers into the same file,
    as `EventWriter` says; on several ranks, on rank 0.

    A failure to write warns once and ends the writing, not the training.

    Args:
        directory: where to write; by default ``tensorboard`` in the run directory.
        histograms: the parameters of the part ``model`` whose values are written as histograms at the end of each
            epoch: names, patterns such as ``"*.weight"``, or a function ``(name, parameter) -> bool``.

    Raises:
        ConfigurationError: before the first step, if there is nowhere to write; at attachment for a name that matches
            no parameter.
    """

    main_only = True

    def __init__(self, directory: str | Path | None = None, *, histograms: Selection | None = None) -> None:
        self._histograms = histograms
        self._wanted_directory = None if directory is None else Path(directory)
        self._writer: Any = None  # a RecordWriter of tensorboardX; None outside a fit, and after a failure
        self._is_open = False
        self._engine: Engine | None = None
        self._num_written = [0, 0]  # rows of the history's validations, and of its epochs
        self._resumed_step: int | None = None  # what TensorBoard is still to drop its values from
        self._logged: tuple[int, dict[str, float]] = (0, {})  # the newest step that a Log has announced
        self._may_repeat_up_to = 0  # a Log of a resumed run may announce values up to this step again

    def attach(self, engine: Engine) -> None:
        """Open the event file for the length of each fit."""
        super().attach(engine)
        self._engine = engine
        self._chosen: dict[str, nn.Parameter] = {}
        if self._histograms is not None:
            self._chosen = select_parameters(unwrap(engine.parts.module("model", "TensorBoard")), self._histograms)
            if has_shards(self._chosen.values()):
                raise ConfigurationError(
                    "TensorBoard cannot write histograms of weights that ranks hold in parts. "
                    "Write TensorBoard() without histograms."
                )
        engine.listeners.around("fit", lambda: self._open(engine))

    @property
    def writer(self) -> EventWriter:
        """What writes into the event file.

        Raises:
            EngineStateError: outside a fit.
        """
        engine = self._engine
        if engine is None or not self._is_open:
            raise EngineStateError("TensorBoard's writer was asked for outside a fit. Ask in a handler.")

        def write(step: int, summary: Callable[[], Any]) -> None:
            self._write_guarded(engine, lambda: self._write(step=int(step), summary=summary()))

        return EventWriter(write)

    def write_into(self, directory: Path) -> None:
        """Write there, if this would not be the run directory."""
        self._wanted_directory = self._wanted_directory and directory

    def on_fit_start(self, event: FitStart) -> None:
        """Begin after what the history has already; a run that finds nothing to resume still replaces its curves."""
        engine = event.engine
        self._num_written = [len(engine.history.validations), len(engine.history.rows)]
        self._resumed_step = engine.step if engine.run.is_resuming else None
        self._logged = (0, {})
        self._may_repeat_up_to = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the step that a resumed run begins after, and what a `Log` has announced last."""
        state: dict[str, Any] = {"logged": list(self._logged)}
        if self._resumed_step is not None:  # nothing was written since
            return {"step": self._resumed_step, **state}
        return {"step": self._engine.step, **state} if self._engine is not None else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        step, values = state.get("logged", (0, {}))
        self._logged = (step, values)
        self._resumed_step = self._may_repeat_up_to = state.get("step", 0)

    def on_logged(self, event: Logged) -> None:
        """Write the values of a training step."""
        if event.at <= self._may_repeat_up_to:  # on its way when the run was saved, and perhaps written since
            self._resumed_step = event.at
        self._may_repeat_up_to = 0
        values = dict(event.values)
        self._write_guarded(event.engine, lambda: self._add_logged(event.at, values))
        self._logged = (event.at, values)

    def on_validation_end(self, event: ValidationEnd) -> None:
        """Write the validation's values, and in mid-epoch those of the training before it, see `History`."""
        self._update(event.engine)

    def on_epoch_end(self, event: EpochEnd) -> None:
        """Write the training values that no validation has written; those of a validation are written when it ends."""
        self._update(event.engine)
        for name, parameter in self._chosen.items():
            self.writer.add_histogram(name, parameter, event.engine.step)

    def _update(self, engine: Engine) -> None:
        """Write the rows of the history that are not written yet."""
        self._write_guarded(engine, lambda: self._add_rows(engine))

    def _add_rows(self, engine: Engine) -> None:
        history = engine.history
        for row in history.validations[self._num_written[0] :]:
            self._add(values_of(row), int(row["step"]))
        for row in history.rows[self._num_written[1] :]:
            self._add(only_of_epoch(row, history.validations), int(row["step"]))
        self._num_written = [len(history.validations), len(history.rows)]

    def _write_guarded(self, engine: Engine, write: Callable[[], None]) -> None:
        if self._writer is None:
            return
        try:
            self._drop_what_is_repeated(engine)
            write()
            self._writer.flush()  # on the disk at once
        except Exception as error:
            logger.warning("TensorBoard stops writing: %r. Training continues.", error)
            self._close()

    def _drop_what_is_repeated(self, engine: Engine) -> None:
        """Let readers drop the values from the resumed step on, and write those that the history has again."""
        step, self._resumed_step = self._resumed_step, None
        if step is None:
            return
        from tensorboardX.proto.event_pb2 import SessionLog

        for _ in range(2):  # TensorBoard takes the first one that it sees for the start of the first run
            self._write(step=step, session_log=SessionLog(status=SessionLog.START))
        tables = engine.history.validations, engine.history.rows
        self._num_written = [sum(row["step"] < step for row in rows) for rows in tables]
        if self._logged[0] >= step:
            self._add_logged(*self._logged)

    def _add_logged(self, step: int, values: Mapping[str, float]) -> None:
        self._add({f"step/{name}": value for name, value in values.items()}, step)

    def _add(self, values: Mapping[str, Any], step: int) -> None:
        from tensorboardX.summary import scalar

        for name, value in scalars(values).items():
            self._write(step=step, summary=scalar(name, value))

    def _write(self, **fields: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write(Event(wall_time=time.time(), **fields).SerializeToString())

    @contextmanager
    def _open(self, engine: Engine) -> Iterator[None]:
        with preserve_rng():  # it imports comet_ml where that is installed, which draws random numbers
            from tensorboardX.record_writer import RecordWriter  # its SummaryWriter hangs when the disk is full

        directory = directory_for("TensorBoard", self._wanted_directory, engine.directory, within="tensorboard")
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)  # TensorBoard reads files in the order of their names
        name = f"events.out.tfevents.{seconds}.{nanoseconds:09}.{os.getpid()}"
        self._writer = RecordWriter(str(directory / name))
        try:
            self._write(file_version="brain.Event:2")
            self._is_open = True
            yield
        finally:
            self._is_open = False
            self._close()

    def _close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(OSError):  # of a full disk, about which a warning was given
                writer.close()

    def __repr__(self) -> str:
        return f"TensorBoard({str(self._wanted_directory) if self._wanted_directory else ''})"


def only_of_epoch(row: Mapping[str, float], validations: list[dict[str, float]]) -> dict[str, float]:
    """Return the training values of an epoch that its last validation does not have."""
    place = bisect_right(validations, row["epoch"], key=lambda other: other["epoch"])
    last = validations[place - 1] if place else {}
    written = last.keys() if last.get("epoch") == row["epoch"] else ()
    return {name: value for name, value in row.items() if name.startswith("train_") and name not in written}
