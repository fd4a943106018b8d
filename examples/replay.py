"""A loss that becomes NaN at some step, and that step made again to see why.

    python examples/replay.py

The data are sequences of different lengths, one of which is empty, as a filter may leave it. The mean over no elements
is NaN, and so are the loss, the gradients and, from then on, all weights. `StopOnNonFinite` looks at the losses every
50 steps: it says the first step that was bad, and keeps the last checkpoint before it. ``camshaft replay`` makes
exactly that step again, and names the module that is the first to return NaN, from inputs that are finite.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from camshaft.callbacks import Fingerprint, RunCheckpoint, RunDirectory, StopOnNonFinite
from camshaft.engine import Engine, Trainer

LONGEST = 12


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of every setting."""
    parser = argparse.ArgumentParser(description="Find the cause of a loss that is NaN.")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="runs", help="where run directories are made")
    return parser


class MeanOfSequence(nn.Module):
    """The mean over the elements that a mask [B, T] selects; values [B, T, C]."""

    def forward(self, values: Tensor, mask: Tensor) -> Tensor:
        """Return the means, [B, C]; NaN where nothing is selected."""
        return (values * mask.unsqueeze(2)).sum(dim=1) / mask.sum(dim=1, keepdim=True)


class Model(nn.Module):
    """Tells from a sequence [B, T] of numbers, and its mask, whether their mean is above 0."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(1, 16), nn.Tanh())
        self.pool = MeanOfSequence()
        self.head = nn.Linear(16, 2)

    def forward(self, values: Tensor, mask: Tensor) -> Tensor:
        """Return the logits, [B, 2]."""
        output: Tensor = self.head(self.pool(self.embed(values.unsqueeze(2)), mask))
        return output


def sequences(seed: int) -> TensorDataset:
    """Return 1,600 sequences with their masks and classes; number 777 is empty."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, LONGEST + 1, (1600,), generator=generator)
    lengths[777] = 0
    mask = (torch.arange(LONGEST) < lengths.unsqueeze(1)).float()
    values = torch.randn(1600, LONGEST, generator=generator) * mask
    return TensorDataset(values, mask, (values.sum(dim=1) > 0).long())


def prepare(batch: tuple[Tensor, Tensor, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Split a batch into what the model is called with, and the target."""
    values, mask, target = batch
    return {"values": values, "mask": mask}, target


def train(args: argparse.Namespace) -> Engine:
    """Train until a loss is NaN."""
    torch.manual_seed(args.seed)
    model = Model()
    run = RunDirectory(args.output, settings=args)
    trainer = Trainer(
        model,
        torch.optim.Adam(model.parameters(), lr=0.01),
        nn.CrossEntropyLoss(),
        prepare_batch=prepare,
        seed=args.seed,
        callbacks=[
            run,
            RunCheckpoint(run.path / "checkpoints", every_steps=20),
            StopOnNonFinite("stop", every_steps=50),
            Fingerprint(every=1),
        ],
    )
    trainer.fit(DataLoader(sequences(args.seed), 16, shuffle=True), epochs=args.epochs)
    return trainer


def main(args: argparse.Namespace) -> Engine:
    """Train, and make the first bad step again."""
    trainer = train(args)
    found = re.search(r"first at step (\d+)", trainer.history.reason)
    if found is None:
        print("Every loss was finite.")
        return trainer
    camshaft = Path(sys.executable).with_name("camshaft")
    script = [sys.executable, __file__, "--output", args.output, "--seed", str(args.seed)]
    subprocess.run([camshaft, "replay", str(trainer.directory), "--step", found[1], "--", *script], check=True)
    return trainer


if __name__ == "__main__":
    main(get_args_parser().parse_args())
