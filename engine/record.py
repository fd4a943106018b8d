"""Averages that are right: every value is a (sum, weight) pair, and the sums stay on the device."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .batch import tree_map
from .errors import DataError
from .metric import ComputedMetric, FunctionMetric, Metric

Total = tuple[float | Tensor, float | Tensor]  # a sum and a count


class AverageMeter:
    """The running average of one value: ``val`` (newest), ``sum``, ``count`` and ``avg``.

    A tensor's sum is kept on its device, in double precision where the device has it; nothing waits for the
    device until ``avg`` is read.

    Args of `update`: ``val`` is the mean over ``n`` samples, both as a number or a tensor of one element.

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
        self.count: float | Tensor = 0

    def update(self, val: float | Tensor, n: float | Tensor = 1) -> None:
        """Add ``val``, the mean over ``n`` samples.

        Raises:
            DataError: if ``val`` is not a real number, or a tensor of more than one element.
        """
        if isinstance(val, Tensor):
            if val.ndim or val.is_complex():
                val = _only_element(val)
            val = val.detach()
        elif type(val) is not float:
            val = _plain(val)
        self.val = val
        if isinstance(n, Tensor):
            self._add_by_tensor(val, n)
            return
        if isinstance(val, Tensor):
            if not isinstance(self.sum, Tensor):
                self.sum = _as_tensor(self.sum, val.device)
            self.sum.add_(val, alpha=n)
        else:
            self.sum += val * n
        self.count += n

    def _add_by_tensor(self, val: float | Tensor, n: Tensor) -> None:
        """Add ``val`` by a weight that nobody has to wait for; sum and count are on the device from then on."""
        device = val.device if isinstance(val, Tensor) and val.device.type != "cpu" else n.device
        weight = _only_element(n.detach()).to(device, _widest(device), non_blocking=True)
        added = torch.where(weight == 0, 0.0, val * weight)  # the mean of nothing is NaN
        self.sum = _as_tensor(self.sum, device).add_(added)
        self.count = _as_tensor(self.count, device).add_(weight)

    def take(self) -> Total:
        """Return the sum and the count, and begin again at zero; the newest value stays."""
        taken = self.sum, self.count
        self.sum, self.count = 0.0, 0
        return taken

    @property
    def avg(self) -> float:
        """The average over all samples, NaN if there are none; reading it waits for the device."""
        count = float(self.count)
        return float(self.sum) / count if count else float("nan")

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
        self._earlier: dict[str, Total] = {}  # sums and counts up to the last mark
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

    def add(self, values: Mapping[str, float | Tensor], weight: float | Tensor) -> None:
        """Add each value, the mean over ``weight`` samples; ignored if ``weight`` is 0.

        Raises:
            DataError: naming the value, if it is neither a number nor a tensor of one element, or its name is taken.
        """
        if not isinstance(weight, Tensor) and not weight:
            return  # the mean of nothing, which is NaN
        for name, value in values.items():
            if name not in self.meters:
                _check_name(name)
            if name in self.computed or name in self.functions:
                raise DataError(f'A value named "{name}" was recorded, which is a metric\'s. Give it another name.')
            self.accumulate(name, value, weight)

    def accumulate(self, name: str, value: float | Tensor, weight: float | Tensor) -> None:
        """Add one value whose name is known to be free."""
        meter = self.meters.get(name)
        if meter is None:
            meter = self.meters[name] = AverageMeter()
        try:
            meter.update(value, weight)
        except DataError as error:
            raise DataError(_not_a_number(name, value)) from error

    def measure(self, output: Any, target: Any, weight: float | Tensor) -> None:
        """Update every metric with one batch, unless ``weight`` is 0; no gradients are recorded."""
        if not isinstance(weight, Tensor) and not weight:
            return
        if self.functions:
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
        values: dict[str, Any] = {}
        for name, metric in self.computed.items():
            computed = metric.compute()
            if taken := (totals.keys() | values.keys()) & computed.keys():
                raise DataError(
                    f'The metric "{name}" gives {sorted(taken)}, which exist already. Give it another name.'
                )
            values |= computed
        return _averages(totals, values)

    def since_mark(self) -> dict[str, float]:
        """Return the averages of what was added since the last call, in one transfer."""
        added: dict[str, Total] = {}
        for name, meter in self.meters.items():
            if isinstance(meter.count, Tensor) or meter.count:
                self._earlier[name] = self._total(name)
                added[name] = meter.take()  # so that a NaN of this stretch is not one of the next
        return _averages(added)

    def _total(self, name: str) -> Total:
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
            meter.val, meter.sum, meter.count = tree_map(lambda tensor: tensor.to(device), (val, total, count))
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

    def __init__(self, totals: Mapping[str, Total]) -> None:
        self._totals = {name: (_sent(total), _sent(count)) for name, (total, count) in totals.items()}
        sums = [total for total, _ in totals.values()]  # a count is on the device only where its sum is
        self._event = torch.cuda.Event() if any(isinstance(one, Tensor) and one.is_cuda for one in sums) else None
        if self._event is not None:
            self._event.record()

    def done(self) -> bool:
        return self._event is None or bool(self._event.query())

    def averages(self) -> dict[str, float]:
        return {name: float(total) / float(count) for name, (total, count) in self._totals.items() if count}


