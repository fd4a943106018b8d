"""Averages that are right: every value is a (sum, weight) pair, and the sums stay on the device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .batch import tree_map
from .errors import DataError
from .metric import ComputedMetric, FunctionMetric, Metric


class AverageMeter:
    """The running average of one value: ``val`` (newest), ``sum``, ``count`` and ``avg``.

    A tensor's sum is kept on its device, in double precision where the device has it; nothing waits for the
    device until ``avg`` is read.

    Args of `update`: ``val`` is the mean over ``n`` samples, as a number or a tensor of one element.

    >>> meter = AverageMeter()
    >>> meter.update(1.0, n=3)
    >>> meter.update(torch.tensor(5.0), n=1)
    >>> meter.avg, meter.count
    (2.0, 4)
    """

    __slots__ = ("count", "sum", "val")

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.val: float | Tensor = 0.0
        self.sum: float | Tensor = 0.0
        self.count: float = 0

    def update(self, val: float | Tensor, n: float = 1) -> None:
        """Add ``val``, the mean over ``n`` samples.

        Raises:
            DataError: if ``val`` is a tensor of more than one element.
        """
        if isinstance(val, Tensor):
            if val.ndim:
                val = _only_element(val)
            val = val.detach()
            if not isinstance(self.sum, Tensor):
                self.sum = torch.full((), self.sum, dtype=_widest(val.device), device=val.device)
            self.sum.add_(val, alpha=n)
        else:
            self.sum += val * n
        self.val = val
        self.count += n

    def take(self) -> tuple[float | Tensor, float]:
        """Return the sum and the count, and begin again at zero; the newest value stays."""
        taken = self.sum, self.count
        self.sum, self.count = 0.0, 0
        return taken

    @property
    def avg(self) -> float:
        """The average over all samples, NaN if there are none; reading it waits for the device."""
        return float(self.sum) / self.count if self.count else float("nan")

    def __repr__(self) -> str:
        return f"AverageMeter(avg={self.avg:.6g}, count={self.count})"


class Record:
    """What one stage (train, val or test) has accumulated: averages by name, and metrics.

    Args:
        metrics: the stage's own metrics by name; they are updated by `measure`.
    """

    def __init__(self, metrics: Mapping[str, Metric] | None = None) -> None:
        self.meters: dict[str, AverageMeter] = {}
        self.computed: dict[str, ComputedMetric] = {}
        self.functions: dict[str, FunctionMetric] = {}
        self._arriving: _Arriving | None = None
        self._arrived: dict[str, float] = {}
        self._earlier: dict[str, tuple[float | Tensor, float]] = {}  # sums and counts up to the last mark
        for name, metric in (metrics or {}).items():
            if isinstance(metric, ComputedMetric):
                self.computed[name] = metric.fresh()
            else:
                self.functions[name] = metric

    def reset(self) -> None:
        """Begin the stage again, with nothing in it."""
        self.meters.clear()
        self._earlier.clear()
        self._arriving, self._arrived = None, {}
        for metric in self.computed.values():
            metric.reset()

    def add(self, values: Mapping[str, float | Tensor], weight: float) -> None:
        """Add each value, the mean over ``weight`` samples; ignored if ``weight`` is 0.

        Raises:
            DataError: naming the value, if it is neither a number nor a tensor of one element.
        """
        if not weight:
            return  # the mean of nothing, which is NaN
        for name, value in values.items():
            if name in self.computed or name in self.functions:
                raise DataError(f'A value named "{name}" was recorded, which is a metric\'s. Give it another name.')
            self.accumulate(name, value, weight)

    def accumulate(self, name: str, value: float | Tensor, weight: float) -> None:
        """Add one value whose name is known to be free."""
        meter = self.meters.get(name)
        if meter is None:
            meter = self.meters[name] = AverageMeter()
        try:
            meter.update(value, weight)
        except (DataError, TypeError) as error:
            raise DataError(_not_a_number(name, value)) from error

    def measure(self, output: Any, target: Any, weight: float) -> None:
        """Update every metric with one batch; no gradients are recorded."""
        if self.functions and weight:
            with torch.no_grad():
                for name, metric in self.functions.items():
                    self.accumulate(name, metric(output, target), weight)
        for computed in self.computed.values():
            computed.update(output, target)

    def compute(self) -> dict[str, Any]:
        """Return every average and metric, the scalars as floats, in one transfer from each device.

        A metric that is not a scalar (a confusion matrix, per-class values) is returned as a tensor on the CPU.
        """
        totals = {name: self._total(name) for name in self.meters}
        values: dict[str, Any] = {name: total for name, (total, _) in totals.items()}
        for name, metric in self.computed.items():
            computed = metric.compute()
            if taken := values.keys() & computed.keys():
                raise DataError(
                    f'The metric "{name}" gives {sorted(taken)}, which exist already. Give it another name.'
                )
            values |= computed
        values = _to_host(values)
        return {name: value / totals[name][1] if name in totals else value for name, value in values.items()}

    def since_mark(self) -> dict[str, float]:
        """Return the averages of what was added since the last call, in one transfer."""
        added: dict[str, tuple[float | Tensor, float]] = {}
        for name, meter in self.meters.items():
            if meter.count:
                self._earlier[name] = self._total(name)
                added[name] = meter.take()  # so that a NaN of this stretch is not one of the next
        sums = _to_host({name: total for name, (total, _) in added.items()})
        return {name: total / added[name][1] for name, total in sums.items()}

    def _total(self, name: str) -> tuple[float | Tensor, float]:
        """Return the sum and the count of a value since the stage began."""
        meter = self.meters[name]
        if name not in self._earlier:
            return meter.sum, meter.count
        total, count = self._earlier[name]
        return total + meter.sum, count + meter.count

    def state_dict(self) -> dict[str, Any]:
        """Return the open averages and metrics."""
        return {
            "earlier": dict(self._earlier),
            "meters": {name: [meter.val, meter.sum, meter.count] for name, meter in self.meters.items()},
            "metrics": {name: metric.state_dict() for name, metric in self.computed.items()},
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Take back what `state_dict` returned, onto ``device``."""
        self.reset()
        for name, (val, total, count) in state["meters"].items():
            meter = self.meters[name] = AverageMeter()
            meter.val, meter.sum = tree_map(lambda tensor: tensor.to(device), (val, total))
            meter.count = count
        self._earlier = tree_map(lambda tensor: tensor.to(device), dict(state["earlier"]))
        for name, metric in self.computed.items():
            if name in state["metrics"]:
                metric.load_state_dict(state["metrics"][name], device)

    def peek(self) -> dict[str, float]:
        """Return the newest averages that have arrived on the host, without waiting for the device.

        On the CPU these are the present ones. On an accelerator each call starts a copy and returns those
        whose copy is done.
        """
        if self._arriving is None:
            self._arriving = _Arriving({name: self._total(name) for name in self.meters})
        if self._arriving.done():
            self._arrived = self._arriving.averages()
            self._arriving = None
        return self._arrived


