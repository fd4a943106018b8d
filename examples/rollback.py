"""Spoiled data: a run that goes back, leaves the batch out, and ends as if it had never been there.

    python examples/rollback.py

One image of scikit-learn's bundled digits is broken (its numbers are a million times too large, and its label is
wrong), and one holds a NaN. The same network is trained three times: on these data; on these data with a `Rollback`;
and on data without the two batches. The first comes to nothing. The weights of the other two are the same, to the bit.
Leaves a run directory for each, and a picture of their losses.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from camshaft.callbacks import Log, ProgressBar, Rollback, RunDirectory
from camshaft.engine import Callback, Engine, Logged, Trainer


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of every setting."""
    parser = argparse.ArgumentParser(description="Train on data that are partly spoiled.")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--every", type=int, default=20, help="steps from snapshot to snapshot")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="runs", help="where run directories are made")
    return parser


def load_digits() -> tuple[Tensor, Tensor, TensorDataset]:
    """Return 1,437 real digits [N, 64] and their labels [N] for training, and 360 for validation."""
    from sklearn.datasets import load_digits as load

    digits = load()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    train, val = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).split(1437)
    return images[train], labels[train], TensorDataset(images[val], labels[val])


def spoil(images: Tensor, broken: int, missing: int) -> Tensor:
    """Return the images with one that is far too bright, and one of which a pixel is missing."""
    spoiled = images.clone()
    spoiled[broken] *= 1e6
    spoiled[missing, 20] = math.nan
    return spoiled


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the share of right answers."""
    return (logits.argmax(dim=1) == labels).float().mean()


class Losses(Callback):
    """Keeps the loss of each step, for the picture."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}

    def on_logged(self, event: Logged) -> None:
        """Take the newest value of a step: after a rollback, it comes once more."""
        self.losses[event.at] = event.values["loss"]


def train_with(
    images: Tensor, labels: Tensor, batches: list[list[int]], val: TensorDataset, args: argparse.Namespace, name: str
) -> Engine:
    """Train one network on these batches: the same start, the same order."""
    torch.manual_seed(args.seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    run = RunDirectory(args.output, settings=vars(args) | {"run": name})
    callbacks: list[Callback] = [run, Log(every=1), Losses(), ProgressBar()]
    if name == "with a rollback":
        callbacks.append(Rollback("spike", every=args.every, window=50))
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), metrics={"acc": accuracy}, callbacks=callbacks)
    train = DataLoader(TensorDataset(images, labels), batch_sampler=batches)
    trainer.fit(train, DataLoader(val, args.batch_size), epochs=args.epochs)
    return trainer


def draw(trainers: dict[str, Engine], path: Path) -> None:
    """Draw the loss of each step of each run; one that is not finite leaves a gap."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.subplots()
    for number, (name, trainer) in enumerate(trainers.items()):
        kept = next(one for one in trainer.listeners.callbacks if isinstance(one, Losses))
        steps, losses = list(kept.losses), list(kept.losses.values())
        axes.plot(steps, losses, label=name, color=f"C{number}", linewidth=1, alpha=0.8)
    axes.set(title="training loss", xlabel="step", ylabel="cross entropy", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main(args: argparse.Namespace) -> dict[str, Engine]:
    """Train three times as the settings say and return the finished trainers."""
    images, labels, val = load_digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))
    batches = [batch.tolist() for batch in order.split(args.batch_size)]
    broken, missing = batches[25][3], batches[40][0]
    spoiled, wrong = spoil(images, broken, missing), labels.clone()
    wrong[broken] = (labels[broken] + 5) % 10
    good = [batch for batch in batches if broken not in batch and missing not in batch]

    trainers = {
        "spoiled data": train_with(spoiled, wrong, batches, val, args, "spoiled data"),
        "with a rollback": train_with(spoiled, wrong, batches, val, args, "with a rollback"),
        "without those batches": train_with(images, labels, good, val, args, "without those batches"),
    }

    directory = trainers["with a rollback"].directory
    assert directory is not None
    draw(trainers, directory / "losses.png")
    for name, trainer in trainers.items():
        print(f"{name}: validation accuracy {trainer.history['val_acc'][-1]:.4f}, in {trainer.directory}")
    for remark in trainers["with a rollback"].history.remarks:
        print(remark["text"])
    pair = [trainers[name].parts["model"].parameters() for name in ("with a rollback", "without those batches")]
    same = all(torch.equal(one, other) for one, other in zip(*pair, strict=True))
    print(f"the weights of the last two are bit-identical: {same}")
    print(f"losses: {directory / 'losses.png'}")
    return trainers


if __name__ == "__main__":
    main(get_args_parser().parse_args())
