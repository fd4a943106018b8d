"""MLflow as an experiment tracker."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from camshaft.engine import import_optional

_STATUS = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}


class MLflow:
    """A run of MLflow, by the package mlflow or mlflow-skinny. It has no histograms; they are left out.

    Args:
        experiment: its name; made if there is none.
        tracking_uri: ``"sqlite:///mlflow.db"``, ``"http://..."``, ``"file:///..."``; by default MLflow's own.
        run_name: by default the name of the run directory.
    """

    name = "MLflow"
    rewinds = False

    def __init__(
        self, experiment: str = "Default", *, tracking_uri: str | None = None, run_name: str | None = None
    ) -> None:
        self.experiment = experiment
        self.tracking_uri = tracking_uri
        self.run_name = run_name
        self._client: Any = None
        self._run_id = ""

    def check(self) -> None:
        """Look for the package."""
        self._mlflow = import_optional("mlflow", used_by="MLflow")

    def open(
        self, run_id: str | None, settings: Mapping[str, Any], directory: Path | None, sent: Mapping[str, int]
    ) -> str:
        """Begin a run, or go on with the one of this id."""
        self._client = self._mlflow.MlflowClient(tracking_uri=self.tracking_uri)
        if run_id is not None:
            self._client.update_run(run_id, status="RUNNING")
            self._run_id = run_id
            return run_id
        found = self._client.get_experiment_by_name(self.experiment)
        experiment = self._client.create_experiment(self.experiment) if found is None else found.experiment_id
        name = self.run_name or (directory and directory.name)
        self._run_id = str(self._client.create_run(experiment, run_name=name).info.run_id)
        for key, value in settings.items():
            self._client.log_param(self._run_id, _key(key), value)
        return self._run_id

    def log(self, kind: str, values: Mapping[str, float], step: int) -> None:
        """Send values."""
        now = int(time.time() * 1000)
        metrics = [self._mlflow.entities.Metric(_key(key), value, now, step) for key, value in values.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def add_image(self, name: str, pixels: Tensor, step: int) -> None:
        """Send an image."""
        self._client.log_image(self._run_id, pixels.numpy(), key=_key(name), step=step)

    def add_histogram(self, name: str, values: Tensor, step: int) -> None:
        """Leave it out."""

    def close(self, outcome: str) -> None:
        """End the run."""
        self._client.set_terminated(self._run_id, _STATUS[outcome])

    def __repr__(self) -> str:
        return f"MLflow({self.experiment!r})"


def _key(name: object) -> str:
    """Return a name with the characters that MLflow takes.

    >>> _key("val_loss"), _key("grad_norm/0.weight"), _key("p@1 [%]")
    ('val_loss', 'grad_norm/0.weight', 'p-1 ---')
    """
    return "".join(one if one.isalnum() or one in "_-. /" else "-" for one in str(name))
