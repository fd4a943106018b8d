"""Metrics of three kinds with one interface: plain functions, torchmetrics and ignite.metrics.

Neither library is imported here: an object of theirs can exist only where its module is loaded already.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .batch import first_tensor, tree_map
from .errors import CheckpointError, ConfigurationError, DataError, can_take, check_name, did_you_mean

FunctionMetric = Callable[[Any, Any], Tensor | float]
MetricName = str | tuple[str, ...]


class ComputedMetric:
    """A torchmetrics or ignite metric: updated with each batch, computed at the end of the stage.

    Args:
        name: what its value is called; a tuple of names selects those values from a metric that returns a dict.
        metric: the metric.
    """

    def __init__(self, name: MetricName, metric: Any) -> None:
        self.name = name
        self.metric = metric
        self.is_torchmetrics = _comes_from("torchmetrics", metric)
        self._updated = False
        self._at: torch.device | None = None  # where it has been moved to

    def fresh(self) -> ComputedMetric:
        """Return an independent copy with nothing in it."""
        # torchmetrics' own clone() is a deep copy, too.
        clone = ComputedMetric(self.name, copy.deepcopy(self.metric))
        for one in clone._torchmetrics() if self.is_torchmetrics else ():
            one.distributed_available_fn = _never  # the ranks are put together here, in one transfer for all metrics
        clone.reset()
        return clone

    def check_ranks(self, tensor_size: int) -> None:
        """Refuse a metric that several ranks cannot put together.

        Args:
            tensor_size: how many ranks see the same samples.

        Raises:
            ConfigurationError: for an ignite metric that keeps every sample, because ignite joins only parts of one
                size; and for any of ignite's under tensor parallelism, because ignite adds up all ranks.
        """
        if self.is_torchmetrics:
            return
        if tensor_size > 1:
            raise ConfigurationError(
                f"The ignite metric {self.name!r} adds up what all ranks have seen, and {tensor_size} of them "
                "see the same samples. Use a metric of torchmetrics, or compute it from what predict returns."
            )
        if any(isinstance(value, list) for value in self.metric._state_dict_per_rank().values()):
            raise ConfigurationError(
                f"The ignite metric {self.name!r} keeps every sample, and ignite can join those of several ranks only "
                "if all have as many. Take a metric of torchmetrics, or compute it from what predict returns."
            )

    def reset(self) -> None:
        """Forget every batch."""
        self.metric.reset()
        self._updated = False

    def update(self, output: Any, target: Any) -> None:
        """Take in one batch, on the batch's device.

        Raises:
            DataError: if the model's output is a dict of which the metric takes no part.
        """
        output = output.detach() if isinstance(output, Tensor) else tree_map(Tensor.detach, output)
        try:
            if self.is_torchmetrics:
                self._follow(output)
                self.metric.update(output, target)
            else:
                self.metric.update(self.metric._output_transform((output, target)))
        except (AttributeError, KeyError, TypeError) as error:  # what taking a dict for a tensor leads to
            if not isinstance(output, Mapping):
                raise
            raise DataError(
                f"The metric {self.name!r} was given the model's output, a dict with keys "
                f"{', '.join(map(str, output))}, and could not use it ({error}). Select the part that it needs: by "
                "torchmetrics.wrappers.LambdaInputTransformer, output_transform= of an ignite metric, or "
                "engine.measure(output[...], target) in your own step."
            ) from error
        self._updated = True

    def _follow(self, output: Any) -> None:
        """Move the metric to where the output is."""
        placed = output if isinstance(output, Tensor) else first_tensor(output)
        if placed is not None and placed.device != self._at:
            self._at = placed.device
            self.metric.to(self._at)

    def compute(self) -> dict[str, Any]:
        """Return the value under its name, or the values of a collection under ``name_key``; empty if unused.

        Raises:
            ConfigurationError: if a value is neither a number nor a tensor, or a value that was named does not exist.
        """
        if not self._updated:
            return {}
        name, value = self.name, self.metric.compute()
        if isinstance(name, tuple):
            return {key: _as_value(key, _pick(value, key)) for key in name}
        if isinstance(value, Mapping):
            return {f"{name}_{key}": _as_value(f"{name}_{key}", item) for key, item in value.items()}
        return {name: _as_value(name, value)}

    def compute_together(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """Return what `compute` does over the batches of all ranks.

        Args:
            states: what `state_dict` returned on each rank, in their order; empty in one process.
        """
        if not states or not any(state["updated"] for state in states):
            return self.compute()
        own, device = self.state_dict(), self._at or torch.device("cpu")
        if self.is_torchmetrics:
            self.load_state_dict(self.merged(states), device)
        elif not own["updated"]:
            self._load_nothing(next(state["states"] for state in states if state["updated"]))
        self._updated = True  # an ignite metric puts the ranks together itself, so that all of them must compute it
        computed = self.compute()
        if not own["updated"]:
            self.reset()
        elif self.is_torchmetrics:
            self.load_state_dict(own, device)
        return computed

    def _load_nothing(self, seen: list[dict[str, Any]]) -> None:
        """Let an ignite metric that has seen nothing have values of the kinds that another rank has."""
        nothing, state = self.metric._state_dict_per_rank(), seen[0]
        self.metric._load_state_dict_per_rank({name: _nothing_as(nothing[name], state[name]) for name in state})

    def continued(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the state from which a metric goes on that has seen what several have, in their order.

        Raises:
            CheckpointError: if they have seen something, and this is an ignite metric, or one of torchmetrics that
                only computes from the states of all ranks and cannot add to them.
        """
        seen = [state for state in states if state["updated"]]
        if len(seen) > 1 and not (self.is_torchmetrics and self._adds_up()):
            raise CheckpointError(
                f"The metric {self.name!r} was saved in the middle of an epoch on {len(states)} ranks, and cannot go "
                "on from what they have seen on another number. Resume on as many ranks."
            )
        return self.merged(states)

    def _adds_up(self) -> bool:
        """Return whether each state is a list, or says how those of several ranks become one."""
        return all(
            isinstance(default, list) or metric._reductions[name] is not None
            for metric in self._torchmetrics()
            for name, default in metric._defaults.items()
        )

    def merged(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the state of a torchmetrics metric, to compute from, that has seen what several have."""
        states = [state for state in states if state["updated"]] or states[:1]
        everywhere = [state["states"] for state in states]
        if len(states) == 1:
            return states[0]
        return {
            "updated": any(state["updated"] for state in states),
            "states": [
                {
                    name: _put_together([one[number][name] for one in everywhere], metric._reductions[name])
                    for name in metric._defaults
                }
                for number, metric in enumerate(self._torchmetrics())
            ],
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what the batches so far have left in the metric."""
        if not self.is_torchmetrics:
            return {"updated": self._updated, "states": [self.metric._state_dict_per_rank()] if self._updated else []}
        states = [{name: getattr(one, name) for name in one._defaults} for one in self._torchmetrics()]
        return {"updated": self._updated, "states": states}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Take back what `state_dict` returned, onto ``device``."""
        self._updated, self._at = state["updated"], None
        states = tree_map(lambda tensor: tensor.to(device), state["states"])
        if not self.is_torchmetrics:
            for saved in states:
                self.metric._load_state_dict_per_rank(saved)  # the other asks all ranks for theirs
            return
        for one, saved in zip(self._torchmetrics(), states, strict=True):
            one.to(device)
            for name, value in saved.items():
                setattr(one, name, value)
            one._update_count = int(self._updated)  # or compute() would warn that nothing was seen
            one._computed = None  # what it has computed of other states

    def _torchmetrics(self) -> list[Any]:
        """Return the single metric, or those of a collection, each followed by those that it wraps."""
        outer = self.metric.values() if isinstance(self.metric, Mapping | torch.nn.ModuleDict) else [self.metric]
        return [inner for one in outer for inner in one.modules() if _comes_from("torchmetrics", inner)]


def _nothing_as(nothing: Any, seen: Any) -> Any:
    """Return a value of a metric that has seen nothing, in the shape of one that has."""
    is_number = isinstance(nothing, int | float) and not isinstance(nothing, bool)
    if isinstance(seen, Tensor) and not isinstance(nothing, Tensor):
        return torch.full_like(seen, nothing if is_number else 0)
    return nothing if is_number or isinstance(nothing, Tensor) else seen


def _never() -> bool:
    return False


def _put_together(values: list[Any], reduction: Callable[[Any], Any] | None) -> Any:
    """Return one state of a torchmetrics metric from those of all ranks, as torchmetrics does between processes."""
    if isinstance(values[0], list):
        return [item for items in values for item in items]
    stacked = torch.stack([value.cpu() for value in values])
    return stacked if reduction is None else reduction(stacked)


Metric = FunctionMetric | ComputedMetric


def _pick(values: Any, key: str) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigurationError(
            f'The metric of which "{key}" was wanted has a single value. Name it by a string, not a tuple.'
        )
    if key not in values:
        raise ConfigurationError(
            f'"{key}" is not among the values of the metric: {", ".join(map(str, values))}. '
            f"{did_you_mean(key, map(str, values))}Name some of those."
        )
    return values[key]


def _as_value(name: str, value: Any) -> Any:
    """Return a number or a tensor, or refuse what is neither."""
    if isinstance(value, Tensor | int | float):
        return value
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise ConfigurationError(
            f'The metric "{name}" gave {value!r}, which is neither a number nor a tensor. '
            "Compute it yourself from what predict returns."
        ) from None


def as_metrics(metrics: object) -> dict[str, Metric]:
    """Return ``{name: metric}`` with each metric in the shape the engine uses.

    Raises:
        ConfigurationError: for a list, a class instead of an instance, or anything else that is not a metric.
    """
    if not isinstance(metrics, Mapping) and not _comes_from("torchmetrics", metrics):
        raise ConfigurationError(f'metrics is {metrics!r}, but each needs a name. Write metrics={{"acc": ...}}.')
    items: Mapping[MetricName, Any] = metrics  # type: ignore[assignment]  # a MetricCollection has items() as well
    found: dict[str, Metric] = {}
    for name, metric in items.items():
        if not all(isinstance(part, str) for part in names_of(name)):
            raise ConfigurationError(f'A metric is named {name!r}. Name it by a string: {{"acc": ...}}.')
        for part in names_of(name):
            check_name(part, ConfigurationError)
        key = ", ".join(names_of(name))
        if key in found:
            raise ConfigurationError(f'Two metrics are named "{key}". Give one of them another name.')
        found[key] = as_metric(name, metric)
    return found


def names_of(name: MetricName) -> tuple[str, ...]:
    """Return the names of a metric's values."""
    return name if isinstance(name, tuple) else (name,)


def as_metric(name: MetricName, metric: Any) -> Metric:
    """Return one metric in the shape the engine uses."""
    if isinstance(metric, type):
        raise ConfigurationError(f"The metric {name!r} is the class {metric.__name__}. Did you forget ()?")
    if _comes_from("torchmetrics", metric) or _comes_from("ignite.metrics", metric):
        return ComputedMetric(name, metric)
    if callable(metric) and can_take(metric, 2):
        if isinstance(name, tuple):
            raise ConfigurationError(f"The metric {name!r} is a function, which has one value. Name it by a string.")
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
