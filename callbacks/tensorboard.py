"""Event files for TensorBoard."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from camshaft.engine import Callback, ConfigurationError, Engine, EpochEnd, ValidationEnd
from camshaft.engine.checkpoint import ensure_writable
from camshaft.engine.record import scalars

logger = logging.getLogger("camshaft")


class TensorBoard(Callback):
    """Writes each epoch's ``train_*`` values and each validation's ``val_*`` values, over steps, by tensorboardX.

    A failure to write warns once and ends the writing, not the training.

    Args:
        directory: where to write; by default ``tensorboard`` in the run directory.

    Raises:
        ConfigurationError: before the first step, if there is nowhere to write.
    """

    def __init__(self, directory: str | Path | None = None) -> None:
        self._wanted_directory = None if directory is None else Path(directory)
        self._writer: Any = None

    def attach(self, engine: Engine) -> None:
        """Open the event file for the length of each fit."""
        super().attach(engine)
        engine.around("fit", lambda: self._open(engine))

    def on_validation_end(self, event: ValidationEnd) -> None:
        """Write the validation's values."""
        self._add(event.metrics, event.engine.step)

    def on_epoch_end(self, event: EpochEnd) -> None:
        """Write the training values; those of a validation are written when it ends."""
        train = {name: value for name, value in event.metrics.items() if name.startswith("train_")}
        self._add(train, event.engine.step)

    def _add(self, values: Mapping[str, Any], step: int) -> None:
        if self._writer is None:
            return
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        try:
            for name, value in scalars(values).items():
                self._writer.write_event(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))
            self._writer.flush()
        except Exception as error:
            logger.warning("TensorBoard stops writing: %r. Training goes on.", error)
            self._writer = None

    @contextmanager
    def _open(self, engine: Engine) -> Iterator[None]:
        directory = self._wanted_directory or (engine.directory and engine.directory / "tensorboard")
        if directory is None:
            raise ConfigurationError(
                "TensorBoard has nowhere to write. Pass TensorBoard(directory), or add RunDirectory()."
            )
        ensure_writable(directory, "TensorBoard")
        # Not its SummaryWriter: that writes on a thread, whose death on a full disk would block the training for ever.
        from tensorboardX.event_file_writer import EventsWriter

        self._writer = EventsWriter(str(directory / "events"), f".{os.getpid()}.{engine.num_fits}")
        try:
            yield
        finally:
            writer, self._writer = self._writer, None
            if writer is not None:
                with contextlib.suppress(OSError):  # all values were flushed as they came
                    writer.close()

    def __repr__(self) -> str:
        return f"TensorBoard({str(self._wanted_directory) if self._wanted_directory else ''})"
