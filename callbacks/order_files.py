"""Orders to a run and their answers, as files in a directory in which only their owner can write.

An order is ``<name>.order`` and its answer ``<name>.answer``. It belongs to whoever removes its file: the run, which
then answers, or its sender, who then takes it back.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from camshaft.engine import ConfigurationError, write_durably

logger = logging.getLogger("camshaft")

_LONGEST = 4096  # bytes


class OrderFiles:
    """The directory in which orders wait.

    Args:
        path: the directory; made if it does not exist.

    Raises:
        ConfigurationError: if others could write in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._left: set[str] = set()  # names of what is no order and cannot be removed
        try:
            path.mkdir(mode=0o700, exist_ok=True)
            about = path.lstat()
        except OSError as error:
            raise ConfigurationError(
                f"Steering cannot make the directory {path}: {error.strerror}. Look for the cause, and start again."
            ) from error
        if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o022:
            raise ConfigurationError(
                f"{path} is no directory, or not this user's, or others can write in it and could steer the run. "
                "Make it yours alone (chmod 700), or remove it."
            )

    def sweep(self) -> None:
        """Remove answers that nobody has read, and refuse the orders that were sent to an earlier process."""
        for path in [*self.path.glob("*.answer"), *self.path.glob("*.tmp")]:
            with contextlib.suppress(OSError):
                path.unlink()
        self.refuse_all("It was sent before this run began, or before it was resumed. Send it again.")

    def refuse_all(self, why: str) -> None:
        """Answer all orders that wait with why none is taken."""
        for name, _ in self.take():
            logger.warning("Steering refuses %r: %s", name, why)
            self.answer(name, why, is_taken=False)

    def take(self) -> Iterator[tuple[str, Any]]:
        """Yield each order that waits, with its name, in the order in which they were sent; its file is removed.

        What is no order is removed with a warning.
        """
        try:
            files = sorted(name for name in os.listdir(self.path) if name.endswith(".order"))
        except OSError:  # somebody has removed the directory, so nobody can send orders
            return
        for path in [self.path / file for file in files if file not in self._left]:
            try:
                order, fault = _read(path), None
            except FileNotFoundError:  # taken back
                continue
            except (OSError, ValueError, RecursionError) as error:
                order, fault = None, error
            if self._remove(path) and fault is None:
                yield path.stem, order
            elif fault is not None:
                logger.warning("Steering does not take %r: %s. Send orders by: camshaft steer", str(path), fault)

    def _remove(self, path: Path) -> bool:
        """Remove a file, and return whether it was this call that removed it."""
        try:
            path.unlink()
        except FileNotFoundError:
            return False
        except OSError:  # as of a directory
            self._left.add(path.name)
            return False
        return True

    def answer(self, name: str, text: str, *, is_taken: bool) -> None:
        """Tell the sender what became of an order."""
        content = json.dumps({"taken": is_taken, "text": text}).encode()
        try:
            write_durably(self.path / f"{name}.answer", lambda file: file.write(content))
        except OSError as error:
            logger.warning("Steering could not answer in %s: %s. Look at the log instead.", self.path, error.strerror)


def _read(path: Path) -> Any:
    """Return the content of a file of this user.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no plain file of this user, is too long, or holds no JSON.
    """
    about = path.lstat()
    if not stat.S_ISREG(about.st_mode):
        raise ValueError(f"it is a link, or no plain file, of user {about.st_uid}")
    if about.st_uid != os.getuid():
        raise ValueError(f"it belongs to user {about.st_uid}, and the run to user {os.getuid()}")
    if about.st_size > _LONGEST:
        raise ValueError(f"it has {about.st_size} bytes, and an order at most {_LONGEST}")
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        return json.loads(file.read(_LONGEST))
