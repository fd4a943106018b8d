"""A file of JSON lines as an experiment tracker."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from camshaft.engine import ConfigurationError

from .appending import append, cut


class JsonLines:
    """Writes a line of JSON for each logged step, validation and epoch; NaN is ``null``.

    Such as ``{"of": "validation", "step": 100, "val_loss": 0.25}``. A resumed run drops the lines of what it repeats,
    and writes them again. Images and histograms are left out.

    Args:
        path: the file; by default ``values.jsonl`` in the run directory.

    >>> JsonLines()
    JsonLines()
    """

    name = "JsonLines"
    rewinds = True

    def __init__(self, path: str | Path | None = None) -> None:
        self._wanted = None if path is None else Path(path)
        self.path = self._wanted

    def open(
        self, run_id: str | None, settings: Mapping[str, Any], directory: Path | None, sent: Mapping[str, int]
    ) -> str:
        """Find the file, and drop what is repeated; a new run begins a new file."""
        self.path = self._wanted or (directory and directory / "values.jsonl")
        if self.path is None:
            raise ConfigurationError("JsonLines has nowhere to write. Attach RunDirectory(), or pass JsonLines(path).")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b") as file:
            file.seek(0)
            cut(file, lambda line: run_id is not None and _was_sent(json.loads(line), sent))
        return self.path.name

    def log(self, kind: str, values: Mapping[str, float], step: int) -> None:
        """Write a line."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        assert self.path is not None  # it is open
        append(self.path, f"{json.dumps({'of': kind, 'step': step, **finite})}\n".encode())

    def add_image(self, name: str, pixels: Tensor, step: int) -> None:
        """Leave it out."""

    def add_histogram(self, name: str, values: Tensor, step: int) -> None:
        """Leave it out."""

    def close(self, outcome: str) -> None:
        """Nothing is held open."""

    def __repr__(self) -> str:
        return f"JsonLines({'' if self._wanted is None else repr(str(self._wanted))})"


def _was_sent(row: Mapping[str, Any], sent: Mapping[str, int]) -> bool:
    step: int = row["step"]
    return step <= sent.get(row["of"], -1)
