"""The window of an update: what has come together since the last step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .meter import as_tensor, widest

MAIN = "optimizer"  # the part that is meant where no optimizer is named
TOGETHER = " + "


def key_of(names: Sequence[str]) -> str:
    """Return one key for the names of several optimizers that step together.

    >>> key_of(("muon", "adamw"))
    'muon + adamw'
    """
    return TOGETHER.join(dict.fromkeys(names))


@dataclass(frozen=True, slots=True)
class WindowSize:
    """How much goes into one update.

    Args:
        batches: number of batches per update.
        samples: number of samples per update; takes precedence over ``batches`` if it is given.
    """

    batches: int = 1
    samples: int | None = None


class Window:
    """What has come together for one update: of one optimizer, or of several that step together.

    Args:
        key: the name of the optimizer's part; of several, what `key_of` returns.

    Attributes:
        names: the names of the optimizers' parts.
        scaler: their loss scaler for float16, or None.
        num_made: how often they were due to step.
        has_gradients: whether anything was differentiated since then.
        batches, samples: what is in the window; samples are a tensor where their numbers are.
        part: samples of a batch that comes in parts, of which not all are there yet.
        nominal: samples that the full window would have, judged by its first batch; 0 before that.
    """

    __slots__ = ("batches", "has_gradients", "names", "nominal", "num_made", "part", "samples", "scaler")

    def __init__(self, key: str) -> None:
        self.names = tuple(key.split(TOGETHER))
        self.scaler: torch.amp.GradScaler | None = None
        self.num_made = 0
        self.has_gradients = False
        self.clear()

    def __str__(self) -> str:
        return " and ".join(f'"{name}"' for name in self.names)

    def clear(self) -> None:
        """Begin a new window."""
        self.batches = 0
        self.part = 0.0
        self.samples: float | Tensor = 0.0
        self.nominal: float | Tensor = 0.0

    def add(
        self, num_samples: float | Tensor, batch_size: float | None, size: WindowSize
    ) -> tuple[float | Tensor, bool]:
        """Add a batch, or a part of one; return the factor of its loss, and whether the window closes with it.

        Nothing waits for a number of samples that is a tensor, unless the size of the window or of the batch is a
        number of samples, too: whether that is reached is decided on the host.

        Args:
            num_samples: of the batch, or of the part.
            batch_size: of the whole batch, where this is a part of it.
            size: of the window.
        """
        if isinstance(num_samples, Tensor):
            device = num_samples.device
            num_samples = num_samples.detach().to(widest(device))
            if not isinstance(self.nominal, Tensor) and self.nominal:  # resumed; a float divides with another rounding
                self.nominal = as_tensor(self.nominal, device)
        factor: float | Tensor = 0.0
        if isinstance(num_samples, Tensor) or num_samples:
            if not isinstance(self.nominal, Tensor) and not self.nominal:
                self.nominal = _nominal(num_samples if batch_size is None else batch_size, size)
            self.samples = self.samples + num_samples
            factor = num_samples / self.nominal
        if batch_size is not None:
            self.part += float(num_samples)
            if self.part < batch_size:
                return factor, False
            self.part = 0.0
        self.batches += 1
        is_full = self.batches >= size.batches if size.samples is None else float(self.samples) >= size.samples
        return factor, is_full

    def correction(self) -> float | Tensor:
        """Return what the gradients are multiplied by, because the window holds more or less than is nominal."""
        if isinstance(self.samples, Tensor):
            return torch.where(self.samples == 0, 1.0, self.nominal / self.samples)  # of no samples, they are 0
        return self.nominal / self.samples if self.samples else 1.0


def _nominal(batch_size: float | Tensor, size: WindowSize) -> float | Tensor:
    """Return the samples of a full window, judged by its first batch."""
    if size.samples is not None:
        return size.samples
    nominal = batch_size * size.batches
    return nominal.clamp(min=1) if isinstance(nominal, Tensor) else nominal
