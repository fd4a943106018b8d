"""A run, as its directory tells it."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

Row = dict[str, float]
Mode = Literal["min", "max"]
Status = Literal["running", "ended", "interrupted", "failed", "killed", "unknown"]


class RunNotFoundError(Exception):
    """There is no run where one was asked for."""


@dataclass(eq=False)
class Run:
    """What a run directory holds; each file is read when it is first asked for, and a broken line is left out.

    Args:
        path: the directory.

    Raises:
        RunNotFoundError: if it is not a run directory.
    """

    path: Path

    def __post_init__(self) -> None:
        if not (self.path / "settings.json").is_file():
            kind = "is not a run directory: it has no settings.json" if self.path.is_dir() else "does not exist"
            raise RunNotFoundError(f"{self.path} {kind}. Pass the directory that a RunDirectory has made.")

    @property
    def name(self) -> str:
        """The name of the directory."""
        return self.path.resolve().name

    @cached_property
    def epochs(self) -> list[Row]:
        """A row for each epoch, with its number, its last step and its values."""
        return list(_rows(self.path / "history.csv"))

    @cached_property
    def validations(self) -> list[Row]:
        """A row for each validation; where none was made in mid-epoch, the epochs' rows that have one."""
        rows = list(_rows(self.path / "validations.csv"))
        return rows or [row for row in self.epochs if any(name.startswith("val_") for name in row)]

    def steps(self) -> Iterator[Row]:
        """Read the rows that a `Log` has announced; there may be very many."""
        return _rows(self.path / "steps.csv")

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What the run was started with."""
        return _json(self.path / "settings.json")

    @cached_property
    def environment(self) -> dict[str, Any]:
        """What the run ran on."""
        return _json(self.path / "environment.json")

    @cached_property
    def matrices(self) -> dict[str, Any]:
        """The confusion matrices of the best moment, and the names of the classes."""
        return _json(self.path / "matrices.json")

    @cached_property
    def moments(self) -> list[dict[str, Any]]:
        """The lines of ``timeline.jsonl``, since the run was started."""
        moments: list[dict[str, Any]] = []
        for line in self.text("timeline.jsonl").splitlines():
            try:
                moment = json.loads(line)
                float(moment["time"]), int(moment["step"]), int(moment["epoch"]), str(moment["what"])
            except (ValueError, TypeError, KeyError):
                continue
            moments = [moment] if moment["what"] == "started" else [*moments, moment]
        return moments

    def text(self, name: str, limit: int | None = None) -> str:
        """Return a text file's content, or of its last lines at most ``limit`` bytes; "" without the file."""
        try:
            with open(self.path / name, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                cut = limit is not None and size > limit
                file.seek(size - limit if limit is not None and cut else 0)
                content = file.read()
        except OSError:
            return ""
        return (content.partition(b"\n")[2] if cut else content).decode(errors="replace")

    # What follows from them ----------------------------------------------------------------------------

    @property
    def started(self) -> datetime | None:
        """When it was started, in this machine's time."""
        return datetime.fromtimestamp(self.moments[0]["time"]) if self.moments else None

    @property
    def status(self) -> Status:
        """How it ended; "running" and "killed" are told apart by its process, and on its machine only."""
        if not self.moments:
            return "unknown"
        last = self.moments[-1]
        failed = any(moment["what"] == "failed" for moment in self._since_begin())
        if last["what"] == "ended" or failed:
            return "failed" if failed else "interrupted" if last.get("signal") else "ended"
        begin = self._since_begin()[0]
        if begin.get("host") != socket.gethostname():
            return "unknown"
        return "running" if _is_alive(begin.get("pid")) else "killed"

    @property
    def reason(self) -> str:
        """Why it ended, or with what error it failed; "" where nothing says so."""
        failed = [moment for moment in self._since_begin() if moment["what"] == "failed"]
        if failed:
            return str(failed[-1].get("error", ""))
        return str(self.moments[-1].get("reason", "")) if self.moments else ""

    def _since_begin(self) -> list[dict[str, Any]]:
        """Return the moments since it was started or resumed last."""
        at = [number for number, one in enumerate(self.moments) if one["what"] in ("started", "resumed")]
        return self.moments[at[-1] :] if at else self.moments

    @property
    def watched(self) -> str | None:
        """The value that says which moment was best; the validation loss where no handler watches one."""
        watched = self._of_begin("watched")
        if isinstance(watched, str):
            return watched
        return "val_loss" if self.better("val_loss") else None

    def better(self, name: str) -> Mode | None:
        """Return whether less or more of a value is better; None where that is unknown."""
        mode = (self._of_begin("better") or {}).get(name)
        return mode if mode in ("min", "max") else None

    @property
    def validation_sets(self) -> list[str]:
        """The names of several validation sets, whose values are ``val_clean_loss`` and the like."""
        return [one for one in self._of_begin("validation_sets") or [""] if isinstance(one, str)]

    @property
    def checkpoints(self) -> str | None:
        """Where its checkpoints are: a path within its directory, or an absolute one."""
        path = self._of_begin("checkpoints")
        return path if isinstance(path, str) else None

    def _of_begin(self, key: str) -> Any:
        return next((one[key] for one in reversed(self.moments) if one.get(key) is not None), None)

    def best(self, name: str | None, mode: Mode | None = None) -> Row | None:
        """Return the row in which a value was best; None where it is unknown what that means.

        Args:
            name: such as ``"val_acc"``.
            mode: which is better; by default what the run itself says.
        """
        mode = mode or (None if name is None else self.better(name))
        if name is None or mode is None:
            return None
        rows = self.validations if name.startswith("val_") else self.epochs
        known = [row for row in rows if not math.isnan(row.get(name, math.nan))]
        if not known:
            return None
        return (min if mode == "min" else max)(known, key=lambda row: row[name])

    @property
    def remarks(self) -> list[dict[str, Any]]:
        """What handlers did to the run on the way, each with ``epoch``, ``step`` and ``text``."""
        found: list[Any] = next(
            (one["remarks"] for one in reversed(self.moments) if isinstance(one.get("remarks"), list)), []
        )
        return [one for one in found if isinstance(one, dict) and {"epoch", "step", "text"} <= one.keys()]

    @cached_property
    def best_row(self) -> Row | None:
        """The row in which the value that is watched was best."""
        return self.best(self.watched)

    @cached_property
    def clock(self) -> list[tuple[int, float]]:
        """Steps, and the seconds of running until each.

        The time between an interruption and its resumption is left out, and so is what a killed run did after the step
        that it was resumed from.
        """
        clock: list[tuple[int, float]] = []
        begun, offset = 0.0, 0.0
        for moment in self.moments:
            step, when = int(moment["step"]), float(moment["time"])
            if moment["what"] in ("started", "resumed"):
                while clock and clock[-1][0] > step:
                    clock.pop()
                begun, offset = when, clock[-1][1] if clock else 0.0
            seconds = offset + max(when - begun, 0.0)
            if clock and clock[-1][0] == step:
                clock[-1] = (step, seconds)
            else:
                clock.append((step, seconds))
        return clock

    @property
    def seconds(self) -> float:
        """How long it has run."""
        return self.clock[-1][1] if self.clock else 0.0


def runs_in(root: Path) -> list[Run]:
    """Return the runs in a directory of run directories, the newest last.

    Raises:
        RunNotFoundError: if there is no such directory.
    """
    if not root.is_dir():
        raise RunNotFoundError(f"{root} does not exist. Pass the directory in which the run directories are.")
    return [Run(path) for path in sorted(root.iterdir()) if (path / "settings.json").is_file()]


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _rows(path: Path) -> Iterator[Row]:
    """Read a table of numbers. Empty cells are left out, and so is a row that is not complete."""
    try:
        file = open(path, encoding="utf-8", errors="replace", newline="")  # noqa: SIM115 - closed below
    except OSError:
        return
    with file:
        lines = csv.reader(file)
        columns = [re.sub(r"^'(?=[=+\-@])", "", cell) for cell in next(lines, [])]  # see callbacks/csv_files.py
        for line in lines:
            if len(line) != len(columns):
                continue
            try:
                row = {name: float(cell) for name, cell in zip(columns, line, strict=True) if cell}
            except ValueError:
                continue
            if "step" in row and "epoch" in row:
                yield row


def _is_alive(pid: object) -> bool:
    if not isinstance(pid, int) or os.name != "posix":  # elsewhere, asking would be a signal
        return isinstance(pid, int)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # somebody else's
    return True
