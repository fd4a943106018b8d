"""What is measured in each stage of a run, and what is known of it beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .errors import ConfigurationError
from .metric import ComputedMetric, Metric, as_metrics, higher_is_better, names_of
from .record import Record


class Stages:
    """The records of the stages ("train", "val", "test"), and the metrics of which each has its own copy."""

    def __init__(self) -> None:
        self.directions: dict[str, bool | None] = {}
        self._metrics: dict[str, Metric] = {}
        self._only_evaluated: set[str] = set()
        self._records: dict[str, Record] = {}

    def add_metrics(self, metrics: Mapping[Any, Any] | nn.ModuleDict, *, train: bool = True) -> None:
        """Add metrics by name; they are updated by ``engine.measure`` and computed at the end of each stage.

        Args:
            metrics: by name; several names, as a tuple, take these of the values of a metric that computes several.
            train: measure in training, too.

        Raises:
            ConfigurationError: if a name is taken or a metric is none.
        """
        for key, metric in as_metrics(metrics).items():
            taken = self._names() & set(_names(key, metric))
            if taken:
                raise ConfigurationError(f'Two metrics are named "{min(taken)}". Give one of them another name.')
            self._metrics[key] = metric
            if not train:
                self._only_evaluated.add(key)

    def declare(self, name: str, *, higher_is_better: bool | None = None) -> None:
        """Say that every stage will record this value besides its metrics, and whether more of it is better.

        A `Trainer` declares its loss. Declare what a handler of yours records, and others can watch it.
        """
        self.directions[name] = higher_is_better

    def __getitem__(self, stage: str) -> Record:
        """Return the stage's record, made on first request."""
        if stage not in self._records:
            self._records[stage] = Record(self._measured(stage))
        return self._records[stage]

    def expected(self, *, validates: bool | None) -> list[str]:
        """Return the names a run will have, such as ``val_acc``; empty where they cannot be known.

        Args:
            validates: whether there will be validations; None where that is unknown, too.
        """
        if not self.directions:
            return []
        stages = ("train",) if validates is False else ("train", "val")
        measured = {stage: [n for key, m in self._measured(stage).items() for n in _names(key, m)] for stage in stages}
        return [f"{stage}_{name}" for stage in stages for name in (*self.directions, *measured[stage])]

    def may_have(self, name: str, *, validates: bool | None) -> bool:
        """Return whether a run may have a value of this name, as far as can be known beforehand."""
        expected = self.expected(validates=validates)
        stage, _, short = name.partition("_")
        collections = [key for key, metric in self._measured(stage).items() if isinstance(metric, ComputedMetric)]
        return not expected or name in expected or short.startswith(tuple(f"{key}_" for key in collections))

    def higher_is_better(self, name: str) -> bool | None:
        """Return whether more of a value such as ``val_acc`` is better; None where nothing says so."""
        name = name.partition("_")[2]
        for key, metric in self._metrics.items():
            if name in _names(key, metric):
                return higher_is_better(metric)
        return self.directions.get(name)

    def _measured(self, stage: str) -> dict[str, Metric]:
        return {
            key: metric for key, metric in self._metrics.items() if stage != "train" or key not in self._only_evaluated
        }

    def _names(self) -> set[str]:
        return {name for key, metric in self._metrics.items() for name in _names(key, metric)} | set(self.directions)


def _names(key: str, metric: Metric) -> tuple[str, ...]:
    return names_of(metric.name) if isinstance(metric, ComputedMetric) else (key,)
