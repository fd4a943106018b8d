"""What a handler of yours may write beside the curves of `TensorBoard`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class EventWriter:
    """Writes into the event file of a `TensorBoard`; what belongs to steps that a resumed run repeats is dropped.

    Methods are named as those of tensorboardX's ``SummaryWriter``. A failure to write warns, and ends the writing.

    Args:
        write: takes a step and a summary as tensorboardX makes it.
    """

    def __init__(self, write: Callable[[int, Callable[[], Any]], None]) -> None:
        self._write = write

    def add_scalar(self, name: str, value: float | Tensor, step: int) -> None:
        """Write a number."""
        from tensorboardX.summary import scalar

        self._write(step, lambda: scalar(name, float(value)))

    def add_image(self, name: str, image: Tensor, step: int) -> None:
        """Write an image [C, H, W] or [H, W], of bytes, or of floats from 0 to 1."""
        from tensorboardX.summary import image as image_summary

        pixels = image.detach().cpu()
        pixels = pixels if pixels.dtype == torch.uint8 else pixels.float()
        layout = "HW" if pixels.ndim == 2 else "CHW"
        self._write(step, lambda: image_summary(name, pixels.numpy(), dataformats=layout))

    def add_figure(self, name: str, figure: Any, step: int) -> None:
        """Write a matplotlib figure as an image."""
        self.add_image(name, figure_pixels(figure), step)

    def add_histogram(self, name: str, values: Tensor, step: int) -> None:
        """Write the distribution of a tensor's values; those that are not finite are left out."""
        from tensorboardX.summary import histogram

        finite = finite_values(values)
        if len(finite):
            self._write(step, lambda: histogram(name, finite.numpy(), bins=50))

    def add_text(self, name: str, text: str, step: int) -> None:
        """Write text, as Markdown."""
        from tensorboardX.summary import text as text_summary

        self._write(step, lambda: text_summary(name, text))


def finite_values(values: Tensor) -> Tensor:
    """Return those of a tensor's values that are finite, [N] on the host."""
    flat = values.detach().float().flatten()
    return flat[flat.isfinite()].cpu()


def figure_pixels(figure: Any) -> Tensor:
    """Return a matplotlib figure as an image [3, H, W] of bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8)
    width, height = canvas.get_width_height()
    return pixels.reshape(height, width, 4)[:, :, :3].permute(2, 0, 1)
