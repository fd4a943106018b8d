"""Placement: modules and batches on one device, whatever a batch looks like."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from helpers import class_batches, linear, make_trainer, refused
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader, TensorDataset

from camshaft.callbacks import Placement
from camshaft.callbacks.placement import devices
from camshaft.engine import ConfigurationError, Engine, FitStart, Trainer


class Pair(NamedTuple):
    image: Tensor
    label: Tensor


@dataclass(frozen=True)
class Sample:
    image: Tensor
    name: str


def one() -> Tensor:
    return torch.ones(2, 4)


def placed(batch: Any, **settings: Any) -> Any:
    """Return the batch as a step sees it, on the meta device: a second device that every machine has."""
    seen: list[Any] = []
    engine = Engine(lambda engine, batch: seen.append(batch), callbacks=[Placement("meta", **settings)])
    engine.fit([batch], epochs=1)
    return seen[0]


def test_auto_takes_the_fastest_device_there_is() -> None:
    """CUDA, else MPS, else the CPU; the CPU is always there, and last."""
    assert devices()[-1] == "cpu"
    assert Placement().device == torch.device(devices()[0])
    assert Placement("cpu").device == torch.device("cpu")


def test_every_tensor_of_a_batch_is_moved_and_its_shape_kept() -> None:
    """Through tuples, named tuples, dicts, dataclasses and lists; what is no tensor stays as it is."""
    batch = {"pair": Pair(one(), one()), "list": [one(), (one(), "text")], "sample": Sample(one(), "a"), "n": 3}
    moved = placed(batch)
    assert type(moved["pair"]) is Pair
    assert (type(moved["sample"]), moved["sample"].name) == (Sample, "a")
    tensors = [*moved["pair"], moved["list"][0], moved["list"][1][0], moved["sample"].image]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (moved["list"][1][1], moved["n"]) == ("text", 3)


class Encoding(UserDict[str, Any]):
    """As transformers' BatchEncoding: a mapping with more than its items, which moves itself."""

    def __init__(self, data: dict[str, Any], words: list[str]) -> None:
        super().__init__(data)
        self.words = words

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Encoding:
        self.data = {name: value.to(device, non_blocking=non_blocking) for name, value in self.data.items()}
        self.was_non_blocking = non_blocking
        return self


class Images:
    """As torchvision's ImageList: ``to`` takes a device and nothing else."""

    def __init__(self, tensors: Tensor) -> None:
        self.tensors = tensors

    def to(self, device: torch.device) -> Images:
        return Images(self.tensors.to(device))


class InPlace(Images):
    """Moves itself, and returns nothing."""

    def to(self, device: torch.device, non_blocking: bool = False) -> None:  # type: ignore[override]  # the point
        self.tensors = self.tensors.to(device)


def test_an_object_with_a_method_to_moves_itself() -> None:
    """Wherever it is in the batch; its copies are non-blocking if it can do that."""
    batch = {"text": Encoding({"ids": one()}, ["a"]), "pair": (Images(one()), [InPlace(one())])}
    moved = placed(batch)
    assert (type(moved["text"]), moved["text"].words, moved["text"].was_non_blocking) == (Encoding, ["a"], True)
    images, (in_place,) = moved["pair"]
    assert (type(images), type(in_place)) == (Images, InPlace)
    assert {one.device.type for one in (moved["text"]["ids"], images.tensors, in_place.tensors)} == {"meta"}


def test_an_error_in_a_method_to_is_its_own() -> None:
    class Broken(Images):
        def to(self, device: torch.device) -> Images:
            raise TypeError("cannot move")

    with pytest.raises(TypeError, match="cannot move"):
        placed(Broken(one()))


def test_a_packed_sequence_stays_one() -> None:
    """Its batch sizes stay on the CPU, where torch wants them."""
    moved, target = placed((pack_sequence([torch.ones(5, 3), torch.ones(2, 3)]), one()))
    assert type(moved) is PackedSequence
    assert (moved.data.device.type, moved.batch_sizes.device.type) == ("meta", "cpu")
    assert target.device.type == "meta"


@pytest.mark.parametrize("value", [Tensor, Images])
def test_a_class_in_a_batch_is_left_alone(value: Any) -> None:
    assert placed((one(), value))[1] is value


@pytest.mark.parametrize("batch", [one(), (one(), one()), [one(), one()], Pair(one(), one())])
def test_a_moved_batch_is_of_the_same_type(batch: Any) -> None:
    """A tensor stays a tensor, a tuple a tuple, a list a list."""
    assert type(placed(batch)) is type(batch)


def test_validation_evaluation_and_prediction_batches_are_moved_too() -> None:
    """A trainer on one device gets its batches there in every stage."""

    class Checked(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            seen.append(inputs.device.type)
            return super().forward(inputs)

    seen: list[str] = []
    model = Checked(4, 3)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), cpu_loss, callbacks=[Placement("cpu")])
    data = [(inputs.to("meta"), target) for inputs, target in class_batches(8)]
    with pytest.raises(NotImplementedError, match="meta"):  # a meta tensor has no data to move to the CPU
        trainer.fit(data, epochs=1)
    trainer.fit(class_batches(8), class_batches(8), epochs=1)
    trainer.evaluate(class_batches(8))
    trainer.predict(class_batches(8))
    assert seen == ["cpu"] * 4