def _sent(value: float | Tensor) -> float | Tensor:
    """Return where a value will be on the host, without waiting for it."""
    if not isinstance(value, Tensor) or not value.is_cuda:
        return value
    return torch.empty((), dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)


def _averages(totals: Mapping[str, Total], values: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return each sum divided by its count, and then further values, in one transfer from each device.

    The sums to which nothing was added are left out.
    """
    sums = {name: total for name, (total, _) in totals.items()}
    counts = {(name,): count for name, (_, count) in totals.items()}
    host = _to_host({**sums, **(values or {}), **counts})
    averages: dict[str, Any] = {name: host[name] / host[name,] for name in sums if host[name,]}
    return averages | {name: host[name] for name in values or ()}


def _to_host(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return the values in their order, scalars as floats; all scalars of a device come in one transfer."""
    by_device: dict[torch.device, list[Any]] = {}
    host: dict[Any, Any] = {}
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


def _as_tensor(value: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(device)
    return torch.full((), value, dtype=_widest(device), device=device)


def _only_element(val: Tensor) -> Tensor:
    if val.numel() != 1 or val.is_complex():
        raise DataError(f"An average was given {_described(val)}. Reduce it, as by .mean().")
    return val.reshape(())


def _plain(val: Any) -> float:
    """Return any real number, such as one of NumPy, as a plain float: a checkpoint can hold it."""
    try:
        number = val.item() if hasattr(val, "item") else val
        if isinstance(number, Real):
            return float(number)
    except (ValueError, OverflowError):  # an array of several, or an integer that is too large
        pass
    raise DataError(f"An average was given {_described(val)}. Pass a float or a tensor of one element.")


def as_weight(weight: object) -> float | Tensor:
    """Return a stated number of samples: a plain float, or a tensor of one element, which is not looked into.

    Raises:
        DataError: if it is neither, or negative, NaN or infinite.
    """
    if isinstance(weight, Tensor):
        if weight.numel() != 1 or weight.is_complex():
            raise DataError(f"weight is {_described(weight)}, but it is one real number. Reduce it: weight.sum().")
        return weight.reshape(())
    try:
        number = _plain(weight)
    except DataError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise DataError(f"weight is {_described(weight)}, but it counts samples. Pass a finite number of at least 0.")
    return number


def _described(value: object) -> str:
    """Return a value in words; an integer too large for a float may even be too large to be printed."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype)[6:]} tensor of shape {list(value.shape)}"
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        return "an integer too large for a float"
    return f"{value!r:.50}"


def _check_name(name: object) -> None:
    """Refuse what cannot name a value; asked once for each."""
    if not isinstance(name, str):
        raise DataError(f'A value is named {name!r}. Give it a string: {{"loss": ...}}.')
    if name == "weight":
        raise DataError(
            "A value is named weight, which is how the number of samples is stated. "
            "Write engine.record(loss=loss, weight=weight) in the step instead of returning it."
        )


def _not_a_number(name: str, value: object) -> str:
    if isinstance(value, Tensor) and value.is_complex():
        return f"{name} is {_described(value)}, which is not a real number. Record a part of it: {name}.abs()."
    if isinstance(value, Tensor):
        return f"{name} has shape {list(value.shape)}, but a recorded value is one number. Reduce it: {name}.mean()."
    return f"{name} is {_described(value)}, which is not a number. Record a float or a tensor of one element."


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
