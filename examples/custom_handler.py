"""A handler and an event of your own: find the images that the model gets most wrong, and draw them.

    python examples/custom_handler.py

`HardestSamples` listens to the engine's validations, and announces what it found as an event of its own,
`HardestFound`. `Gallery` listens to that event alone, and knows nothing of how the samples were found; so does the
function that is subscribed by a decorator. None of them is known to the engine, and nothing is registered anywhere.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import Accuracy

from camshaft.callbacks import ProgressBar, Report, RunDirectory
from camshaft.engine import (
    Callback,
    Engine,
    Event,
    Trainer,
    ValidationEnd,
    ValidationStart,
    ValidationStepEnd,
    at,
    directory_for,
)


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of every setting."""
    parser = argparse.ArgumentParser(description="Draw the images that the model gets most wrong.")
    parser.add_argument("--hardest", type=int, default=8, help="how many images to draw")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.003)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="runs", help="where run directories are made")
    parser.add_argument("--rehearse", action="store_true", help="try the whole run first, in seconds")
    return parser


@dataclass(frozen=True, slots=True)
class HardestFound(Event):
    """A validation has shown which samples are hardest: images [K, 64], logits [K, 10], labels and losses [K]."""

    images: Tensor
    logits: Tensor
    labels: Tensor
    losses: Tensor
    counter: ClassVar[str] = "num_validations"  # what a filter such as at(1) looks at


class HardestSamples(Callback):
    """Keeps the ``count`` validation samples of the highest loss, and emits `HardestFound` with them."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.found: tuple[Tensor, ...] = ()

    def on_validation_start(self, event: ValidationStart) -> None:
        """Begin again."""
        self.found = ()

    def on_validation_step_end(self, event: ValidationStepEnd) -> None:
        """Keep the hardest of this batch and of those before."""
        images, labels = event.batch
        new = images, event.output, labels, cross_entropy(event.output, labels, reduction="none")
        joined = tuple(map(torch.cat, zip(self.found, new, strict=True))) if self.found else new
        hardest = joined[-1].argsort(descending=True)[: self.count]
        self.found = tuple(values[hardest] for values in joined)

    def on_validation_end(self, event: ValidationEnd) -> None:
        """Say what was found, if anyone listens."""
        if event.engine.listeners.hears(HardestFound):
            event.engine.emit(HardestFound(event.engine, *self.found))


class Gallery(Callback):
    """Draws the hardest samples of each validation into the run directory."""

    def on_hardest_found(self, event: HardestFound) -> None:
        """Draw one picture."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(1.4 * len(event.images), 2), layout="constrained")
        panels = figure.subplots(1, len(event.images), squeeze=False)[0]
        for axes, image, guess, label in zip(
            panels, event.images, event.logits.argmax(dim=1), event.labels, strict=True
        ):
            axes.imshow(image.reshape(8, 8).numpy(), cmap="gray_r")
            axes.set_title(f"{label}, predicted {guess}", fontsize=9, color="black" if guess == label else "tab:red")
            axes.axis("off")
        directory = directory_for("Gallery", None, event.engine.directory)
        figure.savefig(directory / f"hardest-{event.engine.epoch:02}.png", dpi=120)


def load_digits() -> tuple[TensorDataset, TensorDataset]:
    """Return 1,797 real digits [N, 64] with labels [N]: 80 % for training, 20 % for validation."""
    from sklearn.datasets import load_digits as load

    digits = load()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    train, val = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).split(1437)
    return TensorDataset(images[train], labels[train]), TensorDataset(images[val], labels[val])


def main(args: argparse.Namespace) -> Engine:
    """Train as the settings say and return the finished trainer."""
    torch.manual_seed(args.seed)
    train_set, val_set = load_digits()
    train = DataLoader(train_set, args.batch_size, shuffle=True)
    val = DataLoader(val_set, args.batch_size)

    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    trainer = Trainer(
        model,
        torch.optim.Adam(model.parameters(), lr=args.lr),
        nn.CrossEntropyLoss(),
        metrics={"acc": Accuracy(task="multiclass", num_classes=10)},
        callbacks=[
            RunDirectory(args.output, settings=args),
            HardestSamples(args.hardest),
            Gallery(),
            Report(),
            ProgressBar(),
        ],
    )

    @trainer.on(HardestFound, when=at(1))
    def say(event: HardestFound) -> None:
        print(f"hardest in the first validation: labels {event.labels.tolist()}, loss up to {event.losses.max():.2f}")

    print(trainer.explain())
    if args.rehearse:
        trainer.rehearse(train, val, epochs=args.epochs)
    trainer.fit(train, val, epochs=args.epochs)
    print(f"validation accuracy: {trainer.evaluate(val)['acc']:.4f}")
    print(f"run directory: {trainer.directory}")
    return trainer


if __name__ == "__main__":
    main(get_args_parser().parse_args())
