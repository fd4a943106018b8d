"""Images of each validation, in TensorBoard and experiment trackers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from camshaft.engine import (
    Callback,
    ConfigurationError,
    DataError,
    Engine,
    FitStart,
    ValidationStepEnd,
    at,
    can_take,
    first_tensor,
    label,
    outline,
    whole_number,
)

from .tensorboard import TensorBoard
from .tracker import Tracker

logger = logging.getLogger("camshaft")


class Images(Callback):
    """Sends images of the first batch of each validation to every attached `TensorBoard` and `Tracker`.

    With data in the same order these are the same samples each time; TensorBoard has a slider over the steps.

    Args:
        images: what to show, ``images(batch, output)``: a tensor [N, C, H, W] or [N, H, W] of bytes or floats, C being
            1 or 3, such as ``lambda batch, output: torch.cat([batch[0], output], dim=3)`` for a reconstruction beside
            its input. By default the inputs. Floats are stretched from the least to the greatest of each image.
        every: of how many validations one is shown.
        num: how many images at most.

    Raises:
        ConfigurationError: for settings that cannot work; before the first step if neither is attached.
        DataError: in the first validation, for what is no batch of images.
    """

    main_only = True

    def __init__(self, images: Callable[[Any, Any], Tensor] | None = None, *, every: int = 1, num: int = 8) -> None:
        if images is not None and not (callable(images) and can_take(images, 2)):
            raise ConfigurationError(
                f"Images was given {images!r}, which cannot be called with a batch and its output. "
                "Write Images(lambda batch, output: ...)."
            )
        self._images = images
        self.every = whole_number("Images' every", every, least=1)
        self.num = whole_number("Images' num", num, least=1)
        self._writers: list[TensorBoard | Tracker] = []

    def attach(self, engine: Engine) -> None:
        """Hear the first step of each validation."""
        super().attach(engine)
        engine.subscribe(ValidationStepEnd, self._write, when=at(1))

    def on_fit_start(self, event: FitStart) -> None:
        """Find where to write."""
        self._writers = [one for one in event.engine.listeners.callbacks if isinstance(one, TensorBoard | Tracker)]
        if not self._writers:
            raise ConfigurationError(
                "Images are for TensorBoard or an experiment tracker, and there is neither. Attach TensorBoard()."
            )

    def _write(self, event: ValidationStepEnd) -> None:
        engine = event.engine
        if engine.num_validations % self.every:
            return
        if self._images is not None and event.output is None:
            logger.warning("Images had no output to show at step %d: the batch came in parts.", engine.step)
            return
        images = self._inputs(event) if self._images is None else self._images(event.batch, event.output)
        name, image = f"{label('val', event.dataset)}_images", _side_by_side(images, self.num)
        for writer in self._writers:
            (writer.writer if isinstance(writer, TensorBoard) else writer).add_image(name, image, engine.step)

    def _inputs(self, event: ValidationStepEnd) -> Any:
        stepper = event.engine.stepper
        return first_tensor(event.batch if stepper is None else stepper.inputs(event.batch))


def _side_by_side(images: Any, num: int) -> Tensor:
    """Return the first images as one, [3, H, W].

    Raises:
        DataError: for what is no batch of images.
    """
    from torchvision.utils import make_grid

    pixels = images.detach()[:num] if isinstance(images, Tensor) and images.ndim in (3, 4) else None
    if pixels is not None and pixels.ndim == 3:
        pixels = pixels.unsqueeze(1)
    if pixels is None or pixels.shape[1] not in (1, 3) or not len(pixels):
        raise DataError(
            f"Images got {outline(images)}, which is no batch of images. "
            "Return a tensor [N, C, H, W] with 1 or 3 channels: Images(lambda batch, output: ...)."
        )
    pixels = pixels.cpu()
    are_floats = pixels.dtype != torch.uint8
    if are_floats:
        pixels = torch.nan_to_num(pixels.float(), nan=0.0, posinf=0.0, neginf=0.0)
    grid: Tensor = make_grid(pixels, nrow=num, normalize=are_floats, scale_each=are_floats)
    return grid
