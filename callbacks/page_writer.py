"""The page of a run that goes on, written on another thread."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from camshaft.engine import write_durably
from camshaft.viewer import Run, plotly_script, run_page

logger = logging.getLogger("camshaft")

_SHARE = 50  # a page may take a fiftieth of the time

Matrices = Mapping[str, tuple[str, Tensor]]


class PageWriter:
    """Writes ``report.html`` from what is in a run directory, on a thread, so that the training goes on.

    A page is whole at any moment, also if the process is killed while one is written. A failure warns once.

    Args:
        directory: the run directory; plotly's script is put beside it.
        class_names: those of confusion matrices.
    """

    def __init__(self, directory: Path, class_names: Sequence[str] | None) -> None:
        self.directory = directory
        self._class_names = None if class_names is None else [str(name) for name in class_names]
        self._thread: threading.Thread | None = None
        self._next = 0.0  # when the next page may be begun, on the monotonic clock
        self._has_warned = False
        self._script = self._find_script()

    def write_soon(self, matrices: Matrices) -> None:
        """Begin to write the page, unless one is being written, or has just been."""
        if self._script is None or time.monotonic() < self._next or (self._thread and self._thread.is_alive()):
            return
        self._thread = threading.Thread(target=self._write, args=(dict(matrices),), name="camshaft-page", daemon=True)
        self._thread.start()

    def write_last(self, matrices: Matrices) -> None:
        """Write the page when the one that is being written is there."""
        if self._thread is not None:
            self._thread.join()
        if self._script is not None:
            self._write(matrices)
            if not self._has_warned:
                logger.info("The page of the run: %s", self.directory / "report.html")

    def _find_script(self) -> Path | None:
        try:
            script = plotly_script(self.directory.parent)
        except OSError as error:
            logger.warning("Report writes no page, because %s cannot be written: %s.", self.directory.parent, error)
            return None
        if script is None:
            logger.info("Report writes no page: plotly is not installed. Write: pip install camshaft[report].")
        return script

    def _write(self, matrices: Matrices) -> None:
        began = time.monotonic()
        try:
            if matrices:
                kept = {name: {"title": title, "values": one.tolist()} for name, (title, one) in matrices.items()}
                self._put("matrices.json", json.dumps({"class_names": self._class_names, "matrices": kept}))
            self._put("report.html", run_page(Run(self.directory), self._script))
        except Exception as error:
            if not self._has_warned:
                logger.warning("Report could not write its page in %s: %r. Training continues.", self.directory, error)
            self._has_warned = True
        self._next = time.monotonic() + _SHARE * (time.monotonic() - began)

    def _put(self, name: str, text: str) -> None:
        write_durably(self.directory / name, lambda file: file.write(text.encode()))
