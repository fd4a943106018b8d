"""Parameter groups: weight decay on the weights, none on the biases.

    python examples/parameter_groups.py
    python examples/parameter_groups.py --weight-decay 0.01    # to see what it does

A small network learns scikit-learn's bundled digits by SGD with momentum. Leaves a picture of the weights, the curves,
the best weights, the log, the settings and the history.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import Accuracy

from camshaft.callbacks import BestCheckpoint, ProgressBar, Report, RunDirectory
from camshaft.engine import Engine, Trainer, decay_groups


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of every setting."""
    parser = argparse.ArgumentParser(description="Train with weight decay on weights only.")
    parser.add_argument("--weight-decay", type=float, default=1e-5, help="of the weights; that of the biases is 0")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="runs", help="where run directories are made")
    parser.add_argument("--rehearse", action="store_true", help="try the whole run first, in seconds")
    return parser


def load_digits() -> tuple[TensorDataset, TensorDataset]:
    """Return 1,797 real digits [N, 64] with labels [N]: 80 % for training, 20 % for validation."""
    from sklearn.datasets import load_digits as load

    digits = load()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    train, val = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).split(1437)
    return TensorDataset(images[train], labels[train]), TensorDataset(images[val], labels[val])


def draw_weights(model: nn.Module, path: Path) -> None:
    """Draw a histogram of each layer's weights, with their root mean square."""
    from matplotlib.figure import Figure

    weights = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.ndim > 1}
    figure = Figure(figsize=(3.6 * len(weights), 3.4), layout="constrained")
    for axes, (name, weight) in zip(figure.subplots(1, len(weights)), weights.items(), strict=True):
        axes.hist(weight.flatten().numpy(), bins=60)
        axes.set(title=f"{name}: {weight.square().mean().sqrt():.3f} rms", xlabel="value", ylabel="weights")
    figure.savefig(path, dpi=120)


def main(args: argparse.Namespace) -> Engine:
    """Train as the settings say and return the finished trainer."""
    torch.manual_seed(args.seed)
    train_set, val_set = load_digits()
    train = DataLoader(train_set, args.batch_size, shuffle=True)
    val = DataLoader(val_set, args.batch_size)

    model = nn.Sequential(
        nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    groups = decay_groups(model, args.weight_decay)
    for group in groups:
        count = sum(parameter.numel() for parameter in group["params"])
        print(f"weight decay {group['weight_decay']:g}: {len(group['params'])} tensors, {count} values")

    run = RunDirectory(args.output, settings=args)
    trainer = Trainer(
        model,
        torch.optim.SGD(groups, lr=args.lr, momentum=args.momentum),
        nn.CrossEntropyLoss(),
        metrics={"acc": Accuracy(task="multiclass", num_classes=10)},
        callbacks=[run, BestCheckpoint("val_acc", restore=True), Report(), ProgressBar()],
    )
    if args.rehearse:
        trainer.rehearse(train, val, epochs=args.epochs)
    trainer.fit(train, val, epochs=args.epochs)

    draw_weights(model, run.path / "weights.png")
    print(f"validation accuracy: {trainer.evaluate(val)['acc']:.4f}")
    print(f"run directory: {run.path}")
    return trainer


if __name__ == "__main__":
    main(get_args_parser().parse_args())
