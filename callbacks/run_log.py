"""The log of a run: a file, and the terminal."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

logger = logging.getLogger("camshaft")
epoch_logger = logging.getLogger("camshaft.epochs")

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@contextmanager
def run_log(path: Path, *, terminal: bool, skip_epochs: bool) -> Iterator[None]:
    """Write what is sent to Python's logging into a file, and an error of the body, too.

    Args:
        path: the file; lines are appended.
        terminal: show the log on the terminal as well, unless logging is set up already.
        skip_epochs: without the lines of the epochs there.
    """
    handlers: list[logging.Handler] = [_LogFile(path, encoding="utf-8")]
    handlers[0].setFormatter(logging.Formatter(FORMAT))
    is_set_up = any(isinstance(handler, logging.StreamHandler) for handler in logging.getLogger().handlers)
    if terminal and not is_set_up:
        handlers.append(_TerminalHandler(skip_epochs=skip_epochs))
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
