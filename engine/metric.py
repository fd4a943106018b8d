"""Metrics from three houses behind one shape: plain functions, torchmetrics and ignite.metrics.

Neither library is imported here: an object of theirs can exist only where its module is loaded already.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .batch import tree_map
from .errors import ConfigurationError, DataError, can_take

FunctionMetric = Callable[[Any, Any], Tensor | float]


class ComputedMetric:
    """A torchmetrics or ignite metric: updated with each batch, computed at the end of the stage."""

    def __init__(self, name: str, metric: Any) -> None:
        self.name = name
        self.metric = metric
        self.is_torchmetrics = _comes_from("torchmetrics", metric)
        self._updated = False

    def fresh(self) -> ComputedMetric:
        """Return an independent copy with nothing in it."""
        # torchmetrics' own clone() is a deep copy, too.
        clone = ComputedMetric(self.name, copy.deepcopy(self.metric))
        clone.reset()
        return clone

    def reset(self) -> None:
        """Forget every batch."""
        self.metric.reset()
        self._updated = False

    def update(self, output: Any, target: Any) -> None:
        """Take in one batch, on the batch's device.

        Raises:
            DataError: if the model's output is a dict, which no metric of these libraries reads.
        """
        if isinstance(output, Mapping):
            raise DataError(
                f"The metric {self.name!r} was given the model's output, a dict with keys "
                f"{', '.join(map(str, output))}. Write a function that picks one, "
                f'or run your own step and call engine.measure(output["..."], target).'
            )
        output = tree_map(Tensor.detach, output)
        if self.is_torchmetrics:
            if isinstance(output, Tensor) and self._device() != output.device:
                self.metric.to(output.device)
            self.metric.update(output, target)
        else:
            self.metric.update(self.metric._output_transform((output, target)))
        self._updated = True

    def compute(self, name: str) -> dict[str, Any]:
        """Return the value under ``name``, or the values of a collection under ``name_key``; empty if unused."""
        if not self._updated:
            return {}
        value = self.metric.compute()
        if isinstance(value, Mapping):
            return {f"{name}_{key}": item for key, item in value.items()}
        if not isinstance(value, Tensor | int | float):
            try:
                value = torch.as_tensor(value)
            except (TypeError, ValueError, RuntimeError):
                raise ConfigurationError(
                    f'The metric "{name}" gave {value!r}, which is neither a number nor a tensor. '
                    "Compute it by yourself, from what predict returns."
                ) from None
        return {name: value}

    def state_dict(self) -> dict[str, Any]:
        """Return what the batches so far have left in the metric."""
        if not self.is_torchmetrics:
            return {"updated": self._updated, "states": [self.metric.state_dict()] if self._updated else []}
        states = [{name: getattr(one, name) for name in one._defaults} for one in self._torchmetrics()]
        return {"updated": self._updated, "states": states}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Take back what `state_dict` returned, onto ``device``."""
        self._updated = state["updated"]
        states = tree_map(lambda tensor: tensor.to(device), state["states"])
        if not self.is_torchmetrics:
            for saved in states:
                self.metric.load_state_dict(saved)
            return
        for one, saved in zip(self._torchmetrics(), states, strict=True):
            one.to(device)
            for name, value in saved.items():
                setattr(one, name, value)
            one._update_count = int(self._updated)  # or compute() would warn that nothing was seen

    def _torchmetrics(self) -> list[Any]:
        """Return the single metric, or those of a collection."""
        return list(self.metric.values()) if isinstance(self.metric, Mapping | torch.nn.ModuleDict) else [self.metric]

    def _device(self) -> torch.device | None:
        device = getattr(self.metric, "device", None)  # a MetricCollection has none
        return device if isinstance(device, torch.device) else None


Metric = FunctionMetric | ComputedMetric


def as_metrics(metrics: object) -> dict[str, Metric]:
    """Return ``{name: metric}`` with each metric in the shape the engine uses.

    Raises:
        ConfigurationError: for a list, a class instead of an instance, or something that is no metric.
    """
    if not isinstance(metrics, Mapping) and not _comes_from("torchmetrics", metrics):
        raise ConfigurationError(f'metrics is {metrics!r}, but each needs a name. Write metrics={{"acc": ...}}.')
    items: Mapping[str, Any] = metrics  # type: ignore[assignment]  # a MetricCollection has items() as well
    return {name: as_metric(name, metric) for name, metric in items.items()}


def as_metric(name: str, metric: Any) -> Metric:
    """Return one metric in the shape the engine uses."""
    if isinstance(metric, type):
        raise ConfigurationError(f"The metric {name!r} is the class {metric.__name__}. Did you forget ()?")
    if _comes_from("torchmetrics", metric) or _comes_from("ignite.metrics", metric):
        return ComputedMetric(name, metric)
    if callable(metric) and can_take(metric, 2):
        return metric  # type: ignore[no-any-return]  # its arguments show at the first call
    raise ConfigurationError(
        f"The metric {name!r} is {metric!r}, which cannot be computed. "
        "Pass a function (output, target) -> tensor, a torchmetrics metric or an ignite metric."
    )


def higher_is_better(metric: Metric) -> bool | None:
    """Return what the metric says of itself: True, False, or None if it does not say."""
    said = getattr(metric.metric if isinstance(metric, ComputedMetric) else metric, "higher_is_better", None)
    return said if isinstance(said, bool) else None


def _comes_from(library: str, metric: object) -> bool:
    module = sys.modules.get(library)
    names = ("Metric", "MetricCollection")
    kinds = tuple(getattr(module, name) for name in names if isinstance(getattr(module, name, None), type))
    return bool(kinds) and isinstance(metric, kinds)
