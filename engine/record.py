"""What a stage records: every value is a (sum, weight) pair, and the sums stay on the device."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .arriving import Arriving
from .batch import num_samples, tree_map
from .errors import DataError, check_name
from .meter import AverageMeter, Total, as_tensor, described, widest
from .metric import ComputedMetric, FunctionMetric, Metric
from .ranks import Ranks


class Record:
    """What one stage (train, val or test) has accumulated: averages by name, and metrics.

    Args:
        metrics: the stage's own metrics by name; they are updated by `measure`.
        ranks: over which averages and metrics are put together when they are computed.
        num_samples: tells the weight of a batch.
    """

    def __init__(
        self,
        metrics: Mapping[str, Metric] | None = None,
        ranks: Ranks | None = None,
        num_samples: Callable[[Any], float | Tensor] = num_samples,
    ) -> None:
        self.num_samples = num_samples
        self._ranks = ranks or Ranks()
        self.meters: dict[str, AverageMeter] = {}
        self.computed: dict[str, ComputedMetric] = {}
        self.functions: dict[str, FunctionMetric] = {}
        self._arriving: Arriving[tuple[str, str]] | None = None
        self._arrived: dict[str, float] = {}
        self._earlier: dict[str, Total] = {}  # sums and counts up to the last mark
        self._postponed: list[Callable[[], None]] | None = None  # what is to be recorded later
        for name, metric in (metrics or {}).items():
            if isinstance(metric, ComputedMetric):
                self.computed[name] = metric.fresh()
                if self._ranks.several:
                    self.computed[name].check_ranks(self._ranks.tensor_size)
            else:
                self.functions[name] = metric

    def reset(self) -> None:
        """Begin the stage again, with nothing in it."""
        self.meters.clear()
        self._earlier.clear()
        self._arriving, self._arrived = None, {}
        for metric in self.computed.values():
            metric.reset()

    @contextmanager
    def postponed(self) -> Iterator[None]:
        """Record what the block adds and measures when it has ended; if it fails, nothing of it.

        Without metrics, outputs are not kept until then.
        """
        outer, self._postponed = self._postponed, []
        calls = self._postponed
        try:
            yield
        finally:
            self._postponed = outer
        if outer is not None:
            outer += calls
            return
        for call in calls:
            call()

    def add(self, values: Mapping[str, float | Tensor], weight: float | Tensor) -> None:
        """Add each value, the mean over ``weight`` samples; ignored if ``weight`` is 0.

        Raises:
            DataError: naming the value, if it is neither a number nor a tensor of one element, or its name is taken.
        """
        if self._postponed is not None:
            self._postponed.append(partial(self.add, tree_map(Tensor.detach, dict(values)), weight))
            return
        if not isinstance(weight, Tensor) and not weight:
            self.expect(values)  # the mean of nothing, which is NaN
            return
        for name, value in values.items():
            if name not in self.meters:
                _check_name(name)
            if name in self.computed or name in self.functions:
                raise DataError(f'A value named "{name}" was recorded, which is a metric\'s. Give it another name.')
            self.accumulate(name, value, weight)

    def expect(self, names: Iterable[str]) -> None:
        """Know that there are values of these names, although there are none here: other ranks may have some."""
        if self._postponed is not None:
            self._postponed.append(partial(self.expect, tuple(names)))
            return
        for name in names:
            if name not in self.meters:
                _check_name(name)
                self.meters[name] = AverageMeter()

    def accumulate(self, name: str, value: float | Tensor, weight: float | Tensor) -> None:
        """Add one value whose name is known to be free."""
        if self._postponed is not None:
            self._postponed.append(partial(self.accumulate, name, tree_map(Tensor.detach, value), weight))
            return
        meter = self.meters.get(name)
        if meter is None:
            meter = self.meters[name] = AverageMeter()
        try:
            meter.update(value, weight)
        except DataError as error:
            raise DataError(_not_a_number(name, value)) from error

    def measure(self, output: Any, target: Any, weight: float | Tensor) -> None:
        """Update every metric with one batch, unless ``weight`` is 0; no gradients are recorded."""
        if self._postponed is not None:
            if self.functions or self.computed:
                output, target = tree_map(Tensor.detach, (output, target))
                self._postponed.append(partial(self.measure, output, target, weight))
            return
        if not isinstance(weight, Tensor) and not weight:
            self.expect(self.functions)
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
        totals = _summed({name: self._total(name) for name in self.meters}, self._ranks)
        values: dict[str, Any] = {}
        everywhere = self._metric_states()
        for name, metric in self.computed.items():
            computed = metric.compute_together([states[name] for states in everywhere])
            for key in computed:  # a collection names its values itself
                check_name(key, DataError)
            if taken := (totals.keys() | values.keys()) & computed.keys():
                raise DataError(
                    f'The metric "{name}" gives {sorted(taken)}, which exist already. Give it another name.'
                )
            values |= computed
        return _averages(totals, values)

    def _metric_states(self) -> list[dict[str, Any]]:
        """Return the states of the metrics on every rank; of a single process, nothing is needed."""
        if not self.computed or not self._ranks.several:
            return []
        return self._ranks.gather({name: metric.state_dict() for name, metric in self.computed.items()})

    def since_mark(self) -> dict[str, float]:
        """Return the averages of what was added since the last call, in one transfer."""
        added: dict[str, Total] = {}
        for name, meter in self.meters.items():
            if self._ranks.several or isinstance(meter.count, Tensor) or meter.count:
                self._earlier[name] = self._total(name)
                added[name] = meter.take()  # so that a NaN of this stretch is not one of the next
        return _averages(_summed(added, self._ranks))

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

    def merged(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the state of a record that has seen what those of several ranks have."""
        metrics = [state["metrics"] for state in states]
        return {
            "earlier": _added([state["earlier"] for state in states]),
            "meters": _added([state["meters"] for state in states]),
            "metrics": {
                name: metric.continued([one[name] for one in metrics]) for name, metric in self.computed.items()
            },
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
            self._arriving = Arriving(_flat({name: self._total(name) for name in self.meters}))
        if self._arriving.is_done():
            self._arrived = averages_of(self._arriving.values())
            self._arriving = None
        return self._arrived

    def send(self) -> Arriving[tuple[str, str]]:
        """Begin to bring all sums and counts, those of all ranks together, to the host, and the newest values.

        Returned under ``(name, "sum")``, ``(name, "count")`` and ``(name, "newest")``. Every rank must ask for it at
        the same step; on an accelerator nothing waits for the device.
        """
        totals = {name: self._total(name) for name in self.meters}
        if self._ranks.several:
            names = sorted(totals)
            added = self._ranks.sum(_packed([value for name in names for value in totals[name]]))
            totals = {name: (added[2 * at], added[2 * at + 1]) for at, name in enumerate(names)}
        newest = {(name, "newest"): meter.val for name, meter in self.meters.items()}
        return Arriving({**_flat(totals), **newest})


def averages_of(values: Mapping[tuple[str, str], float]) -> dict[str, float]:
    """Return the averages of sums and counts that have arrived; without those to which nothing was added."""
    names = [name for name, what in values if what == "sum"]
    return {name: values[name, "sum"] / values[name, "count"] for name in names if values[name, "count"]}


def _flat(totals: Mapping[str, Total]) -> dict[tuple[str, str], float | Tensor]:
    sums = {(name, "sum"): total for name, (total, _) in totals.items()}
    return {**sums, **{(name, "count"): count for name, (_, count) in totals.items()}}


def _added(states: list[dict[str, Any]]) -> dict[str, Any]:
    """Return, by name, the newest value of the first rank, if there is one, and the sums of the sums and counts."""
    added: dict[str, Any] = {}
    for name in dict.fromkeys(name for state in states for name in state):
        entries = [state[name] for state in states if name in state]
        sums = [sum(entry[at] for entry in entries) for at in (-2, -1)]
        added[name] = [*entries[0][:-2], *sums]
    return added


def _summed(totals: dict[str, Total], ranks: Ranks) -> dict[str, Total]:
    """Return the sums and counts of all ranks, in one transfer.

    Raises:
        DataError: if the ranks have not recorded the same names.
    """
    if not ranks.several:
        return totals
    names = sorted(totals)
    pairs = [value for name in names for value in totals[name]]
    mark = zlib.crc32("\n".join(names).encode()) & 0xFFFFF  # 20 bits: its square and a sum of those are exact
    sent = _packed([float(mark), float(mark) ** 2, *pairs])
    received = ranks.sum(sent).tolist()
    if received[1] * ranks.data_world != received[0] ** 2:  # equal only if all marks are equal
        all_names = [set(one) for one in ranks.gather(names)]
        odd = sorted(all_names[0].union(*all_names) - all_names[0].intersection(*all_names))
        raise DataError(
            f"Not all ranks have recorded the same values: {', '.join(odd)}. "
            "Record every value on every rank, with weight=0 where there is nothing to add."
        )
    places = {name: 2 + 2 * at for at, name in enumerate(names)}
    return {name: (received[places[name]], received[places[name] + 1]) for name in totals}


def _packed(values: list[float | Tensor]) -> Tensor:
    """Return the values as one tensor, as long as those of any rank that recorded a few names more or fewer."""
    device = next((value.device for value in values if isinstance(value, Tensor)), torch.device("cpu"))
    tensors = [as_tensor(value, device).reshape(()).to(widest(device)) for value in values]
    length = max(256, 1 << (len(tensors) - 1).bit_length())
    return torch.stack(tensors + [torch.zeros_like(tensors[0])] * (length - len(tensors)))


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
        stacked = torch.stack([values[name].detach().reshape(()).to(widest(device)) for name in names])
        host.update(zip(names, stacked.tolist(), strict=True))
    return host


def _check_name(name: object) -> None:
    """Refuse what cannot name a value; asked once for each."""
    if not isinstance(name, str):
        raise DataError(f'A value is named {name!r}. Give it a string: {{"loss": ...}}.')
    check_name(name, DataError)
    if name == "weight":
        raise DataError(
            "A value is named weight, which is how the number of samples is stated. "
            "Write engine.record(loss=loss, weight=weight) in the step instead of returning it."
        )


def _not_a_number(name: str, value: object) -> str:
    if isinstance(value, Tensor) and value.is_complex():
        return f"{name} is {described(value)}, which is not a real number. Record a part of it: {name}.abs()."
    if isinstance(value, Tensor):
        return f"{name} has shape {list(value.shape)}, but a recorded value is one number. Reduce it: {name}.mean()."
    return f"{name} is {described(value)}, which is not a number. Record a float or a tensor of one element."
