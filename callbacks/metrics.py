"""Metrics for people who run their own step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from camshaft.engine import Callback, Engine, as_metrics


class Metrics(Callback):
    """Computes metrics over each stage from what the step gives to ``engine.measure(output, target)``.

    `Trainer` calls that itself, and ``Trainer(metrics=...)`` does the same as this callback. Each stage has its own
    copy, which is updated with each batch and computed once, at the end of the stage.

    Args:
        metrics: ``{"acc": metric}``; a torchmetrics metric, an ignite metric, or a function
            ``(output, target) -> mean over the batch``, which is weighted by the number of samples. A tuple of names
            selects those values from a metric that returns a dict:
            ``{("map", "map_50"): MeanAveragePrecision()}``.
        train: measure in training, too; False leaves a costly metric to validations and ``evaluate``.

    Raises:
        ConfigurationError: if a value is not a metric, or a name is taken.

    >>> import torch
    >>> def accuracy(output, target):
    ...     return (output == target).float().mean()
    >>> def step(engine, batch):
    ...     engine.measure(*batch)
    >>> engine = Engine(step, callbacks=[Metrics({"acc": accuracy})])
    >>> engine.fit([(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 0]))], epochs=1)["train_acc"]
    [0.75]
    """

    def __init__(self, metrics: Mapping[Any, Any] | nn.ModuleDict, *, train: bool = True) -> None:
        self.metrics = metrics
        self.train = train
        self._names = list(as_metrics(metrics))

    def attach(self, engine: Engine) -> None:
        """Hand the metrics to the engine, which keeps them beside its averages."""
        super().attach(engine)
        engine.stages.add_metrics(self.metrics, train=self.train)

    def __repr__(self) -> str:
        return f"Metrics({', '.join(self._names)})"
