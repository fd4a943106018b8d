"""Trials of a search that end early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from camshaft.engine import Callback, ConfigurationError, Engine, FitEnd, FitStart, import_optional

from .monitor import Monitor


class Prune(Callback):
    """Reports a value to an Optuna trial after each validation, and ends the run if the study's pruner says so.

    ``fit`` then raises ``optuna.TrialPruned`` when the run is over: checkpoints, pictures and the history are written.

    Args:
        trial: the trial of the objective, ``def objective(trial): ...``.
        monitor: the value, such as ``"val_acc"``; its direction is the study's.

    Raises:
        MissingPackageError: if Optuna is not installed.
        ConfigurationError: for something else than a trial, or if the study has several directions; before the first
            step, if the value will not exist.
        optuna.TrialPruned: at the end of a run that was pruned.
    """

    unique = True

    def __init__(self, trial: Any, monitor: str) -> None:
        self._optuna = import_optional("optuna", used_by="Prune")
        if not callable(getattr(trial, "should_prune", None)) or not callable(getattr(trial, "report", None)):
            raise ConfigurationError(f"Prune got {trial!r:.60}, which is not a trial. Pass that of the objective.")
        study = getattr(trial, "study", None)
        if study is not None and len(study.directions) > 1:
            raise ConfigurationError(
                f"The study has {len(study.directions)} directions, of which Optuna prunes none. "
                "Make a study of one direction, or leave Prune out."
            )
        is_minimised = study is None or study.direction.name == "MINIMIZE"
        self.trial = trial
        self.monitor = Monitor("Prune", monitor, "min" if is_minimised else "max")
        self._pruned = self._is_tried = False

    def attach(self, engine: Engine) -> None:
        """Watch the value."""
        super().attach(engine)
        self.monitor.attach(engine, self._report)

    def write_into(self, directory: Path) -> None:
        """Report nothing: a study may be in a database."""
        self._is_tried = True

    def on_fit_start(self, event: FitStart) -> None:
        """Forget what an earlier run has decided."""
        self._pruned = False

    def _report(self, engine: Engine, value: float) -> None:
        if self._is_tried:
            return
        self.trial.report(value, engine.num_validations or engine.epoch)
        if self.trial.should_prune():
            self._pruned = engine.stop(f"Prune: {self.monitor.name} is {value:.6g}")

    def on_fit_end(self, event: FitEnd) -> None:
        """Tell the study that the trial was pruned.

        Raises:
            optuna.TrialPruned: if it was.
        """
        if self._pruned:
            raise self._optuna.TrialPruned(event.engine.history.reason)

    def __repr__(self) -> str:
        return f"Prune({self.monitor.name!r})"
