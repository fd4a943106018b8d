"""Values on their way from a device to the host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

K = TypeVar("K")


class Arriving(Generic[K]):
    """Numbers whose copies to the host have begun, so that nothing has to wait for the device.

    Args:
        values: by name, each a number or a tensor of one element. Those not on a CUDA device are read at once.

    >>> Arriving({"loss": torch.tensor(0.5), "rate": 0.1}).values()
    {'loss': 0.5, 'rate': 0.1}
    """

    def __init__(self, values: Mapping[K, float | Tensor]) -> None:
        self._values = {name: _sent(value) for name, value in values.items()}
        is_on_its_way = any(isinstance(value, Tensor) and value.is_cuda for value in values.values())
        self._event = torch.cuda.Event() if is_on_its_way else None
        if self._event is not None:
            self._event.record()

    def is_done(self) -> bool:
        """Return whether all of them have arrived; does not wait."""
        return self._event is None or bool(self._event.query())

    def values(self) -> dict[K, float]:
        """Return them, by name; waits for those that have not arrived."""
        if self._event is not None:
            self._event.synchronize()
        return {name: float(value) for name, value in self._values.items()}


def _sent(value: float | Tensor) -> float | Tensor:
    """Return where a value will be on the host, without waiting for it; a device without such copies is waited for."""
    if not isinstance(value, Tensor) or not value.is_cuda:
        return float(value)
    return torch.empty((), dtype=value.dtype, pin_memory=True).copy_(value.detach().reshape(()), non_blocking=True)


class ArrivingTensor:
    """A tensor whose copy to the host has begun, so that nothing has to wait for the device.

    Args:
        tensor: one on another device than CUDA's is copied at once.

    >>> ArrivingTensor(torch.tensor([1, 2])).tolist()
    [1, 2]
    """

    def __init__(self, tensor: Tensor) -> None:
        tensor = tensor.detach()
        self._event = torch.cuda.Event() if tensor.is_cuda else None
        if self._event is None:
            self._tensor = tensor.cpu()
        else:
            self._tensor = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
            self._event.record()

    def is_done(self) -> bool:
        """Return whether it has arrived; does not wait."""
        return self._event is None or bool(self._event.query())

    def tolist(self) -> Any:
        """Return its values; waits if it has not arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensor.tolist()
