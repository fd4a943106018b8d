"""One directory per run, with what is needed to understand and repeat it."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.parameter import UninitializedParameter

from camshaft.engine import (
    BatchReady,
    Callback,
    ConfigurationError,
    Engine,
    EpochEnd,
    EpochStart,
    FitEnd,
    FitStart,
    Logged,
    RunFailed,
    ValidationEnd,
    asked_trial,
    ensure_writable,
    format_values,
    is_plain_name,
    launched_rank,
    remove_temporaries,
    sync_directory,
    unwrap,
    values_of,
    write_durably,
)

from .csv_files import RowsFile, StepsFile
from .environment import environment
from .progress import ProgressBar, epoch_line
from .run_log import epoch_logger, run_log
from .secrets import without_secrets
from .timeline import Timeline

logger = logging.getLogger("camshaft")


class RunDirectory(Callback):
    """Makes ``<root>/<time the run started>`` and gives it to every handler that writes files.

    It holds

    * ``log.log``: everything sent to Python's logging during a fit, also by your own loggers; but not camshaft's lines
      of another fit in another thread. During a fit the log goes to the terminal as well, unless logging is set up
      already; the epochs' lines are left to a `ProgressBar` where there is one.
    * ``history.csv``, with a row for each epoch; with validations in mid-epoch also ``validations.csv``, with a row
      for each validation, and with a `Log` also ``steps.csv``.
    * ``settings.json``, ``environment.json`` (versions, machine, command, git commit) and ``model.txt``.
    * ``handlers.txt``: what runs, when and in which order; with a `Profile` also how long it took.
    * ``timeline.jsonl``, for programs: when the run began, was resumed, ended each epoch, and ended.

    On several ranks, rank 0 makes the directory, and the others write only a log there: ``log.rank1.log`` ...

    The value of a setting or an option with ``key``, ``token``, ``password`` or ``secret`` in its name is written as
    ``***``, unless it is a number of keys or tokens.

    Args:
        root: the directory of the run directories; made if it does not exist.
        settings: what the run was started with: a dict, an ``argparse.Namespace`` or a dataclass.
        terminal: show the log on the terminal.

    Raises:
        ConfigurationError: at construction, if the directory cannot be written.
    """

    unique = True

    def __init__(self, root: str | Path = "runs", *, settings: object = None, terminal: bool = True) -> None:
        self.settings = _as_dict(settings)
        self.terminal = terminal
        self._failing: set[Path] = set()  # files whose last writing failed
        self._is_main = launched_rank() == 0  # on several ranks, only rank 0 makes the directory
        self._is_tried = (trial := asked_trial()) is not None
        root = Path(root) if trial is None else trial.directory
        self.run_directory: Path = _make_directory(root) if self._is_main else root

    @property
    def path(self) -> Path:
        """The directory."""
        return self.run_directory

    def attach(self, engine: Engine) -> None:
        """Log every fit into a file."""
        if self._is_main:
            super().attach(engine)
            self._describe()
        engine.listeners.around("fit", lambda: self._logging(engine))

    def state_dict(self) -> dict[str, Any]:
        """Return the name of the directory within ``root``."""
        return {"name": self.path.name}

    def before_resume(self, state: dict[str, Any]) -> None:
        """Go on in the directory of the run that is resumed, if it is still within ``root``."""
        if not self._is_main or self._is_tried:
            return
        name = state.get("name")
        earlier = self.path.with_name(name) if is_plain_name(name) else None
        root = self.path.parent.resolve()
        if earlier is None or not earlier.is_dir() or earlier.resolve().parent != root:  # a link may lead elsewhere
            logger.warning("The directory of the resumed run is not in %s. The run continues in %s.",
                           self.path.parent, self.path)  # fmt: skip
            return
        if earlier != self.path:
            self._remove_new_directory()
            self.run_directory = earlier
            with contextlib.suppress(OSError):
                remove_temporaries(earlier, "*.csv", "*.json", "*.txt")  # of a run that was killed
            self._describe()

    def _describe(self) -> None:
        """Write down the settings, and what the run runs on."""
        self._write("settings.json", json.dumps(without_secrets(self.settings), indent=2, default=str) + "\n")
        self._write("environment.json", json.dumps(environment(), indent=2) + "\n")

    def _remove_new_directory(self) -> None:
        """Remove the directory that was made for a new run, unless somebody else has written in it."""
        for name in ("settings.json", "environment.json"):
            (self.path / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def write_into(self, directory: Path) -> None:
        """Be that directory, also for a run that is resumed; the log goes into its file alone."""
        self.run_directory, self._is_tried, self.terminal = directory, True, False
        self._describe()

    def on_fit_start(self, event: FitStart) -> None:
        """Log the settings; write down what will run in which order."""
        self._history, self._validations = RowsFile(self.path / "history.csv"), RowsFile(self.path / "validations.csv")
        self._steps = StepsFile(self.path / "steps.csv")
        self._timeline = Timeline(self.path / "timeline.jsonl", event.engine)
        if not event.engine.run.goes_on:  # or it was said before
            logger.info("Run directory: %s", self.path)
            logger.info("Settings: %s", json.dumps(without_secrets(self.settings), default=str))
        self._write("handlers.txt", event.engine.explain() + "\n")
        self._write("model.txt", describe_parts(event.engine.parts.modules()))
        if event.engine.run.is_resuming:
            self._first_batch = event.engine.subscribe(BatchReady, self._begin)

    def _begin(self, event: BatchReady) -> None:
        """Note that the run goes on: one that is resumed within an epoch hears no EpochStart."""
        self._first_batch.cancel()
        self._note(self._timeline.begin)

    def on_epoch_start(self, event: EpochStart) -> None:
        """Note that the run has begun; only here is the step of a resumed one known."""
        self._note(self._timeline.begin)

    def on_validation_end(self, event: ValidationEnd) -> None:
        """Log a validation in mid-epoch, and write all of them; the others are in the epoch's line."""
        validations = event.engine.history.validations
        self._note(self._timeline.validation)
        if not event.engine.run.data_exhausted:
            epoch_logger.info("step %d  %s", event.engine.step, format_values(values_of(validations[-1])))
        if not event.engine.run.data_exhausted or self._validations.has_rows:
            self._try(self._validations.path, lambda: self._validations.update(validations))

    def on_logged(self, event: Logged) -> None:
        """Write the values of a training step."""
        place = {"epoch": event.epoch, "step": event.at}
        self._try(self._steps.path, lambda: self._steps.append({**place, **event.values, **place}))

    def on_epoch_end(self, event: EpochEnd) -> None:
        """Log the epoch and write the history."""
        epoch_logger.info("%s", epoch_line(event))
        self._try(self._history.path, lambda: self._history.update(event.engine.history.rows))
        self._note(self._timeline.epoch)

    def on_run_failed(self, event: RunFailed) -> None:
        """Note why."""
        self._note(lambda: self._timeline.failed(event.error))

    def on_fit_end(self, event: FitEnd) -> None:
        """Log why the run ended."""
        if event.engine.run.goes_back_to is None:
            epoch_logger.info("End of the run: %s", event.reason)
        self._note(lambda: self._timeline.ended(event.reason))
        if event.engine.listeners.is_timed:
            self._write("handlers.txt", event.engine.explain(times=True) + "\n")

    def _note(self, write: Callable[[], object]) -> None:
        self._try(self._timeline.path, write)

    def _write(self, name: str, text: str) -> None:
        path = self.path / name
        self._try(path, lambda: write_durably(path, lambda file: file.write(text.encode())))

    def _try(self, path: Path, write: Callable[[], object]) -> None:
        """Write a file; a failure is told at the first of several."""
        try:
            write()
        except OSError as error:
            if path not in self._failing:
                logger.warning("%s could not be written in %s: %s. Training continues.",
                               path.name, path.parent, error.strerror)  # fmt: skip
            self._failing.add(path)
        else:
            self._failing.discard(path)

    @contextmanager
    def _logging(self, engine: Engine) -> Iterator[None]:
        self.run_directory = engine.ranks.shared(self.run_directory)
        name = "log.log" if self._is_main else f"log.rank{engine.ranks.rank}.log"
        has_bar = any(isinstance(callback, ProgressBar) for callback in engine.listeners.callbacks)
        with run_log(self.path / name, terminal=self.terminal and self._is_main, skip_epochs=has_bar):
            yield

    def __repr__(self) -> str:
        return f"RunDirectory({str(self.path)!r})"


