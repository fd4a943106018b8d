"""Event files for TensorBoard."""

from __future__ import annotations

import logging
import os
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from camshaft.engine import Callback, Engine, EpochEnd, ValidationEnd, directory_for, scalars, values_of

logger = logging.getLogger("camshaft")


class TensorBoard(Callback):
    """Writes each epoch's ``train_*`` values and each validation's ``val_*`` values, over steps, as tensorboardX does.

    If validations are made in mid-epoch, the training values are those of the steps between them; those of the steps
    after the last validation of an epoch are only in the history.

    A failure to write warns once and ends the writing, not the training.

    Args:
        directory: where to write; by default ``tensorboard`` in the run directory.

    Raises:
        ConfigurationError: before the first step, if there is nowhere to write.
    """

    def __init__(self, directory: str | Path | None = None) -> None:
        self._wanted_directory = None if directory is None else Path(directory)
        self._file: BinaryIO | None = None

    def attach(self, engine: Engine) -> None:
        """Open the event file for the length of each fit."""
        super().attach(engine)
        engine.listeners.around("fit", lambda: self._open(engine))

    def on_validation_end(self, event: ValidationEnd) -> None:
        """Write the validation's values, and in mid-epoch those of the training since the one before."""
        self._add(values_of(event.engine.history.validations[-1]), event.engine.step)

    def on_epoch_end(self, event: EpochEnd) -> None:
        """Write the training values that no validation has written; those of a validation are written when it ends."""
        engine = event.engine
        written = {name for row in engine.history.validations[-1:] if row["epoch"] == engine.epoch for name in row}
        train = {n: value for n, value in event.metrics.items() if n.startswith("train_") and n not in written}
        self._add(train, engine.step)

    def _add(self, values: Mapping[str, Any], step: int) -> None:
        if self._file is None:
            return
        from tensorboardX.summary import scalar

        try:
            for name, value in scalars(values).items():
                self._write(self._file, step=step, summary=scalar(name, value))
        except Exception as error:
            logger.warning("TensorBoard stops writing: %r. Training continues.", error)
            self._file = None

    def _write(self, file: BinaryIO, **fields: Any) -> None:
        """Append one record; tensorboardX's own writer has a thread that dies on a full disk, and training hangs."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.record_writer import masked_crc32c

        event: bytes = Event(wall_time=time.time(), **fields).SerializeToString()
        header = struct.pack("<Q", len(event))
        checks = [struct.pack("<I", masked_crc32c(part)) for part in (header, event)]
        file.write(header + checks[0] + event + checks[1])

    @contextmanager
    def _open(self, engine: Engine) -> Iterator[None]:
        directory = directory_for("TensorBoard", self._wanted_directory, engine.directory, within="tensorboard")
        name = f"events.out.tfevents.{int(time.time())}.{os.getpid()}.{engine.num_fits}"
        with open(directory / name, "ab", buffering=0) as file:  # each record can be read at once
            self._file = cast("BinaryIO", file)
            self._write(self._file, file_version="brain.Event:2")
            try:
                yield
            finally:
                self._file = None

    def __repr__(self) -> str:
        return f"TensorBoard({str(self._wanted_directory) if self._wanted_directory else ''})"
