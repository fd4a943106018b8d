"""Noisy labels: what symmetric cross entropy keeps that cross entropy loses.

    python examples/noisy_labels.py

Of the training labels of scikit-learn's bundled digits, 40 % are replaced by another class; the validation labels are
clean. One network is trained with each loss. Cross entropy comes to learn the wrong labels by heart and gets worse on
clean ones; the symmetric loss resists. Leaves a run directory for each loss, and a picture that compares them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from camshaft.callbacks import ProgressBar, Report, RunDirectory
from camshaft.engine import Engine, History, SymmetricCrossEntropy, Trainer

Sets = tuple[TensorDataset, TensorDataset]


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of every setting."""
    parser = argparse.ArgumentParser(description="Train on noisy labels with two losses.")
    parser.add_argument("--data", choices=["digits", "mnist"], default="digits")
    parser.add_argument("--data-dir", default="data", help="where MNIST lies or is downloaded to")
    parser.add_argument("--noise", type=float, default=0.4, help="share of the training labels that are made wrong")
    parser.add_argument("--alpha", type=float, default=0.1, help="weight of the cross entropy in the symmetric loss")
    parser.add_argument("--beta", type=float, default=1.0, help="weight of the reverse cross entropy")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.001)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="runs", help="where run directories are made")
    parser.add_argument("--rehearse", action="store_true", help="try the whole run first, in seconds")
    return parser


def load_digits() -> Sets:
    """Return 1,797 real digits [N, 64] with labels [N]: 80 % for training, 20 % for validation."""
    from sklearn.datasets import load_digits as load

    digits = load()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    train, val = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).split(1437)
    return TensorDataset(images[train], labels[train]), TensorDataset(images[val], labels[val])


def load_mnist(directory: str) -> Sets:
    """Return MNIST in the same form [N, 784], downloaded if it is not there."""
    from torchvision.datasets import MNIST

    train, val = (MNIST(directory, train=train, download=True) for train in (True, False))
    return tuple(TensorDataset(part.data.flatten(1) / 255, part.targets) for part in (train, val))  # type: ignore[return-value]  # two


def spoil(labels: Tensor, share: float) -> Tensor:
    """Return the labels [N], with a share of them replaced by another of the ten classes."""
    spoilt = torch.rand(len(labels)) < share
    return torch.where(spoilt, (labels + torch.randint(1, 10, labels.shape)) % 10, labels)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the share of right answers."""
    return (logits.argmax(dim=1) == labels).float().mean()


def train_with(loss_fn: nn.Module, run: RunDirectory, sets: Sets, args: argparse.Namespace) -> Engine:
    """Train one network with one loss: the same start, the same order of the data."""
    torch.manual_seed(args.seed)
    train_set, val_set = sets
    inputs = train_set.tensors[0].shape[1]
    model = nn.Sequential(nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    trainer = Trainer(model, optimizer, loss_fn, metrics={"acc": accuracy}, callbacks=[run, Report(), ProgressBar()])
    train = DataLoader(train_set, args.batch_size, shuffle=True)
    if args.rehearse:
        trainer.rehearse(train, DataLoader(val_set, args.batch_size), epochs=args.epochs)
    trainer.fit(train, DataLoader(val_set, args.batch_size), epochs=args.epochs)
    return trainer


def draw_comparison(histories: dict[str, History], noise: float, path: Path) -> None:
    """Draw the accuracies on noisy training labels and on clean validation labels, a colour for each loss."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for name, history in histories.items():
        left.plot(history["epoch"], history["train_acc"], label=name)
        right.plot(history["epoch"], history["val_acc"], label=name)
    left.axhline(1 - noise, color="grey", linestyle=":", label="labels that are right")
    left.set(title="training, noisy labels", xlabel="epoch", ylabel="accuracy")
    right.set(title="validation, clean labels", xlabel="epoch")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def main(args: argparse.Namespace) -> dict[str, Engine]:
    """Train with each loss as the settings say and return the finished trainers."""
    train_set, val_set = load_digits() if args.data == "digits" else load_mnist(args.data_dir)
    torch.manual_seed(args.seed)
    images, labels = train_set.tensors
    sets = TensorDataset(images, spoil(labels, args.noise)), val_set

    trainers = {}
    for loss_fn in (nn.CrossEntropyLoss(), SymmetricCrossEntropy(args.alpha, args.beta)):
        run = RunDirectory(args.output, settings=vars(args) | {"loss": repr(loss_fn)})
        trainers[type(loss_fn).__name__] = train_with(loss_fn, run, sets, args)

    picture = run.path / "comparison.png"
    draw_comparison({name: trainer.history for name, trainer in trainers.items()}, args.noise, picture)
    for name, trainer in trainers.items():
        print(f"{name}: accuracy on clean labels {trainer.history['val_acc'][-1]:.4f}, in {trainer.directory}")
    print(f"comparison: {picture}")
    return trainers


if __name__ == "__main__":
    main(get_args_parser().parse_args())