def describe_parts(modules: Mapping[str, nn.Module]) -> str:
    """Return the modules as text, with their numbers of parameters."""
    texts = []
    for name, module in modules.items():
        parameters = [one for one in unwrap(module).parameters() if not isinstance(one, UninitializedParameter)]
        total = sum(one.numel() for one in parameters)
        learning = sum(one.numel() for one in parameters if one.requires_grad)
        texts.append(f"{name}: {total:,} parameters, {learning:,} of them are trained\n{unwrap(module)!r}\n")
    return "\n".join(texts)


def _make_directory(root: Path) -> Path:
    ensure_writable(root, "RunDirectory")
    started = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    number = 1
    while True:
        path = root / (started if number == 1 else f"{started}-{number:02}")
        try:
            path.mkdir()  # fails if another run of this second has taken the name
        except FileExistsError:
            number += 1
        else:
            sync_directory(root)
            return path


def _as_dict(settings: object) -> dict[str, Any]:
    if settings is None:
        return {}
    if isinstance(settings, Mapping):
        return dict(settings)
    if isinstance(settings, argparse.Namespace):
        return dict(vars(settings))
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        return dataclasses.asdict(settings)
    raise ConfigurationError(
        f"settings is {settings!r}, which has no names. Pass a dict, an argparse.Namespace or a dataclass."
    )
