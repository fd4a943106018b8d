"""Handwritten digits: a small CNN, trained with a progress bar, early stopping and the best weights kept.

    python examples/digits.py    # scikit-learn's 1,797 bundled digits, no download
    python examples/digits.py --data mnist --batch-size 128 --lr 0.01    # MNIST through torchvision

Leaves a run directory with a page (`report.html`), the loss and accuracy curves, the confusion matrix of the best
epoch, the best weights, the log, the settings, the history and TensorBoard events.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchinfo import summary
from torchmetrics.classification import Accuracy, ConfusionMatrix

from camshaft.callbacks import (
    BestCheckpoint,
    EarlyStopping,
    MixedPrecision,
    Placement,
    ProgressBar,
    Report,
    RunDirectory,
    TensorBoard,
)
from camshaft.engine import Callback, Engine, Trainer

logger = logging.getLogger("digits")


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of every setting."""
    parser = argparse.ArgumentParser(description="Train a small CNN on handwritten digits.")
    parser.add_argument("--data", choices=["digits", "mnist"], default="digits")
    parser.add_argument("--data-dir", default="data", help="where MNIST lies or is downloaded to")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.003)
    parser.add_argument("--patience", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=["fp32", "fp16", "bf16"], default="fp32")
    parser.add_argument("--output", default="runs", help="where run directories are made")
    parser.add_argument("--no-bar", action="store_true", help="show no progress bar")
    parser.add_argument("--rehearse", action="store_true", help="try the whole run first, in seconds")
    return parser


def build_model() -> nn.Sequential:
    """Return a CNN for images [N, 1, H, W] with H, W >= 16; it gives logits [N, 10]."""
    return nn.Sequential(
        nn.Conv2d(1, 32, kernel_size=3),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, kernel_size=5),
        nn.MaxPool2d(2),
        nn.Dropout2d(0.1),
        nn.AdaptiveMaxPool2d((1, 1)),
        nn.Flatten(),
        nn.Linear(64, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def load_digits(test_share: float = 0.2) -> tuple[TensorDataset, TensorDataset]:
    """Return 1,797 real handwritten digits, 8 x 8 resized to 28 x 28, as training and validation sets."""
    from sklearn.datasets import load_digits as load

    digits = load()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = nn.functional.interpolate(images, size=(28, 28), mode="bilinear", align_corners=False)
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    cut = int(len(labels) * (1 - test_share))
    train, val = order[:cut], order[cut:]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[val], labels[val])


def load_mnist(directory: str) -> tuple[Dataset[tuple[Tensor, int]], Dataset[tuple[Tensor, int]]]:
    """Return MNIST as training and validation sets, downloaded if it is not there."""
    from torchvision import datasets, transforms

    to_tensor = transforms.ToTensor()
    train = datasets.MNIST(directory, train=True, download=True, transform=to_tensor)
    return train, datasets.MNIST(directory, train=False, download=True, transform=to_tensor)


def draw_samples(batch: tuple[Tensor, Tensor], path: Path) -> None:
    """Draw the first nine images of a batch with their labels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, image, label in zip(figure.subplots(3, 3).flat, *batch, strict=False):
        axes.imshow(image[0].numpy(), cmap="gray_r")
        axes.set_title(f"label {int(label)}", fontsize=10)
        axes.axis("off")
    figure.savefig(path, dpi=120)


def main(args: argparse.Namespace) -> Engine:
    """Train as the settings say and return the finished trainer."""
    torch.manual_seed(args.seed)
    train_set, val_set = load_digits() if args.data == "digits" else load_mnist(args.data_dir)
    train = DataLoader(train_set, batch_size=args.batch_size, shuffle=True)
    val = DataLoader(val_set, batch_size=args.batch_size)

    model = build_model()
    run = RunDirectory(args.output, settings=args)
    best = BestCheckpoint("val_acc", restore=True)
    callbacks: list[Callback] = [
        run,
        Placement(args.device),
        EarlyStopping("val_acc", patience=args.patience),
        best,
        TensorBoard(),
        Report(),
    ]
    if args.precision != "fp32":
        callbacks.append(MixedPrecision(args.precision))
    if not args.no_bar:
        callbacks.append(ProgressBar())
    trainer = Trainer(
        model,
        torch.optim.Adam(model.parameters(), lr=args.lr),
        nn.CrossEntropyLoss(),
        metrics={
            "acc": Accuracy(task="multiclass", num_classes=10),
            "confusion": ConfusionMatrix(task="multiclass", num_classes=10),
        },
        callbacks=callbacks,
        seed=args.seed,
    )
    sample = next(iter(val))
    draw_samples(sample, run.path / "samples.png")
    print(summary(model, input_data=sample[0].to(trainer.parts.device), verbose=0))
    if args.rehearse:
        trainer.rehearse(train, val, epochs=args.epochs)
    trainer.fit(train, val, epochs=args.epochs)

    result = trainer.evaluate(val)
    print(f"best weights: {best.path}")
    print(f"validation accuracy with them: {result['acc']:.4f}")
    print(f"run directory: {run.path}")
    return trainer


if __name__ == "__main__":
    main(get_args_parser().parse_args())
