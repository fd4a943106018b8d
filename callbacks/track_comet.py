"""Comet as an experiment tracker."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from camshaft.engine import import_optional


class Comet:
    """An experiment of Comet, by the package comet_ml.

    With ``online=False`` each process leaves an archive that ``comet upload`` sends; those of a resumed run have one
    key, so they are one experiment there.

    Args:
        settings: what ``comet_ml.start`` takes: ``project_name="digits"``, ``online=False`` ...
    """

    name = "Comet"
    rewinds = False

    def __init__(self, **settings: Any) -> None:
        self._settings = settings
        self._experiment: Any = None

    def check(self) -> None:
        """Look for the package."""
        self._comet = import_optional("comet_ml", used_by="Comet")

    def open(
        self, run_id: str | None, settings: Mapping[str, Any], directory: Path | None, sent: Mapping[str, int]
    ) -> str:
        """Begin an experiment, or go on with the one of this key."""
        going_on = {"experiment_key": run_id, "mode": "get"} if run_id is not None else {"mode": "create"}
        self._experiment = self._comet.start(**self._settings | going_on)
        if run_id is None:
            self._experiment.log_parameters(dict(settings))
            if directory is not None:
                self._experiment.set_name(directory.name)
        return str(self._experiment.get_key())

    def log(self, kind: str, values: Mapping[str, float], step: int) -> None:
        """Send values."""
        self._experiment.log_metrics(dict(values), step=step)

    def add_image(self, name: str, pixels: Tensor, step: int) -> None:
        """Send an image."""
        self._experiment.log_image(pixels.numpy(), name=name, step=step)

    def add_histogram(self, name: str, values: Tensor, step: int) -> None:
        """Send a histogram."""
        self._experiment.log_histogram_3d(values.numpy(), name=name, step=step)

    def close(self, outcome: str) -> None:
        """End the experiment."""
        self._experiment.log_other("outcome", outcome)
        self._experiment.end()

    def __repr__(self) -> str:
        return f"Comet(project_name={self._settings.get('project_name')!r})"
