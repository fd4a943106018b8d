"""A debugger that stops in the user's own code, and errors of a loop that is the user's own."""

from __future__ import annotations

import os
import pdb
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

_INSTALLED = tuple(
    os.path.join(sysconfig.get_path(name), "") for name in ("stdlib", "platstdlib", "purelib", "platlib")
)
_OURS = tuple(os.path.join(Path(__file__).parent.parent, name, "") for name in ("engine", "callbacks", "testing"))


def is_own_code(file: str) -> bool:
    """Return whether a file is of the user's own code: not of camshaft, nor of anything that is installed.

    >>> is_own_code("train.py"), is_own_code(os.__file__)
    (True, False)
    """
    return not file.startswith(("<frozen", *_OURS, *_INSTALLED))


def _is_own(frame: FrameType) -> bool:
    module = str(frame.f_globals.get("__name__", ""))  # of code that was made from a string, which has no file
    return is_own_code(frame.f_code.co_filename) and not module.startswith(("camshaft.", "torch."))


class Debugger(pdb.Pdb):
    """Python's debugger, which begins at the next line of the user's own code, and steps through that only.

    Args:
        on_error: called with each exception that comes through a frame that runs now, also after "continue".

    Attributes:
        has_stopped: whether it did, as there may be no such line.
        was_left: whether the user has left it with "quit".
    """

    def __init__(self, on_error: Callable[[BaseException], object]) -> None:
        super().__init__(nosigint=True)
        self._on_error = on_error
        self.has_stopped = self.was_left = False

    def begin(self) -> None:
        """Stop at the next line of the user's own code."""
        self.set_trace(sys._getframe())
        self.set_step()

    def end(self) -> None:
        """Stop no more."""
        self.clear_all_breaks()
        super().set_continue()
        sys.settrace(None)

    def stop_here(self, frame: FrameType) -> bool:
        """Return whether to stop in a frame."""
        return _is_own(frame) and super().stop_here(frame)

    def user_call(self, frame: FrameType, argument_list: Any) -> None:
        """Go on to the first line of a function that is called."""

    def user_line(self, frame: FrameType) -> None:
        """Stop."""
        self.has_stopped = True
        super().user_line(frame)

    def set_quit(self) -> None:
        """End the program."""
        self.was_left = True
        super().set_quit()

    def dispatch_exception(self, frame: FrameType, arg: Any) -> Any:
        """Hear of an error."""
        if isinstance(arg[1], Exception) and _is_own(frame):
            self._on_error(arg[1])
        return super().dispatch_exception(frame, arg)

    def set_continue(self) -> None:
        """Run on; errors are still heard of."""
        super().set_continue()
        if not self.breaks:
            watch_errors(self._on_error)


def watch_errors(on_error: Callable[[BaseException], object]) -> None:
    """Call ``on_error(exception)`` for each one that comes through a frame of the user's that runs now.

    An error in the body of a loop over a generator is not seen by the generator, which is closed as by a ``break``.
    Functions that are called later are not traced, and run as fast as before.
    """

    def look(frame: FrameType, event: str, argument: Any) -> Any:
        if event == "exception" and isinstance(argument[1], Exception):
            on_error(argument[1])
        return look

    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if _is_own(frame):
            frame.f_trace, frame.f_trace_lines = look, False
        frame = frame.f_back
    sys.settrace(lambda *event: None)
