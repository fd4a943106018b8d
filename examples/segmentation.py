"""Semantic segmentation with torchvision's own models, which return a dict: a loss and a metric that take their part.

    python examples/segmentation.py    # circles, squares and triangles drawn on the fly, no download
    python examples/segmentation.py --data voc --size 256 --batch-size 8 --epochs 100    # Pascal VOC 2012

Leaves pictures with the true and the predicted masks laid over the images, the curves of loss and mean intersection
over union, the best weights, the log, the settings and the history.
"""

from __future__ import annotations

import argparse
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import JaccardIndex
from torchmetrics.wrappers import LambdaInputTransformer
from torchvision import datasets, models, tv_tensors
from torchvision.transforms import v2
from torchvision.utils import draw_segmentation_masks, make_grid

from camshaft.callbacks import BestCheckpoint, Placement, ProgressBar, Report, RunDirectory, Schedule, warmup_cosine
from camshaft.engine import Engine, Trainer

VOID = 255  # the label of pixels that do not count


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of every setting."""
    parser = argparse.ArgumentParser(description="Train a torchvision model to segment images.")
    parser.add_argument("--data", choices=["shapes", "voc"], default="shapes")
    parser.add_argument("--data-dir", default="data", help="where Pascal VOC lies or is downloaded to")
    parser.add_argument("--images", type=int, default=960, help="number of drawn training images")
    parser.add_argument("--size", type=int, default=64, help="height and width of the images")
    parser.add_argument("--model", default="lraspp_mobilenet_v3_large", help="any of torchvision's for segmentation")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=0.003)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", default="runs", help="where run directories are made")
    parser.add_argument("--rehearse", action="store_true", help="try the whole run first, in seconds")
    return parser


def draw_shapes(num_images: int, size: int) -> TensorDataset:
    """Return images [N, 3, S, S] of noisy shapes and masks [N, S, S]: 1 circle, 2 square, 3 triangle, 0 nothing."""
    ys, xs = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    images = 0.5 * torch.rand(num_images, 3, 1, 1).expand(-1, -1, size, size).clone()
    masks = torch.zeros(num_images, size, size, dtype=torch.long)
    for image, mask in zip(images, masks, strict=True):
        for label in torch.randint(1, 4, (3,)).tolist():
            radius = size * (0.12 + 0.1 * torch.rand(()))
            dy, dx = ys - torch.randint(size, ()), xs - torch.randint(size, ())
            square = (dy.abs() < radius) & (dx.abs() < radius)
            inside = {1: dy**2 + dx**2 < radius**2, 2: square, 3: square & (2 * dx.abs() < dy + radius)}[label]
            image[:, inside] = 0.3 + 0.7 * torch.rand(3, 1)
            mask[inside] = label
    return TensorDataset((images + 0.15 * torch.randn_like(images)).clamp(0, 1), masks)


def load_voc(directory: str, size: int) -> tuple[Any, Any]:
    """Return Pascal VOC 2012, downloaded if it is not there, as images [3, S, S] in [0, 1] and masks [S, S]."""
    to_tensors = [
        v2.ToDtype({tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.long, "others": None}, scale=True),
        v2.Lambda(torch.squeeze, tv_tensors.Mask),  # torchvision's masks are [1, S, S]
        v2.ToPureTensor(),
    ]
    crop = [v2.RandomResizedCrop(size, scale=(0.5, 1.0)), v2.RandomHorizontalFlip()]
    train, val = (
        datasets.wrap_dataset_for_transforms_v2(
            datasets.VOCSegmentation(
                directory, image_set=name, download=True, transforms=v2.Compose([v2.ToImage(), *steps, *to_tensors])
            )
        )
        for name, steps in (("train", crop), ("val", [v2.Resize((size, size))]))
    )
    return train, val


def build_model(name: str, num_classes: int) -> nn.Module:
    """Return an untrained model from images [N, 3, H, W] to ``{"out": logits [N, C, H, W]}``."""
    model: nn.Module = models.get_model(name, weights=None, weights_backbone=None, num_classes=num_classes)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1  # MobileNet's 0.01 would need many more steps than a short run has
    return model


def loss_fn(output: dict[str, Tensor], masks: Tensor) -> Tensor:
    """Return the mean cross entropy over the pixels that count."""
    return cross_entropy(output["out"], masks, ignore_index=VOID)


def draw_overlays(images: Tensor, masks: Tensor, predicted: Tensor, num_classes: int, path: Path) -> None:
    """Draw images [N, 3, H, W] alone, under their true masks [N, H, W] and under the predicted ones, in three rows."""
    from matplotlib.colors import to_hex
    from matplotlib.figure import Figure

    draw = partial(
        draw_segmentation_masks, alpha=0.7, colors=[to_hex(f"C{label % 10}") for label in range(num_classes)]
    )
    rows = {"images": images}
    for title, chosen in (("true masks", masks), ("predicted masks", predicted)):
        layers = chosen[:, None] == torch.arange(1, num_classes)[:, None, None]
        rows[title] = torch.stack(list(map(draw, images, layers)))
    figure = Figure(figsize=(12, 4.9), layout="constrained")
    for axes, (title, row) in zip(figure.subplots(3, 1), rows.items(), strict=True):
        axes.imshow(make_grid(row, nrow=len(row), pad_value=1.0).permute(1, 2, 0).numpy())
        axes.set_title(title, fontsize=10)
        axes.axis("off")
    figure.savefig(path, dpi=120)


def main(args: argparse.Namespace) -> Engine:
    """Train as the settings say and return the finished trainer."""
    torch.manual_seed(args.seed)
    num_classes = 21 if args.data == "voc" else 4
    if args.data == "voc":
        train_set, val_set = load_voc(args.data_dir, args.size)
    else:
        train_set, val_set = draw_shapes(args.images, args.size), draw_shapes(120, args.size)
    train: DataLoader[Any] = DataLoader(train_set, args.batch_size, shuffle=True, drop_last=True)
    val: DataLoader[Any] = DataLoader(val_set, args.batch_size)

    model = build_model(args.model, num_classes)
    miou = JaccardIndex(task="multiclass", num_classes=num_classes, ignore_index=VOID)
    run = RunDirectory(args.output, settings=args)
    trainer = Trainer(
        model,
        torch.optim.AdamW(model.parameters(), lr=args.lr),
        loss_fn,
        metrics={"miou": LambdaInputTransformer(miou, transform_pred=itemgetter("out"))},
        callbacks=[
            run,
            Placement(args.device),
            Schedule(warmup_cosine, per="update"),
            BestCheckpoint("val_miou", mode="max", restore=True),
            Report(),
            ProgressBar(),
        ],
    )
    if args.rehearse:
        trainer.rehearse(train, val, epochs=args.epochs)
    history = trainer.fit(train, val, epochs=args.epochs)

    images, masks = (part[:8] for part in next(iter(val)))
    predicted = trainer.predict([images])["out"].argmax(dim=1)
    draw_overlays(images, masks, predicted, num_classes, run.path / "overlays.png")
    best = history.best("val_miou", mode="max")
    print(f"best mean intersection over union on validation: {best['val_miou']:.4f}, in epoch {best['epoch']}")
    print(f"run directory: {run.path}")
    return trainer


if __name__ == "__main__":
    main(get_args_parser().parse_args())
