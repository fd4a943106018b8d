"""Image classification as torchvision's reference does it, on any of torchvision's models.

    python examples/classification.py    # scikit-learn's bundled digits as small images, no download
    python examples/classification.py --data cifar10 --epochs 100 --batch-size 128 --ema-decay 0.999 --precision bf16

Mixup or CutMix on each batch, label smoothing, SGD without weight decay on biases and normalisation layers, a linear
warm-up and a cosine, an exponential moving average of the weights that is what gets evaluated and kept, mixed
precision. Leaves a sheet of mixed training images and one of the predictions it is least sure of, beside the curves.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, default_collate
from torchmetrics.classification import Accuracy
from torchvision import datasets, models
from torchvision.transforms import v2

from camshaft import callbacks
from camshaft.engine import Callback, Engine, Trainer, decay_groups


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of every setting."""
    parser = argparse.ArgumentParser(description="Train a torchvision model to classify images.")
    parser.add_argument("--data", choices=["digits", "cifar10"], default="digits")
    parser.add_argument("--data-dir", default="data", help="where CIFAR-10 lies or is downloaded to")
    parser.add_argument("--model", default="resnet18", help="any name that torchvision.models.get_model knows")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.add_argument("--mixup-alpha", type=float, default=0.2)
    parser.add_argument("--cutmix-alpha", type=float, default=1.0)
    parser.add_argument("--ema-decay", type=float, default=0.98)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=["fp32", "fp16", "bf16"], default="fp32")
    parser.add_argument("--output", default="runs", help="where run directories are made")
    parser.add_argument("--rehearse", action="store_true", help="try the whole run first, in seconds")
    return parser


def load_digits() -> tuple[Any, Any, list[v2.Transform]]:
    """Return real digits as images [3, 32, 32], training and validation, and what may be done to a training image."""
    from sklearn.datasets import load_digits as load

    digits = load()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = nn.functional.interpolate(images, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, val = (TensorDataset(images[part], torch.tensor(digits.target)[part]) for part in order.split(1437))
    return train, val, [v2.RandomAffine(degrees=10, translate=(0.1, 0.1), scale=(0.9, 1.1))]


def load_cifar10(directory: str) -> tuple[Any, Any, list[v2.Transform]]:
    """Return CIFAR-10, downloaded if it is not there, and what may be done to a training image."""
    train = datasets.CIFAR10(directory, train=True, download=True)
    val = datasets.CIFAR10(directory, train=False, download=True)
    return train, val, [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]


def collate(samples: Sequence[tuple[Any, int]], transform: v2.Transform, mix: v2.Transform) -> tuple[Tensor, Tensor]:
    """Transform each image, then mix the batch: images [N, 3, H, W] and labels [N], or [N, 10] where mixed."""
    images, labels = default_collate([(transform(image), label) for image, label in samples])
    return mix(images, labels)  # type: ignore[no-any-return]  # torchvision has no types


def draw(images: Tensor, titles: Sequence[str], path: Path) -> None:
    """Draw a sheet of images [24, 3, H, W], each with its title."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    for axes, image, title in zip(figure.subplots(3, 8).flat, images, titles, strict=False):
        axes.imshow((image / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy())
        axes.set_title(title, fontsize=9, color="tab:red" if " not " in title else "black")
        axes.axis("off")
    figure.savefig(path, dpi=120)


def draw_mixed(images: Tensor, target: Tensor, path: Path) -> None:
    """Draw training images with the shares of their two labels, target [N, 10]."""
    shares, labels = (values.tolist() for values in target.topk(2))
    titles = [f"{a}" if p > 0.99 else f"{a} ({p:.0%}) + {b}" for (p, _), (a, b) in zip(shares, labels, strict=True)]
    draw(images, titles, path)


def draw_least_sure(trainer: Engine, val: DataLoader[Any], path: Path) -> None:
    """Draw the validation images that the model is least sure of."""
    images, labels = (torch.cat(parts) for parts in zip(*val, strict=True))
    probability, predicted = trainer.predict(val).softmax(dim=1).max(dim=1)
    least = probability.argsort()[:24]
    wrong = ["" if label == guess else f" not {label}" for label, guess in zip(labels, predicted, strict=True)]
    draw(images[least], [f"{predicted[i]}{wrong[i]} ({probability[i]:.0%})" for i in least], path)


def main(args: argparse.Namespace) -> Engine:
    """Train as the settings say and return the finished trainer."""
    torch.manual_seed(args.seed)
    train_set, val_set, augmentation = load_digits() if args.data == "digits" else load_cifar10(args.data_dir)
    plain: list[v2.Transform] = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.5] * 3, [0.5] * 3),
    ]
    mix = v2.RandomChoice(
        [v2.MixUp(alpha=args.mixup_alpha, num_classes=10), v2.CutMix(alpha=args.cutmix_alpha, num_classes=10)]
    )
    collate_train = partial(collate, transform=v2.Compose([*augmentation, *plain]), mix=mix)
    collate_val = partial(collate, transform=v2.Compose(plain), mix=v2.Identity())
    train: DataLoader[Any] = DataLoader(
        train_set, args.batch_size, shuffle=True, drop_last=True, collate_fn=collate_train
    )
    val: DataLoader[Any] = DataLoader(val_set, args.batch_size, collate_fn=collate_val)

    model = models.get_model(args.model, weights=None, num_classes=10)
    run = callbacks.RunDirectory(args.output, settings=args)
    handlers: list[Callback] = [
        run,
        callbacks.Placement(args.device),
        callbacks.Metrics({"acc": Accuracy("multiclass", num_classes=10)}, train=False),  # labels are mixed there
        callbacks.Schedule(callbacks.warmup_cosine, per="update"),
        callbacks.WeightAverage("ema", decay=args.ema_decay),
        callbacks.BestCheckpoint("val_acc", restore=True),
        callbacks.Report(),
        callbacks.ProgressBar(),
    ]
    if args.precision != "fp32":
        handlers.append(callbacks.MixedPrecision(args.precision))
    groups = decay_groups(model, args.weight_decay)
    optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=0.9, nesterov=True)
    loss_fn = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
    trainer = Trainer(model, optimizer, loss_fn, callbacks=handlers)
    images, target = next(iter(train))
    draw_mixed(images, target, run.path / "samples.png")
    if args.rehearse:
        trainer.rehearse(train, val, epochs=args.epochs)
    trainer.fit(train, val, epochs=args.epochs)

    draw_least_sure(trainer, val, run.path / "least_sure.png")
    print(f"validation accuracy: {trainer.evaluate(val)['acc']:.4f}")
    print(f"run directory: {run.path}")
    return trainer


if __name__ == "__main__":
    main(get_args_parser().parse_args())
