"""One directory per run, with what is needed to understand and repeat it."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import logging
import os
import platform
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from camshaft.engine import (
    Callback,
    ConfigurationError,
    Engine,
    EpochEnd,
    FitEnd,
    FitStart,
    Logged,
    ValidationEnd,
    ensure_writable,
    format_values,
    is_plain_name,
    launched_rank,
    remove_temporaries,
    sync_directory,
    values_of,
    write_durably,
)

from .csv_files import RowsFile, StepsFile
from .progress import ProgressBar, epoch_line
from .secrets import command_without_secrets, without_secrets

logger = logging.getLogger("camshaft")
epoch_logger = logging.getLogger("camshaft.epochs")

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class RunDirectory(Callback):
    """Makes ``<root>/<time the run started>`` and gives it to every handler that writes files.

    It holds ``log.log`` (everything sent to Python's logging during a fit, also by your own loggers; but not
    camshaft's lines of another fit in another thread), ``settings.json``, ``environment.json`` (versions, machine,
    command), ``handlers.txt`` (what runs, when and in which order) and ``history.csv``, with a row for each epoch;
    with validations in mid-epoch also ``validations.csv``, with a row for each of them, and with a `Log` also
    ``steps.csv``. During a fit the log goes to the terminal as well, unless logging is set up already; the epochs'
    lines are left to a `ProgressBar` where there is one. On several ranks, rank 0 makes the directory, and the others
    write only a log there: ``log.rank1.log`` ...

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
        self.run_directory: Path = _make_directory(Path(root)) if self._is_main else Path(root)

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
        if not self._is_main:
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
                remove_temporaries(earlier, "*.csv", "*.json", "handlers.txt")  # of a run that was killed
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

    def on_fit_start(self, event: FitStart) -> None:
        """Log the settings; write down what will run in which order."""
        self._history, self._validations = RowsFile(self.path / "history.csv"), RowsFile(self.path / "validations.csv")
        self._steps = StepsFile(self.path / "steps.csv")
        logger.info("Run directory: %s", self.path)
        logger.info("Settings: %s", json.dumps(without_secrets(self.settings), default=str))
        self._write("handlers.txt", event.engine.explain() + "\n")

    def on_validation_end(self, event: ValidationEnd) -> None:
        """Log a validation in mid-epoch, and write all of them; the others are in the epoch's line."""
        validations = event.engine.history.validations
        if not event.engine.run.data_exhausted:
            epoch_logger.info("step %d  %s", event.engine.step, format_values(values_of(validations[-1])))
            self._try(self._validations.path, lambda: self._validations.update(validations))

    def on_logged(self, event: Logged) -> None:
        """Write the values of a training step."""
        place = {"epoch": event.epoch, "step": event.at}
        self._try(self._steps.path, lambda: self._steps.append({**place, **event.values, **place}))

    def on_epoch_end(self, event: EpochEnd) -> None:
        """Log the epoch and write the history."""
        epoch_logger.info("%s", epoch_line(event))
        self._try(self._history.path, lambda: self._history.update(event.engine.history.rows))

    def on_fit_end(self, event: FitEnd) -> None:
        """Log why the run ended."""
        epoch_logger.info("End of the run: %s", event.reason)

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
        root, self.run_directory = logging.getLogger(), engine.ranks.shared(self.run_directory)
        name = "log.log" if self._is_main else f"log.rank{engine.ranks.rank}.log"
        handlers: list[logging.Handler] = [_LogFile(self.path / name, encoding="utf-8")]
        handlers[0].setFormatter(logging.Formatter(FORMAT))
        if (
            self.terminal
            and self._is_main
            and not any(isinstance(handler, logging.StreamHandler) for handler in root.handlers)
        ):
            has_bar = any(isinstance(callback, ProgressBar) for callback in engine.listeners.callbacks)
            handlers.append(_TerminalHandler(skip_epochs=has_bar))
        own = partial(_is_of_thread, threading.get_ident())
        for handler in handlers:
            handler.addFilter(own)
        try:
            with _root_logger(handlers):
                try:
                    yield
                except GeneratorExit:  # the user's own loop was left: no failure
                    raise
                except BaseException as error:
                    logger.error("The run failed.", exc_info=error)
                    raise
        finally:
            for handler in handlers:
                handler.close()

    def __repr__(self) -> str:
        return f"RunDirectory({str(self.path)!r})"


def _is_of_thread(thread: int, record: logging.LogRecord) -> bool:
    """Return whether a line is of the run of this thread: camshaft's are of the thread in which they are logged."""
    return record.thread in (None, thread) or record.name.partition(".")[0] != "camshaft"


class _RootLogger:
    """The root logger has the handlers of each run, and lets INFO through while any is logged, in whichever thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_runs = 0
        self._level = logging.WARNING

    @contextmanager
    def __call__(self, handlers: list[logging.Handler]) -> Iterator[None]:
        root = logging.getLogger()
        with self._lock:
            if not self._num_runs:
                self._level = root.level
            self._num_runs += 1
            if root.getEffectiveLevel() > logging.INFO:
                root.setLevel(logging.INFO)
            for handler in handlers:
                root.addHandler(handler)
        try:
            yield
        finally:
            with self._lock:
                self._num_runs -= 1
                if not self._num_runs:
                    root.setLevel(self._level)
                # A new list: another thread may be going through the old one, where it would skip a handler if one
                # before it were removed.
                root.handlers = [handler for handler in root.handlers if handler not in handlers]


_root_logger = _RootLogger()


class _LogFile(logging.FileHandler):
    """A log file that reports its first failure and is otherwise silent about failures."""

    reported = False
    is_closed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        if not self.reported:
            self.reported = True
            print(f"{self.baseFilename} could not be written: {sys.exc_info()[1]}.", file=sys.stderr)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line; not one of another thread that comes after the end, for which logging would open it again."""
        if not self.is_closed:
            super().emit(record)

    def close(self) -> None:
        self.is_closed = True
        with contextlib.suppress(OSError):
            super().close()


class _TerminalHandler(logging.Handler):
    """Prints records on standard error, above any progress bar."""

    def __init__(self, *, skip_epochs: bool) -> None:
        super().__init__()
        self.skip_epochs = skip_epochs
        self.setFormatter(logging.Formatter("%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        if self.skip_epochs and record.name == epoch_logger.name:
            return
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


def environment() -> dict[str, Any]:
    """Return what a run ran on: command, versions, machine, devices."""
    packages = ("camshaft", "torch", "torchvision", "numpy", "pytorch-ignite", "torchmetrics", "tensorboardX")
    return {
        "command": command_without_secrets(sys.argv),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "versions": {name: _version(name) for name in packages},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


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
