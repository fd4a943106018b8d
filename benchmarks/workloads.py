"""The work that is timed: one small model, its data, the hand-written loop and ours."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from camshaft.callbacks import BestCheckpoint, EarlyStopping, ProgressBar, RunDirectory
from camshaft.engine import Trainer

Batches = Iterable[tuple[Tensor, Tensor]]
NUM_CLASSES = 4
LR = 0.01
FOLDER = tempfile.TemporaryDirectory(prefix="bench-")


def build_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, NUM_CLASSES))


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LR)


def dataset(steps: int) -> TensorDataset:
    inputs = torch.randn(steps * 32, 16, generator=torch.Generator().manual_seed(0))
    return TensorDataset(inputs, inputs[:, :NUM_CLASSES].argmax(1))


def batches(steps: int, *, kind: str = "list") -> Any:
    """Return ``steps`` batches of 32 as a "list" of ready ones, or behind a DataLoader ("loader")."""
    data = dataset(steps)
    if kind == "loader":
        return DataLoader(data, batch_size=32, shuffle=True)
    inputs, target = data.tensors
    return list(zip(inputs.split(32), target.split(32), strict=True))


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(1) == target).float().mean()


class Moved:
    """Batches, each copied to the device when it is read."""

    def __init__(self, data: Any, device: str) -> None:
        self.data = data
        self.device = device

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for inputs, target in self.data:
            yield inputs.to(self.device, non_blocking=True), target.to(self.device, non_blocking=True)


def new_folder() -> Path:
    return Path(tempfile.mkdtemp(dir=FOLDER.name))


def hand_loop(
    train: Batches, val: Batches, *, model: nn.Module | None = None, metric: Any = None
) -> Callable[[], Any]:
    """Return a run of the loop one writes by hand: mean loss and accuracy, summed on the device, read once an epoch.

    ``metric`` is a torchmetrics metric in place of the accuracy function.
    """
    model = build_model() if model is None else model
    optimizer, loss_fn = build_optimizer(model), nn.CrossEntropyLoss()
    device = next(model.parameters()).device

    def measure(output: Tensor, target: Tensor, loss: Tensor, sums: list[Tensor], num: int) -> None:
        with torch.no_grad():
            sums[0].add_(loss.detach(), alpha=num)
            if metric is None:
                sums[1].add_(accuracy(output, target), alpha=num)
            else:
                metric.update(output.detach(), target)

    def finish(sums: list[Tensor], count: int) -> tuple[float, float]:
        loss, acc = (torch.stack(sums) / count).tolist()
        if metric is not None:
            acc = float(metric.compute())
            metric.reset()
        return loss, acc

    def new_sums() -> list[Tensor]:
        return [torch.zeros((), dtype=torch.float64, device=device) for _ in range(2)]

    def run() -> tuple[tuple[float, float], tuple[float, float]]:
        model.train()
        sums, count = new_sums(), 0
        for inputs, target in train:
            output = model(inputs)
            loss = loss_fn(output, target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            num = len(inputs)
            measure(output, target, loss, sums, num)
            count += num
        trained = finish(sums, count)
        model.eval()
        sums, count = new_sums(), 0
        with torch.no_grad():
            for inputs, target in val:
                output = model(inputs)
                measure(output, target, loss_fn(output, target), sums, len(inputs))
                count += len(inputs)
        return trained, finish(sums, count)

    return run


def everything_on(
    train: Batches, val: Batches, *, model: nn.Module | None = None, metric: Any = accuracy, more: Iterable[Any] = ()
) -> Callable[[], Any]:
    """Return a run of our trainer with bar, history, early stopping, best checkpoint and run directory."""
    model = build_model() if model is None else model
    folder = new_folder()
    callbacks = [
        *more,
        RunDirectory(folder, terminal=False),
        ProgressBar(file=io.StringIO()),
        EarlyStopping("val_acc", mode="max", patience=3),
        BestCheckpoint("val_acc", mode="max"),
    ]
    trainer = Trainer(
        model, build_optimizer(model), nn.CrossEntropyLoss(), metrics={"acc": metric}, callbacks=callbacks
    )
    return lambda: trainer.fit(train, val, epochs=1)


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


def digits_loader() -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Return loaders over the 1,797 handwritten digits of scikit-learn, with two workers each."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    data = TensorDataset(images, torch.tensor(digits.target))
    train, val = torch.utils.data.random_split(data, [1500, 297], generator=torch.Generator().manual_seed(0))
    kwargs: dict[str, Any] = {"batch_size": 32, "num_workers": 2, "persistent_workers": True}
    return DataLoader(train, shuffle=True, **kwargs), DataLoader(val, **kwargs)
