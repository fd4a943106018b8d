"""Curves in a notebook that grow with the run."""

from __future__ import annotations

import importlib
import io
import time
from typing import Any

from camshaft.engine import Callback, ConfigurationError, EpochEnd, FitEnd, FitStart, ValidationEnd

from .progress import in_notebook

_SHARE = 10  # drawing may take a tenth of the time


class LiveCurves(Callback):
    """Shows the curves of a run below the cell of a notebook, and draws them anew after each epoch and validation.

    Drawing takes a tenth of the time at most: where epochs are very short, the picture is drawn after some of them,
    and when the run ends. Anywhere but in a notebook it does nothing; `Report` leaves pictures and a page.

    Args:
        names: which values, without ``train_`` or ``val_``; all of them by default.

    Raises:
        ConfigurationError: for names that are not strings.

    >>> LiveCurves("loss", "acc")
    LiveCurves('loss', 'acc')
    """

    main_only = True

    def __init__(self, *names: str) -> None:
        if wrong := [name for name in names if not isinstance(name, str)]:
            raise ConfigurationError(
                f'LiveCurves was given {wrong[0]!r}, which is no name of a value. Write LiveCurves("loss").'
            )
        self.names = names
        self._display: Any = None  # IPython's handle of the picture
        self._next = 0.0  # when it may be drawn again, on the monotonic clock

    def on_fit_start(self, event: FitStart) -> None:
        """Begin a new picture."""
        self._display, self._next = None, 0.0

    def on_validation_end(self, event: ValidationEnd) -> None:
        """Draw, unless that was done just before; a validation at the end of an epoch is drawn with the epoch."""
        if not event.engine.run.data_exhausted:
            self._draw(event)

    def on_epoch_end(self, event: EpochEnd) -> None:
        """Draw, unless that was done just before."""
        self._draw(event)

    def on_fit_end(self, event: FitEnd) -> None:
        """Draw the whole run."""
        self._next = 0.0
        self._draw(event)

    def _draw(self, event: EpochEnd | ValidationEnd | FitEnd) -> None:
        began, history = time.monotonic(), event.engine.history
        known = history.curves()
        names = [name for name in self.names or known if name in known]
        if not in_notebook() or not names or began < self._next:
            return
        display = importlib.import_module("IPython.display")
        content = io.BytesIO()
        history.plot(*names).savefig(content, format="png", dpi=72)
        picture = display.Image(content.getvalue())
        if self._display is None:
            self._display = display.display(picture, display_id=True)
        else:
            self._display.update(picture)
        self._next = time.monotonic() + _SHARE * (time.monotonic() - began)

    def __repr__(self) -> str:
        return f"LiveCurves({', '.join(map(repr, self.names))})"
