"""What a rehearsal has found out, and how it says so."""

from __future__ import annotations

import statistics
import sys
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .data import DataSets, as_sets, num_batches
from .events import EpochStart, Event, Settled, StepEnd, ValidationEnd, ValidationStart, ValidationStepEnd
from .run import Phase

if TYPE_CHECKING:
    from .engine import Engine

try:
    import resource as _resource
except ImportError:
    _resource = None  # type: ignore[assignment]  # Windows has none

resource: Any = _resource


WHAT = ("epochs", "handlers", "stopped", "resumed")


@dataclass(slots=True)
class Rehearsal:
    """What `Engine.rehearse` has tried, and what the whole run will need; ``str`` is a table of it.

    Attributes:
        tried: what was tried, in words, under ``"epochs"``, ``"handlers"``, ``"stopped"`` and ``"resumed"``.
        seconds_per_epoch: of a whole epoch with its validation; None where the number of batches is unknown.
        seconds: of the whole run, if nothing stops it; None where unknown.
        bytes_per_checkpoint: of the run's checkpoints, the largest; 0 without a handler that keeps any.
        bytes_on_disk: what each handler has kept on the disk at the end of the run, by its name.
        peak_memory: bytes; of the GPU if the run is on one, else of the process.
        warnings: what is to be looked at. What cannot work is raised as an error instead.
    """

    tried: dict[str, str] = field(default_factory=dict)
    seconds_per_epoch: float | None = None
    seconds: float | None = None
    bytes_per_checkpoint: int = 0
    bytes_on_disk: dict[str, int] = field(default_factory=dict)
    peak_memory: int = 0
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kept = ", ".join(f"{name} {_size(number)}" for name, number in self.bytes_on_disk.items() if number)
        each = self.bytes_per_checkpoint
        needed = {
            "time per epoch": _duration(self.seconds_per_epoch),
            "whole run": _duration(self.seconds),
            "kept on disk": (kept or "nothing") + (f"; each checkpoint {_size(each)}" if each else ""),
            "peak memory": _size(self.peak_memory) if self.peak_memory else "not known here",
        }
        width = max(map(len, (*self.tried, *needed)))
        lines = ["Tried:", *(_entry(name.ljust(width), text) for name, text in self.tried.items())]
        lines += ["The whole run will need:", *(_entry(name.ljust(width), text) for name, text in needed.items())]
        if self.warnings:
            lines += ["Look at:", *(_entry("-", text) for text in self.warnings)]
        return "\n".join([*lines, "Everything is as it was before."])


class Measure:
    """Measures the steps of a run that is tried, and says from that how long the whole run takes.

    It waits for the device at the end of each step, or it would measure how fast work is handed to it.

    Args:
        engine: whose run.
        val: its validation data.
    """

    def __init__(self, engine: Engine, val: DataSets | None) -> None:
        self._device = engine.parts.device
        lengths = [] if val is None else [num_batches(data) for data in as_sets("val", val).values()]
        self._num_validation_batches = None if None in lengths else sum(number or 0 for number in lengths)
        self._last: tuple[type[Event], float] | None = None
        self._steps: list[float] = []
        self._validation_steps: list[float] = []
        self._first_validation_steps: list[float] = []  # with what happens before
        self._rest: list[float] = []  # of each epoch: what is neither
        self._epoch: tuple[float, int, int] = (0.0, 0, 0)
        for event in (EpochStart, StepEnd, ValidationStart, ValidationStepEnd, ValidationEnd, Settled):
            engine.subscribe(event, self._note)

    def _note(self, event: Event) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now, kind, before = time.perf_counter(), type(event), self._last
        if before is not None and kind is before[0] is StepEnd:
            self._steps.append(now - before[1])
        elif before is not None and kind is before[0] is ValidationStepEnd:
            self._validation_steps.append(now - before[1])
        elif before is not None and (before[0], kind) == (ValidationStart, ValidationStepEnd):
            self._first_validation_steps.append(now - before[1])
        began, steps, validation_steps = self._epoch
        if kind is EpochStart:
            self._epoch = now, 0, 0
        elif kind is Settled and event.engine.run.phase is Phase.BETWEEN:
            known = steps * self._step() + validation_steps * self._validation_step()
            self._rest.append(max(now - began - known, 0.0))
        else:
            self._epoch = began, steps + (kind is StepEnd), validation_steps + (kind is ValidationStepEnd)
        if kind is not Settled:
            self._last = kind, now

    def _step(self) -> float:
        return statistics.median(self._steps) if self._steps else 0.0

    def _validation_step(self) -> float:
        times = self._validation_steps or self._first_validation_steps
        return statistics.median(times) if times else 0.0

    def seconds(self, steps: int | None, epochs: int, validations: float | None) -> float | None:
        """Return how long so many steps, ends of epochs and whole validations take; None where that is unknown."""
        if steps is None or validations is None or not self._steps:
            return None
        if validations and self._num_validation_batches is None:
            return None
        rest = statistics.median(self._rest[1:] or self._rest or [0.0])  # the first one has the start of everything
        of_validation = (self._num_validation_batches or 0) * self._validation_step()
        return steps * self._step() + epochs * rest + validations * of_validation

    def peak_memory(self) -> int:
        """Return the most memory that was in use so far."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if resource is None:
            return 0
        unit = 1 if sys.platform == "darwin" else 1024
        return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit


def listing(directories: list[Path]) -> dict[Path, tuple[int, int]]:
    """Return size and time of change of every file in some directories."""
    files = {path for directory in directories for path in directory.rglob("*") if path.is_file()}
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def _entry(name: str, text: str) -> str:
    indent = " " * (len(name) + 4)
    return textwrap.fill(text, 100, initial_indent=f"  {name}  ", subsequent_indent=indent, break_on_hyphens=False)


def _duration(seconds: float | None) -> str:
    """Return a time as a person would say it.

    >>> _duration(0.0312), _duration(75), _duration(7500), _duration(None)
    ('0.031 s', '1 min 15 s', '2 h 5 min', 'unknown: the data do not say how long they are')
    """
    if seconds is None:
        return "unknown: the data do not say how long they are"
    if seconds < 60:
        return f"{seconds:.2g} s"
    minutes = round(seconds) // 60
    return f"{minutes} min {round(seconds) % 60} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _size(number: float) -> str:
    """Return a number of bytes as a person would say it.

    >>> _size(1_234_567)
    '1.2 MB'
    """
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while number >= 1000 and len(units) > 1:
        number /= 1000
        del units[0]
    return f"{number:.0f} {units[0]}" if number >= 10 or units[0] == "bytes" else f"{number:.1f} {units[0]}"
