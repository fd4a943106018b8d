"""Images of each validation, read back with TensorBoard's own reader."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import refused
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from camshaft.callbacks import Images, MicroBatch, TensorBoard
from camshaft.engine import Callback, ConfigurationError, DataError, Engine, Trainer

Batches = list[tuple[Tensor, Tensor]]


def pictures(*sizes: int, channels: int = 3, seed: int = 0) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.rand(size, channels, 5, 7, generator=generator) for size in sizes]
    return [(one, one.flatten(1).mean(1, keepdim=True)) for one in inputs]


def trainer_of(*callbacks: Callback, channels: int = 3) -> Engine:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(channels * 35, 1))
    return Trainer(model, torch.optim.SGD(model.parameters(), 0.01), nn.MSELoss(), callbacks=callbacks)


def read(directory: Path, name: str) -> list[tuple[int, Tensor]]:
    """The steps and the pixels, [H, W, 3]."""
    events = EventAccumulator(str(directory), size_guidance={"images": 0})
    events.Reload()
    return [(one.step, pixels_of(one.encoded_image_string)) for one in events.Images(name)]


def pixels_of(encoded: bytes) -> Tensor:
    with Image.open(io.BytesIO(encoded)) as image:
        return torch.tensor(list(image.convert("RGB").tobytes()), dtype=torch.uint8).reshape(
            image.height, image.width, 3
        )


def test_the_first_inputs_of_each_validation_are_there_pixel_by_pixel(tmp_path: Path) -> None:
    val = pictures(4, 4, seed=1)
    trainer_of(TensorBoard(tmp_path), Images(num=3)).fit(pictures(4, 4), val, epochs=2)
    shown = read(tmp_path, "val_images")
    assert [step for step, _ in shown] == [2, 4]
    for _, pixels in shown:
        assert pixels.shape == (5 + 4, 3 * (7 + 2) + 2, 3)  # three beside one another, with a border of two pixels
        for place, image in enumerate(val[0][0][:3]):
            ours = pixels[2:7, 2 + 9 * place : 9 + 9 * place].double() / 255
            stretched = (image - image.min()) / (image.max() - image.min())
            torch.testing.assert_close(ours, stretched.permute(1, 2, 0).double(), atol=1 / 255, rtol=0)


def test_a_function_makes_them_of_batch_and_output_and_bytes_stay_as_they_are(tmp_path: Path) -> None:
    def predicted(batch: Any, output: Tensor) -> Tensor:
        return torch.full((len(output), 4, 4), 200, dtype=torch.uint8)

    trainer_of(TensorBoard(tmp_path), Images(predicted, every=2)).fit(pictures(4), pictures(2), epochs=4)
    shown = read(tmp_path, "val_images")
    assert [step for step, _ in shown] == [2, 4]
    assert bool((shown[0][1][2:6, 2:6] == 200).all())


def test_each_validation_set_has_its_images(tmp_path: Path) -> None:
    sets = {"clean": pictures(2), "noisy": pictures(2, seed=3)}
    trainer_of(TensorBoard(tmp_path), Images()).fit(pictures(4), sets, epochs=1)
    assert len(read(tmp_path, "val_clean_images")) == 1
    with pytest.raises(KeyError):
        read(tmp_path, "val_images")


def test_of_a_batch_in_parts_there_is_no_output_to_show(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Small(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            if len(inputs) > 2:
                raise torch.OutOfMemoryError
            return super().forward(inputs)

    model = nn.Sequential(nn.Flatten(), Small(105, 1))
    callbacks = [MicroBatch(), TensorBoard(tmp_path), Images(lambda batch, output: output.reshape(-1, 1, 1, 1))]
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), 0.01), nn.MSELoss(), callbacks=callbacks)
    with caplog.at_level(logging.WARNING):
        trainer.fit(pictures(4), pictures(4), epochs=1)
    assert "no output to show at step 1" in caplog.text


def test_what_is_no_batch_of_images_is_refused(tmp_path: Path) -> None:
    for channels in (2, 5):
        trainer = trainer_of(TensorBoard(tmp_path / str(channels)), Images(), channels=channels)
        with pytest.raises(DataError, match="which is no batch of images"):
            trainer.fit(pictures(4, channels=channels), pictures(4, channels=channels), epochs=1)
    with refused(ConfigurationError, "cannot be called with a batch and its output", "Write Images(lambda"):
        Images(lambda batch: batch)  # type: ignore[arg-type,misc]
    with refused(ConfigurationError, "Images' every is 0"):
        Images(every=0)
    with pytest.raises(ConfigurationError, match="Attach TensorBoard"):
        trainer_of(Images()).fit(pictures(4), pictures(4), epochs=1)
