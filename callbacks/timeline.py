"""When a run began, was resumed, ended an epoch, and ended."""

from __future__ import annotations

import json
import os
import socket
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from camshaft.engine import Engine, checkpoints_of

from .appending import append
from .best_checkpoint import watched_value
from .rates import learning_rates


class Timeline:
    """A file with a line of JSON for each moment of a run, to which lines are appended.

    Each has ``what`` (``started``, ``resumed``, ``epoch``, ``validation``, ``failed`` or ``ended``), ``time`` in
    seconds since 1970, ``epoch`` and ``step``, and the ``remarks`` of the history so far, if there are any. Of a run
    that was killed, the last line is one of an epoch.

    Raises:
        OSError: from each method, if the file cannot be written.
    """

    def __init__(self, path: Path, engine: Engine) -> None:
        self.path = path
        self._engine = engine
        self._has_begun = False
        self._began = time.time()

    def begin(self) -> None:
        """Write that the run begins, once; called when its step is known."""
        if self._has_begun:
            return
        self._has_begun = True
        with self.path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                torn = file.read(1) != b"\n"  # the run was killed while it wrote a line
                file.write(b"\n" if torn else b"")
        monitor = watched_value(self._engine.listeners.callbacks)
        stages, sets = self._engine.stages, self._engine.run.validation_sets
        higher = {name: stages.higher_is_better(name, sets) for name in stages.expected(sets)}
        better = {name: "max" if is_higher else "min" for name, is_higher in higher.items() if is_higher is not None}
        if monitor is not None and monitor.mode is not None:
            better[monitor.name] = monitor.mode
        self._write(
            "resumed" if self._engine.run.is_resuming and self._engine.step else "started",
            {
                "time": round(self._began, 3),
                "step": self._engine.run.ended_step,  # the first batch may have been read already
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "planned_epochs": self._engine.run.plan.epochs,
                "validation_sets": list(sets or ()),
                "better": better,
                "watched": None if monitor is None else monitor.name,
                "checkpoints": self._checkpoints(),
            },
        )

    def _checkpoints(self) -> str | None:
        """Return where the run's checkpoints are, relative to the run directory if they are within it."""
        directory = checkpoints_of(self._engine.listeners.callbacks)
        if directory is None:
            return None
        path, run = directory.path.resolve(), self.path.parent.resolve()
        return str(path.relative_to(run) if path.is_relative_to(run) else path)

    def validation(self) -> None:
        """Write that a validation has ended."""
        self._note("validation", {})

    def epoch(self) -> None:
        """Write that an epoch has ended, with the learning rates."""
        self._note("epoch", {"rates": {name: float(rate) for name, rate in learning_rates(self._engine).items()}})

    def failed(self, error: BaseException) -> None:
        """Write what the run raised."""
        lines = "".join(traceback.format_exception(error))
        self._note("failed", {"error": f"{type(error).__name__}: {error}"[:2000], "traceback": lines[-10_000:]})

    def ended(self, reason: str) -> None:
        """Write why the run ended."""
        interrupted = self._engine.history.interrupted
        self._note("ended", {"reason": reason, "signal": None if interrupted is None else interrupted.name})

    def _note(self, what: str, values: Mapping[str, Any]) -> None:
        self.begin()
        remarks = self._engine.history.remarks
        self._write(what, {**values, "remarks": remarks} if remarks else values)

    def _write(self, what: str, values: Mapping[str, Any]) -> None:
        engine = self._engine
        place = {"what": what, "time": round(time.time(), 3), "epoch": engine.epoch, "step": engine.step}
        append(self.path, f"{json.dumps({**place, **values})}\n".encode())
