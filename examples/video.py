"""Video classification with torchvision's models: which way does a shape move?

    python examples/video.py    # clips made on the fly, no download
    python examples/video.py --data ucf101 --data-dir UCF-101 --annotations ucfTrainTestlist --frames 16 --size 112

A shape moves left, right, up or down over a noisy background, so that no single frame tells the answer. Leaves clips
with their predictions, the curves, the confusion matrix, the best weights, the log, the settings and the history.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import Accuracy, ConfusionMatrix
from torchvision import datasets, models
from torchvision.models.video.resnet import BasicBlock, BasicStem, Conv3DSimple, VideoResNet
from torchvision.transforms import v2
from torchvision.utils import make_grid

from camshaft.callbacks import BestCheckpoint, Placement, ProgressBar, Report, RunDirectory
from camshaft.engine import Engine, Trainer

DIRECTIONS = ("left", "right", "up", "down")


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of every setting."""
    parser = argparse.ArgumentParser(description="Train a torchvision model to classify videos.")
    parser.add_argument("--data", choices=["moves", "ucf101"], default="moves")
    parser.add_argument("--data-dir", default="data", help="where the videos of UCF101 lie")
    parser.add_argument("--annotations", default="ucfTrainTestlist", help="where UCF101's lists lie")
    parser.add_argument("--clips", type=int, default=400, help="number of training clips that are made")
    parser.add_argument("--frames", type=int, default=8, help="frames in a clip")
    parser.add_argument("--size", type=int, default=24, help="height and width of a clip")
    parser.add_argument("--model", default="small", help="small, or one of torchvision's, such as r3d_18")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", default="runs", help="where run directories are made")
    parser.add_argument("--rehearse", action="store_true", help="try the whole run first, in seconds")
    return parser


def make_clips(num_clips: int, frames: int, size: int) -> TensorDataset:
    """Return clips [N, 3, T, S, S] of a moving square or disc, and the numbers [N] of the directions."""
    steps = torch.arange(frames)[:, None, None] * (size / frames / 1.5)
    ys, xs = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    directions = torch.randint(4, (num_clips,))
    clips = 0.3 * torch.rand(num_clips, 3, frames, size, size)
    for clip, direction in zip(clips, directions.tolist(), strict=True):
        dy, dx = ((0, -1), (0, 1), (-1, 0), (1, 0))[direction]
        y, x = size * torch.rand(2)
        # The shape leaves the picture on one side and comes in on the other.
        away_y = ((ys - y - dy * steps) % size - size / 2).abs()
        away_x = ((xs - x - dx * steps) % size - size / 2).abs()
        disc = (away_y**2 + away_x**2).sqrt()
        inside = (disc if torch.rand(()) < 0.5 else torch.maximum(away_y, away_x)) < size / 6
        clip[:, inside] += 0.3 + 0.4 * torch.rand(3, 1)
    return TensorDataset(clips, directions)


def load_ucf101(args: argparse.Namespace) -> tuple[Any, Any]:
    """Return UCF101 as ``(video [T, 3, H, W], sound, label)``, training and test; it is read by torchcodec."""
    load = partial(datasets.UCF101, args.data_dir, args.annotations, args.frames, output_format="TCHW")
    return load(train=True), load(train=False)


def collate_videos(samples: list[tuple[Tensor, Tensor, int]], size: int) -> tuple[Tensor, Tensor]:
    """Return clips [N, 3, T, S, S] in [0, 1] and labels [N]; the sound is left out."""
    resize = v2.Compose([v2.Resize((size, size)), v2.ToDtype(torch.float32, scale=True)])
    clips = torch.stack([resize(video) for video, _, _ in samples]).transpose(1, 2)
    return clips, torch.tensor([label for _, _, label in samples])


def build_model(name: str, num_classes: int) -> nn.Module:
    """Return an untrained model: one of torchvision's, or its ResNet with a single block at each of four sizes."""
    if name != "small":
        return models.get_model(name, weights=None, num_classes=num_classes)  # type: ignore[no-any-return]  # no types
    return VideoResNet(BasicBlock, [Conv3DSimple] * 4, [1] * 4, BasicStem, num_classes)  # type: ignore[no-any-return]


def draw_clips(clips: Tensor, labels: Tensor, predicted: Tensor, path: Path) -> None:
    """Draw clips [6, 3, T, H, W], one a row with time to the right, with the true and the predicted direction."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7.2), layout="constrained")
    for axes, clip, label, guess in zip(
        figure.subplots(6, 1), clips, labels.tolist(), predicted.tolist(), strict=True
    ):
        frames = clip.transpose(0, 1)
        axes.imshow(make_grid(frames, nrow=len(frames), padding=1, pad_value=1.0).permute(1, 2, 0).clamp(0, 1).numpy())
        colour = "black" if label == guess else "tab:red"
        axes.set_title(f"{DIRECTIONS[label]}, predicted {DIRECTIONS[guess]}", fontsize=10, color=colour)
        axes.axis("off")
    figure.savefig(path, dpi=120)


def main(args: argparse.Namespace) -> Engine:
    """Train as the settings say and return the finished trainer."""
    torch.manual_seed(args.seed)
    if args.data == "ucf101":
        num_classes, collate = 101, partial(collate_videos, size=args.size)
        train_set, val_set = load_ucf101(args)
    else:
        num_classes, collate = 4, None
        train_set, val_set = (make_clips(count, args.frames, args.size) for count in (args.clips, 120))
    train: DataLoader[Any] = DataLoader(train_set, args.batch_size, shuffle=True, drop_last=True, collate_fn=collate)
    val: DataLoader[Any] = DataLoader(val_set, args.batch_size, collate_fn=collate)

    model = build_model(args.model, num_classes)
    run = RunDirectory(args.output, settings=args)
    trainer = Trainer(
        model,
        torch.optim.AdamW(model.parameters(), lr=args.lr),
        nn.CrossEntropyLoss(),
        metrics={
            "acc": Accuracy(task="multiclass", num_classes=num_classes, average="micro"),
            "confusion": ConfusionMatrix(task="multiclass", num_classes=num_classes),
        },
        callbacks=[
            run,
            Placement(args.device),
            BestCheckpoint("val_acc", restore=True),
            Report(class_names=DIRECTIONS if args.data == "moves" else None),
            ProgressBar(),
        ],
    )
    if args.rehearse:
        trainer.rehearse(train, val, epochs=args.epochs)
    trainer.fit(train, val, epochs=args.epochs)

    if args.data == "moves":
        clips, labels = val_set[:6]
        draw_clips(clips, labels, trainer.predict([clips]).argmax(dim=1), run.path / "clips.png")
    print(f"validation accuracy: {trainer.evaluate(val)['acc']:.4f}")
    print(f"run directory: {run.path}")
    return trainer


if __name__ == "__main__":
    main(get_args_parser().parse_args())
