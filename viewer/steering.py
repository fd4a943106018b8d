"""Orders to a run that goes on."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import stat
import time
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from .run import Run

ORDERS = ("validate", "checkpoint", "stop", "lr", "set")
_GRACE = 30.0  # seconds for the answer to an order that the run has begun to take


class NoOrderError(Exception):
    """What was written is no order."""


class NotTakenError(Exception):
    """The run has not taken the order, with the reason and what to do."""


def parsed(words: Sequence[str], after: str | None = None) -> dict[str, Any]:
    """Return an order as a run takes it.

    Args:
        words: as they were written.
        after: the option of ``stop``.

    Raises:
        NoOrderError: if they are none.

    >>> parsed(["lr", "x0.5"]), parsed(["stop"], after="epoch")
    ({'what': 'lr', 'factor': 0.5}, {'what': 'stop', 'after': 'epoch'})
    >>> parsed(["set", "EarlyStopping.patience=10"])
    {'what': 'set', 'handler': 'EarlyStopping', 'setting': 'patience', 'value': 10}
    >>> [parsed(["set", f"A.b={text}"])["value"] for text in ("null", "0.5", "cosine", '"0.5"')]
    [None, 0.5, 'cosine', '0.5']
    """
    what, *rest = words
    if what not in ORDERS:
        close = "".join(f"Did you mean '{one}'?" for one in get_close_matches(what, ORDERS, 1))
        raise NoOrderError(f"No such order '{what}'. {close or 'Orders: ' + ', '.join(ORDERS)}")
    if after is not None and what != "stop":
        raise NoOrderError(f"The order '{what}' has no --after")
    if len(rest) != (what in ("lr", "set")):
        takes = {"lr": "a factor, as in lr x0.5", "set": "a setting, as in set EarlyStopping.patience=10"}
        raise NoOrderError(f"The order '{what}' takes {takes.get(what, 'nothing more')}, not '{' '.join(rest)}'")
    if what == "stop":
        return {"what": what, "after": after or "step"}
    if what == "lr":
        return {"what": what, "factor": _factor(rest[0])}
    return {"what": what, **_setting(rest[0])} if what == "set" else {"what": what}


def _factor(text: str) -> float:
    with contextlib.suppress(ValueError):
        if text.startswith("x") and 0 < (factor := float(text[1:])) < math.inf:
            return factor
    raise NoOrderError(f"The order 'lr' takes a factor above 0, as in lr x0.5, not '{text}'")


def _setting(text: str) -> dict[str, Any]:
    name, equals, value = text.partition("=")
    handler, dot, setting = name.partition(".")
    if not (handler and dot and setting and equals):
        raise NoOrderError(f"The order 'set' takes a setting, as in set EarlyStopping.patience=10, not '{text}'")
    try:
        return {"handler": handler, "setting": setting, "value": json.loads(value)}
    except (ValueError, RecursionError):  # text need not be in quotes
        return {"handler": handler, "setting": setting, "value": value}


def send(run: Run, order: dict[str, Any], timeout: float) -> str:
    """Send an order, wait for the answer, and return it.

    Args:
        run: the run.
        order: as `parsed` returns it.
        timeout: the seconds after which the order is taken back.

    Raises:
        NotTakenError: if the run does not take it.
    """
    directory = run.path / "steering"
    _check(run, directory)
    name = f"{time.time_ns():020}-{secrets.token_hex(4)}"  # orders are taken in the order of their names
    file, answer = directory / f"{name}.order", directory / f"{name}.answer"
    _write(file, order)
    try:
        _wait(run.path, file, answer, timeout)
    except KeyboardInterrupt:
        _take_back(file)
        raise
    said = json.loads(answer.read_bytes())
    answer.unlink()
    if not said["taken"]:
        raise NotTakenError(str(said["text"]))
    return str(said["text"])


def _wait(run: Path, file: Path, answer: Path, timeout: float) -> None:
    """Wait until there is an answer; take the order back if there is none in time, or the run does not go on."""
    deadline = time.monotonic() + timeout
    while not answer.exists():
        problem, late = _problem(run), time.monotonic() - deadline
        if problem is None and late > 0:
            problem = (
                f"{run} has not answered for {timeout:g} s, and the order was taken back. "
                "Pass a longer --timeout if a step, or a validation, takes longer than that."
            )
        if problem is not None and _take_back(file):
            raise NotTakenError(problem)
        if late > _GRACE:
            raise NotTakenError(
                f"{run} has begun to take the order and has not answered. "
                "Look whether it is the last line of its steering.jsonl: then the run, when resumed, carries it out."
            )
        time.sleep(0.05)


def _check(run: Run, directory: Path) -> None:
    """Refuse to send what nobody would take."""
    owner = run.path.stat().st_uid
    if owner != os.getuid():
        raise NotTakenError(
            f"{run.path} belongs to user {owner}, who alone may steer it. Let that user send the order."
        )
    if problem := _problem(run.path):
        raise NotTakenError(problem)
    if not directory.exists():
        raise NotTakenError(f"{run.path} takes no orders. Attach Steering() to a run before it begins.")
    about = directory.lstat()
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o022:
        raise NotTakenError(f"Others can write in {directory}. Make it yours alone: chmod 700 {directory}")


def _problem(path: Path) -> str | None:
    """Return why a run takes no orders any more; its files are read anew."""
    status = Run(path).status
    if status in ("running", "unknown"):  # the latter on another machine, or before its first epoch
        return None
    return f"{path} does not go on: its status is {status}. Resume it, and send the order then."


def _write(path: Path, order: dict[str, Any]) -> None:
    """Write a file that is there as a whole or not at all."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(order, file)
        temporary.rename(path)
    except OSError as error:
        raise NotTakenError(f"{path} could not be written: {error.strerror}. Look for the cause.") from error


def _take_back(path: Path) -> bool:
    """Return whether an order could be taken back: not if the run has begun to take it."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True
