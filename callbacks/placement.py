"""Model and batches on one device."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from camshaft.engine import BatchReady, Callback, ConfigurationError, Engine, has_shards, move, tree_map


class Placement(Callback):
    """Moves every part that is a module to ``device`` when attached, and each batch when it was read.

    Copies to an accelerator are non-blocking: with ``DataLoader(pin_memory=True)`` they overlap the computing. What is
    not a tensor and has a method ``to`` (a `PackedSequence`, transformers' ``BatchEncoding``) is moved by it.

    Args:
        device: "auto" (CUDA, else MPS, else the CPU), or a device such as "cuda:1". Under "auto", each of the
            ranks on a machine has a CUDA device of its own.
        channels_last: keep images [N, C, H, W] and convolutions in channels-last memory format.

    Raises:
        ConfigurationError: if the device is not there; the message lists those that are.
    """

    def __init__(self, device: str | torch.device = "auto", *, channels_last: bool = False) -> None:
        self.device = _find(device)
        self.channels_last = channels_last

    def attach(self, engine: Engine) -> None:
        """Move the modules; parameters stay the same objects, so an optimizer keeps hold of them."""
        super().attach(engine)
        for name, module in engine.parts.modules().items():
            if has_shards(module.parameters()):
                self._check_sharded(name, module)
            elif self.channels_last:
                module.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's stubs
            else:
                module.to(self.device)

    def _check_sharded(self, name: str, module: nn.Module) -> None:
        """Refuse to move what is sharded: that has put it where it is."""
        device = next(module.parameters()).device
        if device.type != self.device.type or self.channels_last:
            raise ConfigurationError(
                f"The part {name} is sharded on {device.type}, and {self!r} would move it. "
                f'Write Placement("{device.type}").'
            )

    def on_batch_ready(self, event: BatchReady) -> Any:
        """Return the batch on the device."""
        return tree_map(self._move, event.batch, for_objects=self._ask)

    def _move(self, tensor: Tensor) -> Tensor:
        if self.channels_last and tensor.ndim == 4:
            return tensor.to(self.device, non_blocking=True, memory_format=torch.channels_last)
        return tensor.to(self.device, non_blocking=True)

    def _ask(self, value: Any) -> Any:
        return move(value, self.device)

    def __repr__(self) -> str:
        return f"Placement({str(self.device)!r}, channels_last={self.channels_last})"


def _find(device: str | torch.device) -> torch.device:
    available = devices()
    if device == "auto":
        number = int(os.environ.get("LOCAL_RANK", "0"))  # set by torchrun
        return torch.device(available[number] if number < torch.cuda.device_count() else available[0])
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError):
        wanted = None
    if wanted is None or not _exists(wanted):
        raise ConfigurationError(
            f"Device {str(device)!r} does not exist on this machine. "
            f'Write one of {", ".join(available)}, or "auto" for the first of them.'
        )
    return wanted


def devices() -> list[str]:
    """Return the devices of this machine, the fastest first."""
    cuda = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return [*cuda, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]


def _exists(device: torch.device) -> bool:
    if device.type == "cuda":
        return (device.index or 0) < torch.cuda.device_count()
    return device.type in ("cpu", "meta") or (device.type == "mps" and torch.backends.mps.is_available())
