"""Weights & Biases as an experiment tracker."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from camshaft.engine import import_optional


class WandB:
    """A run of Weights & Biases, by the package wandb.

    Values are over ``global_step``. With ``mode="offline"`` each process leaves a directory that ``wandb sync`` sends;
    those of a resumed run have one id, so they are one run there.

    Args:
        settings: what ``wandb.init`` takes: ``project="digits"``, ``mode="offline"``, ``dir=...``.
    """

    name = "WandB"
    rewinds = False

    def __init__(self, **settings: Any) -> None:
        self._settings = settings
        self._run: Any = None

    def check(self) -> None:
        """Look for the package."""
        self._wandb = import_optional("wandb", used_by="WandB")

    def open(
        self, run_id: str | None, settings: Mapping[str, Any], directory: Path | None, sent: Mapping[str, int]
    ) -> str:
        """Begin a run, or go on with the one of this id."""
        own = {"dir": directory, "name": directory and directory.name, "config": dict(settings), **self._settings}
        going_on = {"id": run_id, "resume": "allow"} if run_id is not None else {}
        self._run = self._wandb.init(**own | going_on)
        self._run.define_metric("*", step_metric="global_step")
        return str(self._run.id)

    def log(self, kind: str, values: Mapping[str, float], step: int) -> None:
        """Send values."""
        self._run.log({**values, "global_step": step})

    def add_image(self, name: str, pixels: Tensor, step: int) -> None:
        """Send an image."""
        self._run.log({name: self._wandb.Image(pixels.numpy()), "global_step": step})

    def add_histogram(self, name: str, values: Tensor, step: int) -> None:
        """Send a histogram."""
        self._run.log({name: self._wandb.Histogram(values.numpy()), "global_step": step})

    def close(self, outcome: str) -> None:
        """End the run."""
        self._run.finish(exit_code=1 if outcome == "failed" else 0)

    def __repr__(self) -> str:
        return f"WandB(project={self._settings.get('project')!r})"
