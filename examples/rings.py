"""Two rings: a tiny network, a rare class, focal loss, and a penalty on the weights.

    python examples/rings.py

1,000 positives lie around a ring of radius 5 and 6,000 negatives around one of radius 8, both with unit noise, so that
they overlap: the best possible area under the ROC curve is 0.983. Leaves a picture of the data and of the predictions
side by side, the curves, the best weights, the log, the settings and the history.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import BinaryAUROC

from camshaft.callbacks import BestCheckpoint, EarlyStopping, Penalty, ProgressBar, Report, RunDirectory
from camshaft.engine import Engine, FocalLoss, Trainer


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of every setting."""
    parser = argparse.ArgumentParser(description="Tell two noisy rings apart.")
    parser.add_argument("--positives", type=int, default=1000)
    parser.add_argument("--negatives", type=int, default=6000)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--lr", type=float, default=0.002)
    parser.add_argument("--l1", type=float, default=1e-4, help="factor of the sum of absolute weights")
    parser.add_argument("--l2", type=float, default=1e-4, help="factor of half the sum of squared weights")
    parser.add_argument("--patience", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="runs", help="where run directories are made")
    parser.add_argument("--rehearse", action="store_true", help="try the whole run first, in seconds")
    return parser


def ring(num_points: int, radius: float) -> Tensor:
    """Return points [N, 2] around a ring: unit normal noise on the radius, the angle uniform."""
    radii = radius + torch.randn(num_points)
    angles = 2 * math.pi * torch.rand(num_points)
    return torch.stack([radii * angles.cos(), radii * angles.sin()], dim=1)


def make_rings(positives: int, negatives: int) -> tuple[TensorDataset, TensorDataset]:
    """Return 70 % of the points for training and 30 % for validation, with labels 1 (inner ring) and 0."""
    points = torch.cat([ring(positives, radius=5), ring(negatives, radius=8)])
    labels = torch.cat([torch.ones(positives, dtype=torch.long), torch.zeros(negatives, dtype=torch.long)])
    order = torch.randperm(len(points))
    cut = int(0.7 * len(points))
    train, val = order[:cut], order[cut:]
    return TensorDataset(points[train], labels[train]), TensorDataset(points[val], labels[val])


def build_model() -> nn.Sequential:
    """Return an MLP 2-4-8-1 from points [N, 2] to probabilities [N]."""
    return nn.Sequential(
        nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1), nn.Sigmoid(), nn.Flatten(0)
    )


def draw_predictions(points: Tensor, labels: Tensor, predicted: Tensor, path: Path) -> None:
    """Draw the true classes of the points [N, 2] and the predicted ones side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.3), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, title, classes in zip(panels, ("validation data", "predictions"), (labels, predicted), strict=True):
        for value, name, colour in ((0, "negative", "tab:blue"), (1, "positive", "tab:orange")):
            chosen = points[classes == value].numpy()
            axes.scatter(chosen[:, 0], chosen[:, 1], s=5, alpha=0.6, color=colour, label=f"{name} ({len(chosen)})")
        axes.set(title=title, aspect="equal")
        axes.legend(loc="upper right", markerscale=2, framealpha=0.9)
    figure.savefig(path, dpi=120)


def main(args: argparse.Namespace) -> Engine:
    """Train as the settings say and return the finished trainer."""
    torch.manual_seed(args.seed)
    train_set, val_set = make_rings(args.positives, args.negatives)
    train = DataLoader(train_set, batch_size=args.batch_size, shuffle=True)
    val = DataLoader(val_set, batch_size=args.batch_size)

    model = build_model()
    run = RunDirectory(args.output, settings=args)
    trainer = Trainer(
        model,
        torch.optim.Adam(model.parameters(), lr=args.lr),
        FocalLoss(alpha=0.75, gamma=2.0),
        metrics={"auc": BinaryAUROC()},
        callbacks=[
            run,
            Penalty(l1=args.l1, l2=args.l2),
            EarlyStopping("val_auc", patience=args.patience),
            BestCheckpoint("val_auc", restore=True),
            Report(),
            ProgressBar(),
        ],
    )
    if args.rehearse:
        trainer.rehearse(train, val, epochs=args.epochs)
    trainer.fit(train, val, epochs=args.epochs)

    points, labels = val_set.tensors
    draw_predictions(points, labels, (trainer.predict(val) > 0.5).long(), run.path / "predictions.png")
    print(f"area under the ROC curve on validation: {trainer.evaluate(val)['auc']:.4f}")
    print(f"run directory: {run.path}")
    return trainer


if __name__ == "__main__":
    torch.set_num_threads(1)  # for so small a model, sharing the work costs more than the work
    main(get_args_parser().parse_args())
