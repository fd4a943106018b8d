"""ClearML as an experiment tracker."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from camshaft.engine import import_optional

# What ClearML would otherwise record by itself, by replacing functions of other packages.
_QUIET = {
    "auto_connect_frameworks": False, "auto_connect_arg_parser": False, "auto_connect_streams": False,
    "auto_resource_monitoring": False,
}  # fmt: skip


class ClearML:
    """A task of ClearML, by the package clearml; offline after ``Task.set_offline(True)``.

    Args:
        project_name: its project.
        settings: what else ``Task.init`` takes. Its automatic recording is switched off, unless they switch it on.
    """

    name = "ClearML"
    rewinds = False

    def __init__(self, project_name: str, **settings: Any) -> None:
        self.project_name = project_name
        self._settings = settings
        self._task: Any = None

    def check(self) -> None:
        """Look for the package."""
        self._clearml = import_optional("clearml", used_by="ClearML")

    def open(
        self, run_id: str | None, settings: Mapping[str, Any], directory: Path | None, sent: Mapping[str, int]
    ) -> str:
        """Begin a task, or go on with the one of this id."""
        own = {"task_name": directory.name if directory else "run", **_QUIET, **self._settings}
        which = {"continue_last_task": run_id} if run_id is not None else {"reuse_last_task_id": False}
        self._task = self._clearml.Task.init(project_name=self.project_name, **own | which)
        if run_id is None:
            self._task.connect(dict(settings), name="settings")
        elif self._task.id == run_id:
            self._task.set_initial_iteration(0)  # our steps are those of the whole run
        return str(self._task.id)

    def log(self, kind: str, values: Mapping[str, float], step: int) -> None:
        """Send values; those of a stage are the series of one title."""
        for name, value in values.items():
            stage, _, short = name.partition("_")
            title, series = (short, stage) if stage in ("train", "val") else (name, name)
            self._task.get_logger().report_scalar(title, series, value, iteration=step)

    def add_image(self, name: str, pixels: Tensor, step: int) -> None:
        """Send an image."""
        self._task.get_logger().report_image(name, name, iteration=step, image=pixels.numpy())

    def add_histogram(self, name: str, values: Tensor, step: int) -> None:
        """Send a histogram."""
        counts, edges = values.histogram(bins=50)
        labels = [f"{edge:.4g}" for edge in edges[:-1].tolist()]
        self._task.get_logger().report_histogram(name, name, counts.numpy(), iteration=step, xlabels=labels)

    def close(self, outcome: str) -> None:
        """End the task."""
        if outcome == "failed":
            self._task.mark_failed()
        self._task.close()

    def __repr__(self) -> str:
        return f"ClearML({self.project_name!r})"
