"""What is measured in each stage of a run, and what is known of it beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .errors import ConfigurationError
from .metric import Metric, as_metrics, higher_is_better
from .record import Record


class Stages:
    """The records of the stages ("train", "val", "test"), and the metrics of which each has its own copy."""

    def __init__(self) -> None:
        self.directions: dict[str, bool | None] = {}
        self._metrics: dict[str, Metric] = {}
        self._records: dict[str, Record] = {}

    def add_metrics(self, metrics: Mapping[str, Any] | nn.ModuleDict) -> None:
        """Add metrics by name; they are updated by ``engine.measure`` and computed at the end of each stage.

        Raises:
            ConfigurationError: if a name is taken or a metric is none.
        """
        for name, metric in as_metrics(metrics).items():
            if name in self._metrics or name in self.directions:
                raise ConfigurationError(f'Two metrics are named "{name}". Give one of them another name.')
            self._metrics[name] = metric

    def declare(self, name: str, *, higher_is_better: bool | None = None) -> None:
        """Say that every stage will record this value besides its metrics, and whether more of it is better.

        A `Trainer` declares its loss. Declare what a handler of yours records, and others can watch it.
        """
        self.directions[name] = higher_is_better

    def __getitem__(self, stage: str) -> Record:
        """Return the stage's record, made on first request."""
        if stage not in self._records:
            self._records[stage] = Record(self._metrics)
        return self._records[stage]

    def expected(self, *, validates: bool | None) -> list[str]:
        """Return the names a run will have, such as ``val_acc``; empty where they cannot be known.

        Args:
            validates: whether there will be validations; None where that is unknown, too.
        """
        stages = ("train",) if validates is False else ("train", "val")
        names = (*self.directions, *self._metrics) if self.directions else ()
        return [f"{stage}_{name}" for stage in stages for name in names]

    def higher_is_better(self, name: str) -> bool | None:
        """Return whether more of a value such as ``val_acc`` is better; None where nothing says so."""
        name = name.partition("_")[2]
        if name in self._metrics:
            return higher_is_better(self._metrics[name])
        return self.directions.get(name)