def cpu_loss(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, target)


def test_every_part_that_is_a_module_is_moved_when_attached() -> None:
    """The loss, too, if it has buffers; other parts are left alone."""
    loss = nn.CrossEntropyLoss(weight=torch.ones(3))
    extra = torch.ones(1)
    engine = Engine(model=linear(), loss_fn=loss, extra=extra, callbacks=[Placement("meta")])
    assert {parameter.device.type for parameter in engine.parts["model"].parameters()} == {"meta"}
    assert loss.weight is not None
    assert loss.weight.device.type == "meta"
    assert (extra.device.type, engine.parts.device.type) == ("cpu", "meta")


def test_an_optimizer_made_before_keeps_hold_of_the_parameters() -> None:
    """Placement on the CPU changes nothing: the weights are those of the run without it, to the bit."""
    with_placement, plain = make_trainer(Placement("cpu")), make_trainer()
    for trainer in (with_placement, plain):
        trainer.fit(class_batches(8, 8, 3), epochs=2)
    for mine, other in zip(with_placement.parts["model"].parameters(), plain.parts["model"].parameters(), strict=True):
        assert torch.equal(mine, other)


def test_channels_last_applies_to_images_and_to_nothing_else() -> None:
    """Images [N, C, H, W] and convolutions change their memory format; values and other shapes stay."""
    images, flat = torch.randn(2, 3, 5, 5), torch.randn(2, 3, 5)
    seen: list[tuple[Tensor, Tensor]] = []
    model = nn.Conv2d(3, 4, 3)
    engine = Engine(
        lambda engine, batch: seen.append(batch), model=model, callbacks=[Placement("cpu", channels_last=True)]
    )
    engine.fit([(images, flat)], epochs=1)
    (moved, untouched) = seen[0]
    assert moved.is_contiguous(memory_format=torch.channels_last)
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(moved, images)
    assert untouched is flat


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "cud", "", "xpu", "cpu:x"])
def test_a_device_that_is_not_there_is_refused_at_construction(device: str) -> None:
    """The message names it and lists those that are."""
    with pytest.raises(ConfigurationError) as caught:
        Placement(device)
    assert str(caught.value).startswith(f"Device {device!r} does not exist on this machine.")
    assert f'Write one of {", ".join(devices())}, or "auto" for the first' in str(caught.value)


def test_explain_shows_where_batches_are_moved() -> None:
    """Placement has one handler, of BatchReady."""
    lines = make_trainer(Placement("cpu")).explain().splitlines()
    assert "Placement.on_batch_ready" in lines[lines.index("BatchReady") + 1]


@pytest.mark.gpu
def test_training_on_cuda_learns_what_training_on_the_cpu_does() -> None:
    """An optimizer made on the CPU trains the moved parameters, from a pinned loader, to nearly the same weights."""
    inputs, target = class_batches(200)[0]
    trainers = make_trainer(Placement("cuda")), make_trainer(Placement("cpu"))
    for trainer in trainers:
        loader = DataLoader(
            TensorDataset(inputs, target), batch_size=32, pin_memory=trainer.parts.device.type == "cuda"
        )
        trainer.fit(loader, loader, epochs=3)
    assert trainers[0].parts.device.type == "cuda"
    for mine, other in zip(
        trainers[0].parts["model"].parameters(), trainers[1].parts["model"].parameters(), strict=True
    ):
        torch.testing.assert_close(mine.cpu(), other, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_the_model_is_on_the_gpu_before_the_run_and_predictions_are_on_the_cpu() -> None:
    """What a FitStart handler sees is placed already; predict returns host tensors."""
    trainer = make_trainer(Placement("cuda:0"))
    places: list[torch.device] = []
    trainer.subscribe(FitStart, lambda event: places.append(event.engine.parts.device))
    trainer.fit(class_batches(8), epochs=1)
    assert places == [torch.device("cuda:0")]
    assert trainer.predict(class_batches(8)).device.type == "cpu"


@pytest.mark.parametrize(
    ("settings", "phrase"),
    [
        ({"device": "cuda:99"}, "Device 'cuda:99' does not exist on this machine"),
        ({"device": "gpu"}, "Device 'gpu' does not exist on this machine"),
        ({"device": ""}, "Device '' does not exist on this machine"),
        ({"device": None}, "Device 'None' does not exist on this machine"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_where_it_is_written(settings: dict[str, Any], phrase: str) -> None:
    with refused(ConfigurationError, phrase):
        Placement(**settings)


def test_a_device_that_is_not_there_is_answered_with_those_that_are() -> None:
    with refused(ConfigurationError, "cpu", '"auto"'):
        Placement("cuda:99")
