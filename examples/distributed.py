"""One script for one process and for several, with the same numbers up to rounding.

    python examples/distributed.py    # one process
    torchrun --nproc-per-node 2 examples/distributed.py    # two on this machine, each with half of every batch
    python examples/distributed.py --task text    # a small transformer, either way

The batch size is that of all processes together, so it is not changed with their number. Leaves one run directory,
whatever the number of processes: the curves, the best weights, the log of each process, the settings and the history.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from camshaft.callbacks import BestCheckpoint, Distributed, Placement, ProgressBar, Report, RunDirectory
from camshaft.engine import Engine, Trainer

Split = tuple[TensorDataset, TensorDataset]


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of every setting."""
    parser = argparse.ArgumentParser(description="Train on one process or on several.")
    parser.add_argument("--task", choices=["digits", "text"], default="digits")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=32, help="of all processes together")
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0, help="the same on every process, as it decides the order")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", default="runs", help="where run directories are made")
    parser.add_argument("--rehearse", action="store_true", help="try the whole run first, in seconds")
    return parser


def load_digits() -> Split:
    """Return scikit-learn's 1,797 handwritten digits, 8 x 8, as training and validation sets."""
    from sklearn.datasets import load_digits as load

    digits = load()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    return split(images, torch.tensor(digits.target))


def digits_model() -> nn.Module:
    """Return a CNN for images [N, 1, 8, 8]; it gives logits [N, 10]."""
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def load_text(num: int = 2000, length: int = 32) -> Split:
    """Return pieces of the Python language reference, and what follows each of their letters."""
    from pydoc_data.topics import topics

    letters = " ".join("\n".join(topics[name] for name in sorted(topics)).lower().split())
    numbers = torch.tensor([ord(c) if ord(c) < 128 else 0 for c in letters[: num * length + 1]])
    return split(numbers[:-1].view(num, length), numbers[1:].view(num, length))


class CharacterTransformer(nn.Module):
    """Predicts the next letter: letters [N, L] give logits [N, 128, L]."""

    def __init__(self, width: int = 64, max_length: int = 32) -> None:
        super().__init__()
        self.letters = nn.Embedding(128, width)
        self.places = nn.Parameter(torch.zeros(max_length, width))
        # Without dropout, because each process would leave out other units than a single one does.
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 128)

    def forward(self, letters: Tensor) -> Tensor:
        """Return the logits; a letter sees those before it."""
        length = letters.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=letters.device).triu(1)
        hidden = self.layers(self.letters(letters) + self.places[:length], mask=mask)
        logits: Tensor = self.head(hidden)
        return logits.transpose(1, 2)


def split(inputs: Tensor, target: Tensor, val_share: float = 0.2) -> Split:
    """Return a training and a validation set, the same ones on every process."""
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    cut = int(len(inputs) * (1 - val_share))
    train, val = order[:cut], order[cut:]
    return TensorDataset(inputs[train], target[train]), TensorDataset(inputs[val], target[val])


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Return the share of right answers; logits [N, C, ...], target [N, ...]."""
    return (output.argmax(dim=1) == target).double().mean()


def main(args: argparse.Namespace) -> Engine:
    """Train as the settings say and return the finished trainer."""
    torch.manual_seed(args.seed)
    train_set, val_set = load_digits() if args.task == "digits" else load_text()
    model = digits_model() if args.task == "digits" else CharacterTransformer()
    run = RunDirectory(args.output, settings=args)
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9),
        nn.CrossEntropyLoss(),
        metrics={"acc": accuracy},
        callbacks=[
            Distributed(),  # before the others, which ask it for the other processes
            run,
            Placement(args.device),
            BestCheckpoint("val_acc", mode="max", restore=True),
            Report(),
            ProgressBar(),
        ],
        seed=args.seed,
    )
    train = DataLoader(train_set, args.batch_size, shuffle=True)  # no DistributedSampler: the engine divides
    val = DataLoader(val_set, args.batch_size)
    if args.rehearse:
        trainer.rehearse(train, val, epochs=args.epochs)
    trainer.fit(train, val, epochs=args.epochs)

    result = trainer.evaluate(val)  # on every process, as all of them take part in it
    if trainer.ranks.is_main:
        for row in trainer.history.rows:
            print("  ".join(f"{name} {row[name]:.3f}" for name in ("train_loss", "val_loss", "val_acc")))
        print(f"validation accuracy with the best weights: {result['acc']:.3f}")
        print(f"run directory: {run.path}")
    return trainer


if __name__ == "__main__":
    main(get_args_parser().parse_args())
