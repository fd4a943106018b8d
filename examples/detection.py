"""Object detection with torchvision: a model that returns its losses in training and its boxes in evaluation.

    python examples/detection.py    # a small Faster R-CNN on shapes drawn on the fly, no download
    python examples/detection.py --data voc --model fasterrcnn_resnet50_fpn --lr 0.0001 --batch-size 4    # Pascal VOC

Leaves a picture of true and predicted boxes, the curves of each loss and of the mean average precision (which needs
pycocotools), the best weights, the log, the settings and the history.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.detection import MeanAveragePrecision
from torchvision import datasets, models, tv_tensors
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import Conv2dNormActivation, masks_to_boxes
from torchvision.transforms import v2

from camshaft import callbacks
from camshaft.engine import Engine

SHAPES = ("", "circle", "square", "triangle")  # detection models keep 0 for the background
Samples = list[tuple[Tensor, dict[str, Tensor]]]


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of every setting."""
    parser = argparse.ArgumentParser(description="Train a torchvision model to detect objects.")
    parser.add_argument("--data", choices=["shapes", "voc"], default="shapes")
    parser.add_argument("--data-dir", default="data", help="where Pascal VOC lies or is downloaded to")
    parser.add_argument("--images", type=int, default=400, help="number of drawn training images")
    parser.add_argument("--size", type=int, default=96, help="height and width of the drawn images")
    parser.add_argument("--model", default="small", help="small, or any of torchvision's for detection")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=0.002)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", default="runs", help="where run directories are made")
    parser.add_argument("--rehearse", action="store_true", help="try the whole run first, in seconds")
    return parser


def draw_shapes(num_images: int, size: int) -> Samples:
    """Return pairs of an image [3, S, S] and ``{"boxes": [3, 4] as x1, y1, x2, y2, "labels": [3]}``."""
    ys, xs = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    samples = []
    for _ in range(num_images):
        image = 0.5 * torch.rand(3, 1, 1).expand(-1, size, size).clone()
        labels, masks = torch.randint(1, 4, (3,)), []
        for label in labels.tolist():
            radius = int(size * (0.1 + 0.1 * torch.rand(())))
            y, x = torch.randint(radius, size - radius, (2,))
            dy, dx = ys - y, xs - x
            square = (dy.abs() < radius) & (dx.abs() < radius)
            inside = (dy**2 + dx**2 < radius**2, square, square & (2 * dx.abs() < dy + radius))[label - 1]
            image[:, inside] = 0.3 + 0.7 * torch.rand(3, 1)
            masks.append(inside)
        image = (image + 0.1 * torch.randn_like(image)).clamp(0, 1)
        samples.append((image, {"boxes": masks_to_boxes(torch.stack(masks)), "labels": labels}))
    return samples


def load_voc(directory: str) -> tuple[Any, Any]:
    """Return Pascal VOC 2012, downloaded if it is not there, in the form of `draw_shapes`."""
    dtypes = {tv_tensors.Image: torch.float32, tv_tensors.BoundingBoxes: torch.float32, "others": None}
    to_tensors = [v2.ToDtype(dtypes, scale=True), v2.ToPureTensor()]
    train, val = (
        datasets.wrap_dataset_for_transforms_v2(
            datasets.VOCDetection(
                directory, image_set=name, download=True, transforms=v2.Compose([v2.ToImage(), *steps, *to_tensors])
            ),
            target_keys=("boxes", "labels"),
        )
        for name, steps in (("train", [v2.RandomHorizontalFlip()]), ("val", []))
    )
    return train, val


