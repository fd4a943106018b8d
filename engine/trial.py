"""A run that is only tried: what it writes is led to another place.

A rehearsal does that in the process of the run. A replay, and the part of a rehearsal that needs a fresh process, run
the user's script once more: the environment variable `VARIABLE` then says what for.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .callback import Callback
from .state import named_callbacks

VARIABLE = "CAMSHAFT_TRIAL"


@dataclass(frozen=True, slots=True)
class Trial:
    """What a script is run for once more.

    Args:
        kind: such as "replay".
        directory: where everything that its run writes is to go.
        settings: what else is to be known.
    """

    kind: str
    directory: Path
    settings: dict[str, Any]

    def as_variable(self) -> str:
        """Return the value of the environment variable.

        >>> Trial("replay", Path("there"), {"step": 3}).as_variable()
        '{"kind": "replay", "directory": "there", "step": 3}'
        """
        return json.dumps({"kind": self.kind, "directory": str(self.directory), **self.settings})


def asked_trial() -> Trial | None:
    """Return what this process is run for; None if that is a run like any other."""
    text = os.environ.get(VARIABLE)
    if not text:
        return None
    settings = json.loads(text)
    return Trial(settings.pop("kind"), Path(settings.pop("directory")), settings)


def script_command() -> list[str] | str:
    """Return the command that runs this process's script once more; or in words, why there is none."""
    file = getattr(sys.modules["__main__"], "__file__", None)
    if multiprocessing.parent_process() is not None:
        return "this process was started by another one"
    if not file:
        return "there is no script: this is a notebook, an interactive session or a command line"
    if "pytest" in (Path(file).stem, *Path(file).parts):
        return "pytest runs it"
    if not Path(file).exists():
        return f"{file} does not exist, seen from this directory"
    return [sys.executable, *sys.orig_argv[1:]]


def lead_files(callbacks: Iterable[Callback], directory: Path) -> None:
    """Let each handler write into a directory of its own within ``directory``."""
    for name, callback in named_callbacks(callbacks).items():
        (own := directory / name).mkdir(parents=True, exist_ok=True)
        callback.write_into(own)