class _Arriving:
    """Averages on their way to the host."""

    def __init__(self, totals: Mapping[str, tuple[float | Tensor, float]]) -> None:
        self._counts = {name: count for name, (_, count) in totals.items()}
        self._sums: dict[str, float | Tensor] = {}
        self._event: torch.cuda.Event | None = None
        for name, (value, _) in totals.items():
            if isinstance(value, Tensor) and value.is_cuda:
                pinned = torch.empty((), dtype=value.dtype, pin_memory=True)
                value = pinned.copy_(value, non_blocking=True)
                self._event = self._event or torch.cuda.Event()
            self._sums[name] = value
        if self._event is not None:
            self._event.record()

    def done(self) -> bool:
        return self._event is None or bool(self._event.query())

    def averages(self) -> dict[str, float]:
        return {name: float(value) / self._counts[name] for name, value in self._sums.items()}


def _to_host(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values in their order, scalars as floats; all scalars of a device come in one transfer."""
    by_device: dict[torch.device, list[str]] = {}
    host: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            host[name] = None
            if value.numel() == 1:
                by_device.setdefault(value.device, []).append(name)
            else:
                host[name] = value.detach().cpu()
        else:
            host[name] = float(value)
    for device, names in by_device.items():
        stacked = torch.stack([values[name].detach().reshape(()).to(_widest(device)) for name in names])
        host.update(zip(names, stacked.tolist(), strict=True))
    return host


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no double precision


def _only_element(val: Tensor) -> Tensor:
    if val.numel() != 1:
        raise DataError(f"An average was given a tensor of shape {list(val.shape)}. Reduce it, as by .mean().")
    return val.reshape(())


def _not_a_number(name: str, value: object) -> str:
    if isinstance(value, Tensor):
        return f"{name} has shape {list(value.shape)}, but a recorded value is one number. Reduce it: {name}.mean()."
    return f"{name} is {value!r}, which is not a number. Record a float or a tensor of one element."


def prefixed(stage: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values under ``<stage>_<name>``.

    >>> prefixed("val", {"loss": 0.5})
    {'val_loss': 0.5}
    """
    return {f"{stage}_{name}": value for name, value in values.items()}


def scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """Return those values that are single numbers: what a history and a log hold."""
    return {name: value for name, value in values.items() if isinstance(value, float)}


def format_values(values: Mapping[str, Any], names: Iterable[str] | None = None) -> str:
    """Return the scalars as one line for people.

    >>> format_values({"train_loss": 0.12345, "val_acc": 0.5})
    'train_loss 0.1235  val_acc 0.5000'
    """
    chosen = scalars(values) if names is None else {name: values[name] for name in names}
    return "  ".join(f"{name} {_short(value)}" for name, value in chosen.items())


def _short(value: float) -> str:
    """Four decimals, or four significant digits where those would say nothing."""
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.4g}"
