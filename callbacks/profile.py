"""Where the time of a run goes."""

from __future__ import annotations

import csv
import io
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from camshaft.engine import (
    BatchReady,
    Callback,
    Engine,
    EpochStart,
    Event,
    FitEnd,
    FitStart,
    GradientsReady,
    LossReady,
    StepEnd,
    UpdateEnd,
    ValidationEnd,
    ValidationStart,
    describe,
    directory_for,
    whole_number,
    write_durably,
)

logger = logging.getLogger("camshaft")

# What has ended when an event is announced, by the event before it, and otherwise.
_PHASES: dict[type[Event], dict[type[Event] | None, str]] = {
    BatchReady: {None: "data"},
    LossReady: {None: "forward"},
    GradientsReady: {None: "backward"},
    UpdateEnd: {None: "update"},
    StepEnd: {LossReady: "backward", BatchReady: "step", None: "rest of the step"},
    ValidationEnd: {None: "validation"},
}
_LOOP, _HANDLERS = 1, 2  # the two rows of the trace


class Profile(Callback):
    """Writes a table of where the time of a run went, and a trace of its first steps.

    ``profile.csv`` has a row for each phase (waiting for data, forward, backward, update, the rest of the step,
    validation) and for each handler, over the whole run; it is logged, too. The time of a phase is without that of the
    handlers in it. ``trace.json`` shows both as spans; open it at ui.perfetto.dev or chrome://tracing. Times are the
    host's: an accelerator works on while the host waits nowhere, and what it does is in the trace of torch's profiler,
    ``trace_torch.json``, with ``torch_profiler=True``.

    Afterwards ``print(engine.explain(times=True))`` shows the handlers in their order with their times.

    Args:
        directory: where to write; by default the run directory.
        num_steps: how many steps the traces hold.
        skip_steps: how many steps of the run come before them.
        torch_profiler: let torch's profiler run for these steps.

    Raises:
        ConfigurationError: for numbers that are no counts; if a second one is attached; before the first step if there
            is nowhere to write.
    """

    main_only = True
    unique = True

    def __init__(
        self,
        directory: str | Path | None = None,
        *,
        num_steps: int = 100,
        skip_steps: int = 10,
        torch_profiler: bool = False,
    ) -> None:
        self._wanted_directory = None if directory is None else Path(directory)
        self.num_steps = whole_number("Profile's num_steps", num_steps, least=1)
        self.skip_steps = whole_number("Profile's skip_steps", skip_steps, least=0)
        self.torch_profiler = torch_profiler
        self._times: dict[tuple[str, str], list[float]] = {}  # by kind and name: number, seconds
        self._spans: list[dict[str, Any]] = []
        self._profiler: Any = None
        self._traces = False
        self._began = self._marked = 0.0
        self._last: type[Event] | None = None  # what was announced at the mark
        self._handled: list[tuple[float, float]] = []  # when handlers began and ended, since the mark

    def attach(self, engine: Engine) -> None:
        """Take the time of every handler, and hear the events between which the phases lie."""
        super().attach(engine)
        for event in (EpochStart, BatchReady, LossReady, GradientsReady, UpdateEnd, StepEnd, ValidationStart,
                      ValidationEnd):  # fmt: skip
            engine.subscribe(event, self._mark)
        engine.listeners.time_handlers(self._report)

    def write_into(self, directory: Path) -> None:
        """Write there, if this would not be the run directory."""
        self._wanted_directory = self._wanted_directory and directory

    def on_fit_start(self, event: FitStart) -> None:
        """Start the clock."""
        self._directory = directory_for("Profile", self._wanted_directory, event.engine.directory)
        self._times.clear()
        self._spans.clear()
        self._traces = False
        self._began = self._marked = time.perf_counter()
        self._last = None
        self._handled.clear()

    def _mark(self, event: Event) -> None:
        """End a phase, and begin the next."""
        now, kind = time.perf_counter(), type(event)
        if kind is BatchReady:
            if not event.engine.training:
                return
            self._follow(event.engine)
        phases = _PHASES.get(kind)
        if phases is not None and self._last is not None:
            of_handlers = sum(ended - began for began, ended in self._handled)
            self._add("phase", phases.get(self._last, phases[None]), self._marked, now, less=of_handlers)
        self._marked, self._last = now, kind
        self._handled.clear()

    def _follow(self, engine: Engine) -> None:
        """Trace the steps that are to be traced."""
        done = engine.step - 1 - engine.run.first_step
        traces = self.skip_steps <= done < self.skip_steps + self.num_steps
        if traces and not self._traces and self.torch_profiler:
            self._profiler = _started()
        elif not traces:
            self._stop_profiler()
        self._traces = traces

    def _report(self, handler: Callable[..., object], event: type[Event], began: float, ended: float) -> None:
        if getattr(handler, "__self__", None) is self:
            return
        within = 0.0  # of handlers of an event that this one has announced
        while self._handled and self._handled[-1][0] >= began:
            first, last = self._handled.pop()
            within += last - first
        self._add("handler", f"{describe(handler)} ({event.__name__})", began, ended, less=within)
        self._handled.append((max(began, self._marked), ended))

    def _add(self, kind: str, name: str, began: float, ended: float, less: float = 0.0) -> None:
        entry = self._times.setdefault((kind, name), [0, 0.0])
        entry[0] += 1
        entry[1] += max(ended - began - less, 0.0)
        if self._traces:
            row = _LOOP if kind == "phase" else _HANDLERS
            self._spans.append(_span(name, row, began - self._began, ended - began))

    def _stop_profiler(self) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler.export_chrome_trace(str(self._directory / "trace_torch.json"))
            self._profiler = None

    def on_fit_end(self, event: FitEnd) -> None:
        """Write the table and the traces."""
        total = time.perf_counter() - self._began
        rows = [(kind, name, int(number), seconds) for (kind, name), (number, seconds) in self._times.items()]
        rest = total - sum(row[3] for row in rows)
        rows.append(("phase", "everything else", 1, max(rest, 0.0)))
        rows.sort(key=lambda row: row[3], reverse=True)
        logger.info("Where the %.1f s of the run went:\n%s", total, _table(rows, total))
        try:
            self._stop_profiler()
            write_durably(self._directory / "profile.csv", lambda file: file.write(_as_csv(rows, total)))
            trace = json.dumps({"traceEvents": [*_names(), *self._spans]}).encode()
            write_durably(self._directory / "trace.json", lambda file: file.write(trace))
        except OSError as error:
            logger.warning("Profile could not write in %s: %s.", self._directory, error.strerror or error)


