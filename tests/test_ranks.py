"""The same script on one process and on several: the same weights, averages and history, up to rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from camshaft.callbacks import Accumulate, ClipGradients, Distributed, EarlyStopping, Schedule, WeightAverage
from camshaft.engine import Callback, Engine, EpochStart, Trainer, made_whole

TOLERANCE = 1e-12


def data(num: int = 103, *, batch_size: int = 16, shuffle: bool = True, seed: int = 0) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num, 5, dtype=torch.float64, generator=generator)
    target = (inputs.sum(1) + inputs[:, 0] * inputs[:, 1] > 0).long()
    return DataLoader(TensorDataset(inputs, target), batch_size, shuffle=shuffle)


def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def accuracy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output.argmax(1) == target).double().mean()


def plain() -> list[Callback]:
    return []


def everything_on() -> list[Callback]:
    return [
        Accumulate(3),
        ClipGradients(0.5),
        WeightAverage(decay=0.9),
        Schedule(lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)),
        EarlyStopping("val_loss", patience=1, min_delta=0.004),
    ]


def fit(callbacks: Callable[[], list[Callback]], *, epochs: int = 4) -> dict[str, Any]:
    net = model()
    trainer = Trainer(
        net,
        torch.optim.SGD(net.parameters(), 0.3, momentum=0.9),
        nn.CrossEntropyLoss(),
        metrics={"acc": accuracy},
        callbacks=[Distributed(), *callbacks()],
        seed=7,
    )
    trainer.fit(data(), data(37, shuffle=False, seed=1), epochs=epochs)
    return outcome(trainer, net)


def function_style(callbacks: Callable[[], list[Callback]], *, epochs: int = 4) -> dict[str, Any]:
    net = model()

    def step(engine: Engine, batch: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
        output = net(batch[0])
        loss = nn.functional.cross_entropy(output, batch[1])
        if engine.training:
            engine.update(loss)
        return {"loss": loss, "acc": accuracy(output, batch[1])}

    engine = Engine(
        step,
        model=net,
        optimizer=torch.optim.SGD(net.parameters(), 0.3, momentum=0.9),
        callbacks=[Distributed(), *callbacks()],
        seed=7,
    )
    engine.stages.declare("loss", higher_is_better=False)
    engine.stages.declare("acc", higher_is_better=True)
    engine.fit(data(), data(37, shuffle=False, seed=1), epochs=epochs)
    return outcome(engine, net)


def script_style(callbacks: Callable[[], list[Callback]], *, epochs: int = 4) -> dict[str, Any]:
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), 0.3, momentum=0.9)
    engine = Engine(model=net, optimizer=optimizer, callbacks=[Distributed(), *callbacks()], seed=7)
    engine.stages.declare("loss", higher_is_better=False)
    engine.stages.declare("acc", higher_is_better=True)
    train, val = data(), data(37, shuffle=False, seed=1)
    by_hand = callbacks is plain
    for _ in engine.epochs(epochs):
        for inputs, target in engine.train(train):
            output = net(inputs)
            loss = nn.functional.cross_entropy(output, target)
            if by_hand:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            else:
                engine.update(loss)
            engine.record(loss=loss, acc=accuracy(output, target))
        for inputs, target in engine.validate(val):
            output = net(inputs)
            engine.record(loss=nn.functional.cross_entropy(output, target), acc=accuracy(output, target))
    return outcome(engine, net)


def outcome(engine: Engine, net: nn.Module) -> dict[str, Any]:
    return {
        "weights": torch.cat([made_whole(parameter).detach().cpu().reshape(-1) for parameter in net.parameters()]),
        "rows": engine.history.rows,
        "reason": engine.history.reason,
        "counters": [engine.epoch, engine.step, engine.num_updates, engine.num_validations],
    }


def assert_alike(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["counters"] == other["counters"]
    assert one["reason"] == other["reason"]
    torch.testing.assert_close(one["weights"], other["weights"], rtol=0, atol=TOLERANCE)
    for ours, theirs in zip(one["rows"], other["rows"], strict=True):
        assert ours == pytest.approx(theirs, rel=0, abs=TOLERANCE, nan_ok=True)


@pytest.mark.parametrize("callbacks", [plain, everything_on])
@pytest.mark.parametrize("style", [fit, function_style, script_style])
@pytest.mark.parametrize("world", [2, 4])
def test_several_ranks_train_as_one_process_does(
    world: int, style: Callable[..., dict[str, Any]], callbacks: Callable[[], list[Callback]]
) -> None:
    alone = style(callbacks)
    results = on_ranks(world, style, callbacks)
    for result in results:
        assert torch.equal(result["weights"], results[0]["weights"])
        assert result["rows"] == results[0]["rows"]
    assert_alike(results[0], alone)


class FreezeInTurn(Callback):
    """One layer learns in odd epochs, and another of the same number of parameters in even ones."""

    def on_epoch_start(self, event: EpochStart) -> None:
        layers = [layer for layer in event.engine.parts["model"] if isinstance(layer, nn.Linear)]
        for number, layer in enumerate(layers):
            layer.requires_grad_(event.engine.epoch % 2 == number)


@pytest.mark.parametrize("world", [2])
def test_as_many_parameters_frozen_as_set_free_are_noticed(world: int) -> None:
    alone = fit(lambda: [FreezeInTurn()])
    for result in on_ranks(world, fit, lambda: [FreezeInTurn()]):
        assert_alike(result, alone)


class Augmented(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Adds noise of torch's global generator to each sample when it is read."""

    def __init__(self) -> None:
        samples = data().dataset
        assert isinstance(samples, TensorDataset)
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, target = self._samples[index]
        return inputs + 0.1 * torch.randn(5), target


def fit_augmented(*, is_subset: bool, num_workers: int) -> dict[str, Any]:
    dataset = Subset(Augmented(), range(3, 90)) if is_subset else Augmented()
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), 0.3)
    trainer = Trainer(net, optimizer, nn.CrossEntropyLoss(), callbacks=[Distributed()], seed=7)
    trainer.fit(DataLoader(dataset, 16, shuffle=True, num_workers=num_workers), epochs=2)
    return outcome(trainer, net)


@pytest.mark.parametrize(("is_subset", "num_workers"), [(False, 0), (True, 0), (False, 1)])
def test_a_sample_is_augmented_alike_on_whichever_rank_it_is_read(is_subset: bool, num_workers: int) -> None:
    alone = fit_augmented(is_subset=is_subset, num_workers=num_workers)
    for result in on_ranks(2, lambda: fit_augmented(is_subset=is_subset, num_workers=num_workers)):
        assert_alike(result, alone)
