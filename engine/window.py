"""The window of an update: what has come together for one optimizer since its last step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

MAIN = "optimizer"  # the part that is meant where no optimizer is named


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
    """What has come together for one optimizer.

    Attributes:
        name: the name of the optimizer's part.
        scaler: its loss scaler for float16, or None.
        num_made: how often its optimizer was due to step.
        has_gradients: whether anything was differentiated since then.
        batches, samples: what is in the window.
        part: samples of a batch that comes in parts, of which not all are there yet.
        nominal: samples that the full window would have, judged by its first batch.
    """

    __slots__ = ("batches", "has_gradients", "name", "nominal", "num_made", "part", "samples", "scaler")

    def __init__(self, name: str) -> None:
        self.name = name
        self.scaler: torch.amp.GradScaler | None = None
        self.num_made = 0
        self.has_gradients = False
        self.clear()

    def clear(self) -> None:
        """Begin a new window."""
        self.batches = 0
        self.part = self.samples = self.nominal = 0.0

    def add(self, num_samples: float, batch_size: float, size: WindowSize) -> tuple[float, bool]:
        """Add a batch, or a part of one; return the factor of its loss, and whether the window closes with it."""
        share = 0.0
        if num_samples:
            if not self.samples:
                self.nominal = size.samples or batch_size * size.batches
            self.samples += num_samples
            share = num_samples / self.nominal
        self.part += num_samples
        if self.part < batch_size:
            return share, False
        self.part = 0.0
        self.batches += 1
        is_full = self.batches >= size.batches if size.samples is None else self.samples >= size.samples
        return share, is_full
