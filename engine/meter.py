"""The average of one value, and which numbers and weights it takes."""

from __future__ import annotations

import math
import sys
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .errors import DataError

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
                val = only_element(val)
            val = val.detach()
        elif type(val) is not float:
            val = _plain(val)
        self.val = val
        if isinstance(n, Tensor):
            self._add_by_tensor(val, n)
            return
        if isinstance(val, Tensor):
            if not isinstance(self.sum, Tensor):
                self.sum = as_tensor(self.sum, val.device)
            self.sum.add_(val, alpha=n)
        else:
            self.sum += val * n
        self.count += n

    def _add_by_tensor(self, val: float | Tensor, n: Tensor) -> None:
        """Add ``val`` by a weight that nobody has to wait for; sum and count are on the device from then on."""
        device = val.device if isinstance(val, Tensor) and val.device.type != "cpu" else n.device
        weight = only_element(n.detach()).to(device, widest(device), non_blocking=True)
        added = torch.where(weight == 0, 0.0, val * weight)  # the mean of nothing is NaN
        self.sum = as_tensor(self.sum, device).add_(added)
        self.count = as_tensor(self.count, device).add_(weight)

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


def widest(device: torch.device) -> torch.dtype:
    """Return the most exact floating dtype of a device."""
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no double precision


def as_tensor(value: float | Tensor, device: torch.device) -> Tensor:
    """Return a number as a tensor on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    return torch.full((), value, dtype=widest(device), device=device)


def only_element(val: Tensor) -> Tensor:
    """Return the one element of a tensor without dimensions.

    Raises:
        DataError: if there are more, or it is complex.
    """
    if val.numel() != 1 or val.is_complex():
        raise DataError(f"An average was given {described(val)}. Reduce it, as by .mean().")
    return val.reshape(())


def _plain(val: Any) -> float:
    """Return any real number, such as one of NumPy, as a plain float: a checkpoint can hold it."""
    try:
        number = val.item() if hasattr(val, "item") else val
        if isinstance(number, Real):
            return float(number)
    except (ValueError, OverflowError):  # an array of several, or an integer that is too large
        pass
    raise DataError(f"An average was given {described(val)}. Pass a float or a tensor of one element.")


def as_weight(weight: object) -> float | Tensor:
    """Return a stated number of samples: a plain float, or a tensor of one element, which is not looked into.

    Raises:
        DataError: if it is neither, or negative, NaN or infinite.
    """
    if isinstance(weight, Tensor):
        if weight.numel() != 1 or weight.is_complex():
            raise DataError(f"weight is {described(weight)}, but it is one real number. Reduce it: weight.sum().")
        return weight.reshape(())
    try:
        number = _plain(weight)
    except DataError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise DataError(f"weight is {described(weight)}, but it counts samples. Pass a finite number of at least 0.")
    return number


def described(value: object) -> str:
    """Return a value in words; an integer too large for a float may even be too large to be printed."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype)[6:]} tensor of shape {list(value.shape)}"
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        return "an integer too large for a float"
    return f"{value!r:.50}"
