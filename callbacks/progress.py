"""Progress, for a terminal, a notebook or a log file."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import sys
import time
from collections.abc import Collection, Mapping
from typing import Any, TextIO

from torch import Tensor

from camshaft.engine import (
    Callback,
    DataError,
    Engine,
    EpochEnd,
    EpochStart,
    FitEnd,
    FitStart,
    StepEnd,
    ValidationEnd,
    ValidationStart,
    ValidationStepEnd,
    every_seconds,
    format_values,
    num_samples,
    scalars,
    values_of,
)

# The values come before the times, because a narrow terminal cuts off the end of the line.
_SHAPE = "{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix} [{elapsed}<{remaining}]"
_GREEN, _PLAIN = "\033[32m", "\033[0m"


class ProgressBar(Callback):
    """Shows a bar for the epoch, one below it while a validation runs, and one line for each finished epoch.

    On a terminal and in a notebook the bars are tqdm's and repaint by the clock. Anywhere else (a pipe, a log
    file) there are only plain lines: one per epoch, and one every ``line_seconds`` within a long epoch. Values
    are the running averages that have reached the host; nothing waits for the device.

    A bar also shows the learning rate of the first optimizer and how many samples are trained in a second, where the
    terminal is wide enough. In the line of an epoch, a star marks a validation's value that is better than all before
    it; on a terminal it is green, unless the environment variable ``NO_COLOR`` is set.

    Args:
        repaint_seconds: time between two repaints.
        line_seconds: time between two plain lines within an epoch.
        file: where to write; standard error by default.
    """

    main_only = True

    def __init__(
        self, *, repaint_seconds: float = 0.1, line_seconds: float = 60.0, file: TextIO | None = None
    ) -> None:
        self._repaint = every_seconds(repaint_seconds)
        self._line = every_seconds(line_seconds)
        self._file = file
        self._bars: list[Any] = []  # the epoch's, and below it the validation's
        self._began = 0.0
        self._painted = 0.0
        self._speed = _Speed()
        self._bests = _Bests()

    @property
    def file(self) -> TextIO:
        """Where to write."""
        return self._file or sys.stderr

    def attach(self, engine: Engine) -> None:
        """Subscribe, and limit how often bars are redrawn."""
        super().attach(engine)
        draws = in_notebook() or self.file.isatty()
        if draws:
            engine.subscribe(EpochStart, self._open_epoch)
            engine.subscribe(StepEnd, self._paint, when=self._repaint)
            engine.subscribe(ValidationStart, self._open_validation)
            engine.subscribe(ValidationStepEnd, self._paint, when=self._repaint)
            engine.subscribe(ValidationEnd, self._close_validation)
        else:
            engine.subscribe(StepEnd, self._write_step, when=self._line)

    def on_fit_start(self, event: FitStart) -> None:
        """Start the clock of an epoch that a resumed run is in the middle of."""
        self._began = time.monotonic()
        self._speed.begin(event.engine.step)

    def on_epoch_start(self, event: EpochStart) -> None:
        """Start the epoch's clock."""
        self._began = time.monotonic()
        self._speed.begin(event.engine.step)

    def on_epoch_end(self, event: EpochEnd) -> None:
        """Replace the bar by the epoch's line."""
        self._close_all()
        values = self._marked(event.metrics, self._bests.among(event))
        self._write(f"{epoch_title(event.engine)}  {values} {time.monotonic() - self._began:.1f}s")

    def on_fit_end(self, event: FitEnd) -> None:
        """Close every bar, however the run ended, and print why it did."""
        self._close_all()
        if event.engine.run.goes_back_to is None:
            self._write(event.reason)

    def _open_epoch(self, event: EpochStart) -> None:
        self._bars.append(self._new_bar(epoch_title(event.engine), event.engine.run.epoch_length))

    def _open_validation(self, event: ValidationStart) -> None:
        self._paint(event)
        self._bars.append(self._new_bar("  validation", event.engine.current.length))

    def _close_validation(self, event: ValidationEnd) -> None:
        self._bars.pop().close()
        self._speed.begin(event.engine.step)  # the time of the validation is none of the training's

    def _paint(self, event: StepEnd | ValidationStepEnd | ValidationStart) -> None:
        # The two bars' filters have a clock each; together they keep to the pace of one.
        now = time.monotonic()
        if not isinstance(event, ValidationStart) and now - self._painted < self._repaint.seconds:
            return
        self._painted = now
        engine = event.engine
        validating = isinstance(event, ValidationStepEnd)
        if not self._bars:  # a run resumed in mid-epoch heard no EpochStart
            self._bars.append(self._new_bar(epoch_title(engine), engine.run.epoch_length))
        bar = self._bars[-1]
        bar.total = engine.current.length if validating else engine.run.epoch_length
        bar.n = engine.validation_step if validating else engine.epoch_step
        values = [format_values(engine.current.peek())]
        if engine.training:
            values.append(_learning_rate(engine))
            bar.bar_format = bar.total and f"{_SHAPE}  {self._speed.of(engine)}"
        if said := "  ".join(filter(None, values)):
            bar.set_postfix_str(said, refresh=False)
        bar.refresh()

    def _write_step(self, event: StepEnd) -> None:
        engine = event.engine
        length = f"/{engine.run.epoch_length}" if engine.run.epoch_length else ""
        values = format_values(engine.current.peek())
        self._write(f"{epoch_title(engine)}  step {engine.epoch_step}{length}  {values}")

    def _new_bar(self, title: str, total: int | None) -> Any:
        self._painted = time.monotonic()
        tqdm = importlib.import_module("tqdm.notebook" if in_notebook() else "tqdm").tqdm
        return tqdm(
            desc=title,
            total=total,
            leave=False,
            position=len(self._bars),
            dynamic_ncols=True,
            file=self.file,
            bar_format=total and _SHAPE,
        )

    def _marked(self, values: Mapping[str, Any], best: Collection[str]) -> str:
        """Return the values as one line, in columns, with a star after those that are best."""
        colours = self.file.isatty() and not os.environ.get("NO_COLOR")
        texts = []
        for name in scalars(values):
            text = format_values(values, [name]) + ("*" if name in best else " ")
            texts.append(f"{_GREEN}{text}{_PLAIN}" if colours and name in best else text)
        return " ".join(texts)

    def _close_all(self) -> None:
        while self._bars:
            self._bars.pop().close()

    def _write(self, line: str) -> None:
        with contextlib.suppress(OSError):  # a reader that went away must not end the training
            print(line, file=self.file, flush=True)


