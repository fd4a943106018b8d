"""Neptune as an experiment tracker."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from camshaft.engine import import_optional


class Neptune:
    """A run of Neptune, by the package neptune. It has no histograms; they are left out.

    Args:
        settings: what ``neptune.init_run`` takes: ``project="team/digits"``, ``mode="offline"`` ...
    """

    name = "Neptune"
    rewinds = False

    def __init__(self, **settings: Any) -> None:
        self._settings = settings
        self._run: Any = None

    def check(self) -> None:
        """Look for the package."""
        self._neptune = import_optional("neptune", used_by="Neptune")

    def open(
        self, run_id: str | None, settings: Mapping[str, Any], directory: Path | None, sent: Mapping[str, int]
    ) -> str:
        """Begin a run, or go on with the one of this id."""
        # An id of ours, which Neptune takes for the same run wherever it comes up, also offline.
        run_id = run_id or (directory.name if directory else None) or self._settings.get("custom_run_id")
        self._run = self._neptune.init_run(**{"custom_run_id": run_id, **self._settings})
        self._run["settings"] = self._neptune.utils.stringify_unsupported(dict(settings))
        return str(run_id or self._run["sys/custom_run_id"])

    def log(self, kind: str, values: Mapping[str, float], step: int) -> None:
        """Send values."""
        for name, value in values.items():
            self._run[name].append(value, step=step)

    def add_image(self, name: str, pixels: Tensor, step: int) -> None:
        """Send an image."""
        image = self._neptune.types.File.as_image(pixels.numpy() / 255)
        self._run[name].append(image, step=step)

    def add_histogram(self, name: str, values: Tensor, step: int) -> None:
        """Leave it out."""

    def close(self, outcome: str) -> None:
        """End the run."""
        self._run["outcome"] = outcome
        self._run.stop()

    def __repr__(self) -> str:
        return f"Neptune(project={self._settings.get('project')!r})"