def collate(samples: Samples) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Return a batch: the images, which may differ in size, and their targets."""
    return [image for image, _ in samples], [target for _, target in samples]


def build_model(name: str, size: int, num_classes: int) -> Any:
    """Return an untrained detector: one of torchvision's, or a Faster R-CNN on a backbone of four convolutions."""
    if name != "small":
        return models.get_model(name, weights=None, weights_backbone=None, num_classes=num_classes)
    sizes = ((3, 32, 2), (32, 64, 2), (64, 128, 2), (128, 128, 1))
    backbone: Any = nn.Sequential(*(Conv2dNormActivation(c_in, c_out, stride=stride) for c_in, c_out, stride in sizes))
    backbone.out_channels = 128  # where torchvision looks for it
    anchors = AnchorGenerator(sizes=((size // 6, size // 4, size // 3),), aspect_ratios=((1.0,),))
    few = {"rpn_post_nms_top_n_train": 200, "rpn_post_nms_top_n_test": 50, "box_batch_size_per_image": 16}
    settings = {"min_size": size, "max_size": size, "rpn_anchor_generator": anchors, **few}
    return models.detection.FasterRCNN(backbone, num_classes, **settings)


def draw_boxes(samples: Samples, found: list[dict[str, Tensor]], path: Path) -> None:
    """Draw images with the true boxes (white), and the predicted ones of a score above one half with their class."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    figure = Figure(figsize=(12, 6.2), layout="constrained")
    for axes, (image, target), boxes in zip(figure.subplots(2, 4).flat, samples, found, strict=True):
        axes.imshow(image.permute(1, 2, 0).numpy())
        axes.axis("off")
        shown = [(box, "white", "") for box in target["boxes"].tolist()]
        for box, label, score in zip(*(boxes[key].tolist() for key in ("boxes", "labels", "scores")), strict=True):
            name = SHAPES[label] if len(SHAPES) > label else label
            shown += [(box, f"C{label}", f"{name} {score:.2f}")] if score > 0.5 else []
        for (x1, y1, x2, y2), colour, text in shown:
            axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=colour, linewidth=1 if text else 3))
            axes.text(x1, y1 - 2, text, color="white", backgroundcolor=colour if text else "none", fontsize=6)
    figure.savefig(path, dpi=120)


def main(args: argparse.Namespace) -> Engine:
    """Train as the settings say and return the finished engine."""
    torch.manual_seed(args.seed)
    if args.data == "voc":
        train_set, val_set = load_voc(args.data_dir)
    else:
        train_set, val_set = draw_shapes(args.images, args.size), draw_shapes(80, args.size)
    train: DataLoader[Any] = DataLoader(train_set, args.batch_size, shuffle=True, drop_last=True, collate_fn=collate)
    val: DataLoader[Any] = DataLoader(val_set, args.batch_size, collate_fn=collate)

    model = build_model(args.model, args.size, num_classes=21 if args.data == "voc" else 4)

    def step(engine: Engine, batch: tuple[list[Tensor], list[dict[str, Tensor]]]) -> dict[str, Tensor] | None:
        images, targets = batch
        if not engine.training:
            engine.measure(model(images), targets)
            return None
        losses = model(images, targets)
        engine.update(loss := sum(losses.values()))
        return {"loss": loss, **losses}

    run = callbacks.RunDirectory(args.output, settings=args)
    handlers = [
        run,
        callbacks.Placement(args.device),
        callbacks.Metrics({("map", "map_50"): MeanAveragePrecision()}),
        callbacks.Schedule(callbacks.warmup_cosine, per="update"),
        callbacks.BestCheckpoint("val_map", restore=True),
        callbacks.Report(),
        callbacks.ProgressBar(),
    ]
    engine = Engine(step, model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=args.lr), callbacks=handlers)
    if args.rehearse:
        engine.rehearse(train, val, epochs=args.epochs)
    history = engine.fit(train, val, epochs=args.epochs)

    samples = [val_set[index] for index in range(8)]
    with torch.inference_mode():
        found = model.eval()([image.to(engine.parts.device) for image, _ in samples])
    draw_boxes(samples, found, run.path / "boxes.png")
    print(
        "best mean average precision on validation: {val_map:.4f}, in epoch {epoch}".format(
            **history.best("val_map", "max")
        )
    )
    print(f"run directory: {run.path}")
    return engine


if __name__ == "__main__":
    main(get_args_parser().parse_args())