class _Bests:
    """The best value so far of each validation value that has a better direction."""

    def __init__(self) -> None:
        self._best: dict[str, float] = {}
        self._num_seen = 0  # rows of the history: each is looked at once

    def among(self, event: EpochEnd) -> set[str]:
        """Return the names of the values of this epoch that are better than all before them."""
        history, stages = event.engine.history, event.engine.stages
        better, sets = set(), ("", *history.validation_sets)
        for row in history.validations[self._num_seen :]:
            for name, value in values_of(row).items():
                higher = stages.higher_is_better(name, sets) if name.startswith("val_") else None
                if higher is None or math.isnan(value):
                    continue
                best = self._best.get(name)
                if best is None or (value > best if higher else value < best):
                    self._best[name] = value
                    better |= set() if best is None else {name}
        self._num_seen = len(history.validations)
        return {name for name in better if event.metrics.get(name) == self._best[name]}


class _Speed:
    """How many samples are trained in a second, as a running mean over repaints."""

    def __init__(self) -> None:
        self._mean = 0.0
        self.begin(0)

    def begin(self, step: int) -> None:
        """Begin to count here."""
        self._step, self._time = step, time.monotonic()

    def of(self, engine: Engine) -> str:
        """Return the speed since the last call in words; batches count as many samples as the present one."""
        steps, seconds = engine.step - self._step, time.monotonic() - self._time
        self.begin(engine.step)
        if steps > 0 and seconds > 0:
            now = steps / seconds
            self._mean = 0.7 * self._mean + 0.3 * now if self._mean else now
        try:
            samples = num_samples(engine.batch)
        except DataError:
            return f"{self._mean:,.1f} steps/s"
        return f"{self._mean * samples:,.0f} samples/s"


def _learning_rate(engine: Engine) -> str:
    """Return the rate of the first optimizer's first group; nothing if asking would wait for a device."""
    optimizer = next(iter(engine.parts.optimizers().values()), None)
    rate = None if optimizer is None else optimizer.param_groups[0]["lr"]
    if rate is None or (isinstance(rate, Tensor) and rate.device.type != "cpu"):
        return ""
    return f"lr {float(rate):.3g}"


def in_notebook() -> bool:
    """Return whether this is a Jupyter kernel, where bars are widgets."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and "IPKernelApp" in shell.config


def epoch_title(engine: Engine) -> str:
    """Return ``epoch  3/20``, or ``epoch 3`` in a run without a last epoch."""
    if engine.run.last_epoch == math.inf:
        return f"epoch {engine.epoch}"
    last = str(int(engine.run.last_epoch))
    return f"epoch {engine.epoch:{len(last)}}/{last}"


def epoch_line(event: EpochEnd) -> str:
    """Return an epoch's values as one line."""
    return f"{epoch_title(event.engine)}  {format_values(event.metrics)}"