def _started() -> Any:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities)
    profiler.start()
    return profiler


def _span(name: str, row: int, began: float, seconds: float) -> dict[str, Any]:
    """Return a span as the trace event format has it, in microseconds."""
    return {"name": name, "ph": "X", "pid": 1, "tid": row, "ts": 1e6 * began, "dur": 1e6 * seconds}


def _names() -> list[dict[str, Any]]:
    rows = {_LOOP: "loop", _HANDLERS: "handlers"}
    return [
        {"name": "thread_name", "ph": "M", "pid": 1, "tid": row, "args": {"name": name}} for row, name in rows.items()
    ]


def _table(rows: list[tuple[str, str, int, float]], total: float) -> str:
    width = max(len(name) for _, name, *_ in rows)
    lines = [f"{'':{width}}   share  seconds    calls  ms each"]
    lines += [
        f"{name:{width}}  {seconds / total:6.1%}  {seconds:7.3f}  {number:7}  {1e3 * seconds / number:7.3f}"
        for _, name, number, seconds in rows[:20]
    ]
    return "\n".join(lines)


def _as_csv(rows: list[tuple[str, str, int, float]], total: float) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["kind", "name", "calls", "seconds", "ms_each", "share"])
    for kind, name, number, seconds in rows:
        writer.writerow(
            [kind, name, number, f"{seconds:.6f}", f"{1e3 * seconds / number:.6f}", f"{seconds / total:.6f}"]
        )
    return text.getvalue().encode()
